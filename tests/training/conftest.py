import json
from pathlib import Path

import pytest
from conversations import record
from PIL import Image
from tiny_model import tiny_checkpoint
from video_files import draw_number, write_video

from mambamia_hf import MambaMiaForConditionalGeneration, MambaMiaProcessor
from mambamia_hf.training import ConversationCollator, MediaReader


@pytest.fixture(scope="module")
def media_folder(tmp_path_factory) -> Path:
    """The media of the records in `conversations`."""
    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "a.mp4", num_frames=40)
    write_video(folder / "b.mp4", num_frames=20)
    (folder / "broken.mp4").write_bytes(b"no video at all")
    (folder / "cut.mp4").write_bytes((folder / "a.mp4").read_bytes()[:2000])
    Image.fromarray(draw_number(5)).save(folder / "a.png")
    return folder


@pytest.fixture(scope="module")
def model_and_processor(tmp_path_factory) -> tuple[MambaMiaForConditionalGeneration, MambaMiaProcessor]:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(model_and_processor) -> MambaMiaForConditionalGeneration:
    return model_and_processor[0].eval()


@pytest.fixture(scope="module")
def processor(model_and_processor) -> MambaMiaProcessor:
    return model_and_processor[1]


@pytest.fixture
def collator(processor, media_folder) -> ConversationCollator:
    return ConversationCollator(processor, MediaReader(processor, media_folder))


@pytest.fixture(scope="module")
def training_folder(tmp_path_factory) -> Path:
    """A model in `model`, media, and `data.json`: 6 videos, 3 images, 2 of text alone and a broken one."""
    folder = tmp_path_factory.mktemp("training")
    tiny_checkpoint(folder / "model")
    records = []
    for number in range(6):
        write_video(folder / f"{number}.mp4", num_frames=10 + 5 * number)
        records.append(record(f"video{number}", "<video>\nWhat?", "A " + "b" * number, video=f"{number}.mp4"))
    for number in range(3):
        Image.fromarray(draw_number(number)).save(folder / f"{number}.png")
        records.append(record(f"image{number}", "<image>\nWhat?", f"{number}", image=f"{number}.png"))
    records += [record("text0", "Hello.", "Hi!"), record("text1", "Who is it?", "Me.", "Who?", "I.")]
    (folder / "broken.mp4").write_bytes(b"no video at all")
    records.append(record("broken", "<video>\nWhat?", "Nothing.", video="broken.mp4"))
    (folder / "data.json").write_text(json.dumps(records))
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder
