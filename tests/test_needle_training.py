"""`examples/needle/train.py` and `evaluate.py`: the stages, a tower that begins to learn, and one question."""

from argparse import Namespace

import pytest
import torch
import train
from needle.evaluate import is_right
from needle.train import STAGES, TRAINING, NamedStills, build_model, build_processor, train_vision_tower
from transformers import set_seed

from mambamia_hf import BUNDLED_CHECKPOINT, MambaMiaForConditionalGeneration


@pytest.mark.parametrize("name", STAGES)
def test_the_stages_are_arguments_of_train(name, tmp_path):
    files = ["--model", "somewhere", "--features", "features", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    stage, training = train.parse_arguments([*files, *f"{STAGES[name]} {TRAINING} --seed 1".split()])
    assert stage.stage == ("video" if name == "long_video" else name)
    assert training.max_steps > 0 and training.weight_decay == 0.05


def test_the_tower_alone_learns(tmp_path):
    train_vision_tower(tmp_path, steps=1, seed=3)
    trained = MambaMiaForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    set_seed(3)
    begun = build_model(build_processor()).state_dict()
    moved = {name for name, tensor in begun.items() if not torch.equal(trained[name], tensor)}
    assert moved and all(name.startswith("model.vision_tower.") for name in moved)


def test_stills_are_named():
    images, labels = NamedStills(4, build_processor().image_processor)[0].values()
    assert images.shape == (8, 3, 96, 96) and labels.shape == (8, 2)
    nothing = torch.tensor([len(NamedStills.names) - 1, len(NamedStills.colours) - 1])
    blank = (labels == nothing).all(dim=1)
    assert 0 < blank.sum() < 8
    assert (labels[~blank] < nothing).all()


def test_an_answer_about_a_video():
    arguments = Namespace(
        model=BUNDLED_CHECKPOINT,
        num_frames=32,
        duration=16.0,
        fps=2.0,
        size=(128, 128),
        background=None,
        keep_ratios=[1.0, 0.5],
    )
    answers = [is_right(arguments, "retrieval", seed) for seed in range(8)]
    assert all(answer.keys() == {1.0, 0.5} for answer in answers)
    assert sum(answer[1.0] for answer in answers) >= 6
