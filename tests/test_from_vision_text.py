"""A model to train, and its processor, from a pretrained vision tower and a pretrained language model."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_tokenizer
from tokenizers import processors
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from video_files import write_video

from mambamia_hf import MambaMiaForConditionalGeneration, MambaMiaProcessor
from mambamia_hf.frame_times import format_time
from mambamia_hf.tokenization_mambamia import SPECIAL_TOKENS
from mambamia_hf.training import ConversationCollator


VISION = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
SIDE = {**VISION, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
COMPRESSOR = {"hidden_size": 40, "num_hidden_layers": 1, "head_dim": 16, "state_size": 8}
TOWERS, LANGUAGE_MODELS = ("clip", "clip_vision", "siglip", "siglip_vision"), ("qwen", "llama")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    towers = {
        "clip": CLIPModel(CLIPConfig(text_config=SIDE, vision_config=VISION)),
        "clip_vision": CLIPVisionModel(CLIPVisionConfig(**VISION)),
        "siglip": SiglipModel(SiglipConfig(text_config=SIDE, vision_config=VISION)),
        "siglip_vision": SiglipVisionModel(SiglipVisionConfig(**VISION)),
    }
    for name, tower in towers.items():
        tower.save_pretrained(folder / name)
        if name.startswith("clip"):  # crops, and has a mean of its own
            CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder / name)
        else:
            SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / name)

    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "qwen")
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, **TEXT)).save_pretrained(
        folder / "qwen"
    )
    # As Llama's: a token that begins every text, none for padding, and none of a chat.
    backend = tiny_tokenizer(["<s>", "</s>"]).backend_tokenizer
    backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "llama")
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **TEXT)).save_pretrained(
        folder / "llama"
    )
    write_video(folder / "video.mp4", num_frames=20)
    return folder


def build(
    folder: Path, vision: str, text: str, frame_time_format: str | None = None
) -> tuple[MambaMiaForConditionalGeneration, MambaMiaProcessor]:
    model = MambaMiaForConditionalGeneration.from_vision_text_pretrained(
        folder / vision, folder / text, frame_time_format=frame_time_format, **COMPRESSOR
    )
    return model, MambaMiaProcessor.from_vision_text_pretrained(folder / vision, folder / text, model.config)


def conversation(folder: Path) -> dict:
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A number."}]
    return {"id": "7", "video": str(folder / "video.mp4"), "conversations": turns}


@pytest.mark.parametrize("text", LANGUAGE_MODELS)
@pytest.mark.parametrize("vision", TOWERS)
def test_it_trains_saves_and_answers(folder, tmp_path, vision, text):
    model, processor = build(folder, vision, text)
    assert not [name for name, weight in model.named_parameters() if weight.device.type == "meta"]
    batch = ConversationCollator(processor)([conversation(folder)])
    assert (batch["input_ids"] == model.config.video_token_id).sum() == 4 * model.config.tokens_per_frame()
    loss = model.train()(**batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    parts = (model.model.compressor, model.model.language_model)
    assert all(parameter.grad is not None for part in parts for parameter in part.parameters())

    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    again = ConversationCollator(AutoProcessor.from_pretrained(tmp_path))([conversation(folder)])
    assert all(torch.equal(again[name], batch[name]) for name in batch)
    torch.testing.assert_close(loaded(**again).logits, model(**batch).logits)
    assert loaded.generation_config.eos_token_id == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("vision", TOWERS)
def test_the_weights_are_those_of_the_two(folder, vision):
    model, _ = build(folder, vision, "qwen")
    tower = AutoModel.from_pretrained(folder / vision)
    tower = getattr(tower, "vision_model", tower).state_dict()
    weights = model.model.vision_tower.state_dict()
    assert weights and all(torch.equal(weights[name], tower[name]) for name in weights)
    assert {name.split(".")[0] for name in tower.keys() - weights.keys()} <= {"head"}
    language_model = AutoModelForCausalLM.from_pretrained(folder / "qwen")
    ids = torch.tensor([[7, 8, 9, 10]])  # no placeholders
    assert torch.equal(model.eval()(ids).logits, language_model.eval()(ids).logits)


@pytest.mark.parametrize(("text", "time_format"), [("qwen", "mm:ss"), ("llama", "h:mm:ss"), ("qwen", "mm:ss.d")])
def test_a_model_of_frames_with_times(folder, tmp_path, text, time_format):
    model, processor = build(folder, "siglip", text, time_format)
    model.train().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, processor = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert processor.frame_time_format == model.config.frame_time_format == time_format
    assert processor.placeholders_per_frame == model.config.placeholders_per_frame() == len(time_format) + 4

    batch = ConversationCollator(processor)([conversation(folder)])
    assert (batch["input_ids"] == model.config.video_token_id).sum() == 4 * (len(time_format) + 4)
    assert batch["video_timestamps"] == [pytest.approx([0.2, 0.7, 1.2, 1.7])]
    ids = []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, output: ids.append(args[0]))
    model(**batch).loss.backward()
    hook.remove()
    (ids,) = ids  # one call, however many videos there are: processes that train together gather equally often
    expected = [format_time(seconds, time_format) for seconds in batch["video_timestamps"][0]]
    assert processor.decode(ids[0, batch["input_ids"].shape[1] :]) == "".join(expected)
    gradients = model.get_input_embeddings().weight.grad
    assert gradients[list(model.config.time_token_ids.values())[:2]].abs().sum(dim=1).min() > 0


def test_tokens_that_are_missing_are_added(folder):
    before = AutoModelForCausalLM.from_pretrained(folder / "llama")
    model, processor = build(folder, "clip", "llama")
    tokenizer = processor.tokenizer
    known = before.config.vocab_size
    ids = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS]
    assert len(set(ids)) == 6 and sum(token >= known for token in ids) == len(tokenizer) - known > 0
    assert tokenizer("<|video_pad|>", add_special_tokens=False)["input_ids"] == [model.config.video_token_id]
    assert tokenizer.pad_token == "</s>" and tokenizer.eos_token == "<|im_end|>"
    embeddings = model.get_input_embeddings().weight
    assert len(embeddings) >= len(tokenizer) and len(embeddings) == model.config.text_config.vocab_size
    assert torch.equal(embeddings[:known], before.get_input_embeddings().weight)

    model, processor = build(folder, "clip", "qwen")
    assert len(processor.tokenizer) == model.config.text_config.vocab_size == len(tiny_tokenizer())
    assert model.config.image_token_id == tiny_tokenizer().convert_tokens_to_ids("<|image_pad|>")


def test_sizes_follow_the_two_and_arguments(folder):
    model, processor = build(folder, "siglip", "qwen")
    config = model.config.compressor_config
    assert (config.input_size, config.output_size, config.patches_per_anchor) == (24, 32, 4)
    assert processor.tokens_per_frame == model.config.tokens_per_frame() == 4
    model = MambaMiaForConditionalGeneration.from_vision_text_pretrained(
        folder / "siglip", folder / "qwen", dtype=torch.bfloat16, patches_per_anchor=16, **COMPRESSOR
    )
    assert model.config.tokens_per_frame() == 1
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="The compressor has no setting frame_dropout; set those of the whole model"):
        MambaMiaForConditionalGeneration.from_vision_text_pretrained("nowhere", "nowhere", frame_dropout=0.5)


def test_frames_are_resized_whole_and_normalised_as_the_towers(folder):
    _, processor = build(folder, "clip", "qwen")
    expected = CLIPImageProcessor.from_pretrained(folder / "clip")
    for part in (processor.image_processor, processor.video_processor):
        assert list(part.image_mean) == list(expected.image_mean) and list(part.image_std) == list(expected.image_std)
    frames = torch.zeros(2, 3, 40, 80, dtype=torch.uint8)
    frames[..., :20] = 255  # what a crop in the middle would leave out
    pixels = processor.video_processor(frames, do_sample_frames=False, return_tensors="pt")["pixel_values_videos"]
    assert pixels.shape == (1, 2, 3, 32, 32)
    assert pixels[..., 0].min() > pixels[..., -1].max()
