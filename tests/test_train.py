"""`examples/train.py`: stages, data in every form, resuming, LoRA, logs, and what activation checkpointing saves."""

import json
from pathlib import Path

import precompute_features
import pytest
import torch
import train
import yaml
from peft import PeftModel
from PIL import Image
from tiny_model import random_videos, tiny_checkpoint, tiny_model
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from video_files import draw_number, write_video


CONFIGS = Path(train.__file__).parent / "configs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model in `model`, media, and `data.json`: 6 videos, 3 images, 2 of text alone and a broken one."""
    folder = tmp_path_factory.mktemp("train")
    tiny_checkpoint(folder / "model")
    records = []
    for number in range(6):
        write_video(folder / f"{number}.mp4", num_frames=10 + 5 * number)
        records.append(sample(f"video{number}", "<video>\nWhat?", "A " + "b" * number, video=f"{number}.mp4"))
    for number in range(3):
        Image.fromarray(draw_number(number)).save(folder / f"{number}.png")
        records.append(sample(f"image{number}", "<image>\nWhat?", f"{number}", image=f"{number}.png"))
    records += [sample("text0", "Hello.", "Hi!"), sample("text1", "Who is it?", "Me.", "Who?", "I.")]
    (folder / "broken.mp4").write_bytes(b"no video at all")
    records.append(sample("broken", "<video>\nWhat?", "Nothing.", video="broken.mp4"))
    (folder / "data.json").write_text(json.dumps(records))
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def sample(name: str, *texts: str, **media: str) -> dict:
    turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]
    return {"id": name, **media, "conversations": turns}


def run(folder: Path, output: Path, stage: str = "video", data: str = "data.json", **settings):
    """Trains for 4 steps of 3 samples, or as `settings` say, and returns the `Trainer`."""
    settings = {
        "stage": stage,
        "model": folder / "model",
        "data": folder / data,
        "media_folder": folder,
        "num_frames": 3,
        "output_dir": output,
        "max_steps": 4,
        "per_device_train_batch_size": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
    }
    return train.main([text for name, value in settings.items() for text in (f"--{name}", str(value))])


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def parts_that_moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {train.part_of(name) for name, tensor in after.items() if not torch.equal(tensor, before[name])}


class TestStages:
    @pytest.mark.parametrize(
        ("stage", "learns", "learning_rate"),
        [
            ("image", {"compressor", "language_model"}, 2e-5),
            ("align", {"compressor", "temporal_layers"}, 1e-4),
            ("video", {"compressor", "temporal_layers", "language_model"}, 2e-5),
        ],
    )
    def test_what_learns_and_how_fast(self, folder, tmp_path, stage, learns, learning_rate):
        trainer = run(folder, tmp_path, stage, lr_scheduler_type="constant")
        assert trainer.state.log_history[0]["learning_rate"] == learning_rate
        before = AutoModelForImageTextToText.from_pretrained(folder / "model").state_dict()
        after = AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict()
        assert parts_that_moved(before, after) == learns

    def test_a_learning_rate_of_ones_own(self, folder, tmp_path):
        trainer = run(folder, tmp_path, "align", learning_rate=0.5, max_steps=1)
        assert trainer.state.log_history[0]["learning_rate"] == 0.5

    def test_every_weight_is_of_one_part(self):
        for settings in (
            {"end_of_frame": True},
            {"tie_word_embeddings": True},
            {"text_config": {"model_type": "llama"}},
        ):
            model = train.prepare_model(tiny_model(**settings), "align")
            learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            assert learning == {
                name for name, _ in model.named_parameters() if "compressor" in name or "end_of_frame" in name
            }

    def test_it_learns(self, folder, tmp_path):
        trainer = run(folder, tmp_path, learning_rate=3e-3, max_steps=16, per_device_train_batch_size=4)
        assert sum(losses(trainer)[-3:]) < 0.7 * sum(losses(trainer)[:3])

    def test_what_is_written_loads_and_says_how_many_were_skipped(self, folder, tmp_path, capsys):
        run(folder, tmp_path, "align")
        assert "1 samples were skipped and 0 were cut" in capsys.readouterr().out
        samples = train.reported_samples(tmp_path)
        assert [name for name, _ in samples["skipped"]] == ["broken"] and samples["cut"] == set()
        AutoModelForImageTextToText.from_pretrained(tmp_path)
        assert AutoProcessor.from_pretrained(tmp_path).video_processor.num_frames == 384

    def test_stages_follow_each_other(self, folder, tmp_path):
        run(folder, tmp_path / "align", "align", max_steps=1)
        run(folder, tmp_path / "video", "video", max_steps=1, model=tmp_path / "align")


