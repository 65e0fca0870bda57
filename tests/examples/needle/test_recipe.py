"""`examples/needle/run.sh`: its stages build on each other, and it continues where it was stopped."""

from pathlib import Path

import needle
from needle import train_times, training_data
from needle.training_data import FIRST_LONG_VIDEO, LONG_VIDEO_FRAMES, RECORDS
from transformers import HfArgumentParser, TrainingArguments

from mambamia_hf.training.arguments import parse_arguments
from mambamia_hf.training.features import FeatureArguments


SCRIPT = Path(needle.__file__).with_name("run.sh")


def test_stages_build_on_each_other(modules_of, tmp_path, monkeypatch):
    output = tmp_path / "a run"
    written = {}
    monkeypatch.setattr(training_data, "write_data", lambda folder, write, seeds: written.update({folder: seeds}))
    commands = modules_of(SCRIPT, output)
    for module, arguments in commands:
        if module == "needle.training_data":
            training_data.main(arguments)
    data = output / "data"
    counts = {"stills": 8000, "clips": 3000, "videos": 4500, "long_videos": 700}
    assert {folder: len(seeds) for folder, seeds in written.items()} == {data / kind: counts[kind] for kind in counts}

    (vision,) = (arguments for module, arguments in commands if module == "needle.pretrain_vision")
    (vision,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(vision)
    assert vision.output_dir == str(output / "vision") and vision.warmup_steps == 0.1

    features = [
        HfArgumentParser(FeatureArguments).parse_args_into_dataclasses(arguments)[0]
        for module, arguments in commands
        if module == "mambamia_hf.training.features"
    ]
    assert [Path(one.media_folder) for one in features] == list(written)
    assert all(one.data == [str(Path(one.media_folder) / RECORDS)] for one in features)
    # Each kind has a folder of features: clips and videos have the same names.
    feature_folders = {Path(one.media_folder).name: one.output for one in features}
    assert len(set(feature_folders.values())) == 4
    assert features[-1].num_frames == max(LONG_VIDEO_FRAMES)
    assert {one.model for one in features} == {vision.output_dir}

    stages = [parse_arguments(arguments) for module, arguments in commands if module == "mambamia_hf.training"]
    assert [stage.stage for stage, _ in stages] == ["image", "video", "video", "video"]
    assert [stage.frame_dropout for stage, _ in stages] == [None, 0, 0, 0.8]
    assert [stage.length_scale for stage, _ in stages] == [
        1,
        1,
        1,
        max(LONG_VIDEO_FRAMES) / max(training_data.NUM_FRAMES),
    ]
    assert [Path(stage.data[0]).parent.name for stage, _ in stages] == ["stills", "clips", "videos", "videos"]
    model = vision.output_dir
    for stage, training in stages:
        assert stage.model == model
        assert stage.features == feature_folders[Path(stage.data[0]).parent.name]
        assert (training.seed, training.weight_decay, training.warmup_steps) == (2025, 0.05, 0.05)
        model = training.output_dir

    launcher, arguments = commands[-1]
    assert launcher == "torch.distributed.run" and arguments[2:4] == ["-m", "needle.train_times"]
    times = train_times.parse_arguments(arguments[4:])
    assert times.model == model == str(output / "long_video") and times.output == output / "times"
    assert str(times.features) == feature_folders["long_videos"]
    # Its videos and stills are new.
    seen = [seeds.stop for folder, seeds in written.items() if folder.name != "long_videos"]
    assert written[data / "long_videos"].start == FIRST_LONG_VIDEO
    assert max(*seen, vision.max_steps * vision.per_device_train_batch_size) <= FIRST_LONG_VIDEO


def test_finished_stages_are_left_out(modules_of, tmp_path):
    output = tmp_path / "a run"
    for name in ("vision", "image"):
        (output / name).mkdir(parents=True)
        (output / name / "trainer_state.json").touch()
    modules = [module for module, _ in modules_of(SCRIPT, output)]
    assert modules.count("mambamia_hf.training") == 3
    assert "needle.pretrain_vision" not in modules
