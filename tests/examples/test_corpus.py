"""`examples/corpus` in real processes of Ray: killed in the middle, called again, with videos that are none."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from program import environment
from tiny_model import tiny_checkpoint
from video_files import write_video

from mambamia_hf import VideoMemory


pytest.importorskip("ray", reason="needs the extra 'corpus'")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "corpus.md"
NAMES = [*(f"{number}.mp4" for number in range(3)), *(f"more/{number}.mkv" for number in range(3))]
BAD, DEADLY, STRANGE = "bad.mp4", "deadly.mp4", "strange.mp4"

# Ends the worker that looks at one video, and meets what nobody expected at another.
POISONED = f"""
import os, signal, sys
from corpus import encode

class Poisoned(encode.Encode):
    def __call__(self, row):
        if row["name"] == {DEADLY!r}:
            os.kill(os.getpid(), signal.SIGKILL)
        if row["name"] == {STRANGE!r}:
            raise RuntimeError("surprise")
        return super().__call__(row)

encode.Encode = Poisoned
sys.exit(encode.main())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a checkpoint, the videos of a corpus, and among them a file that is none."""
    folder = tmp_path_factory.mktemp("corpus")
    tiny_checkpoint(folder / "model")
    (folder / "videos" / "more").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        write_video(folder / "videos" / name, num_frames=300 + number, fps=2)
    (folder / "videos" / BAD).write_text("This is not a video.\n" * 50)
    (folder / "videos" / "notes.txt").write_text("Not named as a video, and left out.\n")
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    """The memories that `mambamia encode` writes with as many threads as a worker has, by the names of the videos."""
    paths = [str(folder / "videos" / name) for name in NAMES]
    code, _, error = finish(["-m", "mambamia_hf", "encode", *paths, "-o", "expected", "--model", "model"], folder)
    assert code == 0, error
    return {name: VideoMemory.load(folder / "expected" / f"{Path(name).name}.safetensors") for name in NAMES}


def commands() -> dict[str, list[str]]:
    """Module and arguments of the page's commands, by their modules, with the tiny checkpoint."""
    code = "\n".join(re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S))
    lines = [line for line in code.replace("\\\n", " ").splitlines() if " -m corpus." in line]
    found = {}
    for line in lines:
        words = shlex.split(line)
        start = words.index("-m") + 1
        found.setdefault(words[start], [*words[start:], "--model", "model"])
    return found


def start(command: list[str], folder: Path, **kwargs) -> subprocess.Popen:
    search = os.pathsep.join([str(ROOT / "src"), str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")])
    variables = environment(PYTHONPATH=search, RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1")
    return subprocess.Popen([sys.executable, *command], cwd=folder, env=variables, text=True, **kwargs)


def finish(command: list[str], folder: Path) -> tuple[int, str, str]:
    process = start(command, folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    printed, error = process.communicate()
    return process.returncode, printed, error


def report_of(folder: Path) -> dict[str, dict]:
    rows = [json.loads(line) for line in (folder / "report.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["name"]: row for row in rows}


def check_equal(memory: VideoMemory, expected: VideoMemory) -> None:
    assert torch.equal(memory.anchors, expected.anchors) and torch.equal(memory.frame_deltas, expected.frame_deltas)
    assert memory.timestamps == expected.timestamps and memory.fingerprint == expected.fingerprint


def test_killed_and_called_again(folder, expected):
    """The page's command: what is whole after `kill -9` is not written again, the rest is; the bad file is told."""
    command = ["-m", *commands()["corpus.encode"]]
    process = start(command, folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    first = next(line for line in process.stdout if line.rstrip().endswith(".safetensors")).strip()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    memories = folder / "memories"
    assert Path(first).parent in (memories, memories / "more") and not (memories / "report.jsonl").exists()
    before = {name: path.stat().st_mtime_ns for name in NAMES if (path := memories / f"{name}.safetensors").exists()}
    assert before

    code, printed, error = finish(command, folder)
    assert code == 2, error
    report = report_of(memories)
    assert report.keys() == {*NAMES, BAD}
    assert report[BAD]["outcome"] == "failed" and BAD in report[BAD]["error"] and report[BAD]["error"] in error
    for name in NAMES:
        path = memories / f"{name}.safetensors"
        assert str(path) in printed.splitlines()
        assert report[name]["outcome"] in ("there already", "written")
        if name in before:
            assert report[name]["outcome"] == "there already" and path.stat().st_mtime_ns == before[name]
        check_equal(VideoMemory.load(path), expected[name])


def test_a_table_of_the_memories(folder, expected):
    """The page's command: of each video the frames that its selection keeps, as `get_video_features` gives them."""
    from pyarrow.parquet import read_table

    from mambamia_hf import MambaMiaEncoder

    command = commands()["corpus.table"]
    assert "--keep-ratio" in command
    ratio = float(command[command.index("--keep-ratio") + 1])
    code, _, error = finish(["-m", *command], folder)
    assert code == 0, error
    rows = read_table(folder / command[command.index("--output") + 1]).to_pandas().groupby("video")
    encoder = MambaMiaEncoder.from_pretrained(folder / "model").eval()
    assert set(rows.groups) == set(NAMES)
    for name, memory in expected.items():
        features = encoder.get_video_features(video_memories=[memory], keep_ratio=ratio)
        kept = features.keep_mask[0].nonzero().squeeze(1)
        found = rows.get_group(name).sort_values("frame")
        assert found["frame"].tolist() == kept.tolist()
        assert found["time"].tolist() == [memory.timestamps[frame] for frame in kept]
        assert found["delta"].tolist() == memory.frame_deltas[kept].tolist()
        tokens = torch.tensor([[token.tolist() for token in frame] for frame in found["tokens"]])
        torch.testing.assert_close(tokens.flatten(0, 1), features.pooler_output[0], atol=1e-5, rtol=1e-4)


def test_what_ends_a_worker_is_told(folder):
    """A listing in place of the folder; a video that kills its worker costs no other."""
    names = ["videos/0.mp4", DEADLY, STRANGE, "videos/more/1.mkv"]
    for name in (DEADLY, STRANGE):
        write_video(folder / name, num_frames=4)
    (folder / "listing.txt").write_text("\n".join([*names[:3], str(folder / names[3])]) + "\n")
    arguments = ["listing.txt", "-o", "poisoned", "--model", "model", "--num-frames", "8", "--workers", "2"]
    code, _, error = finish(["-c", POISONED, *arguments], folder)
    assert code == 2, error
    report = report_of(folder / "poisoned")
    assert list(report) == names
    assert [report[name]["outcome"] for name in names] == ["written", "failed", "failed", "written"]
    assert "died" in report[DEADLY]["error"] and "died" in report[STRANGE]["error"]
    assert len(VideoMemory.load(folder / "poisoned" / "videos" / "more" / "1.mkv.safetensors")) == 8
