"""What a run logs beside the loss: frames per second and memory, over all processes."""

import math
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


if sys.platform != "win32":
    import resource


class MediaLogCallback(TrainerCallback):
    """Adds `frames_per_second` and `peak_memory_gb` to the logs of `Trainer`, and leaves empty steps out of the loss.

    A step is empty if all of its samples were skipped. Its loss is 0, which `Trainer` counts in the mean. An entry
    about empty steps alone has no loss. A loss that is no number any more ends the training.
    """

    _start = 0.0  # in evaluation before any training

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._hook = kwargs["model"].register_forward_pre_hook(self._count, with_kwargs=True)
        self._num_learned = 0  # steps of this run that were not empty
        self._restart(args.device)

    def _restart(self, device: torch.device) -> None:
        self._zero = torch.zeros((), dtype=torch.long, device=device)
        self._frames = self._zero
        self._learned = [self._zero]  # learned tokens of each step, the last of which is not over
        self._start = time.perf_counter()

    def _count(self, model: nn.Module, args: tuple[Any, ...], batch: dict[str, Any]) -> None:
        if model.training:
            images = batch.get("pixel_values", batch.get("patch_features", ()))
            frames = batch["frame_mask"].sum() if "frame_mask" in batch else 0
            self._frames = self._frames + len(images) + frames
            self._learned[-1] = self._learned[-1] + (batch["labels"] != -100).sum()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._learned.append(self._zero)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "train_loss" in logs:
            self._correct_mean(args, state, logs)
        if "loss" not in logs:
            return
        seconds = time.perf_counter() - self._start
        memory = peak_memory(args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(memory, torch.distributed.ReduceOp.MAX)
        frames, *learned = self._counts(args)
        added = {"frames_per_second": frames / seconds}
        if memory:
            added["peak_memory_gb"] = memory.item() / 1e9
        num_steps, num_empty = len(learned), learned.count(0)
        if not math.isfinite(logs["loss"]):
            raise ValueError(
                f"The loss is {logs['loss']} after step {state.global_step}: lower learning_rate or max_grad_norm, or "
                f"train in float32 or bfloat16; checkpoints before step {state.global_step - num_steps} are good."
            )
        self._num_learned += num_steps - num_empty
        for entry in (logs, state.log_history[-1]):
            entry.update(added)
            if num_empty == num_steps:
                del entry["loss"]
            else:
                entry["loss"] *= num_steps / (num_steps - num_empty)
        self._restart(args.device)

    def _counts(self, args: TrainingArguments) -> list[int]:
        """Frames, and learned tokens of each step, since the last entry and over all processes."""
        counts = torch.stack([self._frames, *self._learned[:-1]])
        if args.world_size > 1:
            torch.distributed.all_reduce(counts)
        return counts.tolist()

    def _correct_mean(self, args: TrainingArguments, state: TrainerState, logs: dict[str, float]) -> None:
        """Leaves empty steps, and those before this run was resumed, out of the mean loss of the training."""
        _, *learned = self._counts(args)
        num_learned = self._num_learned + len(learned) - learned.count(0)
        for entry in (logs, state.log_history[-1]):
            entry["train_loss"] *= state.global_step / max(num_learned, 1)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves the seconds of an evaluation out of the frames per second."""
        self._start += sum(value for name, value in kwargs["metrics"].items() if name.endswith("_runtime"))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._hook.remove()


def peak_memory(device: torch.device) -> Tensor:
    """Peak memory of this process in bytes: of the GPU where it trains on one, else of the CPU; 0 where unknown."""
    peak = 0
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    elif sys.platform != "win32":
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return torch.tensor(peak, device=device)


__all__ = ["MediaLogCallback", "peak_memory"]
