import pytest
import torch
from needle import training_data
from needle.plan import TASKS, plan_video
from needle.seen_videos import SeenVideo, seen_videos
from needle.training_data import plan_long_video

from mambamia_hf import BUNDLED_CHECKPOINT, MambaMiaForConditionalGeneration, MambaMiaProcessor
from mambamia_hf.training import features
from mambamia_hf.training.media import MediaReader, VisionFeatures


def make_video(task: str, num_frames: int = 32, seed: int = 3) -> SeenVideo:
    """A video whose features are the numbers of its frames."""
    plan = plan_video(seed, task=task, duration=num_frames, fps=1.0, num_frames=num_frames)
    return SeenVideo(plan, torch.arange(float(num_frames))[:, None, None])


@pytest.fixture(scope="module")
def features_of_long_videos(tmp_path_factory) -> VisionFeatures:
    """Those of the bundled model, of five videos as `run.sh` writes them, but short."""
    folder = tmp_path_factory.mktemp("long videos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_data, "LONG_VIDEO_FRAMES", (16,))
        training_data.main(["long_videos", "--output", str(folder / "data"), "--count", "5"])
    arguments = ["--model", str(BUNDLED_CHECKPOINT), "--data", str(folder / "data" / training_data.RECORDS)]
    arguments += ["--media_folder", str(folder / "data"), "--output", str(folder / "features"), "--num_workers", "0"]
    features.main(arguments)
    processor = MambaMiaProcessor.from_pretrained(BUNDLED_CHECKPOINT)
    model = MambaMiaForConditionalGeneration.from_pretrained(BUNDLED_CHECKPOINT)
    return VisionFeatures(folder / "features", MediaReader(processor).settings(model))


def test_features_show_what_is_planned(features_of_long_videos, monkeypatch):
    monkeypatch.setattr(training_data, "LONG_VIDEO_FRAMES", (16,))
    videos = seen_videos(features_of_long_videos)
    assert [video.plan.task for video in videos] == list(TASKS)
    for video in videos:
        assert video.features.shape == (16, 9, 128) and video.features.isfinite().all()
        assert len(video.shown) == len(video.plan.needles)
        for needle, shown in zip(video.plan.needles, video.shown, strict=True):
            assert needle.start == pytest.approx(shown.start / video.plan.fps)
            assert needle.duration == pytest.approx(len(shown) / video.plan.fps)
    # A frame with a needle differs more from the others than these from each other.
    (needle,) = videos[TASKS.index("retrieval")].shown
    frames = videos[TASKS.index("retrieval")].features.float().flatten(1)
    distances = (frames - frames.median(dim=0).values).norm(dim=1)
    assert int(distances.argmax()) in needle


def test_features_of_other_videos_are_refused(features_of_long_videos, monkeypatch):
    monkeypatch.setattr(training_data, "LONG_VIDEO_FRAMES", (8,))
    with pytest.raises(ValueError, match="seed 100000 has features of 16 frames and is planned with 8; write"):
        seen_videos(features_of_long_videos)


def test_long_videos_are_of_the_train_split_and_at_most_an_hour():
    videos = [plan_long_video(seed) for seed in range(60)]
    assert {video.task for video in videos} == set(TASKS)
    assert {video.total_num_frames for video in videos} == set(training_data.LONG_VIDEO_FRAMES)
    assert all(video.split == "train" and video.duration <= 3650 for video in videos)