class TestData:
    def test_workers(self, folder, tmp_path):
        expected = losses(run(folder, tmp_path / "0", "align"))
        assert losses(run(folder, tmp_path / "2", "align", dataloader_num_workers=2)) == expected

    def test_stream(self, folder, tmp_path):
        whole = run(folder, tmp_path / "whole", "align", train_sampling_strategy="sequential")
        stream = run(folder, tmp_path / "stream", "align", data="data.jsonl", streaming=True)
        assert losses(stream) == losses(whole)

    def test_features_in_place_of_pixels(self, folder, tmp_path):
        command = ["--model", folder / "model", "--data", folder / "data.json", "--media_folder", folder]
        command += ["--output", tmp_path / "features", "--num_frames", 3, "--num_workers", 0]
        precompute_features.main(list(map(str, command)))
        expected = losses(run(folder, tmp_path / "pixels", "align"))
        features = run(folder, tmp_path / "run", "align", features=tmp_path / "features", media_folder="nowhere")
        assert losses(features) == pytest.approx(expected, rel=1e-3)
        with pytest.raises(ValueError, match="made with video num_frames 3 and it is 2 now"):
            run(folder, tmp_path / "wrong", "align", features=tmp_path / "features", num_frames=2)

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_accumulated_gradients_give_the_steps_of_whole_batches(self, folder, tmp_path, checkpointing):
        """Their samples have very different numbers of tokens to learn."""
        model = tiny_model(compressor_config={"gpa_dropout": 0.0})
        reference = AutoModelForImageTextToText.from_pretrained(folder / "model")
        reference.config.compressor_config.gpa_dropout = model.config.compressor_config.gpa_dropout
        reference.save_pretrained(tmp_path / "model")
        AutoProcessor.from_pretrained(folder / "model").save_pretrained(tmp_path / "model")
        settings = {"model": tmp_path / "model", "learning_rate": 1e-3, "gradient_checkpointing": checkpointing}
        whole = run(folder, tmp_path / "whole", per_device_train_batch_size=4, **settings)
        parts = run(
            folder, tmp_path / "parts", per_device_train_batch_size=1, gradient_accumulation_steps=4, **settings
        )
        assert losses(parts) == pytest.approx(losses(whole), abs=1e-4)

    def test_a_video_that_is_longer_than_max_length(self, folder, tmp_path):
        with pytest.raises(ValueError, match="images and videos of sample 'video[0-9]' reach up to its token"):
            run(folder, tmp_path, max_length=20, max_steps=8)


class TestResuming:
    @pytest.mark.parametrize("how", ["workers", "stream", "accumulation", "stretched videos"])
    def test_losses_are_those_of_an_unbroken_run(self, folder, tmp_path, how):
        """With dropout, across the end of an epoch of 4 batches, and in the middle of one."""
        settings = {
            "workers": {"dataloader_num_workers": 2},
            "stream": {"data": "data.jsonl", "streaming": True},
            "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
            "stretched videos": {"video_stretch": 4, "dataloader_num_workers": 2},
        }[how]
        settings |= {"learning_rate": 1e-3, "max_steps": 7, "save_strategy": "steps", "save_steps": 2}
        unbroken = run(folder, tmp_path, **settings)
        for step in (2, 4, 6):
            checkpoint = tmp_path / f"checkpoint-{step}"
            resumed = run(folder, tmp_path / "again", resume_from_checkpoint=checkpoint, **settings)
            assert losses(resumed) == losses(unbroken)
            state = AutoModelForImageTextToText.from_pretrained(tmp_path / "again").state_dict()
            for name, tensor in AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict().items():
                assert torch.equal(tensor, state[name]), name

    def test_the_last_checkpoint(self, folder, tmp_path, capsys):
        settings = {"save_strategy": "steps", "save_steps": 2}
        broken_first = json.loads((folder / "data.json").read_text())[::-1]
        (tmp_path / "data.json").write_text(json.dumps(broken_first))
        settings |= {"data": tmp_path / "data.json", "train_sampling_strategy": "sequential"}
        run(folder, tmp_path, max_steps=2, resume_from_checkpoint=True, **settings)
        assert get_last_checkpoint(tmp_path).endswith("checkpoint-2")
        with pytest.raises(ValueError, match="checkpoint-2' of an earlier run: go on .* choose another output_dir"):
            run(folder, tmp_path, **settings)
        assert run(folder, tmp_path, resume_from_checkpoint=True, **settings).state.global_step == 4
        assert "1 samples were skipped" in capsys.readouterr().out.splitlines()[-1]  # by the earlier part of the run


class TestLora:
    @pytest.mark.parametrize("stage", ["image", "video"])
    def test_adapter_merges_into_what_was_trained(self, folder, tmp_path, stage):
        trainer = run(folder, tmp_path / "lora", stage, lora_rank=4, learning_rate=1e-2)
        files = {path.name for path in (tmp_path / "lora").iterdir()}
        assert "adapter_model.safetensors" in files and "model.safetensors" not in files
        base = AutoModelForImageTextToText.from_pretrained(folder / "model")
        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        merged = PeftModel.from_pretrained(base, tmp_path / "lora").merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
        learns, _ = train.STAGES[stage]
        assert parts_that_moved(before, loaded.state_dict()) == set(learns)
        moved = {name for name, tensor in loaded.state_dict().items() if not torch.equal(tensor, before[name])}
        assert {name for name in moved if "language_model" in name} == {
            name for name in before if "language_model" in name and "_proj.weight" in name
        }
        ids = torch.tensor([[5, 7, 11, 13]])
        torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits, atol=1e-4, rtol=1e-4)

    def test_resumes(self, folder, tmp_path):
        settings = {"lora_rank": 4, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
        unbroken = run(folder, tmp_path, **settings)
        checkpoint = tmp_path / "checkpoint-2"
        resumed = run(folder, tmp_path / "again", resume_from_checkpoint=checkpoint, **settings)
        assert losses(resumed) == losses(unbroken)

    def test_what_learns_is_float32_beside_weights_in_bfloat16(self, folder, tmp_path):
        model = run(folder, tmp_path, lora_rank=4, dtype="bfloat16", max_steps=1).model
        types = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
        assert types == {torch.float32}
        assert model.get_input_embeddings().weight.dtype == torch.bfloat16

    def test_where_the_language_model_does_not_learn(self, folder, tmp_path):
        with pytest.raises(ValueError, match="lora_rank=4 and the language model does not learn in stage align"):
            run(folder, tmp_path, "align", lora_rank=4)


class TestArguments:
    def test_yaml_and_what_goes_before_it(self, tmp_path):
        settings = {
            "stage": "video",
            "model": "somewhere",
            "data": ["a.json", "b.jsonl"],
            "output_dir": str(tmp_path),
            "learning_rate": 1e-3,
            "max_length": 7,
            "lr_scheduler_kwargs": {"num_cycles": 2},
            "use_cpu": True,
        }
        (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings))
        stage, training = train.parse_arguments([str(tmp_path / "a.yaml"), "--max_length", "8", "--data", "c.json"])
        assert (stage.stage, stage.max_length, stage.data) == ("video", 8, ["c.json"])
        assert (training.learning_rate, training.use_cpu) == (1e-3, True)
        assert training.lr_scheduler_kwargs == {"num_cycles": 2}

    def test_a_name_that_there_is_not(self, tmp_path, capsys):
        (tmp_path / "a.yaml").write_text("stage: video\nmodel: somewhere\nmodle: elsewhere\n")
        with pytest.raises((SystemExit, ValueError)) as error:
            train.parse_arguments([str(tmp_path / "a.yaml"), "--data", "a.json", "--output_dir", str(tmp_path)])
        assert "modle" in str(error.value) + capsys.readouterr().err

    def test_a_stretch_that_would_shorten(self, tmp_path):
        arguments = ["--stage", "video", "--model", "somewhere", "--data", "a.json", "--output_dir", str(tmp_path)]
        with pytest.raises(ValueError, match="video_stretch must be at least 1, not 0.5"):
            train.parse_arguments([*arguments, "--video_stretch", "0.5"])

    @pytest.mark.parametrize("stage", train.STAGES)
    def test_the_configs_that_come_along(self, stage, tmp_path):
        arguments = ["--model", "somewhere", "--data", "a.json", "--output_dir", str(tmp_path), "--bf16", "false"]
        arguments, training = train.parse_arguments([str(CONFIGS / f"{stage}.yaml"), *arguments, "--use_cpu", "true"])
        assert arguments.stage == stage and training.learning_rate == train.STAGES[stage][1]
        assert training.gradient_checkpointing and training.seed == 2025
        assert training.get_warmup_steps(1000) == 30


