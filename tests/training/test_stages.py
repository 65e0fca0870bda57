"""Which parts learn: in full, by LoRA, and what a frozen part costs."""

import pytest
import torch
from peft import PeftModel
from tiny_model import random_videos, tiny_model
from torch import Tensor
from training_runs import losses, parts_that_moved, run
from transformers import AutoModelForImageTextToText, AutoProcessor

from mambamia_hf import MambaMiaProcessor
from mambamia_hf.training.stages import STAGES, marks_of_turns, prepare_model


class TestStages:
    @pytest.mark.parametrize(
        ("stage", "learns", "learning_rate"),
        [
            ("image", {"compressor", "language_model"}, 2e-5),
            ("align", {"compressor", "temporal_layers"}, 1e-4),
            ("video", {"compressor", "temporal_layers", "language_model"}, 2e-5),
        ],
    )
    def test_what_learns_and_how_fast(self, training_folder, tmp_path, stage, learns, learning_rate):
        trainer = run(training_folder, tmp_path, stage, lr_scheduler_type="constant")
        assert trainer.state.log_history[0]["learning_rate"] == learning_rate
        before = AutoModelForImageTextToText.from_pretrained(training_folder / "model").state_dict()
        after = AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict()
        assert parts_that_moved(before, after) == learns

    def test_a_learning_rate_of_ones_own(self, training_folder, tmp_path):
        trainer = run(training_folder, tmp_path, "align", learning_rate=0.5, max_steps=1)
        assert trainer.state.log_history[0]["learning_rate"] == 0.5

    def test_every_weight_is_of_one_part(self):
        for settings in (
            {"end_of_frame": True},
            {"tie_word_embeddings": True},
            {"text_config": {"model_type": "llama"}},
        ):
            model = prepare_model(tiny_model(**settings), "align")
            learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            assert learning == {
                name for name, _ in model.named_parameters() if "compressor" in name or "end_of_frame" in name
            }

    @pytest.mark.slow
    def test_it_learns(self, training_folder, tmp_path):
        trainer = run(training_folder, tmp_path, learning_rate=3e-3, max_steps=16, per_device_train_batch_size=4)
        assert sum(losses(trainer)[-3:]) < 0.7 * sum(losses(trainer)[:3])

    def test_stages_follow_each_other(self, training_folder, tmp_path):
        run(training_folder, tmp_path / "align", "align", max_steps=1)
        run(training_folder, tmp_path / "video", "video", max_steps=1, model=tmp_path / "align")


# PEFT reads the property by the name that it had before Transformers 5.23.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
class TestLora:
    @pytest.mark.parametrize("stage", ["image", "video"])
    def test_adapter_merges_into_what_was_trained(self, training_folder, tmp_path, stage):
        trainer = run(training_folder, tmp_path / "lora", stage, lora_rank=4, learning_rate=1e-2)
        files = {path.name for path in (tmp_path / "lora").iterdir()}
        assert "adapter_model.safetensors" in files and "model.safetensors" not in files
        base = AutoModelForImageTextToText.from_pretrained(training_folder / "model")
        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        merged = PeftModel.from_pretrained(base, tmp_path / "lora").merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
        assert parts_that_moved(before, loaded.state_dict()) == set(STAGES[stage].learns)
        moved = {name for name, tensor in loaded.state_dict().items() if not torch.equal(tensor, before[name])}
        assert {name for name in moved if "language_model" in name} == {
            name for name in before if "language_model" in name and "_proj.weight" in name
        } | {"model.language_model.embed_tokens.weight"}
        ids = torch.tensor([[7, 9, 11, 13]])  # no placeholders
        torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("tied", [False, True])
    def test_marks_of_turns_learn(self, training_folder, tmp_path, tied):
        """A language model that lacked them would keep random numbers for them."""
        model, folder = training_folder / "model", tmp_path / "lora"
        if tied:
            base = AutoModelForImageTextToText.from_pretrained(model)
            base.config.tie_word_embeddings = base.config.text_config.tie_word_embeddings = True
            base.tie_weights()
            base.save_pretrained(tmp_path / "tied")
            AutoProcessor.from_pretrained(model).save_pretrained(tmp_path / "tied")
            model = tmp_path / "tied"
        trainer = run(training_folder, folder, model=model, lora_rank=4, learning_rate=1e-2)
        base = AutoModelForImageTextToText.from_pretrained(model)
        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        merged = PeftModel.from_pretrained(base, folder).merge_and_unload()
        assert isinstance(trainer.processing_class, MambaMiaProcessor)
        marks = marks_of_turns(trainer.processing_class)
        assert len(marks) == 4
        for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
            moved = (merged.state_dict()[name] != before[name]).any(dim=1).nonzero().flatten().tolist()
            assert 0 < len(moved) and set(moved) <= set(marks), name

    def test_resumes(self, training_folder, tmp_path):
        settings = {"lora_rank": 4, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
        unbroken = run(training_folder, tmp_path, **settings)
        checkpoint = tmp_path / "checkpoint-2"
        resumed = run(training_folder, tmp_path / "again", resume_from_checkpoint=checkpoint, **settings)
        assert losses(resumed) == losses(unbroken)

    def test_what_learns_is_float32_beside_weights_in_bfloat16(self, training_folder, tmp_path):
        model = run(training_folder, tmp_path, lora_rank=4, dtype="bfloat16", max_steps=1).model
        types = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
        assert types == {torch.float32}
        assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def checkpoint_activations(model):
    """By the name that the method has had since Transformers 5.23, or before."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def saved_bytes(model, call, *inputs) -> int:
    """Bytes that a call of a model, or of a part of it, keeps for the backward pass beside the model's weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call(*inputs)
    assert output is not None
    return sum(storages.values())


def test_activation_checkpointing_covers_the_compressor():
    """What is kept then is little more than the input of every block."""
    compressor = tiny_model(compressor_config={"hidden_size": 64, "num_hidden_layers": 3}).train().model.compressor
    patch_features = torch.randn(1, 32, 16, 24)
    plain = saved_bytes(compressor, compressor, patch_features)
    checkpoint_activations(compressor)
    checkpointed = saved_bytes(compressor, compressor, patch_features)
    block = 4 * 64 * 32 * 20  # float32 * hidden_size * frames * tokens per frame
    assert 3 * block <= checkpointed < 6 * block
    assert plain > 5 * checkpointed


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_tower_keeps_nothing(checkpointing):
    model = prepare_model(tiny_model(), "video").train()
    if checkpointing:
        checkpoint_activations(model)
        model.enable_input_require_grads()
    encode_frames, frames = model.model.encode_frames, random_videos(1, 8)[0]
    assert saved_bytes(model, encode_frames, frames) == 0
    assert not encode_frames(frames).last_hidden_state.requires_grad
    assert encode_frames(frames.clone().requires_grad_()).last_hidden_state.requires_grad
    model.model.vision_tower.requires_grad_(True)
    tower = 4 * 8 * 16 * 24  # float32 * frames * patches * width: the input of every layer
    assert saved_bytes(model, encode_frames, frames) > tower
