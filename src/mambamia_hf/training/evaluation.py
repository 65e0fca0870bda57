"""What is measured on an evaluation set while a model trains: its loss, and how often it would answer right.

Answers are scored as the data have them, every token after the right ones before it. No text is generated, so that an
evaluation costs no more than a pass over its set.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import EvalPrediction, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy


class EvaluationRecord(dict[str, Any]):
    """A record that is evaluated, which the collator tells from one that is learned from by its type."""


class EvaluationSet(Dataset):
    """Records to evaluate on: the `eval_dataset` of a `Trainer` whose collator is a `ConversationCollator`.

    Args:
        records: conversations in LLaVA's format, with a length; what `open_dataset` opens without `streaming`.

    Raises:
        ValueError: if there are none.
    """

    def __init__(self, records: Sequence[dict[str, Any]]):
        if not len(records):
            raise ValueError("The evaluation data have no records; give others as eval_data.")
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> EvaluationRecord:
        return EvaluationRecord(self.records[index])

    def __iter__(self) -> Iterator[EvaluationRecord]:
        return (self[index] for index in range(len(self)))


def scored_places(labels: Tensor) -> Tensor:
    """The places whose scores tell about an answer: those directly before its tokens.

    Args:
        labels: `(batch_size, length)`, -100 for what is no answer.

    Returns:
        `(batch_size, num_places)`, in order, padded with 0 at the end. They count from the end, as -1 for the last
        place: a prompt that PEFT learned goes before all others.
    """
    places = [row.nonzero().flatten() - labels.shape[1] for row in labels[:, 1:] != -100]
    return pad_sequence(places, batch_first=True)


def answer_statistics(logits: Tensor, labels: Tensor) -> Tensor:
    """What is gathered of scores, for `preprocess_logits_for_metrics` of a `Trainer`: three numbers per sample.

    The scores themselves have a number for every token and every entry of the vocabulary.

    Args:
        logits: `(batch_size, length, vocab_size)`, or those of a prompt that PEFT learned before, or `(batch_size,
            num_places, vocab_size)` at the [`scored_places`].
        labels: `(batch_size, length)`, -100 for what is no answer.

    Returns:
        `(batch_size, 3)` in float32: the number of the answers' tokens, the number of those that have the highest
        score, and the sum of the losses. All are 0 for a sample that could not be read.
    """
    answers = labels[:, 1:] != -100
    targets = labels[:, 1:][answers]
    if logits.shape[1] >= labels.shape[1]:
        scores = logits[:, -labels.shape[1] : -1][answers]
    else:
        places = torch.arange(logits.shape[1], device=labels.device)
        scores = logits[places < answers.sum(dim=1, keepdim=True)]
    losses = nn.functional.cross_entropy(scores.float(), targets, reduction="none")
    right = (scores.argmax(dim=-1) == targets).to(losses)
    statistics = torch.stack([torch.ones_like(losses), right, losses], dim=1)
    return statistics.new_zeros(len(labels), 3).index_add(0, answers.nonzero()[:, 0], statistics)


class AnswerMetrics:
    """What is logged of an evaluation, for `compute_metrics` of a `Trainer`, from [`answer_statistics`].

    `loss` is the mean over all tokens of answers. It takes the place of the `eval_loss` of `Trainer`, which is a mean
    over batches, however many tokens they have, with 0 for those of which nothing could be read. `accuracy` is the
    share of samples whose every token is right, `token_accuracy` that of tokens. `samples` is how many samples these
    are of, and `skipped` how many could not be read: they count as neither right nor wrong.
    """

    def __init__(self) -> None:
        self._statistics: list[Tensor] = []

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Adds samples, and gives the metrics of all of them.

        Args:
            prediction: with predictions of shape `(num_samples, 3)`, or a list of those of each batch.
            compute_result: False while there are more samples to come, with `batch_eval_metrics`.

        Raises:
            ValueError: if no sample could be read, or the loss is no number any more.
        """
        given: Any = prediction.predictions
        batches = given if isinstance(given, list) else [given]
        self._statistics += [torch.as_tensor(batch).cpu().double() for batch in batches]
        if not compute_result:
            return {}
        statistics = torch.cat(self._statistics)
        self._statistics = []
        read = statistics[statistics[:, 0] > 0]
        if not len(read):
            raise ValueError(f"None of the {len(statistics)} evaluation samples can be read; samples_*.jsonl say why.")
        tokens, right, losses = read.sum(dim=0).tolist()
        if not math.isfinite(losses):
            raise ValueError(
                f"The loss on the evaluation data is {losses / tokens}: the model's scores are no numbers any more."
            )
        return {
            "loss": losses / tokens,
            "accuracy": (read[:, 0] == read[:, 1]).double().mean().item(),
            "token_accuracy": right / tokens,
            "samples": len(read),
            "skipped": len(statistics) - len(read),
        }


class LastEvaluationCallback(TrainerCallback):
    """Evaluates after the last step, whatever `eval_strategy` says: what is saved has been evaluated."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps and args.eval_strategy != IntervalStrategy.EPOCH:
            control.should_evaluate = True


__all__ = [
    "AnswerMetrics",
    "EvaluationRecord",
    "EvaluationSet",
    "LastEvaluationCallback",
    "answer_statistics",
    "scored_places",
]
