"""Memory of training the compressor: how it grows with the frames, with and without activation checkpointing.

    python benchmarks/training_memory.py

For a small compressor, the peak of a whole step (forward and backward) is measured. For the full-size one, the bytes
that a forward pass keeps for the backward pass are counted, tensor by tensor. Both are proportional to the frames: a
few frames give the slope, and the slope gives 128 frames.
"""

import torch
from measure import extra_bytes, plot, report
from torch import Tensor

from mambamia_hf import MambaMiaCompressor, MambaMiaCompressorConfig


SMALL = {
    "input_size": 128,
    "output_size": 128,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "head_dim": 32,
    "state_size": 32,
    "patches_per_anchor": 7,
}
FRAMES, FULL_SIZE_FRAMES, PLANNED_FRAMES = (16, 32, 48, 64), (1, 2), 128


def checkpoint_activations(compressor: MambaMiaCompressor):
    """By the name that the method has had since Transformers 5.23, or before."""
    enable = getattr(compressor, "activation_checkpointing_enable", None) or compressor.gradient_checkpointing_enable
    enable()


def kept_bytes(compressor: MambaMiaCompressor, patch_features: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, beside weights and input."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*compressor.parameters(), patch_features)}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that its address is not given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = compressor(patch_features)
    total = sum(storage.nbytes() for storage in kept.values())
    del output
    return total


def peak_bytes(compressor: MambaMiaCompressor, patch_features: Tensor) -> int:
    """Memory that a step needs at its peak beside weights and their gradients."""

    def step():
        compressor(patch_features).last_hidden_state.sum().backward()

    step()  # makes the gradients, which stay
    return extra_bytes(step)


def slope(frames: tuple[int, ...], values: list[int]) -> float:
    """Bytes per frame."""
    return (values[-1] - values[0]) / (frames[-1] - frames[0])


def main():
    torch.manual_seed(0)
    rows, series = [], {}
    compressor = MambaMiaCompressor(MambaMiaCompressorConfig(**SMALL)).train()
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(compressor)
        peaks = [peak_bytes(compressor, torch.randn(1, count, 49, 128)) for count in FRAMES]
        name = "with activation checkpointing" if checkpointing else "without"
        series[name] = FRAMES, [peak / 1e6 for peak in peaks]
        rows += [
            {"compressor": "small", "checkpointing": checkpointing, "frames": count, "peak_mb": peak / 1e6}
            for count, peak in zip(FRAMES, peaks, strict=True)
        ]
        rows.append(
            {"compressor": "small", "checkpointing": checkpointing, "mb_per_frame": slope(FRAMES, peaks) / 1e6}
        )
    del compressor

    compressor = MambaMiaCompressor(MambaMiaCompressorConfig()).train()
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(compressor)
        kept = [kept_bytes(compressor, torch.randn(1, count, 576, 1152)) for count in FULL_SIZE_FRAMES]
        per_frame = slope(FULL_SIZE_FRAMES, kept)
        rows.append(
            {
                "compressor": "full size",
                "checkpointing": checkpointing,
                "mb_per_frame": per_frame / 1e6,
                "planned_frames": PLANNED_FRAMES,
                "planned_gb": PLANNED_FRAMES * per_frame / 1e9,
            }
        )
    report("training_memory", rows)
    plot("training_memory", "frames", "peak of a training step, MB", series)


if __name__ == "__main__":
    main()
