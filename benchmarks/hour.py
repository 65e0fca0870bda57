"""From a video file to the first token of an answer: seconds and memory of every stage, each beside its limit.

PYTHONPATH=examples python -m needle.generate --output hour --task retrieval --num_videos 1 --split test --fps 30
python benchmarks/hour.py hour/retrieval_test_0.mp4 --dtype bfloat16 --language_model 7B

Vision tower (SigLIP2 so400m's shape) and compressor have the paper's size, the language model that of Qwen2-7B or
Qwen2-0.5B; all weights are random. The language model reads half of the frames. The limit of a stage is its operations
at the rate of a large product, which is measured at the start; the limit of decoding is not known. Then the same with
average pooling to as many tokens, and on paper without compression, as LLaVA reads: all patches.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import torch
from ask_many import build_processor
from measure import peak_rss, product_rate, report, restart_peak
from torch import Tensor, nn
from transformers import PreTrainedConfig
from whole_path import compressor_flops, prefill_flops, text_config

from mambamia_hf import BUNDLED_CHECKPOINT, MambaMiaConfig, MambaMiaForConditionalGeneration, MambaMiaProcessor
from mambamia_hf.video_sampling import SampledVideo, open_video


QUESTION = "What happens in the middle of the video?"
KEEP_RATIO = 0.5
Result = TypeVar("Result")


class Stages:
    """What was measured of each stage.

    Args:
        rate: operations per second of a large product.
    """

    def __init__(self, rate: float):
        self.rate = rate
        self.rows: list[dict[str, Any]] = []

    def measure(self, name: str, flops: float | None, call: Callable[[], Result]) -> Result:
        """Calls once; a first call that does not count would double the hours."""
        before = restart_peak()
        start = time.perf_counter()
        result = call()
        self.add(name, flops, time.perf_counter() - start, (peak_rss() - before) / 1e6)
        return result

    def add(self, name: str, flops: float | None, seconds: float | None, megabytes: float | None = None) -> None:
        limit = None if flops is None else flops / self.rate
        self.rows.append(
            {
                "stage": name,
                "seconds": seconds,
                "TFLOP": None if flops is None else flops / 1e12,
                "limit, s": limit,
                "times the limit": seconds / limit if seconds and limit else None,
                "peak MB": megabytes,
            }
        )


def build(language_model: str, dtype: torch.dtype) -> tuple[MambaMiaForConditionalGeneration, MambaMiaProcessor]:
    """The paper's model, with the tokenizer of the bundled checkpoint."""
    tokenizer = MambaMiaProcessor.from_pretrained(BUNDLED_CHECKPOINT).tokenizer
    vocabulary = tokenizer.get_vocab()
    config = MambaMiaConfig(
        **({} if language_model == "7B" else {"text_config": text_config()}),
        image_token_id=vocabulary["<|image_pad|>"],
        video_token_id=vocabulary["<|video_pad|>"],
        keep_ratio=KEEP_RATIO,
        delta_threshold=None,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)  # a language model of 7B does not fit in float32
    model = MambaMiaForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    return model, build_processor(config, tokenizer)


def tower_flops(config: MambaMiaConfig, num_frames: int) -> float:
    """Of the layers up to the one that is read, and of the patch embedding."""
    vision, (rows, columns) = config.vision_config, config.patch_grid()
    width, patches = vision.hidden_size, rows * columns
    layer = 4 * width**2 + 2 * width * vision.intermediate_size + 2 * patches * width
    embedding = 3 * vision.patch_size**2 * width
    return 2.0 * num_frames * patches * (config.vision_layer(config.vision_feature_layer) * layer + embedding)


def reading_flops(config: PreTrainedConfig, tokens: int) -> float:
    return sum(prefill_flops(config, tokens))


