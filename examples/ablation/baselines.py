"""Other ways from patches to tokens, to compare MambaMia's compressor with. Each takes its place in a model:

    from ablation.baselines import PooledQueries

    model.model.compressor = PooledQueries(model.config.compressor_config)

Called with patch features, each returns a `MambaMiaCompressorOutput` with as many tokens per frame as MambaMia. None
has a Δ, so the model has to keep every frame: `delta_threshold=None` in its config. Projections, norms, width and
initialisation are MambaMia's. Between them are as many residual layers as MambaMia has in both stages together.

    PooledQueries   queries pooled over space and time, read out of bidirectional Mamba-2 (BIMBA)
    SelfAttention   queries and patches attend to each other
    FramePooling    the patches of a frame are averaged over cells of its grid
    MLPProjector    no compression, every patch is a token (LLaVA); `patches_per_anchor` has to be 1

`PYTHONPATH=examples python -m ablation.baselines` prints their numbers of parameters at the size of the paper's model.
"""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.utils import can_return_tuple

from mambamia_hf import MambaMiaCompressor, MambaMiaCompressorConfig
from mambamia_hf.modeling_compressor import (
    MambaMiaCompressorOutput,
    MambaMiaCompressorPreTrainedModel,
    MambaMiaSpatialBlock,
)


