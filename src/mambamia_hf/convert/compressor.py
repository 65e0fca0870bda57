"""The compressor alone, between its released tensors and our module."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..configuration_mambamia import MambaMiaCompressorConfig
from ..finite import check_finite
from ..modeling_compressor import MambaMiaCompressor
from .configurations import (
    absent_projections,
    check_settings_are_original,
    compressor_config,
    identity_projections,
)
from .names import (
    COMPRESSOR_PREFIXES,
    check_tensors,
    is_buffer,
    is_empty_embedding,
    original_compressor_name,
    wrapping,
)
from .weights import DAMAGED, check_types, dtype_name


# What a compressor may hold, for the message where it holds something else.
EXPECTED_TENSORS = (
    "Expected query_token, input_proj.*, input_norm.*, model.layers.N.{norm,weight_fc,gate_fc,mixer}.*, "
    "model.norm_f.weight and output_proj.*; no checkpoint with temporal layers has been released, so their names are "
    "not known."
)


def compressor_from_original(
    state_dict: Mapping[str, Tensor],
    *,
    head_dim: int | None = None,
    state_size: int | None = None,
    n_groups: int = MambaMiaCompressorConfig.n_groups,
    chunk_size: int = MambaMiaCompressorConfig.chunk_size,
) -> MambaMiaCompressor:
    """A compressor from its tensors in the released layout; sizes are read from their shapes.

    A compressor without `input_proj` or `output_proj` gets an identity in its place, which changes no value.

    Args:
        state_dict: the compressor's tensors, all of them bare, or all under `model.mm_projector.`,
            `model.video_audio_compressor.` (HyperCLOVAX-SEED-Omni) or `model.mm_audio_projector.` (UniMambaMia-AV).
            These may lack `model.` or be wrapped, as in `module.` and `base_model.model.`.
        head_dim: size of a head, by default what the shapes tell.
        state_size: size of a head's state per channel, by default what the shapes tell.
        n_groups: groups of heads that share B and C.
        chunk_size: chunk length of the scan; changes the speed on a GPU, never the result.

    Returns:
        The compressor in evaluation mode, in the type of the tensors, which it does not share.

    Raises:
        ValueError: if tensors are unknown, missing, of a wrong shape or type or not finite, naming them, or if a size
            that was given disagrees with the shapes.
    """
    wrapped = wrapping(state_dict)
    state_dict = {name.removeprefix(wrapped): tensor for name, tensor in state_dict.items()}
    prefix = next((p for p in COMPRESSOR_PREFIXES if all(name.startswith(p) for name in state_dict)), "")
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in state_dict.items()
        if not is_buffer(name) and not is_empty_embedding(name, tuple(tensor.shape))
    }
    check_types({name: dtype_name(tensor.dtype) for name, tensor in tensors.items()})
    for name, tensor in tensors.items():
        check_finite(name, tensor, DAMAGED)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    config = compressor_config(shapes, head_dim, state_size, n_groups, chunk_size)
    tensors |= absent_projections(config, tensors, tensors["model.layers.0.mixer.out_proj.weight"].dtype)
    with torch.device("meta"):
        compressor = MambaMiaCompressor(config)
    expected = {original_compressor_name(name): name for name in compressor.state_dict()}
    check_tensors(
        "the compressor",
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {name: tuple(compressor.state_dict()[ours].shape) for name, ours in expected.items()},
        hint=EXPECTED_TENSORS,
    )
    compressor.load_state_dict({ours: tensors[name].clone() for name, ours in expected.items()}, assign=True)
    return compressor.eval()


def compressor_to_original(compressor: MambaMiaCompressor) -> dict[str, Tensor]:
    """The tensors of a compressor in the released layout, without a prefix: what `compressor_from_original` takes.

    Outer projections that change nothing are left out, as the released code has none where widths are equal.

    Raises:
        ValueError: if a setting has no place in that layout, as temporal layers have none; names it.
    """
    check_settings_are_original(compressor.config)
    tensors = compressor.state_dict()
    redundant = identity_projections(compressor.config, tensors)
    return {original_compressor_name(name): tensor for name, tensor in tensors.items() if name not in redundant}
