"""`mambamia demo`, and the small video that comes with it."""

import json

import numpy as np

from mambamia_hf.cli.demo import VIDEO
from mambamia_hf.video_decoding import decode_video


def test_demo_answers_its_own_question(program, tmp_path):
    folder = tmp_path / "some" / "demo"
    code, printed, _ = program("demo", "--output", folder)
    assert code == 0
    lines = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert lines["truth"].startswith(f"{lines['answer']} (of ")
    assert lines["question"].endswith("?")
    assert lines["tokens"].startswith("64 frames -> 576 patches -> 64 anchors -> 192 video tokens")
    assert sorted(entry.name for entry in folder.iterdir()) == ["needle.mp4", "timeline.png"]
    assert (folder / "needle.mp4").read_bytes() == VIDEO.read_bytes()
    assert program("demo", "--output", folder)[0] == 0  # once more in the same folder


def test_the_video_is_small_and_fits_its_question():
    assert VIDEO.stat().st_size < 300_000
    _, metadata = decode_video(VIDEO, lambda metadata: np.arange(1))
    assert (metadata.total_num_frames, metadata.duration) == (64, 32.0)
    needle = json.loads(VIDEO.with_suffix(".json").read_text())
    assert needle["answer"] in needle["options"] and len(set(needle["options"])) == len(needle["options"])
