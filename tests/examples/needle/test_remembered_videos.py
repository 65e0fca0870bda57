import pytest
import torch
from needle import remembered_videos
from needle.plan import TASKS, plan_video
from needle.remembered_videos import RememberedVideo, remember, video_settings

from mambamia_hf import BUNDLED_CHECKPOINT, MambaMiaForConditionalGeneration


def make_video(task: str, num_frames: int = 32, seed: int = 3) -> RememberedVideo:
    """A video whose tokens are the numbers of its frames, and whose Δ are random."""
    plan = plan_video(seed, task=task, duration=num_frames, fps=1.0, num_frames=num_frames)
    tokens = torch.arange(float(num_frames))[:, None, None]
    return RememberedVideo(plan, tokens, torch.rand(num_frames, generator=torch.Generator().manual_seed(seed)))


def test_memories_are_written_once_and_fit_the_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(remembered_videos, "LENGTHS", (16,))
    remember(str(BUNDLED_CHECKPOINT), tmp_path, 23)
    written = (tmp_path / "23.memory").stat().st_mtime_ns
    remember(str(BUNDLED_CHECKPOINT), tmp_path, 23)
    assert (tmp_path / "23.memory").stat().st_mtime_ns == written

    model = MambaMiaForConditionalGeneration.from_pretrained(BUNDLED_CHECKPOINT)
    video = RememberedVideo.load(model, tmp_path, 23)
    assert video.tokens.shape == (16, 1, 128) and video.deltas.shape == (16,)
    assert video.plan.task == TASKS[23 % len(TASKS)] == "when" and video.plan.split == "train"
    (needle,) = video.plan.needles
    (first,) = video.first_frames
    assert needle.start == pytest.approx(first / video.plan.fps)
    # Frames differ most where the needle is, and just after it, as the compressor notices that it has gone.
    change = (video.tokens - video.tokens.median(dim=0).values).norm(dim=(1, 2))
    assert first <= change.argmax() <= first + round(needle.duration * video.plan.fps)

    (tmp_path / "23.memory").rename(tmp_path / "24.memory")
    monkeypatch.setattr(remembered_videos, "LENGTHS", (8,))
    with pytest.raises(ValueError, match=r"24.memory has 16 frames and the video of this seed 8; remove the file"):
        RememberedVideo.load(model, tmp_path, 24)


def test_settings_are_of_the_train_split_and_at_most_an_hour():
    videos = [plan_video(seed, **video_settings(seed)) for seed in range(60)]
    assert {video.task for video in videos} == set(TASKS)
    assert {video.total_num_frames for video in videos} == set(remembered_videos.LENGTHS)
    assert all(video.split == "train" and video.duration <= 3650 for video in videos)
