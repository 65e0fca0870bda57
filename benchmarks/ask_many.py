"""What a question costs: the first about a video, the second, the first from a saved memory, and many at once.

PYTHONPATH=examples python -m needle.generate --output hour --task retrieval --num_videos 1 --split test --fps 30
python benchmarks/ask_many.py hour/retrieval_test_0.mp4

The model has random weights: a vision tower of SigLIP-base's shape at 224 pixels, the compressor with the paper's
layers at a width of 768, and a language model of Qwen2-0.5B's shape. It reads half of at most 384 frames, with 14
tokens each. All answers are of one length. Many at once are compared with a batch of the same prompts without a video,
by `generate`; they take turns.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import median_seconds, report
from transformers import PreTrainedTokenizerBase, Qwen2Config, SiglipImageProcessor, SiglipVisionConfig

from mambamia_hf import (
    BUNDLED_CHECKPOINT,
    MambaMiaCompressorConfig,
    MambaMiaConfig,
    MambaMiaForConditionalGeneration,
    MambaMiaProcessor,
    MambaMiaVideoProcessor,
)
from mambamia_hf.chat import VideoChat
from mambamia_hf.video_memory import VideoMemory


SIZE, PATCH = 224, 16
NEW_TOKENS = 32
QUESTIONS = [
    f"{question} {place}?"
    for question in ("What happens", "Who appears", "What is shown", "Which colour is most frequent", "What changes")
    for place in ("at the beginning", "in the middle of the video", "at the end", "from start to end, in one sentence")
]


def build(dtype: torch.dtype) -> tuple[MambaMiaForConditionalGeneration, MambaMiaProcessor]:
    torch.manual_seed(0)
    tokenizer = MambaMiaProcessor.from_pretrained(BUNDLED_CHECKPOINT).tokenizer
    text = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    vocabulary = tokenizer.get_vocab()
    config = MambaMiaConfig(
        vision_config=SiglipVisionConfig(image_size=SIZE, patch_size=PATCH, vision_use_head=False),
        text_config=text,
        compressor_config=MambaMiaCompressorConfig(hidden_size=768, patches_per_anchor=SIZE // PATCH),
        image_token_id=vocabulary["<|image_pad|>"],
        video_token_id=vocabulary["<|video_pad|>"],
        keep_ratio=0.5,
        delta_threshold=None,
    )
    model = MambaMiaForConditionalGeneration(config).to(dtype).eval()
    model.generation_config.eos_token_id = None  # all answers are of one length
    return model, build_processor(config, tokenizer)


def build_processor(config: MambaMiaConfig, tokenizer: PreTrainedTokenizerBase) -> MambaMiaProcessor:
    """The processor of a model with this configuration."""
    size = {"height": config.vision_config.image_size, "width": config.vision_config.image_size}
    return MambaMiaProcessor(
        image_processor=SiglipImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=MambaMiaVideoProcessor(size=size),
        tokens_per_frame=config.tokens_per_frame(),
    )


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def without_video(model: MambaMiaForConditionalGeneration, processor: MambaMiaProcessor) -> Callable[[], Any]:
    """The same questions as one batch, without the video."""
    conversations = [[{"role": "user", "content": [{"type": "text", "text": question}]}] for question in QUESTIONS]
    texts = processor.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
    prompts = processor.tokenizer(texts, padding=True, return_tensors="pt")
    return lambda: model.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path, help="of an hour, say")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--runs", type=int, default=3, help="of the twenty questions")
    arguments = parser.parse_args()
    model, processor = build(getattr(torch, arguments.dtype))

    def first(video: Path | VideoMemory) -> VideoChat:
        chat = VideoChat(model, processor, video, max_new_tokens=NEW_TOKENS)
        chat.ask(QUESTIONS[0])
        return chat

    from_file, chat = seconds(lambda: first(arguments.video))
    second, _ = seconds(lambda: chat.ask(QUESTIONS[1]))
    another, _ = seconds(lambda: chat.fork().ask(QUESTIONS[1]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "memory.safetensors")
        chat.memory.save(path)
        size = path.stat().st_size
        from_memory, _ = seconds(lambda: first(path))
    together = {"at once": lambda: chat.ask_many(QUESTIONS), "without a video": without_video(model, processor)}
    medians = median_seconds(together, arguments.runs)
    rows = [
        {"what": f"first question about {chat.memory.duration:.0f} s of video", "seconds": from_file},
        {"what": "second question", "seconds": second, "times the first": second / from_file},
        {"what": "a question to a fork", "seconds": another, "times the first": another / from_file},
        {
            "what": f"first question, from a memory of {size / 1e6:.0f} MB",
            "seconds": from_memory,
            "times the first": from_memory / from_file,
        },
        {
            "what": f"{len(QUESTIONS)} questions at once, {chat.video_tokens} video tokens",
            "seconds": medians["at once"],
            "times a batch without a video": medians["at once"] / medians["without a video"],
        },
        {"what": f"{len(QUESTIONS)} questions in a batch without a video", "seconds": medians["without a video"]},
    ]
    report(f"ask_many_{arguments.dtype}", rows)


if __name__ == "__main__":
    main()
