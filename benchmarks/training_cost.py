"""Time and memory of a training run on 8 GPUs, on paper: nothing here is measured on a GPU, and nothing is run.

    python benchmarks/training_cost.py

Time is the operations of all samples over the rate of the GPUs, of which `SHARE` is assumed to be reached. Memory is
what one of 8 GPUs holds of weights, gradients and optimizer, and of one sample's activations. Reading videos is left
out; so is the traffic between GPUs. At the rate that the compressor reached in `gpu_compressor.json`, its part takes
longer, which has a column of its own.
"""

import json
from dataclasses import dataclass
from typing import NamedTuple

from measure import RESULTS, report
from transformers import PreTrainedConfig
from whole_path import compressor_flops, prefill_flops

from mambamia_hf import MambaMiaConfig


GPUS = 8
# Operations per second in bfloat16, as the maker states them, and the share of it that is assumed.
RATES, SHARE = {"H100": 989e12, "A100": 312e12}, 0.4
# Tokens of a question and its answer, and those of the answer; assumed.
TEXT_TOKENS, ANSWER_TOKENS = 300, 100
CONFIG = MambaMiaConfig()


@dataclass(frozen=True)
class Stage:
    """A stage, the number of its samples as the paper has it, and the frames of each, at most."""

    name: str
    samples: int
    frames: int
    learns: tuple[str, ...]


STAGES = (
    Stage("image", 1_000_000, 1, ("compressor", "language model")),
    Stage("align, on images", 558_000, 1, ("compressor",)),
    Stage("video, ablation", 133_000, 64, ("compressor", "language model")),
    Stage("video", 1_400_000, 128, ("compressor", "language model")),
)


def parameters() -> dict[str, float]:
    """Of each part, as `count_parameters.json` has them."""
    rows = json.loads((RESULTS / "count_parameters.json").read_text())["rows"]
    return {row["part"]: row["parameters"] for row in rows if row["preset"] == "qwen2-7b"}


def tower_flops(config: PreTrainedConfig, patches: int) -> float:
    """Of one frame: products with the weights, and attention among its patches."""
    width = config.hidden_size
    weights = 4 * width**2 + 2 * width * config.intermediate_size
    return 2.0 * config.num_hidden_layers * patches * (weights + 2 * patches * width)


def sample_flops(stage: Stage) -> dict[str, float]:
    """Of one sample: forward, once more for activation checkpointing, and backward.

    Backward is twice the forward where weights learn, and once where only the gradient passes through. The tower, in
    which neither happens, runs once.
    """
    rows, columns = CONFIG.patch_grid()
    text, compressor = CONFIG.text_config, CONFIG.compressor_config
    tokens = stage.frames * rows + TEXT_TOKENS
    head = 2.0 * ANSWER_TOKENS * text.hidden_size * text.vocab_size
    passes = {part: 2 + (2 if part in stage.learns else 1) for part in ("compressor", "language model")}
    return {
        "tower": stage.frames * tower_flops(CONFIG.vision_config, rows * columns),
        "compressor": passes["compressor"] * compressor_flops(compressor, stage.frames, rows * columns),
        "language model": passes["language model"] * sum(prefill_flops(text, tokens))
        + (passes["language model"] - 1) * head,
    }


def time_rows() -> list[dict]:
    measured = json.loads((RESULTS / "gpu_training.json").read_text())["rows"]
    compressor_rate = next(row["TFLOP/s"] for row in measured if row["engine"] == "Triton") * 1e12
    rows = []
    for stage in STAGES:
        flops = sample_flops(stage)
        hours = {
            gpu: stage.samples * sum(flops.values()) / (GPUS * SHARE * rate) / 3600 for gpu, rate in RATES.items()
        }
        slower = flops["compressor"] * (1 / compressor_rate - 1 / (SHARE * RATES["H100"]))
        rows.append(
            {
                "stage": stage.name,
                "samples": stage.samples,
                "frames": stage.frames,
                **{f"{part} TFLOP": value / 1e12 for part, value in flops.items()},
                "sample TFLOP": sum(flops.values()) / 1e12,
                **{f"h on {GPUS} {gpu}": value for gpu, value in hours.items()},
                f"h on {GPUS} H100, compressor as measured": hours["H100"] + stage.samples * slower / GPUS / 3600,
            }
        )
    return rows


class Sharding(NamedTuple):
    """Bytes per GPU for each parameter: of weights, gradients and optimizer that are split, and of what is whole."""

    name: str
    learned: float  # of a parameter that learns
    frozen: float  # of one that does not
    whole_language_model: float  # more, of a parameter of its layers, held whole
    whole_rest: float  # more, of any other parameter, held whole


# FSDP2: float32 weights, gradients and two moments, split; what is outside the layers is gathered in bfloat16, weights
# and gradients. ZeRO-2: bfloat16 weights, which are whole; their gradients, float32 weights and two moments are split.
# ZeRO-3 splits the bfloat16 weights as well. What it and FSDP2 gather for a single layer is left out.
SHARDINGS = (
    Sharding("DDP", 16, 4, 0, 0),
    Sharding("ZeRO-2", 14 / GPUS, 0, 2, 2),
    Sharding("ZeRO-3", 16 / GPUS, 2 / GPUS, 0, 0),
    Sharding("FSDP2", 16 / GPUS, 4 / GPUS, 0, 4),
)


def activation_bytes(frames: int) -> dict[str, float]:
    """Of one sample in bfloat16 with activation checkpointing: what is kept, and the block that is computed again."""
    text, rows = CONFIG.text_config, CONFIG.patch_grid()[0]
    width, key_value = text.hidden_size, text.hidden_size * text.num_key_value_heads // text.num_attention_heads
    tokens = frames * rows + TEXT_TOKENS
    measured = json.loads((RESULTS / "training_memory.json").read_text())["rows"]
    per_frame = {
        row["checkpointing"]: row["mb_per_frame"] * 1e6 for row in measured if row["compressor"] == "full size"
    }
    blocks = CONFIG.compressor_config.num_hidden_layers
    return {
        "compressor, kept": frames * per_frame[True] / 2,
        "compressor, one block": frames * per_frame[False] / blocks / 2,
        "language model, kept": 2.0 * tokens * width * text.num_hidden_layers,
        # norms, q, k, v, attention, output and residuals; gate, up, activation and their product
        "language model, one layer": 2.0 * tokens * (10 * width + 2 * key_value + 4 * text.intermediate_size),
    }


def memory_rows(frames: int) -> list[dict]:
    parts = parameters()
    embeddings = parts["head"]  # those of the input are as many
    layers = parts["language model"] - embeddings
    learned = parts["compressor"] + parts["language model"] + parts["head"]
    rest = parts["vision tower"] + parts["compressor"] + 2 * embeddings
    activations = activation_bytes(frames)
    rows = []
    for sharding in SHARDINGS:
        states = (
            sharding.learned * learned
            + sharding.frozen * parts["vision tower"]
            + sharding.whole_language_model * layers
            + sharding.whole_rest * rest
        )
        rows.append(
            {
                "frames": frames,
                "sharding": sharding.name,
                "weights, gradients, optimizer GB": states / 1e9,
                **{f"{part} GB": value / 1e9 for part, value in activations.items()},
                "all GB": (states + sum(activations.values())) / 1e9,
            }
        )
    return rows


def main():
    report("training_cost", time_rows() + memory_rows(frames=128))


if __name__ == "__main__":
    main()
