"""The tokenizer of any language model, with the tokens that chats about images and videos need."""

import os

from transformers import AutoTokenizer, PreTrainedTokenizerBase


# Those of Qwen2's dialogues; the last two are the placeholders of images and videos.
SPECIAL_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def load_tokenizer(text: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer of the language model `text`, a folder or a name on the Hub.

    Of the special tokens those are added that it lacks, so that their ids depend on the language model alone. Turns
    end with `<|im_end|>`. Padding is on the left, with the language model's own end token if it has none for padding.
    """
    tokenizer = AutoTokenizer.from_pretrained(text, padding_side="left")
    vocabulary = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token in SPECIAL_TOKENS if token not in vocabulary], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or "<|im_end|>"
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = None  # the processor has one
    return tokenizer


__all__ = ["SPECIAL_TOKENS", "load_tokenizer"]