class TestLogs:
    def test_throughput_and_memory(self, folder, tmp_path):
        """One epoch of all but the broken sample in one batch, whose frames and tokens are known."""
        trainer = run(folder, tmp_path, max_steps=1, per_device_train_batch_size=12)
        (entry,) = (entry for entry in trainer.state.log_history if "loss" in entry)
        frames, tokens = 2 + 5 * 3 + 3, int(trainer.data_collator(trainer.train_dataset)["attention_mask"].sum())
        assert entry["frames_per_second"] > 0
        assert entry["tokens_per_second"] / entry["frames_per_second"] == pytest.approx(tokens / frames)
        assert 0.1 < entry["peak_memory_gb"] < 100

    def test_files_get_them(self, folder, tmp_path):
        run(folder, tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
        logged = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
        assert {"frames_per_second", "tokens_per_second", "peak_memory_gb"} <= logged[0].keys()


def saved_bytes(model, call=None, **inputs) -> int:
    """Bytes that a forward pass, or another call, keeps for the backward pass, the model's weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = (call or model)(**inputs)
    assert output is not None
    return sum(storages.values())


def test_activation_checkpointing_covers_the_compressor():
    """What is kept then is little more than the input of every block."""
    compressor = tiny_model(compressor_config={"hidden_size": 64, "num_hidden_layers": 3}).train().model.compressor
    features = torch.randn(1, 32, 16, 24)
    plain = saved_bytes(compressor, features=features)
    compressor.gradient_checkpointing_enable()
    checkpointed = saved_bytes(compressor, features=features)
    block = 4 * 64 * 32 * 20  # float32 * hidden_size * frames * tokens of a frame
    assert 3 * block <= checkpointed < 6 * block
    assert plain > 5 * checkpointed


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_tower_keeps_nothing(checkpointing):
    model = train.prepare_model(tiny_model(), "video").train()
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    encode_frames, frames = model.model.encode_frames, random_videos(1, 8)[0]
    assert saved_bytes(model, encode_frames, frames=frames) == 0
    assert not encode_frames(frames).last_hidden_state.requires_grad
    assert encode_frames(frames.clone().requires_grad_()).last_hidden_state.requires_grad
    model.model.vision_tower.requires_grad_(True)
    tower = 4 * 8 * 16 * 24  # float32 * frames * patches * width: the input of every layer
    assert saved_bytes(model, encode_frames, frames=frames) > tower


def test_out_of_memory_comes_with_advice(folder, tmp_path):
    def exhausted(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = torch.nn.modules.module.register_module_forward_pre_hook(exhausted)
    try:
        with pytest.raises(RuntimeError, match="per_device_train_batch_size=3 and num_frames=3: lower them"):
            run(folder, tmp_path)
    finally:
        hook.remove()


def test_arguments_that_must_not_be_otherwise(folder, tmp_path):
    _, training = train.parse_arguments(
        ["--stage", "align", "--model", "m", "--data", "d.json", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    )
    assert isinstance(training, TrainingArguments)
    assert not training.remove_unused_columns and training.accelerator_config.dispatch_batches is False
