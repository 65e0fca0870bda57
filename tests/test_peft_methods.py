"""Each method of PEFT: what works on Qwen2-VL works on this model, and on the layers of the compressor."""

import functools
import re

import peft
import pytest
import torch
from peft import LoraConfig, XLoraConfig, get_peft_model
from peft_methods import LAYERS, PROMPTS, Adapted, available, try_all
from tiny_model import IMAGE_TOKEN, TEXT_CONFIG, VIDEO_TOKEN, prompt, random_videos, tiny_model
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from mambamia_hf.versions import CACHE_NAME


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

# Of the language model, whose names are the same in both models.
LANGUAGE_MODEL = r".*language_model.*\.(q_proj|v_proj|down_proj)"
# All linear layers but the gate of Gated Patch Aggregation, which has one output, and those of the tower, of which
# nothing reads the last.
ALL_BUT_GATE = r".*(language_model|compressor)\..*(?<!gpa\.gate)_proj"
# What Qwen2-VL does not take, either: "adaption prompt" is for LLaMA, Mistral and GPT-2 alone.
NEITHER = {"ADAPTION_PROMPT"}
# In tests of their own: X-LoRA needs adapters that are saved already, the others come in `test_adapters.py`.
ELSEWHERE = {"XLORA", "TRAINABLE_TOKENS"}


def tiny_qwen2_vl() -> Qwen2VLForConditionalGeneration:
    torch.manual_seed(0)
    text = {name: value for name, value in TEXT_CONFIG.items() if name != "model_type"}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    vision = {"depth": 2, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4, "hidden_size": 32}
    config = Qwen2VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config={**vision, "initializer_range": 0.2},
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=1,
        vision_end_token_id=2,
    )
    return Qwen2VLForConditionalGeneration(config).eval()


def qwen2_vl_inputs() -> dict:
    """A video of 2 · 4 · 4 patches, which are 8 tokens."""
    ids = torch.tensor([[5, 6, *8 * [VIDEO_TOKEN], 7, 8]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": torch.randn(32, 96, generator=torch.Generator().manual_seed(0)),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
        "mm_token_type_ids": 2 * (ids == VIDEO_TOKEN).int(),
    }


# Widths that the blocks of the methods divide.
tiny_mambamia = functools.partial(tiny_model, compressor_config={"hidden_size": 32})


def inputs_of(frames_in_prompt: int, **selection: int) -> dict:
    """A video of 4 frames, of which 2 are kept: by the placeholders of the prompt, or by `selection`."""
    ids = prompt([5, 6], frames_in_prompt, [7, 8])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": random_videos(1, 4),
        **selection,
    }


def test_every_method_of_peft_is_here():
    configs = {method.config for method in {**available(LAYERS), **available(PROMPTS)}.values()}
    types = {str(getattr(peft, config)(**_required(config)).peft_type.value) for config in configs - _NEED_A_LIBRARY}
    known = types | NEITHER | ELSEWHERE | ({"ADAMSS"} if hasattr(peft, "AdamssConfig") else set())
    assert {kind.value for kind in peft.PeftType} == known


_NEED_A_LIBRARY = {"AdamssConfig"}


def _required(config: str) -> dict:
    return {"AdaLoraConfig": {"total_step": 1}, "CPTConfig": {"task_type": "CAUSAL_LM"}}.get(config, {})


# What fails with Qwen2-VL, too.
FAILS = {
    "BEFT": {"merge"},  # of a layer without a bias
    "Lily": {"merge"},
    "LoRA, activated": {"merge"},  # depends on the tokens
    "LoRA, bias": {"merge"},  # as BEFT
    "LoRA, CorDA": {"reload"},  # changes the weights below
    "LoRA, GA": {"reload"},  # the same
    "Poly": {"merge"},
    "Shadow": {"make", *Adapted.STEPS},  # wants the configuration of a language model
}


@pytest.mark.parametrize("name", available(LAYERS))
def test_methods_that_change_layers(name, tmp_path):
    method = LAYERS[name]
    theirs = try_all(tiny_qwen2_vl, method, qwen2_vl_inputs(), tmp_path / "theirs", target_modules=LANGUAGE_MODEL)
    if isinstance(theirs["make"], ImportError) or "please install" in str(theirs["make"]):
        pytest.skip(str(theirs["make"]))
    ours = try_all(tiny_mambamia, method, inputs_of(2), tmp_path / "ours", target_modules=LANGUAGE_MODEL)
    for step, error in ours.items():
        if error is not None and theirs[step] is None:
            raise AssertionError(f"{name}: {step} fails, and goes well with Qwen2-VL") from error
    assert {step for step, error in theirs.items() if error is not None} == FAILS.get(name, set()), theirs


