"""Where an interrupted run goes on: at a checkpoint that was saved to its end."""

import json
import logging
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments
from transformers.trainer_utils import sort_checkpoints


logger = logging.getLogger(__name__)

# What a checkpoint consists of, by the names that `Trainer` gives to it: alone, with FSDP or with DeepSpeed.
_PARTS = {
    "weights": ("*.safetensors", "pytorch_model*", "global_step*"),
    "state of the optimizer": ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*"),
    "state of the schedule": ("scheduler.pt", "global_step*"),
}


def checkpoint_to_resume(training: TrainingArguments, output: Path) -> str | None:
    """Finds the checkpoint that `resume_from_checkpoint` asks for.

    Args:
        training: with `resume_from_checkpoint` a folder, `"true"` for the newest whole checkpoint in the output
            folder, or None to start anew.
        output: the output folder.

    Returns:
        The checkpoint's folder; None to start anew, also with `"true"` where nothing has been saved yet.

    Raises:
        ValueError: if the output folder has checkpoints of an earlier run and nothing asks to go on from them, or if
            a part of the checkpoint is missing or another number of processes has saved it.
    """
    asked = training.resume_from_checkpoint
    found = [Path(folder) for folder in sort_checkpoints(str(output))]
    if asked is None:
        if found:
            raise ValueError(
                f"There is '{found[-1]}' of an earlier run: go on from it with --resume_from_checkpoint true, or "
                f"choose another output_dir."
            )
        return None
    candidates = [Path(asked)]
    if asked in ("true", "True"):
        candidates = [folder for folder in reversed(found) if _has_state(folder)]
        if found and candidates[:1] != found[-1:]:
            logger.warning("'%s' was not saved to its end and is left out.", found[-1])
        if not candidates:
            return None
    problems: dict[Path, str] = {}
    for folder in candidates:
        problem = _problem(folder, training)
        if problem is None:
            for other, reason in problems.items():
                logger.warning("'%s' is left out: %s.", other, reason)
            return str(folder)
        problems[folder] = problem
    folder = candidates[0]
    raise ValueError(
        f"Training cannot go on from '{folder}' with {training.world_size} processes: {problems[folder]}. Use as many "
        f"processes as before and a whole checkpoint, or start a new run with `--model {folder}`."
    )


def _has_state(checkpoint: Path) -> bool:
    """Whether a checkpoint has its `trainer_state.json`, which `Trainer` writes after everything else."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _is_whole(file: Path) -> bool:
    """Whether a file of a checkpoint was written to its end, as far as it tells."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                pass
        elif file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
    except (SafetensorError, ValueError):
        return False
    return file.suffix not in (".pt", ".pth", ".bin") or zipfile.is_zipfile(file)


def _problem(checkpoint: Path, training: TrainingArguments) -> str | None:
    """Why training cannot go on exactly from a checkpoint; None where it can.

    Without the state of the optimizer, of the schedule or of its random numbers a process would go on with other ones,
    which `Trainer` does not mind.
    """
    if not _has_state(checkpoint):
        return "it has no whole trainer_state.json"
    for what, patterns in _PARTS.items():
        is_needed = what == "weights" or not training.save_only_model
        if is_needed and not any(found for pattern in patterns for found in checkpoint.glob(pattern)):
            return f"it has no {what}"
    cut = [file.name for file in sorted(checkpoint.iterdir()) if file.is_file() and not _is_whole(file)]
    if cut:
        return f"it has parts that are not whole: {', '.join(cut)}"
    num_processes = training.world_size
    expected = {f"rng_state_{index}.pth" for index in range(num_processes)} if num_processes > 1 else {"rng_state.pth"}
    found = {file.name for file in checkpoint.glob("rng_state*.pth")}
    if found == expected:
        return None
    return f"it has the random states {', '.join(sorted(found)) or 'of none'}, not {', '.join(sorted(expected))}"


__all__ = ["checkpoint_to_resume"]
