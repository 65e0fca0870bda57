"""Language models quantised by torchao, bitsandbytes and quanto, unmodified: what stays, is right and is refused."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from needle.questions import accepted_answers, task_question
from needle.video import write_needle_video
from pages import blocks
from tiny_model import video_prompt
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig


torchao = pytest.importorskip("torchao.quantization")
bitsandbytes = pytest.importorskip("bitsandbytes")
pytest.importorskip("optimum.quanto")
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training  # noqa: E402

from mambamia_hf import (  # noqa: E402
    BUNDLED_CHECKPOINT,
    MambaMiaCompressor,
    MambaMiaEncoder,
    MambaMiaForConditionalGeneration,
    MambaMiaProcessor,
    VideoMemory,
)
from mambamia_hf.modeling_encoder import MambaMiaPreTrainedModel  # noqa: E402


PAGE = Path(__file__).parents[2] / "docs/quantization.md"
INT4 = torchao.IntxWeightOnlyConfig(torch.int4, granularity=torchao.PerGroup(32))
METHODS = {
    "torchao int8": TorchAoConfig(torchao.Int8WeightOnlyConfig(version=2)),
    "torchao int8 dynamic": TorchAoConfig(torchao.Int8DynamicActivationInt8WeightConfig(version=2)),
    "torchao int4": TorchAoConfig(INT4),
    "bitsandbytes int8": BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "quanto int8": QuantoConfig("int8"),
    "quanto int4": QuantoConfig("int4"),
}
SAVED = [method for method in METHODS if not method.startswith("quanto")]
LAYERS = 28  # linear layers of the bundled language model: 4 layers of 7


def load(quantization=None, **kwargs) -> MambaMiaForConditionalGeneration:
    return MambaMiaForConditionalGeneration.from_pretrained(
        BUNDLED_CHECKPOINT, quantization_config=quantization, **kwargs
    ).eval()


@pytest.fixture(scope="module")
def exact() -> MambaMiaForConditionalGeneration:
    return load()


@pytest.fixture(scope="module")
def processor() -> MambaMiaProcessor:
    return MambaMiaProcessor.from_pretrained(BUNDLED_CHECKPOINT)


@pytest.fixture(scope="module")
def videos(tmp_path_factory, exact, processor) -> list[tuple]:
    """A question about each of a few videos, its video file and its memory by the exact model, from the disk."""
    folder = tmp_path_factory.mktemp("videos")
    found = []
    for seed, task in enumerate(("retrieval", "ordering", "counting", "nothing")):
        video = write_needle_video(folder / f"{task}.mp4", seed, task=task, split="test")
        exact.encode_video(video.path, processor).save(folder / f"{task}.safetensors")
        found.append((task_question(video, seed), video.path, VideoMemory.load(folder / f"{task}.safetensors")))
    return found


def answer(model, processor, video, text: str, **kwargs) -> str:
    inputs = video_prompt(processor, video, text)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=12, **kwargs)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]


@torch.no_grad()
def logits_of(model, processor, videos) -> torch.Tensor:
    question, _, memory = videos[0]
    return model(**video_prompt(processor, memory, question.prompt)).logits


def quantised(model: nn.Module) -> list[str]:
    """The linear layers that are not plain ones any more."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not (type(module) is nn.Linear and type(module.weight) is nn.Parameter)
    ]


@pytest.mark.parametrize("method", METHODS)
def test_methods(method, exact, processor, videos):
    """Only layers of the language model change; memories of the exact model are taken, and answers are right."""
    given = copy.deepcopy(METHODS[method])
    model = load(given)
    assert given.to_dict() == METHODS[method].to_dict()
    changed = quantised(model)
    assert len(changed) == LAYERS and all(name.startswith("model.language_model.layers.") for name in changed)
    for part in ("vision_tower", "compressor"):
        theirs = getattr(model.model, part).state_dict()
        for name, weight in getattr(exact.model, part).state_dict().items():
            assert type(theirs[name]) is torch.Tensor and torch.equal(theirs[name], weight), name
    question, path, memory = videos[0]
    own = model.encode_video(path, processor)
    assert torch.equal(own.anchors, memory.anchors) and torch.equal(own.frame_deltas, memory.frame_deltas)
    for question, _, memory in videos:
        for ratio in (1.0, 0.5):
            assert answer(model, processor, memory, question.prompt, keep_ratio=ratio) in accepted_answers(question, 1)
    error = logits_of(model, processor, videos) - logits_of(exact, processor, videos)
    assert 0 < error.norm() < (0.01 if "int8" in method else 0.1) * logits_of(exact, processor, videos).norm()