# These see a batch of prompts in every layer, change whole blocks or certain layers of a language model, or want a
# package more; RandLoRA's basis gives so narrow a layer as the weights of GPA here no gradient.
NOT_IN_COMPRESSOR = {
    *("Poly", "Shadow", "LoRA, activated", "LoRA, BD", "LoRA, CorDA", "LoRA, EVA", "LoRA, GA"),
    *("AdaMSS", "RandLoRA"),
}


@pytest.mark.parametrize("name", [name for name in available(LAYERS) if name not in NOT_IN_COMPRESSOR])
def test_methods_in_the_compressor(name):
    method = LAYERS[name]
    if method.cuts_outputs:
        with pytest.raises(ValueError):  # PEFT's sentence about a layer of one output
            Adapted(tiny_mambamia, method, inputs_of(2), target_modules="all-linear")
    adapted = Adapted(tiny_mambamia, method, inputs_of(2), target_modules=ALL_BUT_GATE)
    adapted.train()
    logits = adapted.logits()  # segment by segment
    loss = adapted.model(**adapted.arguments, labels=adapted.arguments["input_ids"])
    torch.testing.assert_close(loss.logits, logits, atol=1e-4, rtol=1e-4)  # whole, as for a gradient
    loss.loss.backward()
    is_adapted = re.compile(rf"(base_model\.model\.)+{ALL_BUT_GATE}").fullmatch
    modules = dict(adapted.model.named_modules())
    layers = [module for name, module in modules.items() if is_adapted(name) and "compressor" in name]
    assert len(layers) == 10
    for layer in layers:
        gradients = [weight.grad for weight in layer.parameters() if weight.grad is not None]
        assert any(gradient.any() for gradient in gradients), layer


@pytest.mark.parametrize(("mixer_type", "layers"), [("mamba2", 2), ("mamba1", 1)])
def test_each_linear_layer_of_the_compressor_alone(mixer_type, layers):
    config = {"hidden_size": 32, "mixer_type": mixer_type, "num_hidden_layers": layers}
    make = functools.partial(tiny_model, compressor_config=config)
    inputs = inputs_of(2)
    with torch.no_grad():
        plain = make()(**inputs).logits
    names = [name for name, module in make().model.compressor.named_modules() if isinstance(module, nn.Linear)]
    assert len(names) >= 12 and len(names) == len(set(names))
    for name in names:
        model = get_peft_model(make(), LoraConfig(target_modules=[f"compressor.{name}"], init_lora_weights=False))
        with torch.no_grad():
            logits = model.eval()(**inputs).logits
        assert not torch.allclose(logits, plain, atol=1e-5), name
        torch.testing.assert_close(model(**inputs).logits, logits, atol=1e-4, rtol=1e-4)
        model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert all(weight.grad.any() for weight in model.parameters() if weight.requires_grad), name


@pytest.mark.parametrize("name", available(PROMPTS))
def test_methods_that_learn_a_prompt(name, tmp_path):
    method = PROMPTS[name]
    kept = Adapted(tiny_mambamia, method, inputs_of(2))
    kept.train()
    kept.generate()
    kept.reload(tmp_path)
    # As many virtual tokens stand before a prompt of all frames, of which the model drops some.
    every = Adapted(tiny_mambamia, method, inputs_of(4, keep_frames=2))
    every.train()
    every.reload(tmp_path)
    assert torch.isfinite(every.logits()).all()
    every.model = kept.model
    torch.testing.assert_close(every.logits()[:, -2:], kept.logits()[:, -2:])
    every.generate()


def test_a_cache_lacks_the_virtual_tokens():
    model = get_peft_model(tiny_mambamia(), PROMPTS["prompt tuning"].make_config())
    inputs = inputs_of(2)
    first = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="pass the whole dialogue"):
        model.generate(input_ids=first.sequences, cache=first[CACHE_NAME], max_new_tokens=2)


def test_x_lora(tmp_path):
    adapters = {}
    for name in ("0", "1"):
        lora = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=LANGUAGE_MODEL, init_lora_weights=False)
        adapters[name] = str(tmp_path / name)
        get_peft_model(tiny_mambamia(), lora).save_pretrained(adapters[name])
    model = tiny_mambamia()
    model.config.use_cache = False
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, xlora_depth=1, adapters=adapters)
    adapted, inputs = get_peft_model(model, config), inputs_of(2)
    adapted.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert any(weight.grad is not None for weight in adapted.parameters())
    assert adapted.eval().generate(**inputs, max_new_tokens=2).shape == (1, inputs["input_ids"].shape[1] + 2)
