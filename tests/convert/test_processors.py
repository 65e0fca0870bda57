"""Processors of converted checkpoints."""

import pytest
import torch
from original_checkpoint import Original
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, PreTrainedTokenizerFast

from mambamia_hf import MambaMiaForConditionalGeneration
from mambamia_hf.convert import convert_from_original


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


@pytest.mark.parametrize(
    ("tokenizer", "text", "dialogue"),
    [
        (tiny_tokenizer, {"vocab_size": 400}, QWEN_DIALOGUE),
        (word_tokenizer, {"model_type": "llama", "vocab_size": 400}, VICUNA_DIALOGUE),
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
    inputs = processor(text=dialogue, videos=video, return_tensors="pt")
    assert inputs["pixel_values_videos"].shape == (1, 3, 3, 32, 32)
    assert (inputs["input_ids"] == model.config.video_token_id).sum() == 3 * 4
    assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape
