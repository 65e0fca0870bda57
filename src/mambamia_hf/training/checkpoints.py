"""Where an interrupted run goes on: at a checkpoint that was saved to its end."""

import json
import logging
import zipfile
from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer_utils import sort_checkpoints


logger = logging.getLogger(__name__)


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
            another number of processes has saved the checkpoint.
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
    problems = {folder: _problem(folder, training.world_size) for folder in candidates}
    whole = next((folder for folder, problem in problems.items() if problem is None), None)
    if whole is None:
        folder = candidates[0]
        raise ValueError(
            f"Training cannot go on from '{folder}' with {training.world_size} processes: {problems[folder]}. Use as "
            f"many processes as before, or start a new run with `--model {folder}`."
        )
    return str(whole)


def _has_state(checkpoint: Path) -> bool:
    """Whether a checkpoint has its `trainer_state.json`, which `Trainer` writes after everything else."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _problem(checkpoint: Path, num_processes: int) -> str | None:
    """Why training cannot go on exactly from a checkpoint; None where it can.

    A process without its random state would go on with other numbers, which `Trainer` does not mind.
    """
    if not _has_state(checkpoint):
        return "it has no whole trainer_state.json"
    expected = {f"rng_state_{index}.pth" for index in range(num_processes)} if num_processes > 1 else {"rng_state.pth"}
    found = {file.name for file in checkpoint.glob("rng_state*.pth") if zipfile.is_zipfile(file)}
    if found == expected:
        return None
    return f"it has the random states {', '.join(sorted(found)) or 'of none'}, not {', '.join(sorted(expected))}"


__all__ = ["checkpoint_to_resume"]
