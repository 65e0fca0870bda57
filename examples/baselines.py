"""Other ways from patches to tokens, to compare MambaMia's compressor with; each takes its place in a model:

    from baselines import PooledQueries

    model.model.compressor = PooledQueries(model.config.compressor_config)

Called with the features of frames, each returns a `MambaMiaCompressorOutput` with as many tokens a frame, and never
lets the padding of one video reach another. None has a Δ, so the model has to keep every frame: `delta_threshold=None`
in its config. Projections, norms, width and initialisation are MambaMia's; between them stand as many residual layers
as MambaMia has in both stages together.

    PooledQueries   queries pooled over space and time, read out of bidirectional Mamba-2 (BIMBA)
    SelfAttention   queries and patches attend to each other
    FramePooling    the patches of a frame are averaged over cells of its grid
    NoCompression   every patch is a token; `patches_per_anchor` has to be 1

`python examples/baselines.py` prints how many parameters each has at the size of the paper's model.
"""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from mambamia_hf import MambaMiaCompressor, MambaMiaCompressorConfig
from mambamia_hf.modeling_compressor import MambaMiaCompressorPreTrainedModel, MambaMiaSpatialBlock


class Baseline(MambaMiaCompressorPreTrainedModel):
    """What the baselines share: input projection, residual layers, norm and output projection.

    How it is called, its checks, and that padded videos run without their padding, are MambaMia's own.
    """

    forward = MambaMiaCompressor.forward
    _compress_masked = MambaMiaCompressor._compress_masked

    def __init__(self, config: MambaMiaCompressorConfig, make_layer: Callable[[int], nn.Module]):
        super().__init__(config)
        num_layers = config.num_hidden_layers + config.num_temporal_layers
        self.input_proj = nn.Linear(config.input_size, config.hidden_size)
        self.layers = nn.ModuleList(make_layer(index) for index in range(num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.output_proj = nn.Linear(config.hidden_size, config.output_size)

    def mix(self, patches: Tensor) -> Tensor:
        """`(batch, frames, patches, hidden_size)` to `(batch, frames, anchors, hidden_size)`."""
        raise NotImplementedError

    def _compress(self, features: Tensor) -> tuple[Tensor, None]:
        if features.shape[1] == 0:
            raise ValueError("The compressor got a video without frames; give it one frame at least.")
        return self.output_proj(self.norm(self.mix(self.input_proj(features)))), None

    def insert(self, patches: Tensor, queries: Tensor) -> Tensor:
        """MambaMia's sequence: frame, row, the row's patches, then its query `(batch, frames, anchors, width)`."""
        rows = patches.unflatten(2, (-1, self.config.patches_per_anchor))
        return torch.cat([rows, queries.unsqueeze(3)], dim=3).flatten(1, 3)

    def read_out(self, sequence: Tensor, num_frames: int) -> Tensor:
        """The queries of such a sequence, `(batch, frames, anchors, width)`."""
        return sequence.unflatten(1, (num_frames, -1, self.config.patches_per_anchor + 1))[:, :, :, -1]

    def grid(self, patches: Tensor) -> Tensor:
        """`(batch, frames, patches, width)` as `(batch, width, frames, height, width)`: square where that is possible,
        else as rows of `patches_per_anchor`."""
        side = math.isqrt(patches.shape[2])
        columns = side if side**2 == patches.shape[2] else self.config.patches_per_anchor
        return patches.unflatten(2, (-1, columns)).permute(0, 4, 1, 2, 3)


class PooledQueries(Baseline):
    """Queries by 3D average pooling, as in BIMBA (Islam et al., CVPR 2025, arXiv 2503.09590).

    From BIMBA: the queries start as averages of the patches over space and time; they stand among the patches at equal
    distances; bidirectional state-space layers, each with a norm before it and a residual connection around it, run
    over all of them; what the queries have become is what the language model reads.

    From MambaMia, so that nothing else differs: the number of queries, Mamba-2 in place of Mamba-1, the last norm.
    BIMBA's optional question tokens, and the dropping of every other frame between layers in its released code, are
    left out.

    Args:
        frames_per_query: frames that a query averages over. Queries average over less of a frame in turn, so that
            there are as many for any number of frames; frames that are left over at the end form a shorter group.
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
        """Groups of so many frames, each pooled to as many queries as there are anchors in its frames."""
        num_frames, num_anchors = patches.shape[1], patches.shape[2] // self.config.patches_per_anchor
        cells = _near_square(frames_per_query * num_anchors)
        pooled = nn.functional.adaptive_avg_pool3d(self.grid(patches), (num_frames // frames_per_query, *cells))
        return pooled.flatten(2).mT.unflatten(1, (num_frames, num_anchors))


class SelfAttention(Baseline):
    """Layers of a Llama, without its causal mask, over the sequence of MambaMia: patches with a learned query a row.

    Attention is all-to-all within windows of frames. Its cost grows with window times length: 384 frames of 600 tokens
    of width 3072 in one window take 650 TFLOP a layer forward, in windows of 16 frames 27.

    Args:
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
        """One window, `(batch, frames, patches, hidden_size)`, to its anchors."""
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
        cells = _near_square(patches.shape[2] // self.config.patches_per_anchor)
        pooled = nn.functional.adaptive_avg_pool3d(self.grid(patches), (patches.shape[1], *cells))
        return pooled.flatten(3).movedim(1, 3)


class NoCompression(FramePooling):
    """The same MLP, as in LLaVA, and every patch becomes a token of the language model.

    Raises:
        ValueError: if the model does not expect a token for every patch.
    """

    def __init__(self, config: MambaMiaCompressorConfig):
        if config.patches_per_anchor != 1:
            raise ValueError(
                f"Without compression every patch is a token, but patches_per_anchor is {config.patches_per_anchor}; "
                f"set it to 1 in the model's compressor_config, and the processor's num_frame_tokens to the patches."
            )
        super().__init__(config)

    def pool(self, patches: Tensor) -> Tensor:
        return patches


def _near_square(count: int) -> tuple[int, int]:
    """The height and width, of `count` cells in all, that differ least."""
    height = next(height for height in range(math.isqrt(count), 0, -1) if count % height == 0)
    return height, count // height


def main():
    rows = MambaMiaCompressorConfig()
    patches = MambaMiaCompressorConfig(patches_per_anchor=1)
    with torch.device("meta"):
        baselines = PooledQueries(rows), SelfAttention(rows), FramePooling(rows), NoCompression(patches)
        for compressor in (MambaMiaCompressor(rows), *baselines):
            print(f"{type(compressor).__name__:<20}{compressor.num_parameters():>15,}")


if __name__ == "__main__":
    main()
