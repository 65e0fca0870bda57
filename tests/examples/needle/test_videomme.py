"""Needle videos in the format of Video-MME."""

import json
import sys
from contextlib import closing

from needle import videomme

from mambamia_hf.video_decoding import VideoReader


def test_questions_and_videos_are_where_lmms_eval_looks(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["videomme", "--output", str(tmp_path), "--count", "4"])
    videomme.main()
    rows = [json.loads(line) for line in (tmp_path / "lmms-eval/Video-MME/test.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [f"00{1 + row // 3}-{1 + row % 3}" for row in range(12)]
    for row in rows:
        assert [option[:3] for option in row["options"]] == ["A. ", "B. ", "C. ", "D. "]
        assert row["answer"] in "ABCD"
    assert {row["task_type"] for row in rows} == set(videomme.TASK_TYPES.values())
    assert [row["duration"] for row in rows[::3]] == ["short"] * 3 + ["medium"]
    video = tmp_path / "huggingface" / "videomme" / "data" / f"{rows[9]['videoID']}.mp4"
    with closing(VideoReader(video)) as reader:
        assert reader.metadata.duration == videomme.DURATIONS["medium"]
