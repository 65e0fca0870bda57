import os
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import needle
import pytest
import torch
from needle import training_data
from needle.conversations import Asked
from needle.looks import Look
from needle.seen_videos import STILLS_PER_SEED, SeenVideo, see_stills
from needle.small_model import build_model, build_processor
from needle.train_times import STATE, Reader, Training, average_gradients, main, most_frames
from needle.video import needle_frames
from test_seen_videos import make_video
from torch import distributed, nn
from transformers import set_seed

from mambamia_hf import MambaMiaForConditionalGeneration, VideoMemory
from mambamia_hf.training import features
from mambamia_hf.video_memory import encoder_fingerprint


@pytest.fixture(scope="module")
def model_and_processor():
    set_seed(0)
    processor = build_processor()
    return build_model(processor).eval(), processor


def look_at(features: torch.Tensor, times: list[float] | None, *questions: tuple[str, str]) -> Look:
    return Look(features, times, [Asked("", question, answer) for question, answer in questions])


QUESTIONS = [("When does the star appear?", "00:07"), ("What appears?", "star"), ("Which order?", "3 star 7")]


@pytest.mark.parametrize("keep_frames", [3, 5])
def test_questions_that_share_a_video_are_answered_as_alone(model_and_processor, keep_frames):
    """As the whole model answers about the kept frames of a memory, question by question."""
    model, processor = model_and_processor
    seen, times = torch.randn(5, 9, 128), [0.0, 7.0, 8.5, 61.0, 3599.0]
    with torch.no_grad():
        anchors, deltas = model.model.compress(seen[None])
    memory = VideoMemory(anchors[0], deltas[0], times, encoder_fingerprint(model))
    look = replace(look_at(seen, times, *QUESTIONS), keep_frames=keep_frames)
    check_answers(model, processor, look, {"type": "video", "video": memory.select(keep_frames=keep_frames)})


def test_questions_that_share_a_still_are_answered_as_alone(model_and_processor):
    model, processor = model_and_processor
    still, *_ = see_stills(model, processor, 5)
    (image, needle), *_ = needle_frames(5, STILLS_PER_SEED)
    assert still.needle == needle
    look = look_at(still.features, None, *QUESTIONS)
    check_answers(model, processor, look, {"type": "image", "image": image})


def check_answers(model, processor, look: Look, medium: dict) -> None:
    with torch.no_grad():
        _, logits, tokens, number = Reader(model, processor).read(look)
    assert logits.shape == (len(tokens), model.config.text_config.vocab_size)
    for which, (question, answer) in enumerate(QUESTIONS):
        conversation = [{"role": "user", "content": [medium, {"type": "text", "text": question}]}]
        inputs = processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        own = processor.tokenizer(answer + "<|im_end|>")["input_ids"]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([own])], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            alone = model(**inputs).logits[0, -len(own) - 1 : -1]
        assert tokens[number == which].tolist() == own
        torch.testing.assert_close(logits[number == which], alone, atol=1e-4, rtol=1e-4)


def test_looks_become_longer():
    lengths = [most_frames(step / 100) for step in range(101)]
    assert lengths == sorted(lengths) and lengths[0] == 32 and set(lengths[50:]) == {384}


def test_all_but_the_vision_tower_learns(model_and_processor, tmp_path):
    model, processor = model_and_processor
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    videos = [seen(make_video("when", num_frames=16, seed=seed)) for seed in range(4)]
    stills = see_stills(model, processor, 5)
    training = Training(model, processor, videos, stills, tmp_path, max_steps=12, learning_rate=3e-3)
    training.run(save_steps=100)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[1] for name in moved} == {"compressor", "language_model", "weight"}  # the last is lm_head
    saved = MambaMiaForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(saved[name], before[name]) for name in before.keys() - moved)
    assert not torch.equal(saved["lm_head.weight"], model.state_dict()["lm_head.weight"])  # it is the average


def seen(video: SeenVideo) -> SeenVideo:
    return SeenVideo(video.plan, torch.randn(len(video.features), 9, 128))


@pytest.fixture
def arguments(model_and_processor, tmp_path) -> list[str]:
    """Those of a training on the features of two videos."""
    model, processor = model_and_processor
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    training_data.main(["long_videos", "--output", str(tmp_path / "data"), "--count", "2"])
    records = str(tmp_path / "data" / training_data.RECORDS)
    written = ["--model", str(tmp_path / "model"), "--media_folder", str(tmp_path / "data"), "--data", records]
    features.main([*written, "--output", str(tmp_path / "features"), "--num_workers", "0"])
    arguments = ["--model", str(tmp_path / "model"), "--features", str(tmp_path / "features"), "--num_stills", "4"]
    return [*arguments, "--output", str(tmp_path / "out"), "--save_steps", "1"]


def test_the_command_goes_on_where_it_stopped(arguments, monkeypatch):
    main([*arguments, "--max_steps", "2"])
    steps = []
    take_step = Training.take_step
    monkeypatch.setattr(Training, "take_step", lambda self: steps.append(self.step) or take_step(self))
    main([*arguments, "--max_steps", "3"])
    assert steps == [2]


def test_a_training_that_was_stopped_ends_as_one_that_was_not(model_and_processor, tmp_path):
    model, processor = model_and_processor
    videos = [seen(make_video("ordering", num_frames=16, seed=seed)) for seed in range(3)]
    beginning, ends = deepcopy(model.state_dict()), []
    for stops in ([3], [2, 3]):
        torch.manual_seed(0)
        folder = tmp_path / f"{len(stops)} parts"
        for stop in stops:
            training = Training(model, processor, videos, [], folder, max_steps=3, learning_rate=1e-3)
            while training.step < stop:
                training.take_step()
            training.save()
            model.load_state_dict(beginning)
        ends.append(torch.load(folder / STATE))
    assert ends[0]["step"] == ends[1]["step"] == 3
    for part in ("model", "averaged", "counter"):
        torch.testing.assert_close(ends[1][part], ends[0][part])


def test_two_processes_learn_from_the_mean_of_their_gradients(tmp_path):
    torch.multiprocessing.spawn(check_average, args=(tmp_path / "store",), nprocs=2)


def check_average(rank: int, store: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    first, second = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4))
    first.grad = torch.full((2, 3), 1.0 + rank)
    if rank == 1:
        second.grad = torch.full((4,), 5.0)
    average_gradients([first, second])
    assert first.grad.tolist() == [[1.5] * 3] * 2 and second.grad.tolist() == [2.5] * 4
    distributed.destroy_process_group()


def test_the_command_in_two_processes(arguments, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "needle.train_times"]
    subprocess.run([*launcher, *arguments, "--max_steps", "2"], check=True, env=environment())
    assert torch.load(tmp_path / "out" / STATE)["step"] == 2


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(needle.__file__).parents[1])}
