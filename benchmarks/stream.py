"""Streams: whether memory stays level over a day, and how far a bidirectional compressor in windows is from offline.

    python benchmarks/stream.py memory
    PYTHONPATH=examples python benchmarks/stream.py windows

`memory` pushes 24 hours of a synthetic stream at one frame per second into a tiny bidirectional model, asks a question
every half hour of it, and writes the resident memory of each hour. `windows` shows hour-long
needle videos to the bundled checkpoint, offline and as streams, and compares anchors, Δ and answers.
"""

import argparse
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from ask_many import build_processor
from measure import plot, report, resident

from mambamia_hf import (
    BUNDLED_CHECKPOINT,
    MambaMiaConfig,
    MambaMiaForConditionalGeneration,
    MambaMiaProcessor,
    VideoMemory,
)


HOURS, HOUR = 24, 3600
ASK_EVERY, SAMPLE_EVERY = 1800, 60  # seconds of the stream
IMAGE_SIZE = 16

# Window and look-ahead in frames, and how many frames are held of the 384 that are sampled from an hour.
WINDOWS = [(32, 0), (8, 8), (32, 32), (64, 64)]
KEPT = (384, 192)
NUM_FRAMES = 384


def tiny_model() -> tuple[MambaMiaForConditionalGeneration, MambaMiaProcessor]:
    """An untrained model of some 100,000 parameters, with the tokenizer of the bundled checkpoint."""
    torch.manual_seed(0)
    tokenizer = MambaMiaProcessor.from_pretrained(BUNDLED_CHECKPOINT).tokenizer
    vocabulary = tokenizer.get_vocab()
    config = MambaMiaConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 24,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": IMAGE_SIZE,
            "patch_size": 8,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        compressor_config={
            "hidden_size": 40,
            "num_hidden_layers": 1,
            "head_dim": 16,
            "state_size": 8,
            "patches_per_anchor": 2,
        },
        image_token_id=vocabulary["<|image_pad|>"],
        video_token_id=vocabulary["<|video_pad|>"],
    )
    return MambaMiaForConditionalGeneration(config).eval(), build_processor(config, tokenizer)


def measure_memory(hours: int, frames_per_push: int) -> None:
    model, processor = tiny_model()
    stream = model.stream(processor)
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    for hour in range(hours):
        samples = []
        for second in range(hour * HOUR, (hour + 1) * HOUR, frames_per_push):
            shape = (frames_per_push, 3, IMAGE_SIZE, IMAGE_SIZE)
            frames = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            stream.push(frames, [float(second + number) for number in range(frames_per_push)])
            if second % ASK_EVERY == 0:
                stream.ask("What shape appears in the video?", max_new_tokens=4)
            if second % SAMPLE_EVERY == 0:
                samples.append(resident() / 1e6)
        memory = stream.memory
        rows.append(
            {
                "hour": hour + 1,
                "frames per push": frames_per_push,
                "MB, mean": statistics.mean(samples),
                "MB, most": max(samples),
                "frames": len(stream),
                "held": len(memory),
                "newest": memory.timestamps[-1],
            }
        )
        print(rows[-1], flush=True)
        report("stream_memory", rows)
    plot(
        "stream_memory",
        "hour of the stream",
        "resident memory, MB",
        {"mean": ([row["hour"] for row in rows], [row["MB, mean"] for row in rows])},
    )


@torch.no_grad()
def measure_windows(num_videos: int) -> None:
    from needle.plan import TASKS
    from needle.questions import multiple_choice
    from needle.video import write_needle_video

    model = MambaMiaForConditionalGeneration.from_pretrained(BUNDLED_CHECKPOINT, dtype=torch.float32).eval()
    processor = MambaMiaProcessor.from_pretrained(BUNDLED_CHECKPOINT)
    processor.video_processor.num_frames = NUM_FRAMES
    found: dict[Any, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for seed in range(num_videos):
        for task in TASKS:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "video.mp4"
                settings: Any = {"duration": 3600.0, "fps": 1.0, "num_frames": NUM_FRAMES, "split": "test"}
                video = write_needle_video(path, seed, task=task, **settings)
                question = multiple_choice(video, seed)
                inputs = processor.video_processor([str(path)], return_tensors="pt", return_metadata=True)
            offline = model.encode_video(inputs, processor)
            features = model.model.encode_frames(inputs["pixel_values_videos"][0]).last_hidden_state
            answers = {kept: ask(model, processor, offline.select(keep_frames=kept), question.prompt) for kept in KEPT}
            for kept, answer in answers.items():
                found["offline"][f"right, {kept} held"].append(answer == question.answer)
            for window, look_ahead in WINDOWS:
                results = found[window, look_ahead]
                for kept in KEPT:
                    stream = model.stream(processor, keep_frames=kept, window=window, look_ahead=look_ahead)
                    push(stream, features, offline.timestamps)
                    answer = stream.ask(question.prompt)
                    results[f"right, {kept} held"].append(answer == question.answer)
                    results[f"same, {kept} held"].append(answer == answers[kept])
                    if kept == NUM_FRAMES:
                        results["anchors"].append(relative_error(stream.memory.anchors, offline.anchors))
                        results["delta"].append(relative_error(stream.memory.frame_deltas, offline.frame_deltas))
            report("stream_windows", rows_of(found))


def rows_of(found: dict[Any, dict[str, list[float]]]) -> list[dict[str, Any]]:
    rows = []
    for how, results in found.items():
        window, look_ahead = (None, None) if how == "offline" else how
        means = {name: statistics.mean(values) for name, values in results.items()}
        rows.append(
            {"window": window, "look-ahead": look_ahead, "questions": len(results["right, 384 held"]), **means}
        )
    return rows


def push(stream: Any, features: torch.Tensor, times: list[float]) -> None:
    """Pushes features of the vision tower, which runs once for all streams."""
    encoder = stream._model.model
    with (
        patch.object(stream, "_pixels", lambda frames: frames),
        patch.object(encoder, "encode_frames", lambda frames: SimpleNamespace(last_hidden_state=frames)),
    ):
        for start in range(0, len(times), 32):
            stream.push(features[start : start + 32], times[start : start + 32])


def ask(
    model: MambaMiaForConditionalGeneration, processor: MambaMiaProcessor, memory: VideoMemory, question: str
) -> str:
    content = [{"type": "video", "video": memory}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, do_sample=False)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("memory", "windows"))
    parser.add_argument("--hours", type=int, default=HOURS)
    parser.add_argument("--frames_per_push", type=int, default=1, help="of the 3,600 of an hour")
    parser.add_argument("--num_videos", type=int, default=16, help="videos per task")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "memory":
        measure_memory(arguments.hours, arguments.frames_per_push)
    else:
        measure_windows(arguments.num_videos)


if __name__ == "__main__":
    main()
