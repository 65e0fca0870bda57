import torch
from needle.pretrain_vision import COLOUR_NAMES, VALUES, LabelledFrames, main
from needle.small_model import build_model, build_processor
from transformers import set_seed

from mambamia_hf import MambaMiaForConditionalGeneration


def test_the_tower_alone_learns_and_training_continues(tmp_path):
    folder = tmp_path / "the tower"
    arguments = ["--per_device_train_batch_size", "1", "--seed", "3", "--report_to", "none", "--use_cpu", "true"]
    main(["--output_dir", str(folder), "--max_steps", "1", *arguments])
    trained = MambaMiaForConditionalGeneration.from_pretrained(folder).state_dict()
    set_seed(3)
    untrained = build_model(build_processor()).state_dict()
    moved = {name for name, tensor in untrained.items() if not torch.equal(trained[name], tensor)}
    assert moved and all(name.startswith("model.vision_tower.") for name in moved)

    (folder / "trainer_state.json").unlink()
    main(["--output_dir", str(folder), "--max_steps", "2", *arguments])
    assert '"global_step": 2' in (folder / "trainer_state.json").read_text()
    assert (folder / "checkpoint-1").is_dir() and (folder / "checkpoint-2").is_dir()


def test_frames_are_labelled():
    images, labels = LabelledFrames(4, build_processor().image_processor)[0].values()
    assert images.shape == (8, 3, 96, 96) and labels.shape == (8, 2)
    nothing = torch.tensor([len(VALUES) - 1, len(COLOUR_NAMES) - 1])
    blank = (labels == nothing).all(dim=1)
    assert 0 < blank.sum() < 8
    assert (labels[~blank] < nothing).all()