# Loads a checkpoint with the code that it carries, and writes what it gives for the tokens of a text.
STRANGER = """
import sys
sys.modules["mambamia_hf"] = None
import torch
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    torch.save(model(torch.arange(20, 40)[None]).logits, sys.argv[2])
"""


@pytest.mark.parametrize("method", SAVED)
def test_saved_and_loaded(method, processor, videos, tmp_path):
    model = load(METHODS[method])
    model.save_pretrained(tmp_path / "checkpoint")
    again = MambaMiaForConditionalGeneration.from_pretrained(tmp_path / "checkpoint").eval()
    assert quantised(again) == quantised(model)
    assert torch.equal(logits_of(again, processor, videos), logits_of(model, processor, videos))
    encoder = MambaMiaEncoder.from_pretrained(tmp_path / "checkpoint")
    assert not quantised(encoder) and torch.equal(
        encoder.encode_video(videos[0][1], processor).anchors, videos[0][2].anchors
    )
    if method in ("torchao int4", "bitsandbytes nf4"):
        environment = {**os.environ, "HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", STRANGER, str(tmp_path / "checkpoint"), str(tmp_path / "logits.pt")]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        with torch.no_grad():
            assert torch.equal(torch.load(tmp_path / "logits.pt"), again(torch.arange(20, 40)[None]).logits)


def test_quanto_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="not serializable"):
        load(METHODS["quanto int8"]).save_pretrained(tmp_path)


LISTS = {
    "none": ([], LAYERS),
    "the compressor by its bare name": (["compressor"], LAYERS),
    "the head": (["lm_head"], LAYERS),
    "a layer by its name in the inner model": (["language_model.layers.0"], LAYERS - 7),
    "a layer by its whole name": (["model.language_model.layers.0"], LAYERS - 7),
    "a pattern": (["language_model.layers.*.mlp"], LAYERS - 12),
}


@pytest.mark.parametrize("case", LISTS)
def test_lists_of_modules_are_added_to(case, processor, videos):
    names, expected = LISTS[case]
    for quantization in (
        TorchAoConfig(torchao.Int8WeightOnlyConfig(version=2), modules_to_not_convert=names),
        BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=names),
        {"quant_method": "quanto", "weights": "int8", "modules_to_not_convert": names},
    ):
        model = load(quantization)
        assert len(quantised(model)) == expected
        assert all(name.startswith("model.language_model.") for name in quantised(model))
        question, _, memory = videos[0]
        assert answer(model, processor, memory, question.prompt) in accepted_answers(question, 1)


def test_a_quantised_compressor_is_refused(exact, tmp_path):
    exact.model.compressor.save_pretrained(tmp_path / "compressor")
    for method in ("bitsandbytes int8", "bitsandbytes nf4", "quanto int8"):
        with pytest.raises(ValueError, match="MambaMiaCompressor is quantised .* quantise the language model"):
            MambaMiaCompressor.from_pretrained(tmp_path / "compressor", quantization_config=METHODS[method])
    # As other code than ours could have saved it.
    quantization = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head"])
    load_any = super(MambaMiaPreTrainedModel, MambaMiaForConditionalGeneration).from_pretrained
    wrong = load_any(BUNDLED_CHECKPOINT, quantization_config=quantization)
    assert any("compressor" in name for name in quantised(wrong))
    wrong.save_pretrained(tmp_path / "wrong")
    with pytest.raises(ValueError, match="is quantised .* vision tower and compressor have to stay as they are"):
        MambaMiaForConditionalGeneration.from_pretrained(tmp_path / "wrong")


