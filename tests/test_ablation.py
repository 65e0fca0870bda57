"""`examples/ablation.py`: what counts as right, how frames are selected, and a run of a few steps."""

import json
from dataclasses import replace
from pathlib import Path

import ablation
import precompute_features
import pytest
import torch
from needle.train import RECORDS, build_model, build_processor, still, video, write_data
from tiny_model import NUM_ANCHORS, prompt, tiny_model


def compressed_video(model, num_frames: int = 8) -> tuple[ablation.CompressedVideo, torch.Tensor]:
    """A video of random features, asked about in a prompt that ends with the question, and those features."""
    features = torch.randn(1, num_frames, 16, 24, generator=torch.Generator().manual_seed(1))
    encoded = model.get_video_features(video_features=features, delta_threshold=0.0)
    input_ids = prompt([7], num_frames, [8, 9])[0]
    tokens, deltas = encoded.last_hidden_state[0].detach(), encoded.frame_deltas[0].detach()
    return ablation.CompressedVideo("retrieval", input_ids, torch.empty(0), tokens, deltas), features


@pytest.mark.parametrize("keep_ratio", [None, 0.5])
def test_right_is_what_generate_says(keep_ratio):
    model = tiny_model(delta_threshold=None, keep_ratio=keep_ratio)
    asked, features = compressed_video(model)
    answer = model.generate(
        input_ids=asked.input_ids[None], video_features=features, max_new_tokens=3, do_sample=False
    )[0, -3:]
    select = ablation.every_frame if keep_ratio is None else ablation.by_delta(keep_ratio=keep_ratio)
    input_ids = torch.cat([asked.input_ids, answer])
    labels = torch.cat([torch.full_like(asked.input_ids, -100), answer])
    right = replace(asked, input_ids=input_ids, labels=labels)
    assert ablation.accuracy(model, [right], select) == {"retrieval": 1.0}
    wrong = replace(right, task="counting", labels=torch.cat([labels[:-1], labels[-1:] + 1]))
    assert ablation.accuracy(model, [right, wrong, wrong], select) == {"retrieval": 1.0, "counting": 0.0}
    assert right.tokens.shape[1] == NUM_ANCHORS


def test_selections():
    video, _ = compressed_video(tiny_model(delta_threshold=None))
    assert ablation.every_frame(video).tolist() == [True] * 8
    assert ablation.uniform(0.5)(video).nonzero().flatten().tolist() == [1, 3, 5, 7]
    assert ablation.uniform(0.05)(video).nonzero().flatten().tolist() == [4]
    assert ablation.uniform(1.0)(video).all()
    assert ablation.by_delta(keep_ratio=0.25)(video).sum() == 2


def test_threshold_for_half():
    video, _ = compressed_video(tiny_model(delta_threshold=None))
    videos = [
        replace(video, deltas=torch.rand(8, generator=torch.Generator().manual_seed(seed))) for seed in range(20)
    ]
    threshold = ablation.threshold_for_half(videos)
    assert ablation.share_kept(videos, ablation.by_delta(threshold=threshold)) == pytest.approx(0.5, abs=0.03)


def test_the_committed_table_is_that_of_the_committed_results():
    results = Path(ablation.__file__).parent / "results"
    summary = json.loads((results / "ablation.json").read_text())
    assert (results / "ablation.md").read_text() == ablation.markdown(summary)


@pytest.fixture(scope="module")
def needle(tmp_path_factory) -> Path:
    """What `examples/needle/train.py` leaves, with a tower that has not learned anything and little data."""
    folder = tmp_path_factory.mktemp("needle")
    processor = build_processor()
    build_model(processor).save_pretrained(folder / "vision")
    processor.save_pretrained(folder / "vision")
    for name, make in (("stills", still), ("videos", video)):
        write_data(folder / name, make, 6)
        media = ["--data", str(folder / name / RECORDS), "--media_folder", str(folder / name)]
        model = ["--model", str(folder / "vision"), "--output", str(folder / "features")]
        precompute_features.main([*model, *media, "--num_frames", "128", "--num_workers", "0"])
    return folder


def test_runs_and_their_summary(needle, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "SEEDS", (0, 1))
    monkeypatch.setattr(
        ablation, "VARIANTS", {name: ablation.VARIANTS[name] for name in ("MambaMia", "no compression")}
    )
    settings = ablation.Settings(num_frames=32, image_steps=1, video_steps=1, num_videos=3)
    for num_frames, folder in settings.test_folders(tmp_path).items():
        ablation.write_test_videos(folder, 3, num_frames, needle)
    results = [ablation.run(variant, 0, settings, needle, tmp_path) for variant in ablation.VARIANTS]
    assert [result["frame_tokens"] for result in results] == [1, 9]
    for result in results:
        assert list(result["tests"]) == ["32", "128"]
        for test in result["tests"].values():
            assert set(test["accuracy"]) == {"retrieval", "ordering", "counting"}
        for seed in (0, 1):
            name = result["variant"].replace(" ", "_")
            (tmp_path / f"{name}-{seed}.json").write_text(json.dumps({**result, "seed": seed}))
    # All of them are there: nothing is run again.
    results = ablation.run_all(settings, needle, tmp_path, workers=1)
    assert [(result["variant"], result["seed"]) for result in results] == [
        ("MambaMia", 0),
        ("no compression", 0),
        ("MambaMia", 1),
        ("no compression", 1),
    ]
    summary = ablation.summarise(results, settings)
    for num_frames, test in summary["tests"].items():
        assert test["selections"]["exact budget, 50 %"]["kept"] == 0.5
        assert test["budgets"]["1.0"]["uniform"] == summary["variants"]["MambaMia"]["accuracy"][num_frames]
    table = ablation.markdown(summary)
    assert "| no compression | " in table and "| uniform 50 % | 50% | " in table
    ablation.plot_variants(summary, tmp_path / "ablation.png")
    ablation.plot_budgets(summary, tmp_path / "budget.png")
    assert (tmp_path / "ablation.png").stat().st_size > 5000 and (tmp_path / "budget.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="other settings"):
        ablation.run_all(replace(settings, video_steps=2), needle, tmp_path, workers=1)
