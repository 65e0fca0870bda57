"""The checkpoint that comes with the package, and its card."""

import json
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from needle.evaluate import matches
from needle.questions import NOTHING, questions, task_question
from needle.video import write_needle_video
from tiny_model import ask
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from mambamia_hf import BUNDLED_CHECKPOINT, MambaMiaForConditionalGeneration
from mambamia_hf.model_card import PIPELINE_TAG, TAGS


@pytest.fixture(scope="module")
def model_and_processor():
    return (
        AutoModelForImageTextToText.from_pretrained(BUNDLED_CHECKPOINT),
        AutoProcessor.from_pretrained(BUNDLED_CHECKPOINT),
    )


def test_is_small_and_complete(model_and_processor):
    model, _ = model_and_processor
    assert type(model) is MambaMiaForConditionalGeneration
    files = list(Path(BUNDLED_CHECKPOINT).iterdir())
    assert sum(file.stat().st_size for file in files if file.suffix == ".safetensors") < 10e6
    assert not any(file.suffix == ".bin" for file in files)


def test_has_what_others_look_up():
    folder = Path(BUNDLED_CHECKPOINT)
    config, processor, videos = (
        json.loads((folder / name).read_text())
        for name in ("config.json", "processor_config.json", "video_preprocessor_config.json")
    )
    assert videos == processor["video_processor"]
    assert config["auto_map"]["AutoModelForImageTextToText"].endswith(f".{config['architectures'][0]}")
    for names in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
        assert names[config["model_type"]] == config["architectures"][0]


def test_answers_about_fresh_videos(model_and_processor, tmp_path):
    right = []
    for seed in range(12):
        video = write_needle_video(tmp_path / "video.mp4", seed, split="test")
        question, answer = questions(video)[0]
        right.append(ask(*model_and_processor, video.path, question, max_new_tokens=8) == answer)
    # It does not know all of them (see MODEL_CARD.md), but by chance one in twelve would be right.
    assert sum(right) >= 8, f"{sum(right)} of {len(right)} answers are right"


def test_tells_times(model_and_processor, tmp_path):
    right = []
    for seed in range(8):
        video = write_needle_video(tmp_path / "video.mp4", seed, task="when", split="test", duration=600.0, fps=0.1)
        question = task_question(video, seed)
        answer = ask(*model_and_processor, video.path, question.prompt, max_new_tokens=8)
        right.append(matches(question, answer, interval=10.0))
    assert sum(right) >= 6, f"{sum(right)} of {len(right)} times are right"


def test_says_nothing_where_nothing_is(model_and_processor, tmp_path):
    answers = []
    for seed in range(8):
        video = write_needle_video(tmp_path / "video.mp4", seed, task="nothing", split="test")
        answers.append(ask(*model_and_processor, video.path, task_question(video, seed).prompt, max_new_tokens=8))
    assert answers.count(NOTHING) >= 7, answers


def test_says_nothing_about_a_black_video(model_and_processor):
    frames = np.zeros((16, 96, 96, 3), np.uint8)
    inputs = model_and_processor[1](
        text="<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>What appears in the video?<|im_end|>\n"
        "<|im_start|>assistant\n",
        videos=[frames],
        video_metadata=[{"fps": 2.0}],
        return_tensors="pt",
    )
    output = model_and_processor[0].generate(**inputs, max_new_tokens=8)
    answer = model_and_processor[1].batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == [NOTHING]


def test_model_card_is_valid():
    card = ModelCard.load(Path(__file__).parents[1] / "MODEL_CARD.md")
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0" and data["library_name"] == "transformers"
    assert data["pipeline_tag"] == PIPELINE_TAG and set(TAGS) <= set(data["tags"])
    assert "@" not in card.text, "a figure has not been filled in"
