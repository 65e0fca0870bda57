"""Checkpoints as others get them: with their own copy of the code, on a machine that does not have this package."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from fake_hub import serving_hub
from needle.video import write_needle_video
from original_checkpoint import Original
from tiny_model import tiny_checkpoint
from transformers import AutoModel, AutoProcessor, AutoVideoProcessor
from video_files import write_video

from mambamia_hf import (
    MambaMiaCompressor,
    MambaMiaCompressorConfig,
    MambaMiaProcessor,
    MambaMiaVideoProcessor,
)


# Run where `mambamia_hf` cannot be imported: a folder, a video and a file to write the results to.
STRANGER = """
import sys
sys.modules["mambamia_hf"] = None
import torch
from transformers import (
    AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor, AutoVideoProcessor
)
folder, video, output = sys.argv[1:]
trusted = {"trust_remote_code": True}
processor = AutoProcessor.from_pretrained(folder, **trusted)
content = [{"type": "video", "path": video}, {"type": "text", "text": "What appears?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
)
logits = {}
for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    model = auto.from_pretrained(folder, **trusted)
    with torch.no_grad():
        logits[auto.__name__] = model(**inputs).logits
model.save_pretrained(folder + "_again")
loaded = [
    AutoConfig.from_pretrained(folder, **trusted),
    AutoModel.from_pretrained(folder, **trusted),
    AutoVideoProcessor.from_pretrained(folder, **trusted),
    AutoModelForImageTextToText.from_pretrained(folder + "_again", **trusted),
    processor,
]
torch.save({"logits": logits, "names": [type(thing).__name__ for thing in loaded]}, output)
"""

STRANGER_TO_THE_COMPRESSOR = """
import sys
sys.modules["mambamia_hf"] = None
import torch
from transformers import AutoModel
folder, features, output = sys.argv[1:]
compressor = AutoModel.from_pretrained(folder, trust_remote_code=True)
torch.save(compressor(torch.load(features)).last_hidden_state.detach(), output)
"""


def run_stranger(code: str, tmp_path: Path, *arguments: Path):
    """Runs `code` with Transformers' caches in `tmp_path` and returns what it saves in the last of `arguments`."""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    return torch.load(arguments[-1])


def test_checkpoint_carries_its_code(tmp_path):
    folder = tmp_path / "checkpoint"
    model, processor = tiny_checkpoint(folder, frame_time_format="mm:ss")
    video = write_needle_video(tmp_path / "video.mp4", 0, duration=10.0, size=(32, 32)).path
    seen = run_stranger(STRANGER, tmp_path, folder, video, tmp_path / "seen.pt")
    assert seen["names"] == [
        "MambaMiaConfig",
        "MambaMiaModel",
        "MambaMiaVideoProcessor",
        "MambaMiaForConditionalGeneration",
        "MambaMiaProcessor",
    ]
    content = [{"type": "video", "path": str(video)}, {"type": "text", "text": "What appears?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model(**inputs)
    assert not output.keep_mask.all(), "the selection should drop frames of this video"
    assert len(seen["logits"]) == 2
    for theirs in seen["logits"].values():
        torch.testing.assert_close(theirs, output.logits)


def test_compressor_carries_its_code(tmp_path):
    torch.manual_seed(0)
    config = MambaMiaCompressorConfig(
        input_size=12, output_size=8, hidden_size=16, head_dim=8, state_size=4, patches_per_anchor=3
    )
    compressor = MambaMiaCompressor(config)
    compressor.save_pretrained(tmp_path / "compressor")
    features = torch.randn(1, 3, 9, 12)
    torch.save(features, tmp_path / "features.pt")
    seen = run_stranger(
        STRANGER_TO_THE_COMPRESSOR, tmp_path, tmp_path / "compressor", tmp_path / "features.pt", tmp_path / "seen.pt"
    )
    torch.testing.assert_close(seen, compressor.eval()(features).last_hidden_state)
    assert type(AutoModel.from_pretrained(tmp_path / "compressor")) is MambaMiaCompressor


def test_auto_classes_find_the_package(tmp_path):
    tiny_checkpoint(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is MambaMiaProcessor
    assert type(AutoVideoProcessor.from_pretrained(tmp_path)) is MambaMiaVideoProcessor


def test_import_needs_no_network():
    code = """
import socket
def refuse(*arguments, **kwargs):
    raise AssertionError("the import opened a connection")
socket.socket.connect = refuse
socket.create_connection = refuse
import mambamia_hf
"""
    subprocess.run([sys.executable, "-c", code], check=True)


STRANGER_TO_MEMORIES = """
import sys
sys.modules["mambamia_hf"] = None
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, video, output = sys.argv[1:]
trusted = {"trust_remote_code": True}
processor = AutoProcessor.from_pretrained(folder, **trusted)
model = AutoModelForImageTextToText.from_pretrained(folder, **trusted).eval()
frames = torch.load(video)
stream = model.stream(processor, keep_frames=3)
stream.push(frames, list(range(len(frames))))
torch.save({"answer": stream.ask("What appears?", max_new_tokens=4), "kept": stream.kept_frames}, output)
"""


def test_memories_and_streams_of_the_code_that_a_checkpoint_carries(tmp_path):
    model, processor = tiny_checkpoint(tmp_path / "checkpoint")
    frames = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)
    torch.save(frames, tmp_path / "frames.pt")
    seen = run_stranger(
        STRANGER_TO_MEMORIES, tmp_path, tmp_path / "checkpoint", tmp_path / "frames.pt", tmp_path / "seen.pt"
    )
    stream = model.eval().stream(processor, keep_frames=3)
    stream.push(frames, list(range(7)))
    assert seen == {"answer": stream.ask("What appears?", max_new_tokens=4), "kept": stream.kept_frames}


LOAD_EACH = """
import mambamia_hf

for kind in ("ForConditionalGeneration", "Model", "Compressor", "Processor", "Config"):
    try:
        getattr(mambamia_hf, f"MambaMia{kind}").from_pretrained("lab/video")
    except ValueError as error:
        print(error)
"""


def test_a_hub_name_in_the_layout_of_the_authors_is_told_of_the_converter(tmp_path):
    original, video = Original().write(tmp_path / "original"), write_video(tmp_path / "video.mp4", num_frames=2)
    refusal = (
        "lab/video is a checkpoint in the layout of the authors' code (model_type='llava_qwen'); convert it first: "
        "python -m mambamia_hf.convert SRC DST"
    )
    with serving_hub() as hub:
        files = [path for path in original.rglob("*") if path.is_file()]
        hub.repositories["lab/video"] = {path.relative_to(original).as_posix(): path.read_bytes() for path in files}
        environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
        environment["HF_HUB_OFFLINE"] = "0"
        command = [sys.executable, "-c", LOAD_EACH]
        loaded = subprocess.run(command, env=environment, capture_output=True, text=True)
        command = [sys.executable, "-m", "mambamia_hf", "ask", str(video), "What?", "--model", "lab/video"]
        asked = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert loaded.stdout == 5 * f"{refusal}.\n", loaded.stderr
    assert asked.returncode == 2 and refusal in asked.stderr and asked.stderr.count("\n") == 1
