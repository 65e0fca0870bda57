"""PEFT's methods, each with settings that fit small models, and what can be done with a model that has one."""

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn


TASKS = {"task_ids": torch.tensor([1])}


@dataclass
class Method:
    """
    Args:
        config: name of the configuration's class.
        settings: of the configuration, beside the layers; blocks divide the widths of the layers.
        arguments: further ones of each call of the model.
        needs: names that PEFT has since the version that brought the method.
        before: prepares the model for the configuration, given inputs.
        after: prepares the adapter, given inputs.
        cuts_outputs: whether each layer's outputs are cut into blocks or reduced, which a layer of one output cannot
            be.
    """

    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    needs: str = ""
    before: Callable[[nn.Module, PeftConfig, dict], None] | None = None
    after: Callable[[PeftModel, dict], None] | None = None
    cuts_outputs: bool = False

    def make_config(self, **layers: Any) -> PeftConfig:
        settings = {name: value() if callable(value) else value for name, value in self.settings.items()}
        return getattr(peft, self.config)(task_type="CAUSAL_LM", **settings, **layers)


def _corda(model: nn.Module, config: PeftConfig, inputs: dict) -> None:
    from peft.tuners.lora.corda import preprocess_corda

    preprocess_corda(model, config, run_model=lambda: model(**inputs))


def _lora_ga(model: nn.Module, config: PeftConfig, inputs: dict) -> None:
    from peft.tuners.lora.loraga import preprocess_loraga

    preprocess_loraga(model, config, lambda: model(**inputs, labels=inputs["input_ids"]).loss.backward())


def _eva(model: PeftModel, inputs: dict) -> None:
    peft.initialize_lora_eva_weights(model, [inputs], show_progress_bar=False)


def _lora(**settings: Any) -> dict[str, Any]:
    return {"r": 4, **settings}


def _made(name: str, *layers: list[str], **settings: Any) -> Callable[[], Any]:
    """A configuration in a configuration, of a class that old versions lack."""
    return lambda: attrgetter(name)(peft)(*layers, **settings)


