import pytest
import torch
from needle.video import write_needle_video
from PIL import Image
from tiny_model import tiny_checkpoint
from transformers import pipeline


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_checkpoint(folder)
    write_needle_video(folder / "video.mp4", 0, duration=10.0, size=(32, 32))
    return folder


def test_any_to_any_in_a_chat(checkpoint):
    answerer = pipeline("any-to-any", model=str(checkpoint))
    content = [
        {"type": "video", "path": str(checkpoint / "video.mp4")},
        {"type": "text", "text": "What appears?"},
    ]
    output = answerer([{"role": "user", "content": content}], max_new_tokens=3)
    assert output[0]["generated_text"][-1]["role"] == "assistant"


def test_any_to_any_with_videos(checkpoint):
    answerer = pipeline("any-to-any", model=str(checkpoint))
    output = answerer(
        text="<|video_pad|>What appears?",
        videos=str(checkpoint / "video.mp4"),
        max_new_tokens=3,
        return_full_text=False,
    )
    assert isinstance(output[0]["generated_text"], str)


@pytest.fixture(scope="module")
def answerer(checkpoint):
    return pipeline("any-to-any", model=str(checkpoint))


@pytest.fixture(scope="module")
def memory(checkpoint, answerer):
    return answerer.model.encode_video(checkpoint / "video.mp4", answerer.processor)


def test_memory_in_a_chat(checkpoint, answerer, memory):
    """A chat's media as Transformers' pipelines know them: in the content, under their type."""
    answers = []
    for video in ({"path": str(checkpoint / "video.mp4")}, {"video": memory}):
        content = [{"type": "video", **video}, {"type": "text", "text": "What appears?"}]
        output = answerer([{"role": "user", "content": content}], max_new_tokens=5, return_full_text=False)
        answers.append(output[0]["generated_text"])
    assert answers[0] == answers[1]


def test_memories_beside_text(checkpoint, answerer, memory):
    video = str(checkpoint / "video.mp4")
    text, options = "<|video_pad|>What appears?", {"max_new_tokens": 5, "return_full_text": False}
    expected = answerer(text=text, videos=video, **options)[0]["generated_text"]
    assert answerer(text=text, videos=memory, **options)[0]["generated_text"] == expected
    both = answerer(text=text * 2, videos=[memory, video], **options)[0]["generated_text"]
    assert both == answerer(text=text * 2, videos=[video, video], **options)[0]["generated_text"]


def test_times_survive_the_type_of_the_weights(checkpoint, tmp_path):
    tiny_checkpoint(tmp_path, frame_time_format="mm:ss")
    answerer = pipeline("any-to-any", model=str(tmp_path), dtype=torch.bfloat16)
    assert answerer.model.dtype == torch.bfloat16
    video = str(checkpoint / "video.mp4")
    output = answerer(text="<|video_pad|>What appears?", videos=video, max_new_tokens=3, return_full_text=False)
    assert isinstance(output[0]["generated_text"], str)


def test_image_text_to_text(checkpoint):
    answerer = pipeline("image-text-to-text", model=str(checkpoint))
    content = [{"type": "image", "image": Image.new("RGB", (40, 30))}, {"type": "text", "text": "What appears?"}]
    output = answerer(text=[{"role": "user", "content": content}], max_new_tokens=3)
    assert output[0]["generated_text"][-1]["role"] == "assistant"
