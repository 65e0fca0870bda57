"""`examples/ablation/run.py`: what counts as right, how frames are selected, and runs of a few steps."""

import json
import re
from dataclasses import replace
from pathlib import Path

import ablation
import pytest
import torch
from ablation import run
from ablation.run import EncodedVideos, Selection, Settings, accuracy, run_all, share_kept, threshold_for_half
from needle import training_data
from needle.small_model import build_model, build_processor
from needle.training_data import RECORDS
from tiny_model import prompt, tiny_model, tiny_processor

from mambamia_hf.modeling_encoder import MambaMiaFeaturesOutput
from mambamia_hf.training import features, load_records


@pytest.mark.parametrize("selection", [Selection("all", 1.0), Selection("delta_budget", 0.5)])
def test_right_is_what_generate_says(selection):
    model, processor = tiny_model(delta_threshold=None), tiny_processor()
    patches = torch.randn(3, 8, 16, 24, generator=torch.Generator().manual_seed(1))
    prompts = [prompt([7], 8, question)[0] for question in ([8, 9], [10], [11, 12, 13])]
    answers = []
    for video, input_ids in enumerate(prompts):
        output = model.generate(
            input_ids=input_ids[None],
            patch_features_videos=patches[video : video + 1],
            keep_ratio=selection.keep_ratio,
            max_new_tokens=3,
            do_sample=False,
        )
        answers += processor.batch_decode(output[:, len(input_ids) :], skip_special_tokens=True)
    model.generation_config.max_new_tokens = 3
    longest = max(len(input_ids) for input_ids in prompts)
    asked = EncodedVideos(
        tasks=["retrieval", "counting", "counting"],
        answers=[*answers[:2], "something else"],
        input_ids=torch.stack([torch.nn.functional.pad(ids, (longest - len(ids), 0)) for ids in prompts]),
        attention_mask=torch.stack([(torch.arange(longest) >= longest - len(ids)).long() for ids in prompts]),
        features=model.get_video_features(patch_features_videos=patches, delta_threshold=0.0),
    )
    assert accuracy(model, processor, [asked], selection) == {"retrieval": 1.0, "counting": 0.5}


def test_selections():
    encoded = MambaMiaFeaturesOutput(
        keep_mask=torch.ones(2, 8, dtype=torch.bool), frame_deltas=torch.tensor([[0.1] * 8, [0.0] * 6 + [1.0] * 2])
    )
    assert Selection("all", 1.0).keep_mask(encoded).all()
    uniform = Selection("uniform", 0.5).keep_mask(encoded)
    assert uniform.tolist() == 2 * [4 * [False, True]]
    assert Selection("uniform", 0.05).keep_mask(encoded).nonzero().tolist() == [[0, 4], [1, 4]]
    budget = Selection("delta_budget", 0.25).keep_mask(encoded)
    assert budget.sum(dim=1).tolist() == [2, 2] and budget[1, 6:].all()
    threshold = Selection("delta_threshold", 0.5, 0.5).keep_mask(encoded)
    assert threshold.sum(dim=1).tolist() == [1, 2]


def test_threshold_for_half():
    deltas = [torch.rand(8, generator=torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert share_kept(deltas, threshold_for_half(deltas)) == pytest.approx(0.5, abs=0.03)


@pytest.fixture(scope="module")
def needle(tmp_path_factory) -> Path:
    """What `examples/needle/run.sh` makes first, with an untrained tower and little data."""
    folder = tmp_path_factory.mktemp("the needle")
    processor = build_processor()
    build_model(processor).save_pretrained(folder / "vision")
    processor.save_pretrained(folder / "vision")
    for kind in ("stills", "videos"):
        training_data.main([kind, "--output", str(folder / "data" / kind), "--count", "6"])
        write_features(folder / "vision", folder / "data" / kind, folder / "features" / kind)
    return folder


def write_features(model: Path, media: Path, output: Path) -> None:
    data = ["--data", str(media / RECORDS), "--media_folder", str(media)]
    features.main(
        [
            "--model",
            str(model),
            *data,
            "--output",
            str(output),
            "--num_frames",
            str(run.SAMPLED_FRAMES),
            "--num_workers",
            "0",
        ]
    )


def test_questions_of_tasks(needle):
    conversations = load_records([needle / "data/videos" / RECORDS])
    records = run.questions_of_tasks(conversations)
    assert {record["task"] for record in records} <= set(run.TASKS) and len(records) >= 4
    for record in records:
        assert record["kinds"] == [record["task"]]
        question, answer = (turn["value"] for turn in record["conversations"])
        assert question.startswith("<video>\n") and question.count("<video>") == 1
        (options,) = re.findall(r"Options: (.*)\.", question)
        assert answer in options.split("; ")


@pytest.mark.slow
def test_runs_give_rows_and_are_not_repeated(needle, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SEEDS", (0,))
    monkeypatch.setattr(run, "VARIANTS", {name: run.VARIANTS[name] for name in ("MambaMia", "no compression")})
    tests = [tmp_path / "test 24", tmp_path / "test 48"]
    for folder in tests:
        num_frames = folder.name.removeprefix("test ")
        data = ["--output", str(folder), "--count", "6", "--num_frames", num_frames, "--tasks", *run.TASKS]
        training_data.main(["test_videos", *data])
        write_features(needle / "vision", folder, folder / "features")
    output, settings = tmp_path / "the rows.jsonl", Settings(train_frames=32, image_steps=1, video_steps=1)
    run_all(settings, needle, tests, output, workers=1)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    keys = {(row["variant"], row["num_frames"], row["selection"], row["keep_ratio"], row["task"]) for row in rows}
    assert len(keys) == len(rows) == 2 * 3 * (1 + 1 + 2 * len(run.KEEP_RATIOS) + 1)
    assert {row["variant"]: row["tokens_per_frame"] for row in rows} == {"MambaMia": 1, "no compression": 9}
    assert all(
        row["frames_kept"] == pytest.approx(0.5)
        for row in rows
        if row["keep_ratio"] == 0.5 and row["selection"] != "delta_threshold"
    )
    assert all(0 <= row["accuracy"] <= 1 and row["num_videos"] == 6 for row in rows)

    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join(line for line in lines if '"MambaMia"' in line))
    run_all(settings, needle, tests, output, workers=1)
    again = output.read_text().splitlines(keepends=True)
    assert again[:-6] == lines[:-6], "a finished run was repeated"
    assert len(again) == len(lines)
    with pytest.raises(ValueError, match="the rows.jsonl' has rows of Settings.*video_steps=1.*choose another output"):
        run_all(replace(settings, video_steps=2), needle, tests, output, workers=1)
    with pytest.raises(ValueError, match=r"\(48, 6\), and the tests have \[\(24, 6\)\]"):
        run_all(settings, needle, tests[:1], output, workers=1)


def test_recipe(modules_of, tmp_path, monkeypatch):
    script, output = Path(ablation.__file__).with_name("run.sh"), tmp_path / "an ablation"
    commands = modules_of(script, tmp_path / "a needle", output)
    called, written = [], []
    monkeypatch.setattr(run, "run_all", lambda *arguments: called.extend(arguments))
    monkeypatch.setattr(training_data, "write_data", lambda folder, *rest: written.append(folder))
    for module, arguments in commands:
        if module == "needle.training_data":
            training_data.main(arguments)
        if module == "ablation.run":
            run.main(arguments)
    settings, needle, tests, rows, _ = called
    assert settings == Settings(train_frames=32, image_steps=100, video_steps=1200)
    assert needle == tmp_path / "a needle"
    assert tests == written == [output / "test-32", output / "test-128"]
    features = [arguments for module, arguments in commands if module == "mambamia_hf.training.features"]
    assert all(str(folder / "features") in arguments for folder, arguments in zip(tests, features, strict=True))
    assert commands[-1] == ("ablation.report", [str(rows)])