# Those that change layers, by the names of PEFT's documentation; LoftQ is missing, which wants a GPU.
LAYERS = {
    "AdaLoRA": Method("AdaLoraConfig", {"init_r": 6, "target_r": 4, "total_step": 10}),
    "AdaMSS": Method("AdamssConfig", {"r": 8, "num_subspaces": 2}),
    "BEFT": Method("BeftConfig"),
    "BOFT": Method("BOFTConfig", {"boft_block_size": 4}),
    "Bone": Method("BoneConfig", {"r": 4}),
    "C3A": Method("C3AConfig", {"block_size": 4}, cuts_outputs=True),
    "DeFT": Method("DeftConfig", {"r": 4}),
    "DeLoRA": Method("DeloraConfig", {"r": 4}),
    "FourierFT": Method("FourierFTConfig", {"n_frequency": 32}),
    "FRoD": Method("FrodConfig", {"progressbar": False}),
    "GLoRA": Method("GloraConfig", {"r": 4}),
    "GraLoRA": Method("GraloraConfig", {"r": 4, "gralora_k": 2}, cuts_outputs=True),
    "HiRA": Method("HiraConfig", {"r": 4}),
    "HRA": Method("HRAConfig", {"r": 4}),
    "IA3": Method("IA3Config", {"feedforward_modules": []}),
    "Lily": Method("LilyConfig", {"r": 4}),
    "LN tuning": Method("LNTuningConfig"),
    "LoHa": Method("LoHaConfig", {"r": 4}),
    "LoKr": Method("LoKrConfig", {"r": 4}),
    "LoRA": Method("LoraConfig", _lora()),
    "LoRA, activated": Method("LoraConfig", _lora(alora_invocation_tokens=[7])),
    "LoRA, BD": Method(
        "LoraConfig",
        _lora(use_bdlora=_made("BdLoraConfig", ["o_proj", "down_proj"], ["q_proj", "v_proj"], nblocks=2)),
        needs="BdLoraConfig",
    ),
    "LoRA, bias": Method("LoraConfig", _lora(lora_bias=True)),
    "LoRA, CorDA": Method(
        "LoraConfig",
        _lora(init_lora_weights="corda", corda_config=_made("tuners.lora.config.CordaConfig")),
        before=_corda,
    ),
    "LoRA, DoRA": Method("LoraConfig", _lora(use_dora=True)),
    "LoRA, EVA": Method("LoraConfig", _lora(init_lora_weights="eva", eva_config=_made("EvaConfig")), after=_eva),
    "LoRA, GA": Method(
        "LoraConfig",
        _lora(init_lora_weights="lora_ga", lora_ga_config=_made("LoraGAConfig")),
        needs="LoraGAConfig",
        before=_lora_ga,
    ),
    "LoRA, gaussian": Method("LoraConfig", _lora(init_lora_weights="gaussian")),
    "LoRA, KaSA": Method(
        "LoraConfig", {"r": 2, "kasa_config": _made("KasaConfig")}, needs="KasaConfig", cuts_outputs=True
    ),
    "LoRA, MonteCLoRA": Method(
        "LoraConfig", _lora(monteclora_config=_made("MontecloraConfig")), needs="MontecloraConfig"
    ),
    "LoRA, OLoRA": Method("LoraConfig", _lora(init_lora_weights="olora")),
    "LoRA, orthogonal": Method("LoraConfig", _lora(init_lora_weights="orthogonal")),
    "LoRA, PiSSA": Method("LoraConfig", _lora(init_lora_weights="pissa")),
    "LoRA, rank stabilised": Method("LoraConfig", _lora(use_rslora=True)),
    "LoRA, VeLoRA": Method(
        "LoraConfig", _lora(velora_config=_made("VeloraConfig", num_groups=4)), needs="VeloraConfig"
    ),
    "MiSS": Method("MissConfig", {"r": 4}),
    "OFT": Method("OFTConfig", {"r": 0, "oft_block_size": 4}),
    "OSF": Method("OSFConfig", cuts_outputs=True),
    "PEANuT": Method("PeanutConfig", {"r": 4}),
    "Poly": Method("PolyConfig", {"r": 4, "n_tasks": 2, "n_skills": 2}, TASKS),
    "PSOFT": Method("PsoftConfig", {"r": 4}, cuts_outputs=True),
    "PVeRA": Method("PveraConfig", {"r": 4}),
    "RandLoRA": Method("RandLoraConfig", {"r": 8}),
    "RoAd": Method("RoadConfig", {"group_size": 4}, cuts_outputs=True),
    "SHiRA": Method("ShiraConfig", {"r": 2}, cuts_outputs=True),
    "Shadow": Method("ShadowConfig", {"r": 4}),
    "Super": Method("SupertuningConfig", cuts_outputs=True),
    "TinyLoRA": Method("TinyLoraConfig"),
    "Uni-LoRA": Method("UniLoraConfig", {"r": 4, "theta_d_length": 64}),
    "VB-LoRA": Method("VBLoRAConfig", {"r": 4, "num_vectors": 8, "vector_length": 4}, cuts_outputs=True),
    "VeRA": Method("VeraConfig", {"r": 8}),
    "WaveFT": Method("WaveFTConfig", {"n_frequency": 32}),
}
# Those that learn a prompt.
PROMPTS = {
    "Cartridges": Method("CartridgeConfig", {"num_virtual_tokens": 5}),
    "CPT": Method("CPTConfig", {"cpt_token_ids": [9, 10, 11, 12], "cpt_tokens_type_mask": [1, 2, 3, 4]}),
    "multitask prompt tuning": Method("MultitaskPromptTuningConfig", {"num_virtual_tokens": 5, "num_tasks": 2}, TASKS),
    "P-tuning": Method("PromptEncoderConfig", {"num_virtual_tokens": 5, "encoder_hidden_size": 16}),
    "prefix tuning": Method("PrefixTuningConfig", {"num_virtual_tokens": 5}),
    "prompt tuning": Method("PromptTuningConfig", {"num_virtual_tokens": 5}),
}


def available(methods: dict[str, Method]) -> dict[str, Method]:
    """Those that the installed PEFT has."""
    return {
        name: method
        for name, method in methods.items()
        if hasattr(peft, method.config) and hasattr(peft, method.needs or method.config)
    }


