"""Quantised language models: right answers and weights of the bundled model, and speed and memory at full size.

    pip install -e ".[quantization]"
    PYTHONPATH=examples python benchmarks/quantization.py

Accuracy is that of the needle benchmark, every video asked with all of its frames and with half of them. Speed is that
of random weights, the methods in turn in one process, which holds a model of each: name some `--methods` for less
memory. `--shape 0.5B` or `7B` is that of Qwen2.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import peak_rss, report, restart_peak
from needle.evaluate import matches
from needle.plan import TASKS
from needle.questions import Question, task_question
from needle.video import write_needle_video
from offload import config as half_billion
from torch import Tensor
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
)
from transformers import BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from mambamia_hf import BUNDLED_CHECKPOINT, MambaMiaConfig, MambaMiaForConditionalGeneration, MambaMiaProcessor


METHODS = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {},
    "torchao int8": {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig(version=2))},
    "torchao int8, activations too": {
        "quantization_config": TorchAoConfig(Int8DynamicActivationInt8WeightConfig(version=2))
    },
    "torchao int4": {"quantization_config": TorchAoConfig(IntxWeightOnlyConfig(torch.int4, granularity=PerGroup(32)))},
    "torchao int4, packed for CPUs": {
        "quantization_config": TorchAoConfig(PrototypeInt4WeightOnlyConfig(group_size=32))
    },
    "bitsandbytes int8": {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
    "bitsandbytes nf4": {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    },
    "quanto int8": {"quantization_config": QuantoConfig("int8")},
    "quanto int4": {"quantization_config": QuantoConfig("int4")},
}
KEEP_RATIOS = {"all frames": 1.0, "half of them": 0.5}
PROMPT_TOKENS, NEW_TOKENS, RUNS = 128, 4, 2


def load(folder: str | Path, method: str) -> MambaMiaForConditionalGeneration:
    settings = {"dtype": torch.bfloat16, **METHODS[method]}
    return MambaMiaForConditionalGeneration.from_pretrained(folder, **settings).eval()


def megabytes(model: MambaMiaForConditionalGeneration) -> float:
    """Of the language model's weights, with their scales; before the model has run."""
    return sum(_bytes(weight) for weight in model.model.language_model.state_dict().values()) / 1e6


def _bytes(tensor: Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # a quantised tensor, made of plain ones
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


class Samples:
    """Questions about videos, which every method is asked."""

    def __init__(self, folder: Path, num_videos: int, seconds: float, num_frames: int):
        self.interval = seconds / num_frames
        self.num_frames = num_frames
        self.processor = MambaMiaProcessor.from_pretrained(BUNDLED_CHECKPOINT)
        self.questions: list[tuple[Question, Path]] = []
        for seed in range(num_videos):
            video = write_needle_video(
                folder / f"{seed}.mp4",
                seed,
                task=TASKS[seed % len(TASKS)],
                split="test",
                duration=seconds,
                num_frames=num_frames,
            )
            self.questions.append((task_question(video, seed), video.path))
        self.memories: dict[torch.dtype, list[Any]] = {}

    def accuracy(self, model: MambaMiaForConditionalGeneration) -> dict[str, float]:
        """The share of right answers by the share of frames; memories are those of any model of the same type."""
        if model.dtype not in self.memories:
            self.memories[model.dtype] = [
                model.encode_video(path, self.processor, num_frames=self.num_frames) for _, path in self.questions
            ]
        right = dict.fromkeys(KEEP_RATIOS, 0)
        for (question, _), memory in zip(self.questions, self.memories[model.dtype], strict=True):
            content = [{"type": "video", "video": memory}, {"type": "text", "text": question.prompt}]
            inputs = self.processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            for name, ratio in KEEP_RATIOS.items():
                output = model.generate(**inputs, keep_ratio=ratio, do_sample=False)
                answer = output[0, inputs["input_ids"].shape[1] :]
                given = self.processor.tokenizer.decode(answer, skip_special_tokens=True)
                right[name] += matches(question, given, self.interval)
        return {f"right, {name}": count / len(self.questions) for name, count in right.items()}


def config(shape: str) -> MambaMiaConfig:
    return half_billion() if shape == "0.5B" else MambaMiaConfig()


def seconds_of(model: MambaMiaForConditionalGeneration, new_tokens: int) -> float:
    torch.manual_seed(0)
    ids = torch.randint(1000, 100_000, (1, PROMPT_TOKENS))
    start = time.perf_counter()
    output = model.generate(ids, min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False)
    assert output.shape[1] == PROMPT_TOKENS + new_tokens
    return time.perf_counter() - start


def speeds(folder: Path, methods: list[str]) -> dict[str, dict[str, float]]:
    """Tokens per second of a prompt and of an answer, the latter also beside bfloat16, and memory."""
    models = {method: load(folder, method) for method in methods}
    found: dict[str, dict[str, float]] = {method: {"MB": megabytes(models[method])} for method in methods}
    seconds: dict[str, list[tuple[float, float]]] = {method: [] for method in methods}
    for model in models.values():
        seconds_of(model, 2)  # what is set up once does not count
    for _ in range(RUNS):
        for method, model in models.items():
            before = restart_peak()
            times = seconds_of(model, 1), seconds_of(model, 1 + NEW_TOKENS)
            found[method]["peak beside MB"] = (peak_rss() - before) / 1e6
            seconds[method].append(times)
    for method, pairs in seconds.items():
        found[method]["prompt tokens/s"] = PROMPT_TOKENS / median(first for first, _ in pairs)
        found[method]["answer tokens/s"] = NEW_TOKENS / median(whole - first for first, whole in pairs)
    for method in methods if "bfloat16" in methods else []:
        for what in ("prompt", "answer"):
            found[method][f"{what}, times bfloat16"] = (
                found[method][f"{what} tokens/s"] / found["bfloat16"][f"{what} tokens/s"]
            )
    return found


def accuracies(folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    samples = Samples(folder, arguments.num_videos, arguments.seconds, arguments.num_frames)
    rows = []
    for method in arguments.methods:
        model = load(BUNDLED_CHECKPOINT, method)
        rows.append({"method": method, "MB": megabytes(model), **samples.accuracy(model)})
    return rows


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=("accuracy", "speed"), default=("accuracy", "speed"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--num_videos", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=300, help="of a video")
    parser.add_argument("--num_frames", type=int, default=64, help="sampled of a video")
    parser.add_argument("--shape", choices=("0.5B", "7B"), default="0.5B", help="whose speed is measured")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "accuracy" in arguments.parts:
            report("quantization", accuracies(folder, arguments))
        if "speed" in arguments.parts:
            busy = round(max(0.0, os.getloadavg()[0] - 1), 1)  # over a minute, this process left out
            torch.set_default_dtype(torch.bfloat16)
            MambaMiaForConditionalGeneration(config(arguments.shape)).save_pretrained(folder)
            torch.set_default_dtype(torch.float32)
            found = speeds(folder, arguments.methods).items()
            rows = [{"method": method, **row, "processes of others": busy} for method, row in found]
            report(f"quantization_{arguments.shape}", rows)


if __name__ == "__main__":
    main()
