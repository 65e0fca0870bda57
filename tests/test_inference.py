"""A video that is encoded once and asked from Python. `tests/cli/test_ask.py` has the options, which are the same."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from tiny_model import tiny_checkpoint, video_prompt
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig
from video_files import write_video

from mambamia_hf.inference import ask, encode_video


QUESTION = "What shape appears in the video?"


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "video.mp4", num_frames=16, fps=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_checkpoint(folder)
    return folder


def test_an_answer_for_each_question(checkpoint, video):
    questions = (QUESTION, "Which colour?")
    answers = ask(checkpoint, video, *questions, keep_frames=4, max_new_tokens=8)
    assert [answer.question for answer in answers] == list(questions)
    for answer in answers:
        assert (answer.video, answer.model) == (str(video), str(checkpoint))
        assert len(answer.kept_frames) == 4
        alone = ask(checkpoint, video, answer.question, keep_frames=4, max_new_tokens=8)[0]
        assert (alone.answer, alone.frame_deltas) == (answer.answer, answer.frame_deltas)
        assert json.loads(json.dumps(asdict(answer))) == asdict(answer)
    assert ask(checkpoint, video) == []


def test_the_video_goes_through_the_vision_tower_once(checkpoint, video):
    encoded = encode_video(checkpoint, video)
    calls = []
    encoded.model.model.vision_tower.register_forward_hook(lambda *_: calls.append("tower"))
    encoded.model.model.compressor.register_forward_hook(lambda *_: calls.append("compressor"))
    first, second = encoded.ask(QUESTION, 4), encoded.ask(QUESTION, 4)
    assert calls == []
    assert first.answer == second.answer
    stages = ("decode", "vision", "compress")
    assert [first.seconds[stage] for stage in stages] == [second.seconds[stage] for stage in stages]


def prompt_of(encoded):
    """The tokens that the language model reads for the question."""
    return encoded.chat._tokens([{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}])


@pytest.mark.parametrize("template", ["{bos}", ""])
def test_the_prompt_is_that_of_the_processor(checkpoint, video, template):
    """Also where the tokenizer puts a token in front, unless the chat template does."""
    encoded = encode_video(checkpoint, video, keep_frames=5)
    processor = encoded.processor
    tokenizer = processor.tokenizer
    end = tokenizer.eos_token
    tokenizer.bos_token = end
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{end} $A", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    processor.chat_template = template.format(bos="{{ bos_token }}") + processor.chat_template
    expected = video_prompt(processor, video, QUESTION, keep_frames=5)
    prompt = prompt_of(encoded)
    assert [prompt] == expected["input_ids"].tolist()
    # One in front, and the ends of system message and question.
    assert prompt.count(tokenizer.eos_token_id) == 1 + 2


def test_a_placeholder_in_a_question_is_an_error(checkpoint, video):
    encoded = encode_video(checkpoint, video)
    with pytest.raises(ValueError, match="leave it out"):
        encoded.ask("What is <|video_pad|>?")


@pytest.mark.parametrize("other", ["keep_frames", "keep_ratio"])
def test_a_budget_and_a_threshold(other):
    with pytest.raises(ValueError, match="Give one of keep_frames, keep_ratio and delta_threshold"):
        ask("nowhere", "nowhere.mp4", QUESTION, delta_threshold=0.5, **{other: 1})


@pytest.mark.parametrize(
    ("checkpoint_name", "video_name", "options", "message"),
    [
        ("./nowhere", None, {}, "no folder './nowhere'"),
        (None, "nowhere.mp4", {}, "no video file 'nowhere.mp4'"),
        (None, None, {"start": 3.0, "end": 2.0}, "nothing from 3.0 to 2.0"),
        (None, None, {"device": "nothing"}, "device 'nothing'"),
        (None, None, {"dtype": "nothing"}, "dtype"),
        (None, None, {"seek_mode": "nothing"}, "nothing"),
        (None, None, {"fps": 2.0, "num_frames": 4}, "mutually exclusive"),
        (None, None, {"keep_frames": 0}, "keep_frames"),
    ],
)
def test_bad_input_from_python(checkpoint, video, checkpoint_name, video_name, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        encode_video(checkpoint_name or checkpoint, video_name or video, **options)


def test_deltas_are_those_of_the_memory(checkpoint, video):
    encoded = encode_video(checkpoint, video)
    assert torch.equal(torch.tensor(encoded.frame_deltas), encoded.memory.frame_deltas)


def test_bfloat16_weights_on_a_cpu(checkpoint, video, tmp_path, monkeypatch):
    """They stay, where the CPU multiplies them fast, or else become float32, which is said."""
    model, processor = tiny_checkpoint(tmp_path)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).dtype == torch.bfloat16
    monkeypatch.setattr("mambamia_hf.inference._multiplies_bfloat16_fast", lambda: True)
    assert encode_video(tmp_path, video).model.dtype == torch.bfloat16
    monkeypatch.setattr("mambamia_hf.inference._multiplies_bfloat16_fast", lambda: False)
    with pytest.warns(UserWarning, match="slower than float32"):
        assert encode_video(tmp_path, video).model.dtype == torch.float32
    assert encode_video(tmp_path, video, dtype="bfloat16").model.dtype == torch.bfloat16


def test_a_checkpoint_that_does_not_resize(checkpoint, tmp_path):
    """Its frames have to be of the right size, as from the processor."""
    tiny_checkpoint(tmp_path)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    config["video_processor"]["do_resize"] = False
    (tmp_path / "processor_config.json").write_text(json.dumps(config))
    path = write_video(tmp_path / "video.mp4", images=list(np.zeros((4, 32, 32, 3), np.uint8)), fps=2)
    assert len(ask(tmp_path, path, QUESTION, max_new_tokens=2)[0].timestamps) == 4


def test_more_frames_of_the_video_without_a_second_index(checkpoint, video, monkeypatch):
    with encode_video(checkpoint, video) as encoded:
        monkeypatch.setattr("mambamia_hf.video_decoding.read_index", None)
        batch = encoded.reader.frames_at([1, 5], lambda frame: frame[:, ::2, ::2])
    assert batch.data.shape[:2] == (2, 3) and batch.indices == [1, 5]


@pytest.mark.parametrize("settings", [{"frame_time_format": "mm:ss.d"}, {"time_instruction": True}])
def test_prompts_with_times_are_those_of_the_processor(tmp_path, video, settings):
    model, processor = tiny_checkpoint(tmp_path, **settings)
    encoded = encode_video(tmp_path, video, keep_frames=4)
    answer = encoded.ask(QUESTION, 8)
    inputs = video_prompt(processor, video, QUESTION, keep_frames=4)
    assert [prompt_of(encoded)] == inputs["input_ids"].tolist()
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    expected = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()
    assert answer.answer == expected
    assert answer.video_tokens == 4 * model.config.placeholders_per_frame()
