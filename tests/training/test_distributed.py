"""Two CPU processes over gloo, started by `accelerate launch` with the configs that come along, train as one does."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conversations import arguments, record
from PIL import Image
from tiny_model import tiny_model, tiny_processor
from training_runs import change_settings
from transformers import AutoModelForImageTextToText
from video_files import write_video

from mambamia_hf.frame_times import time_token_ids
from mambamia_hf.training import features
from mambamia_hf.training.__main__ import main


CONFIGS = Path(__file__).parents[2] / "examples" / "train"
HELPERS = Path(__file__).parents[1] / "helpers"
STEPS = 4
FSDP_ON_CPU = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of this version of torch needs a GPU"
)
DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
# Programs that stand between accelerate and the training, which want GPUs without them.
ON_CPU = {"fsdp2": "fsdp_on_cpu.py", "zero2": "deepspeed_on_cpu.py", "zero3": "deepspeed_on_cpu.py"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model without dropout, media, and records such that the processes get very different batches."""
    folder = tmp_path_factory.mktemp("distributed")
    processor = tiny_processor(frame_time_format="mm:ss")
    model = tiny_model(
        frame_time_format="mm:ss",
        time_token_ids=time_token_ids(processor.tokenizer, "mm:ss"),
        text_config={"vocab_size": len(processor.tokenizer), "pad_token_id": processor.tokenizer.pad_token_id},
        compressor_config={"gpa_dropout": 0.0},
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_batch_size=2,  # so that the number of calls of the tower depends on the videos
    )
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    for number in range(3):
        write_video(folder / f"{number}.mp4", num_frames=10 + 20 * number)
    (folder / "broken.mp4").write_bytes(b"no video at all")
    videos = [record(f"video{n}", "<video>\nWhat?", "A " + "b" * 3 * n, video=f"{n}.mp4") for n in range(3)]
    texts = [record(f"text{n}", "Hello " * n, "Hi" * n) for n in range(1, 4)]
    # A process has 2 of every 4. In the first step one has videos and the other text; in the second one has nothing.
    broken = record("broken", "<video>\nWhat?", "Nothing.", video="broken.mp4")
    also_broken = record("broken", "<video>\nWho?", "Nobody.", video="broken.mp4")
    records = [videos[0], videos[2], texts[0], texts[2], broken, also_broken, videos[1], texts[1]]
    (folder / "data.json").write_text(json.dumps(records))
    mixture = "datasets:\n- {json_path: data.json, sampling_strategy: 'random:100%', weight: 2}"  # twice, in order
    (folder / "mixture.yaml").write_text(mixture)
    (folder / "evaluation.json").write_text(json.dumps(records[:5]))  # the last batch is filled up with the first ones
    return folder


def command_line(folder: Path, output: Path, batch_size: int, config: str | None = None) -> list[str]:
    settings = {
        "stage": "video",
        "model": folder / "model",
        "data": folder / "mixture.yaml",
        "media_folder": folder,
        "output_dir": output,
        "learning_rate": 1e-3,
        "max_steps": STEPS,
        "per_device_train_batch_size": batch_size,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_steps": 2,
        "eval_data": folder / "evaluation.json",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_eval_batch_size": batch_size,
        "activation_checkpointing": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    # Asked for CPUs, accelerate leaves DeepSpeed out.
    where = {"ddp_backend": "gloo"} if ON_CPU.get(config) == "deepspeed_on_cpu.py" else {"use_cpu": True}
    return arguments(**settings, **where)


def losses(output: Path) -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def evaluations(output: Path) -> list[dict]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    names = ("step", "eval_loss", "eval_accuracy", "eval_token_accuracy", "eval_samples", "eval_skipped")
    return [{name: entry[name] for name in names} for entry in history if "eval_loss" in entry]


@pytest.fixture(scope="module")
def alone(folder) -> Path:
    """What one process trains with the same global batch."""
    main(command_line(folder, folder / "alone", batch_size=4))
    return folder / "alone"


def train_with_two_processes(config: str, arguments: list[str]) -> str:
    """What they print."""
    result = launch_two_processes(config, arguments)
    assert result.returncode == 0, result.stderr[-8000:]
    return result.stdout


def launch_two_processes(config: str, arguments: list[str]) -> subprocess.CompletedProcess:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", port]
    command += ["--config_file", CONFIGS / f"{config}.yaml"]
    command += [HELPERS / ON_CPU[config]] if config in ON_CPU else ["-m"]
    command += ["mambamia_hf.training", *arguments]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        "ddp",
        pytest.param("fsdp2", marks=FSDP_ON_CPU),
        pytest.param("zero2", marks=DEEPSPEED),
        pytest.param("zero3", marks=DEEPSPEED),
    ],
)
def test_two_processes_train_as_one(folder, alone, config, tmp_path):
    printed = train_with_two_processes(config, command_line(folder, tmp_path, 2, config))
    assert len(losses(alone)) == STEPS
    assert losses(tmp_path) == pytest.approx(losses(alone), abs=1e-4)
    assert len(set(losses(alone))) == STEPS
    assert "2 samples were skipped and 0 were cut to max_length, 1 could not be evaluated" in printed
    assert [entry["step"] for entry in evaluations(alone)] == [2, 4]
    for one, two in zip(evaluations(alone), evaluations(tmp_path), strict=True):
        assert two == pytest.approx(one, abs=1e-4) and (two["eval_samples"], two["eval_skipped"]) == (4, 1)
    assert len(list(tmp_path.glob("samples_*.jsonl"))) >= 1

    # One process loads what two have written, in full, and it is what one has trained.
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    before = AutoModelForImageTextToText.from_pretrained(folder / "model").state_dict()
    for name, tensor in AutoModelForImageTextToText.from_pretrained(alone).state_dict().items():
        change = (tensor - before[name]).abs().max()
        assert (loaded.state_dict()[name] - tensor).abs().max() <= 0.05 * change + 1e-6, name
    assert torch.isfinite(loaded(torch.tensor([[7, 9, 11]])).logits).all()

    # Two go on from what two have saved on the way.
    again = command_line(folder, tmp_path / "again", 2, config)
    train_with_two_processes(config, [*again, "--resume_from_checkpoint", str(tmp_path / "checkpoint-2")])
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path), abs=1e-4)


