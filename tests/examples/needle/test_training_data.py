import json
from collections import Counter

import av
from needle import training_data
from needle.plan import TASKS, plan_video
from needle.questions import needle_questions
from needle.training_data import RECORDS, main
from PIL import Image

from mambamia_hf import MambaMiaVideoProcessor
from mambamia_hf.frame_times import format_time


def read(folder):
    return [json.loads(line) for line in (folder / RECORDS).read_text().splitlines()]


def test_stills(tmp_path):
    folder = tmp_path / "my stills"
    main(["stills", "--output", str(folder), "--count", "12"])
    records = read(folder)
    assert [record["image"] for record in records] == [f"{seed}.jpg" for seed in range(12)]
    for seed, record in enumerate(records):
        assert Image.open(folder / record["image"]).size == (128, 128)
        (needle,) = plan_video(seed, duration=1.0, fps=1.0, num_frames=1).needles
        question, answer = (turn["value"] for turn in record["conversations"])
        asked = question.removeprefix("<image>\n")
        assert answer == dict(needle_questions(needle, "image")).get(asked, needle.value)
        assert asked in dict(needle_questions(needle, "image")) or " Options: " in asked


def test_times_are_those_that_a_model_reads(tmp_path):
    """The answer to "when" is the time of a sampled frame, the first that shows the needle."""
    main(["videos", "--output", str(tmp_path), "--count", "12"])
    found = 0
    for record in read(tmp_path):
        video = str(tmp_path / record["video"])
        times = MambaMiaVideoProcessor(num_frames=128)(video, return_tensors="pt")["video_timestamps"][0]
        assert len(times) == record["length"]
        sampled = {format_time(seconds, "mm:ss") for seconds in times.tolist()}
        answers = [turn["value"] for turn in record["conversations"][1::2]]
        asked = {answer for kind, answer in zip(record["kinds"], answers, strict=True) if kind == "when"}
        assert asked <= sampled
        found += len(asked)
    assert found >= 12


def test_videos(tmp_path):
    main(["videos", "--output", str(tmp_path), "--count", "5"])
    records = read(tmp_path)
    assert [record["task"] for record in records] == [task for task in TASKS for _ in range(2)]
    assert Counter(record["video"] for record in records) == {f"{seed}.mp4": 2 for seed in range(5)}
    for record in records:
        with av.open(str(tmp_path / record["video"])) as container:
            assert container.streams.video[0].frames == record["length"]
        spoken = [turn["from"] for turn in record["conversations"]]
        assert len(spoken) >= 4 and spoken == ["human", "gpt"] * (len(spoken) // 2)
        is_shown = ["<video>" in turn["value"] for turn in record["conversations"]]
        assert is_shown == [True] + [False] * (len(spoken) - 1), "the video is shown once, at the beginning"

    main(["videos", "--output", str(tmp_path), "--count", "6"])
    assert read(tmp_path) == records, "finished data is written again"


def test_clips(tmp_path):
    main(["clips", "--output", str(tmp_path), "--count", "6"])
    records = read(tmp_path)
    assert {record["length"] for record in records} <= {6, 8}
    assert {record["task"] for record in records} == {"retrieval", "when", "nothing"}


def test_long_videos_have_seeds_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(training_data, "LONG_VIDEO_FRAMES", (16,))
    main(["long_videos", "--output", str(tmp_path), "--count", "2"])
    assert {record["video"]: record["length"] for record in read(tmp_path)} == {"100000.mp4": 16, "100001.mp4": 16}


def test_test_videos(tmp_path):
    main(["test_videos", "--output", str(tmp_path), "--count", "6", "--num_frames", "24"])
    records = read(tmp_path)
    assert [record["task"] for record in records] == [*TASKS, TASKS[0]]
    assert {record["length"] for record in records} == {24}
    choices = [record for record in records if record["task"] not in ("when", "nothing")]
    assert all(" Options: " in record["conversations"][0]["value"] for record in choices)


def test_test_videos_of_some_tasks(tmp_path):
    main(["test_videos", "--output", str(tmp_path), "--count", "3", "--num_frames", "8", "--tasks", "when", "nothing"])
    assert [record["task"] for record in read(tmp_path)] == ["when", "nothing", "when"]


def test_answers_of_test_videos_that_count_as_right(tmp_path):
    main(["test_videos", "--output", str(tmp_path), "--count", "5", "--num_frames", "8"])
    records = read(tmp_path)
    assert [record["task"] for record in records] == list(TASKS)
    for record in records:
        answer = record["conversations"][1]["value"]
        assert answer in record["answers"]
        assert len(record["answers"]) == 1 or (record["task"] == "when" and len(record["answers"]) >= 3)