def test_a_quantised_language_model_is_no_part_of_a_new_model(exact, processor, tmp_path):
    exact.model.vision_tower.save_pretrained(tmp_path / "vision")
    text = AutoModelForCausalLM.from_config(exact.config.text_config)
    text.save_pretrained(tmp_path / "text")
    quantization = METHODS["bitsandbytes nf4"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "text", quantization_config=quantization).save_pretrained(
        tmp_path / "quantised"
    )
    processor.tokenizer.save_pretrained(tmp_path / "quantised")
    with pytest.raises(ValueError, match="quantised is quantised, and a new model is made of parts that are not"):
        MambaMiaForConditionalGeneration.from_vision_text_pretrained(tmp_path / "vision", tmp_path / "quantised")


def packs() -> bool:
    """Whether bitsandbytes packs 4-bit weights on this CPU."""
    return bitsandbytes.nn.Linear4bit(64, 64).support_avx512bf16_for_cpu


@pytest.mark.skipif(not packs(), reason="bitsandbytes packs 4-bit weights on CPUs with AVX512-BF16 alone")
def test_packed_weights_are_neither_saved_nor_trained(processor, videos, tmp_path):
    model = load(METHODS["bitsandbytes nf4"])
    question, _, memory = videos[0]
    inputs = video_prompt(processor, memory, question.prompt)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    adapted.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    expected = answer(adapted.eval(), processor, memory, question.prompt)
    for save in (model, adapted):
        with pytest.raises(RuntimeError, match="has packed .*q_proj.* and cannot have it saved; save the model"):
            save.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="has packed .*q_proj.* and cannot have it trained; load the model again"):
        adapted.train()(**inputs, labels=inputs["input_ids"])
    assert answer(adapted.eval(), processor, memory, question.prompt) == expected


@pytest.mark.parametrize("method", ["bitsandbytes nf4", "bitsandbytes int8", "torchao int8"])
def test_adapters_learn_on_quantised_models(method, processor, videos, tmp_path):
    def base() -> nn.Module:
        model = load(METHODS[method])
        return prepare_model_for_kbit_training(model) if method.startswith("bitsandbytes") else model

    adapter = LoraConfig(
        r=4, target_modules=r".*language_model.*\.(q|v)_proj", modules_to_save=["compressor"], lora_dropout=0.0
    )
    model = get_peft_model(base(), adapter).train()
    optimiser = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)
    question, path, _ = videos[0]
    inputs = video_prompt(processor, str(path), question.prompt)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    losses = []
    for _ in range(3):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        learned = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert any("compressor" in name for name in learned) and any(
        "layers.0.self_attn.q_proj.lora" in n for n in learned
    )
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    loaded = dict(again.named_parameters())
    for name, weight in model.named_parameters():
        assert name not in learned or torch.equal(loaded[name], weight), name
    with torch.no_grad():  # rounding to 8 bits makes much of the last bits of a sum
        torch.testing.assert_close(again(**inputs).logits, model.eval()(**inputs).logits, rtol=1e-3, atol=2e-2)


def test_recipes(tmp_path, monkeypatch, capsys):
    """Every block of the page runs as it stands, in a folder with `video.mp4`, and prints what it says."""
    shutil.copy(Path(BUNDLED_CHECKPOINT).parent / "demo" / "needle.mp4", tmp_path / "video.mp4")
    monkeypatch.chdir(tmp_path)
    recipes = list(blocks(PAGE, "python"))
    assert len(recipes) == 4
    namespace: dict = {"__name__": "__main__"}
    for recipe in recipes:
        exec(compile(recipe.code, str(PAGE), "exec"), namespace)
        if recipe.text is not None:
            assert capsys.readouterr().out.strip().splitlines()[-1] == recipe.text.strip()
