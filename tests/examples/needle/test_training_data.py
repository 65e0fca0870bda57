import json
from collections import Counter

import av
from needle.plan import TASKS, plan_video
from needle.questions import needle_questions
from needle.training_data import RECORDS, main
from PIL import Image


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


def test_videos(tmp_path):
    main(["videos", "--output", str(tmp_path), "--count", "4"])
    records = read(tmp_path)
    assert Counter(record["video"] for record in records) == {f"{seed}.mp4": 3 for seed in range(4)}
    for record in records:
        with av.open(str(tmp_path / record["video"])) as container:
            assert container.streams.video[0].frames == record["length"]

    main(["videos", "--output", str(tmp_path), "--count", "5"])
    assert read(tmp_path) == records, "finished data is written again"


def test_test_videos(tmp_path):
    main(["test_videos", "--output", str(tmp_path), "--count", "6", "--num_frames", "24"])
    records = read(tmp_path)
    assert [record["task"] for record in records] == 2 * list(TASKS)
    assert {record["length"] for record in records} == {24}
    assert all(" Options: " in record["conversations"][0]["value"] for record in records)