@pytest.fixture
def mixed(folder, tmp_path) -> Path:
    """A model that drops half of the frames in evaluations, and records: in a step, a process has images and the other
    videos of two lengths; or both and nothing."""
    model = shutil.copytree(folder / "model", tmp_path / "model")
    change_settings(model, keep_ratio=0.5, delta_threshold=None)
    images = [record(f"image{n}", "<image>\nWhat?", "C " + "d" * 3 * n, image=f"{n}.png") for n in range(3)]
    for number in range(3):
        Image.new("RGB", (64, 48), (80 * number, 100, 50)).save(folder / f"{number}.png")
    videos = [record(f"video{n}", "<video>\nWhat?", "A " + "b" * 3 * n, video=f"{n}.mp4") for n in range(3)]
    texts = [record(f"text{n}", "Hello " * n, "Hi" * n) for n in range(1, 5)]
    records = [*images[:2], *videos[1:], images[0], videos[0], *texts[:2], *texts, *videos[:2], *images[1:]]
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path


def mixed_command_line(
    folder: Path, mixed: Path, output: str, batch_size: int, config: str | None = None
) -> list[str]:
    settings = {"model": mixed / "model", "data": mixed / "data.json", "eval_data": mixed / "data.json"}
    return command_line(folder, mixed / output, batch_size, config) + arguments(**settings)


@pytest.mark.slow
@DEEPSPEED
def test_with_zero_3_processes_have_different_media(folder, mixed):
    main(mixed_command_line(folder, mixed, "one", 4))
    train_with_two_processes("zero3", mixed_command_line(folder, mixed, "two", 2, "zero3"))
    assert len(set(losses(mixed / "one"))) == STEPS
    assert losses(mixed / "two") == pytest.approx(losses(mixed / "one"), abs=1e-4)
    for one, two in zip(evaluations(mixed / "one"), evaluations(mixed / "two"), strict=True):
        assert two == pytest.approx(one, abs=1e-4) and two["eval_samples"] == 16


@pytest.mark.slow
@DEEPSPEED
def test_with_zero_3_frames_are_dropped_at_random_and_features_replace_pixels(folder, mixed):
    paths = {"model": mixed / "model", "data": mixed / "data.json", "media_folder": folder}
    features.main(arguments(**paths, output=mixed / "features", num_workers=0))
    change_settings(mixed / "model", frame_dropout=0.8)
    command = mixed_command_line(folder, mixed, "two", 2, "zero3")
    train_with_two_processes("zero3", [*command, "--features", str(mixed / "features")])
    assert len(losses(mixed / "two")) == STEPS and all(map(math.isfinite, losses(mixed / "two")))


@pytest.mark.slow
@DEEPSPEED
@pytest.mark.parametrize("setting", ["lora_rank", "delta_loss_coef"])
def test_with_zero_3_is_refused(mixed, folder, setting):
    command = mixed_command_line(folder, mixed, "two", 2, "zero3")
    if setting == "lora_rank":
        command += ["--lora_rank", "4"]
    else:
        change_settings(mixed / "model", delta_loss_coef=0.5)
    result = launch_two_processes("zero3", command)
    assert result.returncode != 0
    assert f"{setting}=" in result.stderr and "does not go with DeepSpeed's ZeRO-3" in result.stderr
