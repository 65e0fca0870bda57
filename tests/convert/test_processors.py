"""Processors of converted checkpoints."""

import json
import math

import numpy as np
import pytest
import torch
from original_checkpoint import Original
from PIL import Image
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, PreTrainedTokenizerFast, SiglipImageProcessor
from video_files import write_video

from mambamia_hf import MambaMiaForConditionalGeneration
from mambamia_hf.convert import convert_from_original, convert_to_original


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer like Vicuna's in that it knows no marks of a dialogue."""
    words = "<unk> <s> </s> A chat between a curious user USER ASSISTANT : . what".split()
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


CHAT = [
    {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A star."}]},
    {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
]
QWEN_DIALOGUE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|video_pad|>\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA star.<|im_end|>\n"
    "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
)
VICUNA_DIALOGUE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: <|video_pad|>\nWhat is it? ASSISTANT: A star.</s>"
    "USER: Sure? ASSISTANT:"
)


def expanded(image: Image.Image, mean: list[float]) -> Image.Image:
    """LLaVA's way to a square, as its papers describe it: the picture in the middle of a square of the mean colour."""
    size = max(image.size)
    square = Image.new("RGB", (size, size), tuple(int(255 * channel) for channel in mean))
    square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return square


@pytest.mark.parametrize("size", [(40, 64), (64, 42), (48, 48)])
def test_padding_to_a_square(tmp_path, size):
    original = Original()
    original.config["image_aspect_ratio"] = "pad"
    src = original.write(tmp_path / "src")
    tiny_tokenizer().save_pretrained(src)
    mean = [0.2, 0.5, 0.8]
    SiglipImageProcessor(size={"height": 32, "width": 32}, image_mean=mean, resample=3).save_pretrained(src)
    convert_from_original(src, tmp_path / "dst")
    processor = AutoProcessor.from_pretrained(tmp_path / "dst")
    processor.time_instruction = False  # frames of an array have no times
    picture = np.random.default_rng(0).integers(30, 220, (*size, 1), dtype=np.uint8).repeat(3, axis=2)
    plain = SiglipImageProcessor(size={"height": 32, "width": 32}, image_mean=mean, resample=3)
    expected = plain(expanded(Image.fromarray(picture), mean), return_tensors="pt")["pixel_values"][0]
    image = processor(text="<|image_pad|>", images=Image.fromarray(picture), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(image, expected, atol=2 / 255, rtol=0)
    video = write_video(tmp_path / "v.mkv", images=[picture] * 3, codec="ffv1")
    for source in (np.stack([picture] * 3), str(video)):
        pixels = processor(text="<|video_pad|>", videos=source, return_tensors="pt")["pixel_values_videos"][0, 0]
        torch.testing.assert_close(pixels, expected, atol=8 / 255, rtol=0)  # of twice the range; grey levels of videos
    convert_to_original(tmp_path / "dst", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["image_aspect_ratio"] == "pad"


@pytest.mark.parametrize(("num_frames", "fps", "asked"), [(40, 10, 2.0), (41, 10, 1.0), (30, 25, 3.0), (7, 10, 1.0)])
def test_frames_are_sampled_as_by_the_released_code(tmp_path, num_frames, fps, asked):
    src = Original().write(tmp_path / "src")
    tiny_tokenizer().save_pretrained(src)
    convert_from_original(src, tmp_path / "dst")
    processor = AutoProcessor.from_pretrained(tmp_path / "dst").video_processor
    processor.fps = asked
    duration = num_frames / fps
    count = math.ceil(round(duration * asked, 6))
    times = np.linspace(0, duration, count, endpoint=False)
    expected = np.clip(np.round(times * fps), 0, num_frames - 1).astype(int).tolist()
    video = write_video(tmp_path / "v.mp4", num_frames=num_frames, fps=fps)
    _, metadata = processor.fetch_videos(str(video), processor.sample_frames)
    assert metadata.frames_indices == expected
    assert processor.sample_frames(metadata, num_frames=3).tolist() == [
        round(share * num_frames) for share in (0, 1 / 3, 2 / 3)
    ]


@pytest.mark.parametrize(
    ("tokenizer", "text", "dialogue"),
    [
        (tiny_tokenizer, {"vocab_size": 400}, QWEN_DIALOGUE),
        (word_tokenizer, {"model_type": "llama", "vocab_size": 30}, VICUNA_DIALOGUE),
    ],
    ids=["qwen2", "vicuna"],
)
def test_processor_is_built_where_there_is_a_tokenizer(tmp_path, tokenizer, text, dialogue):
    original = Original(text=text)
    src = original.write(tmp_path / "src")
    tokenizer().save_pretrained(src)
    convert_from_original(src, tmp_path / "dst")
    processor = AutoProcessor.from_pretrained(tmp_path / "dst")
    assert processor.apply_chat_template(CHAT, add_generation_prompt=True) == dialogue
    model = MambaMiaForConditionalGeneration.from_pretrained(tmp_path / "dst").eval()
    assert model.config.video_token_id == processor.video_token_id == processor.tokenizer.vocab["<|video_pad|>"]
    assert model.config.image_token_id == processor.image_token_id
    video = torch.randint(256, (3, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    inputs = processor(text=dialogue, videos=video, video_metadata=[{"fps": 2.0}], return_tensors="pt")
    sentence = "The video lasts for 1.500 seconds, and 3 frames are sampled"
    assert (sentence in processor.decode(inputs["input_ids"][0])) == ("<|im_start|>" in dialogue)  # words of the other
    assert inputs["pixel_values_videos"].shape == (1, 3, 3, 32, 32)
    assert (inputs["input_ids"] == model.config.video_token_id).sum() == 3 * 4
    assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape
