"""What the model of lmms-eval refuses, and how a task's settings become those of `generate`."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from mambamia_hf import BUNDLED_CHECKPOINT


pytest.importorskip("lmms_eval")

from mambamia_hf.lmms_eval.chat_model import MambaMia  # needs lmms-eval


DEMO = str(Path(BUNDLED_CHECKPOINT).parent / "demo" / "needle.mp4")


@pytest.fixture(scope="module")
def model():
    return MambaMia(device="cpu", dtype="float32", batch_size=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": "auto"}, "batch_size=auto"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"keep_ratio": 2}, "keep_ratio"),
        ({"keep_frames": 4, "keep_ratio": 0.5}, "keep_frames"),
        ({"keep_frames": 4, "delta_threshold": 0.5}, "delta_threshold"),
        ({"device": "nowhere"}, "nowhere"),
        ({"dtype": "float99"}, "dtype"),
        ({"attn_implementation": "none"}, "attn_implementation"),
        ({"pretrained": "no/such/folder"}, "no/such/folder"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_used(arguments, message):
    with pytest.raises(ValueError, match=message):
        MambaMia(**arguments)


def test_unknown_arguments_are_errors():
    with pytest.raises(TypeError, match="keep_frame"):
        MambaMia.create_from_arg_string(f"pretrained={BUNDLED_CHECKPOINT},keep_frame=3", {"batch_size": "1"})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"max_new_tokens": 8, "do_sample": False}),
        ({"max_new_tokens": 3, "temperature": 0, "top_p": 1.0, "do_sample": True}, {"max_new_tokens": 3}),
        ({"temperature": 0.7}, {"temperature": 0.7, "do_sample": True}),
        ({"temperature": 0.7, "do_sample": False, "num_beams": 1}, {"do_sample": False, "num_beams": 1}),
        ({"do_sample": True, "top_k": 5}, {"do_sample": True, "top_k": 5}),
        ({"temperature": 1.0, "top_p": None}, {"temperature": 1.0, "do_sample": True}),
    ],
    ids=str,
)
def test_settings_of_generation(model, settings, expected):
    assert model._generation_options(settings) == {"max_new_tokens": 8, "do_sample": False, **expected}


def ask(model, content, **settings):
    model.task_dict = {"task": {"test": [None]}}
    arguments = ("", lambda doc: [{"role": "user", "content": content}], settings, 0, "task", "test")
    return list(model.generate_until([SimpleNamespace(args=arguments)]))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"type": "video", "url": "no.mp4"}, "Question 0 of task: .*no.mp4"),
        ({"type": "image", "url": "no.png"}, "Question 0 of task: .*no.png"),
        ({"type": "audio", "url": "sound.wav"}, "Question 0 of task: it has sound"),
        ({"type": "video", "url": {"video_start": 1.0}}, "Question 0 of task: .*video_start"),
    ],
    ids=str,
)
def test_media_that_cannot_be_read(model, entry, message):
    with pytest.raises(ValueError, match=message):
        ask(model, [entry, {"type": "text", "text": "What appears?"}])


def test_a_prompt_that_is_too_long(model, monkeypatch):
    monkeypatch.setattr(model.model.config.text_config, "max_position_embeddings", 50)
    with pytest.raises(ValueError, match="Question 0 of task: .* tokens"):
        ask(model, [{"type": "video", "url": DEMO}, {"type": "text", "text": "What appears?"}])


def test_a_video_is_looked_at_once_for_questions_that_follow_each_other(model, monkeypatch):
    model._remember.cache_clear()
    looked_at = []
    monkeypatch.setattr(model.model, "encode_video", lambda video, *args, **part: looked_at.append(part) or video)
    entry = {"type": "video", "video": DEMO}
    entries = [entry, entry, {**entry, "video_end": 3.0}, entry, {**entry, "video_end": 3.0}]
    assert [model._medium(entry)["video"] for entry in entries] == [DEMO] * 5
    assert [part["end"] for part in looked_at] == [None, 3.0]
    model._remember.cache_clear()  # these were no memories


def test_text_that_ends_early(model):
    question = [{"type": "text", "text": "What appears in the video?"}]
    (whole,) = ask(model, question, max_new_tokens=4)
    assert len(whole.text) > 1
    (cut,) = ask(model, question, max_new_tokens=4, until=whole.text[1])
    assert cut.text == whole.text.split(whole.text[1])[0]


def test_other_kinds_of_tasks_are_refused(model):
    with pytest.raises(NotImplementedError, match="generate_until"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="generate_until"):
        model.generate_until_multi_round([])
