import json
from pathlib import Path

import pytest
from needle.generate import main
from needle.plan import TASKS, Needle
from needle.questions import task_question
from needle.video import write_needle_video


def generate(folder: Path, *arguments: str) -> None:
    settings = ["--duration", "10", "--size", "32", "48", "--num_videos", "2", "--split", "test", "--first_seed", "5"]
    main(["--output", str(folder), "--workers", "1", *settings, *arguments])


def test_generate_writes_a_data_set_and_goes_on_where_it_stopped(tmp_path):
    folder = tmp_path / "my needles"
    generate(folder)
    file = folder / "records.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["id"] for record in records] == [f"{task}_test_{seed}" for task in TASKS for seed in (5, 6)]
    for record in records:
        video = write_needle_video(
            tmp_path / "again.mp4", record["seed"], task=record["task"], split="test", duration=10.0, size=(32, 48)
        )
        assert (folder / record["video"]).read_bytes() == video.path.read_bytes()
        question = task_question(video, record["seed"])
        assert [turn["value"] for turn in record["conversations"]] == [f"<video>\n{question.prompt}", question.answer]
        assert (tuple(record["options"]), record["answer"]) == (question.options, question.answer)
        assert [Needle(**needle) for needle in record["needles"]] == video.needles

    # One file is lost, the line of another was cut off, and the others are not made again.
    (folder / records[0]["video"]).unlink()
    text = file.read_text()
    file.write_text(text[:-20])
    kept = folder / records[1]["video"]
    kept.write_bytes(b"kept")
    generate(folder)
    assert file.read_text() == text
    assert (folder / records[0]["video"]).stat().st_size > 1000
    assert kept.read_bytes() == b"kept"

    with pytest.raises(SystemExit, match="error: .*retrieval_test_5 with other settings"):
        generate(folder, "--fps", "3")
