"""The `Trainer` of the training command: Transformers' own, with evaluations that leave no trace."""

from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import Trainer


class StageTrainer(Trainer):
    """`Trainer`, whose evaluations change nothing about the training: its losses are the same without them."""

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


__all__ = ["StageTrainer"]
