"""TRL's trainers, unmodified: the recipes of docs/finetuning_trl.md, and the scores that they learn from."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from pages import blocks


trl = pytest.importorskip("trl")
from datasets import Dataset  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

from mambamia_hf import BUNDLED_CHECKPOINT, MambaMiaForConditionalGeneration, MambaMiaProcessor  # noqa: E402


PAGE = Path(__file__).parents[1] / "docs/finetuning_trl.md"
DEMO = Path(BUNDLED_CHECKPOINT).parent / "demo" / "needle.mp4"
VIDEO = [{"type": "video", "path": str(DEMO)}, {"type": "text", "text": "What shape appears?"}]
SETTINGS = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "bf16": False}


@pytest.fixture
def model() -> MambaMiaForConditionalGeneration:
    return MambaMiaForConditionalGeneration.from_pretrained(BUNDLED_CHECKPOINT)


@pytest.fixture(scope="module")
def processor() -> MambaMiaProcessor:
    return MambaMiaProcessor.from_pretrained(BUNDLED_CHECKPOINT, num_frames=24)


def said(role: str, content: str | list) -> list[dict]:
    return [{"role": role, "content": [{"type": "text", "text": content}] if isinstance(content, str) else content}]


def conversation(question: list, answer: str = "star") -> dict:
    return {"images": [], "messages": said("user", question) + said("assistant", answer)}


def batch_of(processor, *conversations: dict) -> tuple[dict, torch.Tensor]:
    """The arguments of the model, and labels of the assistant's turns."""
    inputs = processor.apply_chat_template(
        [conversation["messages"] for conversation in conversations],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "padding_side": "right"},
    )
    masks = torch.as_tensor(inputs.pop("assistant_masks"))
    return dict(inputs), inputs["input_ids"].masked_fill(masks == 0, -100)


def test_recipes(tmp_path, monkeypatch):
    """Every block of the page runs as it stands, in a folder with `video.mp4`, and prints what it says."""
    shutil.copy(DEMO, tmp_path / "video.mp4")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_DISABLED", "true")
    recipes = list(blocks(PAGE, "python"))
    assert len(recipes) == 6
    namespace: dict = {"__name__": "__main__"}
    for recipe in recipes:
        exec(compile(recipe.code, str(PAGE), "exec"), namespace)
        if "trainer" in namespace:
            (summary,) = (entry for entry in namespace["trainer"].state.log_history if "train_loss" in entry)
            assert math.isfinite(summary["train_loss"])
    assert {folder.name for folder in (tmp_path / "runs").iterdir()} == {"sft", "lora", "dpo", "grpo"}
    tuned = MambaMiaForConditionalGeneration.from_pretrained(tmp_path / "runs/sft/checkpoint-2")
    before = MambaMiaForConditionalGeneration.from_pretrained(BUNDLED_CHECKPOINT)
    moved = {
        name.split(".")[1]
        for (name, new), old in zip(tuned.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(new, old)
    }
    assert moved >= {"compressor", "language_model"} and "vision_tower" not in moved


@pytest.mark.parametrize("training", [True, False])
def test_the_fused_head_scores_as_if_frames_had_never_been_there(model, processor, training):
    """In rows of several lengths; a processor with a budget makes prompts without the places of dropped frames."""
    chats = conversation(VIDEO, "star square"), conversation(VIDEO)
    budget = MambaMiaProcessor.from_pretrained(BUNDLED_CHECKPOINT, num_frames=24, keep_frames=8)
    sized, sized_labels = batch_of(budget, *chats)
    inputs, labels = batch_of(processor, *chats)
    assert sized_labels.shape[1] < labels.shape[1]
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train(training)
    expected = model(**sized, labels=sized_labels)
    assert expected.token_indices is None and expected.keep_mask.sum(dim=1).tolist() == [8, 8]
    del inputs["num_kept_frames"]
    add_fused_lm_head(model)
    fused = model(**inputs, keep_frames=8, labels=labels, fused_lm_head=True)
    assert fused.log_probs.shape == labels[:, 1:].shape
    torch.testing.assert_close(fused.loss, expected.loss)
    own = model(**inputs, keep_frames=8, labels=labels)
    assert own.token_indices is not None and own.logits.shape[:2] == labels.shape
    torch.testing.assert_close(own.loss, expected.loss)


def test_sft_drops_frames_in_training_and_in_evaluation(model, processor, tmp_path):
    model.config.frame_dropout, model.config.keep_frames = 0.9, 8
    rows = Dataset.from_list([conversation(VIDEO, answer) for answer in ("star", "nothing")])
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(tmp_path, max_length=None, assistant_only_loss=True, learning_rate=0.0, **SETTINGS),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=processor,
    )
    trainer.train()
    inputs, labels = batch_of(processor, *rows)
    with torch.no_grad():
        expected = model.eval()(**inputs, labels=labels)
    assert expected.token_indices is not None
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-4)


def with_images(**columns: list) -> dict:
    return {"images": [], **columns}


PAIR = {"chosen": said("assistant", "star"), "rejected": said("assistant", "ring")}
REFUSED = {
    "a video that is cut": ("SFT", conversation(VIDEO), {"max_length": 20}, "Mismatch in `video` token count"),
    "no column images": ("SFT", {"messages": conversation(VIDEO)["messages"]}, {"max_length": None}, "are no videos"),
    "prompt and completion": (
        "SFT",
        with_images(prompt=said("user", VIDEO), completion=said("assistant", "star")),
        {"max_length": None},
        "0 videos",
    ),
    "pairs": ("DPO", with_images(prompt=said("user", VIDEO), **PAIR), {"max_length": None}, "0 videos"),
    "rewards": (
        "GRPO",
        {"prompt": said("user", VIDEO)},
        {"num_generations": 2, "max_completion_length": 4},
        "are no videos",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_no_trainer_learns_without_the_video(model, processor, case, tmp_path):
    name, row, settings, message = REFUSED[case]
    more = {"reward_funcs": lambda completions, **columns: [0.0] * len(completions)} if name == "GRPO" else {}
    arguments = getattr(trl, f"{name}Config")(tmp_path, **SETTINGS, **settings)
    rows = Dataset.from_list(2 * [row])
    with pytest.raises(ValueError, match=message):
        getattr(trl, f"{name}Trainer")(
            model, args=arguments, train_dataset=rows, processing_class=processor, **more
        ).train()
