"""The `Trainer` of the training command: Transformers' own, with evaluations that leave no trace and a filled card."""

from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import Trainer

from .arguments import StageArguments
from .run_card import write_run_card


class StageTrainer(Trainer):
    """`Trainer`, whose evaluations change nothing about the training: its losses are the same without them.

    Args:
        stage: what is trained on what, for the model card.
        arguments: those of `Trainer`.
    """

    def __init__(self, stage: StageArguments, **arguments: Any):
        self.stage = stage
        super().__init__(**arguments)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer`'s; the random numbers of the training go on where they were. A data loader draws one."""
        state = torch.get_rng_state()
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            torch.set_rng_state(state)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        """In order; `Trainer` would group them by length, as those to learn from, and they need not have one."""
        return None

    def create_model_card(self, **given: Any) -> None:  # type: ignore[override]  # all are given by name
        """Writes the model card, which `push_to_hub` does, too; arguments are those of `Trainer`."""
        if self.is_world_process_zero():
            write_run_card(self, self.stage, **given)


__all__ = ["StageTrainer"]
