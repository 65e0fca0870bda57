import pytest
import torch
from needle import remembered_videos
from needle.conversations import Asked
from needle.looks import Look
from needle.remembered_videos import STILLS_PER_SEED, remember_stills
from needle.small_model import build_model, build_processor
from needle.train_times import Reader, Training, main, most_frames
from needle.video import needle_frames
from test_remembered_videos import make_video
from transformers import set_seed

from mambamia_hf import MambaMiaForConditionalGeneration, VideoMemory
from mambamia_hf.video_memory import encoder_fingerprint


@pytest.fixture(scope="module")
def model_and_processor():
    set_seed(0)
    processor = build_processor()
    return build_model(processor).eval(), processor


def look_at(tokens: torch.Tensor, times: list[float] | None, *questions: tuple[str, str]) -> Look:
    return Look(tokens, times, [Asked("", question, answer) for question, answer in questions])


QUESTIONS = [("When does the star appear?", "00:07"), ("What appears?", "star"), ("Which order?", "3 star 7")]


def test_questions_that_share_a_video_are_answered_as_alone(model_and_processor):
    """As the whole model answers about the memory, question by question."""
    model, processor = model_and_processor
    anchors, times = torch.randn(5, 1, 128), [0.0, 7.0, 8.5, 61.0, 3599.0]
    memory = VideoMemory(anchors, torch.rand(5), times, encoder_fingerprint(model))
    with torch.no_grad():
        look = look_at(model.model.project(anchors), times, *QUESTIONS)
    check_answers(model, processor, look, {"type": "video", "video": memory})


def test_questions_that_share_a_still_are_answered_as_alone(model_and_processor):
    model, processor = model_and_processor
    still, *_ = remember_stills(model, processor, 5)
    (image, needle), *_ = needle_frames(5, STILLS_PER_SEED)
    assert still.needle == needle
    look = look_at(still.tokens, None, *QUESTIONS)
    check_answers(model, processor, look, {"type": "image", "image": image})


def check_answers(model, processor, look: Look, medium: dict) -> None:
    with torch.no_grad():
        logits, tokens, number = Reader(model, processor).answers(look)
    assert logits.shape == (len(tokens), model.config.text_config.vocab_size)
    for which, (question, answer) in enumerate(QUESTIONS):
        conversation = [{"role": "user", "content": [medium, {"type": "text", "text": question}]}]
        inputs = processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        own = processor.tokenizer(answer + "<|im_end|>")["input_ids"]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([own])], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            alone = model(**inputs).logits[0, -len(own) - 1 : -1]
        assert tokens[number == which].tolist() == own
        torch.testing.assert_close(logits[number == which], alone, atol=1e-4, rtol=1e-4)


def test_looks_become_longer():
    lengths = [most_frames(step / 100) for step in range(101)]
    assert lengths == sorted(lengths) and lengths[0] == 32 and set(lengths[50:]) == {384}


def test_the_language_model_alone_learns(model_and_processor, tmp_path):
    model, processor = model_and_processor
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    videos = [video_with_tokens(seed) for seed in range(4)]
    stills = remember_stills(model, processor, 5)
    training = Training(model, processor, videos, stills, tmp_path, max_steps=12, learning_rate=3e-3)
    training.run(save_steps=100)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all("language_model" in name or name == "lm_head.weight" for name in moved)
    saved = MambaMiaForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(saved[name], before[name]) for name in before.keys() - moved)
    assert not torch.equal(saved["lm_head.weight"], model.state_dict()["lm_head.weight"])  # it is the average


def video_with_tokens(seed: int):
    video = make_video("when", num_frames=16, seed=seed)
    return remembered_videos.RememberedVideo(video.plan, torch.randn(16, 1, 128), video.deltas)


def test_the_command_goes_on_where_it_stopped(model_and_processor, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(remembered_videos, "LENGTHS", (16,))
    model, processor = model_and_processor
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--memories", str(tmp_path / "memories"), "--num_videos", "5"]
    arguments += ["--num_stills", "4", "--output", str(tmp_path / "out"), "--workers", "1", "--save_steps", "1"]
    main([*arguments, "--max_steps", "2"])
    steps = []
    take_step = Training.take_step
    monkeypatch.setattr(Training, "take_step", lambda self: steps.append(self.step) or take_step(self))
    main([*arguments, "--max_steps", "3"])
    assert steps == [2]
    assert len(list((tmp_path / "memories").glob("*.memory"))) == 5
