"""The model card of a run: where the model comes from, how it was trained, and what evaluation says of it."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import Trainer
from transformers.modelcard import TrainingSummary, make_markdown_table
from transformers.training_args import OptimizerNames

from .. import __version__
from ..configuration_mambamia import MambaMiaConfig
from ..model_card import PIPELINE_TAG, TAGS, description, table, usage, write_card
from .arguments import StageArguments
from .mixtures import listed_entries
from .stages import STAGES


# Metrics of evaluation that a card has, by their names in the logs: their type on the Hub, and what they are called.
_METRICS = {
    "eval_accuracy": ("accuracy", "answers with every token right"),
    "eval_token_accuracy": ("accuracy", "right tokens"),
    "eval_loss": ("loss", "loss per token"),
}


def write_run_card(trainer: Trainer, stage: StageArguments, **given: Any) -> None:
    """Writes `README.md` into the output folder of a run.

    Args:
        trainer: of the run.
        stage: what was trained on what.
        given: what `Trainer.create_model_card` takes; it comes before what is known from the run.
    """
    folder = Path(str(trainer.args.output_dir))
    config: Any = trainer.model.config  # type: ignore[union-attr]
    inherited = _card_of(stage.model)
    base_models = _base_models(stage.model, config, inherited)
    summary = TrainingSummary.from_trainer(trainer, **{"license": inherited.license, **given})
    name = getattr(trainer, "hub_model_id", None) or summary.model_name
    is_adapter = (folder / "adapter_config.json").is_file()
    tags = [*TAGS, *(["lora"] if is_adapter else []), *(summary.tags or [])]
    results = _results(trainer, stage)
    data = ModelCardData(
        license=summary.license,
        language=summary.language,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=PIPELINE_TAG,
        base_model=given.get("finetuned_from") or base_models or None,
        datasets=summary.dataset_tags or _hub_datasets([*stage.data, *(stage.eval_data or [])]) or None,
        metrics=["accuracy"] if results else None,
        tags=list(dict.fromkeys(tags)),
        model_name=summary.model_name if results else None,
        eval_results=results or None,
    )
    base = _hub_name(stage.model) or "path/to/the/model/that/training/started/from" if is_adapter else None
    has_code = (folder / "modeling_mambamia.py").is_file()
    sections = [
        usage(name, has_code, base),
        description(config),
        _evaluation(results),
        _training(stage, config, summary, trainer.args.optim),
    ]
    write_card(folder / "README.md", summary.model_name, data, [section for section in sections if section])


def _card_of(model: str) -> ModelCardData:
    """The metadata of the card in the folder of a model; nothing where there is none."""
    file = Path(model) / "README.md"
    return ModelCard.load(file).data if file.is_file() else ModelCardData()


def _base_models(model: str, config: MambaMiaConfig, inherited: ModelCardData) -> list[str]:
    """The models of the Hub that a model was trained from.

    A folder hands on those of its card, and one without a card those that its vision tower and its language model had
    come from.
    """
    if (name := _hub_name(model)) is not None:
        return [name]
    if inherited.base_model:
        return [inherited.base_model] if isinstance(inherited.base_model, str) else list(inherited.base_model)
    names = [_hub_name(part.name_or_path or "") for part in (config.vision_config, config.text_config)]
    return [name for name in names if name is not None]


def _hub_name(name: str) -> str | None:
    """The name if it is that of a model of the Hub, and not of a folder: one that has been loaded from there."""
    try:
        known = not Path(name).exists() and try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return name if isinstance(known, str) else None


def _hub_datasets(given: list[str]) -> list[str]:
    """The datasets of the Hub among data, by their names."""
    names: dict[str, Path] = {}  # with what a folder of that name would be
    for data in given:
        if data.endswith((".yaml", ".yml")):
            listed = [entry["name"] for entry in listed_entries(Path(data)) if entry.get("name")]
            names |= {name: Path(data).parent / name for name in listed}
        elif not data.endswith((".json", ".jsonl")):
            names[data] = Path(data)
    is_name = re.compile(r"[\w.-]+(/[\w.-]+)?")
    return [name for name, folder in names.items() if is_name.fullmatch(name) and not folder.exists()]


def _results(trainer: Trainer, stage: StageArguments) -> list[EvalResult]:
    """What the evaluation of the weights that were saved has measured."""
    state = trainer.state
    entries = {entry["step"]: entry for entry in state.log_history if "eval_accuracy" in entry}
    best = state.best_global_step if trainer.args.load_best_model_at_end else None
    entry = entries.get(best or state.global_step)
    if entry is None or stage.eval_data is None:
        return []
    names = [Path(name).name for name in stage.eval_data]
    unread = f", {entry['eval_skipped']} more could not be read" if entry["eval_skipped"] else ""
    return [
        EvalResult(
            task_type="video-text-to-text",
            task_name="Questions about images and videos",
            dataset_type=next(iter(_hub_datasets(stage.eval_data)), Path(names[0]).stem),
            dataset_name=f"{', '.join(names)} ({entry['eval_samples']} samples{unread})",
            metric_type=kind,
            metric_name=title,
            metric_value=round(entry[name], 4),
        )
        for name, (kind, title) in _METRICS.items()
    ]


def _evaluation(results: list[EvalResult]) -> str:
    if not results:
        return ""
    values = table({str(result.metric_name): result.metric_value for result in results})
    how = "Each token of an answer is scored after the right ones before it."
    return f"## Evaluation\n\nOn {results[0].dataset_name}. {how}\n\n{values}"


def _training(stage: StageArguments, config: MambaMiaConfig, summary: TrainingSummary, optimizer: str) -> str:
    """A section with the settings of the run and the course of its evaluations."""
    settings: dict[str, Any] = {
        "stage": f"{stage.stage}: {', '.join(STAGES[stage.stage].learns)} learned".replace("_", " "),
        "data": ", ".join(Path(name).name for name in stage.data),
        "frames per video, at most": stage.num_frames,
        "frames per second, at most": stage.fps,
        "tokens per sample, at most": stage.max_length,
        "length scale": stage.length_scale,
        "frame dropout": config.frame_dropout,
        "weight of Δ in the loss": config.delta_loss_coef,
        "rank of the LoRA": stage.lora_rank or None,
        "type of the weights": stage.dtype,
        **{name.replace("_", " "): value for name, value in (summary.hyperparameters or {}).items()},
        "optimizer": OptimizerNames(optimizer).value,
        "package": f"mambamia_hf {__version__}",
    }
    given = {name: value for name, value in settings.items() if value is not None}
    course = f"\n{make_markdown_table(summary.eval_lines)}" if summary.eval_lines else ""
    return f"## Training\n\n{table(given)}{course}"


__all__ = ["write_run_card"]