class Baseline(MambaMiaCompressorPreTrainedModel):
    """What the baselines share: input projection, residual layers, norm and output projection.

    Args:
        config: of MambaMia's compressor.
        make_layer: makes the residual layer of a given index.
    """

    def __init__(self, config: MambaMiaCompressorConfig, make_layer: Callable[[int], nn.Module]):
        super().__init__(config)
        num_layers = config.num_hidden_layers + config.num_temporal_layers
        self.input_proj = nn.Linear(config.input_size, config.hidden_size)
        self.layers = nn.ModuleList(make_layer(index) for index in range(num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.output_proj = nn.Linear(config.hidden_size, config.output_size)

    @can_return_tuple
    def forward(
        self,
        patch_features: Tensor | None = None,
        frame_mask: Tensor | None = None,
        anchors: Tensor | None = None,
        anchors_only: bool = False,
    ) -> MambaMiaCompressorOutput:
        """Compresses videos, those of one length together, so that no padding reaches a video.

        Args:
            patch_features: `(batch_size, num_frames, num_patches, input_size)`.
            frame_mask: `(batch_size, num_frames)`, True for real frames, all of them by default.
            anchors, anchors_only: as of MambaMia's compressor: final norm and projection are a step of their own.

        Raises:
            ValueError: if the patches are not a whole number of rows, or a video has no frame.
        """
        if patch_features is None:
            return MambaMiaCompressorOutput(last_hidden_state=self.output_proj(self.norm(anchors)), anchors=anchors)
        if frame_mask is None:
            frame_mask = patch_features.new_ones(patch_features.shape[:2], dtype=torch.bool)
        num_tokens = self.config.num_anchors(patch_features.shape[2])
        anchors = patch_features.new_zeros(*frame_mask.shape, num_tokens, self.config.hidden_size)
        lengths = frame_mask.sum(dim=1)
        if not lengths.all():
            raise ValueError("The compressor got a video without frames; give it at least one frame.")
        for length in lengths.unique().tolist():
            places = frame_mask & (lengths == length)[:, None]
            videos = patch_features[places].unflatten(0, (-1, length))
            anchors[places] = self.mix(self.input_proj(videos)).flatten(0, 1).to(anchors)
        tokens = None
        if not anchors_only:
            tokens = self.output_proj(self.norm(anchors)) * frame_mask[:, :, None, None]
        return MambaMiaCompressorOutput(last_hidden_state=tokens, anchors=anchors)

    def mix(self, patches: Tensor) -> Tensor:
        """`(batch, frames, patches, hidden_size)` to `(batch, frames, anchors, hidden_size)`."""
        raise NotImplementedError

    def insert(self, patches: Tensor, queries: Tensor) -> Tensor:
        """MambaMia's sequence (frame, row, the row's patches, then its query), `(batch, length, width)`.

        Args:
            patches: `(batch, frames, patches, width)`.
            queries: `(batch, frames, anchors, width)`.
        """
        rows = patches.unflatten(2, (-1, self.config.patches_per_anchor))
        return torch.cat([rows, queries.unsqueeze(3)], dim=3).flatten(1, 3)

    def read_out(self, sequence: Tensor, num_frames: int) -> Tensor:
        """The queries of a sequence that `insert` made, `(batch, frames, anchors, width)`."""
        return sequence.unflatten(1, (num_frames, -1, self.config.patches_per_anchor + 1))[:, :, :, -1]

    def grid(self, patches: Tensor) -> Tensor:
        """Patches `(batch, frames, patches, channels)` as `(batch, channels, frames, height, width)`.

        The grid is square if possible, and otherwise has rows of `patches_per_anchor`.
        """
        side = math.isqrt(patches.shape[2])
        columns = side if side**2 == patches.shape[2] else self.config.patches_per_anchor
        return patches.unflatten(2, (-1, columns)).permute(0, 4, 1, 2, 3)


class PooledQueries(Baseline):
    """Queries by 3D average pooling, as in BIMBA (Islam et al., CVPR 2025, arXiv 2503.09590).

    From BIMBA: the queries start as averages of the patches over space and time. They are inserted among the patches
    at equal distances. Bidirectional state-space layers, each pre-norm with a residual connection, run over the
    sequence, and the language model reads the queries that come out.

    From MambaMia, so that nothing else differs: the number of queries, Mamba-2 in place of Mamba-1, the last norm.
    Left out: BIMBA's optional question tokens, and the dropping of every other frame between layers in its released
    code.

    Args:
        config: of MambaMia's compressor.
        frames_per_query: frames that a query averages over. The number of queries per frame does not depend on it: a
            query averages over a smaller part of each frame in turn. Frames left over at the end form a shorter group.
    """

    def __init__(self, config: MambaMiaCompressorConfig, frames_per_query: int = 4):
        layer_config = copy.copy(config)
        layer_config.gpa_placement, layer_config.bidirectional = None, True
        super().__init__(config, lambda index: MambaMiaSpatialBlock(layer_config))
        self.frames_per_query = frames_per_query
        self.post_init()

    def mix(self, patches: Tensor) -> Tensor:
        num_frames = patches.shape[1]
        whole = num_frames // self.frames_per_query * self.frames_per_query
        parts = [(patches[:, :whole], self.frames_per_query), (patches[:, whole:], num_frames - whole)]
        queries = torch.cat([self.pool(part, length) for part, length in parts if part.shape[1]], dim=1)
        sequence = self.insert(patches, queries)
        for layer in self.layers:
            sequence = layer(sequence)
        return self.read_out(sequence, num_frames)

    def pool(self, patches: Tensor, frames_per_query: int) -> Tensor:
        """Pools groups of `frames_per_query` frames, each to as many queries as its frames have anchors.

        Args:
            patches: `(batch, frames, patches, width)`, whole groups.
            frames_per_query: frames of a group.

        Returns:
            `(batch, frames, anchors, width)`.
        """
        num_frames, num_anchors = patches.shape[1], patches.shape[2] // self.config.patches_per_anchor
        cells = _near_square(frames_per_query * num_anchors)
        pooled = nn.functional.adaptive_avg_pool3d(self.grid(patches), (num_frames // frames_per_query, *cells))
        return pooled.flatten(2).mT.unflatten(1, (num_frames, num_anchors))


class SelfAttention(Baseline):
    """Layers of a Llama without its causal mask over MambaMia's sequence: patches with one learned query per row.

    Attention is all-to-all within windows of frames. Its cost grows with window times length: a layer's forward pass
    over 384 frames of 600 tokens of width 3072 takes 650 TFLOP in one window, and 27 in windows of 16 frames.

    Args:
        config: of MambaMia's compressor.
        frames_per_window: frames that attend to each other; None for all of the video.
    """

    def __init__(self, config: MambaMiaCompressorConfig, frames_per_window: int | None = None):
        llama_config = LlamaConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.hidden_size // config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            attn_implementation="sdpa",
        )
        super().__init__(config, lambda index: LlamaDecoderLayer(llama_config, index))
        for layer in self.layers:
            layer.self_attn.is_causal = False
        self.frames_per_window = frames_per_window
        self.anchor = nn.Parameter(torch.empty(config.hidden_size))
        self.rotary_embedding = LlamaRotaryEmbedding(llama_config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if module is self:
            init.normal_(self.anchor, std=self.config.initializer_range)

    def mix(self, patches: Tensor) -> Tensor:
        windows = patches.split(self.frames_per_window or patches.shape[1], dim=1)
        return torch.cat([self.attend(window) for window in windows], dim=1)

    def attend(self, patches: Tensor) -> Tensor:
        """`(batch, frames, patches, hidden_size)` of one window to `(batch, frames, anchors, hidden_size)`."""
        batch_size, num_frames, num_patches = patches.shape[:3]
        anchors = self.anchor.to(patches.dtype)
        anchors = anchors.expand(batch_size, num_frames, num_patches // self.config.patches_per_anchor, -1)
        sequence = self.insert(patches, anchors)
        places = torch.arange(sequence.shape[1], device=sequence.device)[None]
        rotations = self.rotary_embedding(sequence, places)
        for layer in self.layers:
            sequence = layer(sequence, position_embeddings=rotations)
        return self.read_out(sequence, num_frames)


class PatchMLP(nn.Module):
    """A residual layer that sees each patch alone."""

    def __init__(self, config: MambaMiaCompressorConfig):
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.up_proj = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.down_proj = nn.Linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.down_proj(nn.functional.gelu(self.up_proj(self.norm(hidden_states))))


class FramePooling(Baseline):
    """An MLP on each patch, then 2D average pooling of every frame to a grid with a cell for each of its anchors."""

    def __init__(self, config: MambaMiaCompressorConfig):
        super().__init__(config, lambda index: PatchMLP(config))
        self.post_init()

    def mix(self, patches: Tensor) -> Tensor:
        for layer in self.layers:
            patches = layer(patches)
        return self.pool(patches)

    def pool(self, patches: Tensor) -> Tensor:
        """`(batch, frames, patches, hidden_size)` to `(batch, frames, anchors, hidden_size)`."""
        cells = _near_square(self.config.num_anchors(patches.shape[2]))
        pooled = nn.functional.adaptive_avg_pool3d(self.grid(patches), (patches.shape[1], *cells))
        return pooled.flatten(3).movedim(1, 3)


class MLPProjector(Baseline):
    """An MLP on each patch, and every patch becomes a token of the language model, as in LLaVA.

    Raises:
        ValueError: if the model does not expect one token per patch.
    """

    def __init__(self, config: MambaMiaCompressorConfig):
        if config.patches_per_anchor != 1:
            raise ValueError(
                f"Without compression every patch is a token, but patches_per_anchor is {config.patches_per_anchor}; "
                f"set it to 1 in the model's compressor_config, and the processor's tokens_per_frame to the patches."
            )
        super().__init__(config, lambda index: PatchMLP(config))
        self.post_init()

    def mix(self, patches: Tensor) -> Tensor:
        for layer in self.layers:
            patches = layer(patches)
        return patches


def _near_square(count: int) -> tuple[int, int]:
    """Height and width of the most nearly square grid of `count` cells."""
    height = next(height for height in range(math.isqrt(count), 0, -1) if count % height == 0)
    return height, count // height


def main() -> None:
    rows = MambaMiaCompressorConfig()
    patches = MambaMiaCompressorConfig(patches_per_anchor=1)
    with torch.device("meta"):
        baselines = PooledQueries(rows), SelfAttention(rows), FramePooling(rows), MLPProjector(patches)
        for compressor in (MambaMiaCompressor(rows), *baselines):
            print(f"{type(compressor).__name__:<20}{compressor.num_parameters():>15,}")


if __name__ == "__main__":
    main()
