"""DeepSpeed's ZeRO-3: what processes that train together have to agree on.

ZeRO-3 splits the weights, and each module gathers its own from all processes when it is called, in the forward and in
the backward pass. So all of them have to call the same modules in the same order, whatever media a process has: one
that would call the vision tower or the compressor less often than another goes on with calls on a black frame.
"""

import torch
from transformers.integrations import is_deepspeed_zero3_enabled


def largest_of_processes(*counts: int, device: torch.device) -> list[int]:
    """With ZeRO-3 the largest of each count over all processes, which have to ask together; else the counts.

    Args:
        counts: of this process.
        device: of the model.
    """
    if not is_deepspeed_zero3_enabled():
        return list(counts)
    largest = torch.tensor(counts, device=device)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return largest.tolist()


__all__ = ["largest_of_processes"]