class Adapted:
    """A model with an adapter, and what one does with it, one method each. All raise where something is wrong.

    Args:
        make: makes the model, the same each time.
        method: of `LAYERS` or `PROMPTS`.
        inputs: arguments of a call of the model, without labels.
        layers: the layers to change, as arguments of the configuration.
    """

    STEPS = ("train", "generate", "reload", "merge")

    def __init__(self, make: Callable[[], nn.Module], method: Method, inputs: dict[str, Any], **layers: Any):
        self.make, self.method, self.inputs = make, method, inputs
        self.arguments = {**inputs, **method.arguments}
        model, config = make(), method.make_config(**layers)
        torch.manual_seed(0)
        if method.before is not None:
            method.before(model, config, inputs)
        self.model = get_peft_model(model, config).eval()
        if method.after is not None:
            method.after(self.model, inputs)

    def learned(self) -> dict[str, nn.Parameter]:
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def train(self) -> None:
        """A step of training, then a larger change of what it learned, which the output shows."""
        optimizer = torch.optim.AdamW(self.learned().values(), lr=1e-2)
        self.model.train()
        loss = self.model(**self.arguments, labels=self.arguments["input_ids"]).loss
        loss.backward()
        assert torch.isfinite(loss)
        assert any(weight.grad is not None for weight in self.learned().values())
        optimizer.step()
        optimizer.zero_grad()
        self.model.eval()
        before = self.logits()
        torch.manual_seed(1)
        with torch.no_grad():
            for weight in self.learned().values():
                weight.add_(0.1 * torch.randn_like(weight))
        assert not torch.allclose(self.logits(), before, atol=1e-4)

    def logits(self, **arguments: Any) -> torch.Tensor:
        with torch.no_grad():
            return self.model(**{**self.arguments, **arguments}).logits

    def generate(self) -> None:
        """Generates what the scores of the whole sequence say, token by token."""
        placeholders = [self.model.config.image_token_id, self.model.config.video_token_id]
        rows = {"input_ids": self.inputs["input_ids"], "attention_mask": self.inputs["attention_mask"]}
        for _ in range(3):
            scores = self.logits(**self._longer(rows))[:, -1:]
            scores[..., placeholders] = -torch.inf
            rows["input_ids"] = torch.cat([rows["input_ids"], scores.argmax(dim=-1)], dim=1)
            rows["attention_mask"] = torch.ones_like(rows["input_ids"])
        settings = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": placeholders}
        assert torch.equal(self.model.generate(**self.arguments, **settings), rows["input_ids"])

    def _longer(self, rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        types = self.inputs.get("mm_token_type_ids")
        if types is None:
            return rows
        more = rows["input_ids"].shape[1] - types.shape[1]
        return {**rows, "mm_token_type_ids": nn.functional.pad(types, (0, more))}

    def reload(self, folder: Path) -> None:
        """Saves the adapter, and loads it onto a new model."""
        expected = self.logits()
        self.model.save_pretrained(folder)
        self.model = PeftModel.from_pretrained(self.make(), folder).eval()
        torch.testing.assert_close(self.logits(), expected)

    def merge(self) -> None:
        expected = self.logits()
        with torch.no_grad():
            merged = self.model.merge_and_unload()(**self.inputs).logits
        torch.testing.assert_close(merged, expected, atol=1e-3, rtol=1e-3)


def try_all(
    make: Callable[[], nn.Module], method: Method, inputs: dict[str, Any], folder: Path, **layers: Any
) -> dict[str, Exception | None]:
    """What each step raised, None where it went well; without the first, to make the adapter, there is no other."""
    try:
        adapted = Adapted(make, method, inputs, **layers)
    except Exception as error:  # what a method raises for a model that it cannot take is no part of its promises
        return dict.fromkeys(("make", *Adapted.STEPS), error)
    outcome: dict[str, Exception | None] = {"make": None}
    for step in Adapted.STEPS:
        try:
            getattr(adapted, step)(*([folder] if step == "reload" else []))
        except Exception as error:
            outcome[step] = error
        else:
            outcome[step] = None
    return outcome