class Pooling(nn.Module):
    """The mean of every two rows of patches, then LLaVA's two-layer MLP: as many tokens as half of the frames have."""

    def __init__(self, config: MambaMiaConfig):
        super().__init__()
        self.columns = 2 * config.patch_grid()[1]
        width = config.text_config.hidden_size
        self.mlp = nn.Sequential(nn.Linear(config.vision_hidden_size, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, features: Tensor) -> Tensor:
        """Features `(frames, patches, vision_size)` to tokens `(1, frames * patches / columns, hidden_size)`."""
        return self.mlp(features.unflatten(1, (-1, self.columns)).mean(dim=2)).flatten(0, 1)[None]


class Timed:
    """A method of the model that says how long it took in all, and keeps the first argument of its last call.

    Args:
        model: whose method is replaced.
        name: of the method.
    """

    def __init__(self, model: nn.Module, name: str):
        self.method, self.seconds = getattr(model, name), 0.0
        self.given: Tensor | None = None
        setattr(model, name, self)

    def __call__(self, given: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.given, start = given, time.perf_counter()
        result = self.method(given, *args, **kwargs)
        self.seconds += time.perf_counter() - start
        return result


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path, help="of an hour, say")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--language_model", default="0.5B", choices=("0.5B", "7B"), help="whose shape it has")
    parser.add_argument("--num_frames", type=int, default=384)
    arguments = parser.parse_args()
    dtype, num_frames = getattr(torch, arguments.dtype), arguments.num_frames
    model, processor = build(arguments.language_model, dtype)
    config = model.config
    text, width = config.text_config, config.compressor_config.hidden_size
    patches = config.patch_grid()[0] * config.patch_grid()[1]
    anchors = num_frames * config.compressor_config.num_anchors(patches)
    stages = Stages(product_rate(2048, dtype))

    def sampled() -> SampledVideo:
        return SampledVideo(reader, processor.video_processor, name=str(arguments.video), num_frames=num_frames)

    def decode() -> None:
        for _ in sampled().batches(config.vision_batch_size):
            pass

    with closing(open_video(arguments.video, processor.video_processor, None, None)) as reader:
        stages.measure("decoding alone", None, decode)
        video, tower, compressor = sampled(), Timed(model.model, "encode_frames"), Timed(model.model, "compress")
        last_layer = 2.0 * anchors * width * text.hidden_size  # comes with the question
        flops = tower_flops(config, num_frames), compressor_flops(config.compressor_config, num_frames, patches)
        memory = stages.measure("encode_video", sum(flops) - last_layer, lambda: model.encode_video(video))
        if len(memory) != num_frames:
            raise SystemExit(f"{arguments.video} gives {len(memory)} frames; pass a video of {num_frames} or more.")
        stages.add("  waiting for frames", None, video.seconds_waited)
        stages.add("  vision tower", flops[0], tower.seconds)
        stages.add("  compressor", flops[1] - last_layer, compressor.seconds)
    content = [{"type": "video", "video": memory}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    read = round(KEEP_RATIO * anchors)
    stages.measure(
        f"language model, {read} tokens, to the first token",
        reading_flops(text, read) + KEEP_RATIO * last_layer,
        lambda: model.generate(**inputs, max_new_tokens=1, do_sample=False),
    )
    pooling, features = Pooling(config).to(dtype), compressor.given[0]
    pool_flops = 2.0 * read * text.hidden_size * (config.vision_hidden_size + text.hidden_size)
    tokens = stages.measure("instead: pooling", pool_flops, lambda: pooling(features))
    stages.measure(
        f"instead: language model, {tokens.shape[1]} pooled tokens",
        reading_flops(text, tokens.shape[1]),
        lambda: model.model.language_model(inputs_embeds=tokens, use_cache=True),
    )
    all_patches = num_frames * patches
    key_values = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    cache = 2 * dtype.itemsize * text.num_hidden_layers * key_values * all_patches
    stages.add(f"on paper: language model, {all_patches} tokens", reading_flops(text, all_patches), None, cache / 1e6)
    settings = {"frames": num_frames, "dtype": arguments.dtype, "product GFLOP/s": stages.rate / 1e9}
    rows = [{**row, **settings} for row in stages.rows]
    report(f"hour_{arguments.language_model}_{arguments.dtype}", rows)


if __name__ == "__main__":
    main()
