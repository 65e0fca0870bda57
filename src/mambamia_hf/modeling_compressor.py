"""The compressor: many patch features a frame in, a few anchors a frame and the importance of each frame out."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.integrations import use_kernelized_func
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .configuration_mambamia import MambaMiaCompressorConfig
from .frame_selection import frame_budget
from .selective_scan import _kernel_selective_scan, selective_scan
from .ssd import _kernel_causal_conv1d, _kernel_chunk_scan, causal_conv1d_silu, ssd_chunk_scan, ssd_final_states


# Where no gradient is asked for, stage 1 runs in segments of so many tokens: enough for matrix products at full speed.
_SEGMENT_TOKENS = 4800
# What lies between the products runs in tiles of so many tokens, which stay in a CPU's cache; a GPU has no need of it.
_TILE_TOKENS = {"cpu": 300}


@dataclass
class MambaMiaCompressorOutput(ModelOutput):
    """
    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, num_frames, num_anchors, output_size)`):
            The anchors of every frame; zero where `frame_mask` is.
        frame_deltas (`torch.FloatTensor` of shape `(batch_size, num_frames)`, *optional*):
            Δ, the importance of every frame: the mean step size of the Time Axis Aggregator's scan, never negative,
            zero where `frame_mask` is. `None` without a temporal layer.
    """

    last_hidden_state: torch.FloatTensor | None = None
    frame_deltas: torch.FloatTensor | None = None


def _in_full(tensor: Tensor) -> Tensor:
    """In float32, or float64 where it is that: what step sizes and decays are computed in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _stretch_quiet_time(delta: Tensor, stretch: float) -> Tensor:
    """Δ `(batch, length, heads)` with that of the half of the tokens that have least of it multiplied by a factor.

    As Δ is the time that a token lasts for the scan, this is as if the sequence had up to `stretch` times the length,
    and nothing went on in what was added. The factor is drawn for each sequence.
    """
    if stretch == 1:
        return delta
    importance = delta.detach().mean(dim=-1, keepdim=True)
    quiet = importance <= importance.median(dim=1, keepdim=True).values
    factor = 1 + 2 * (stretch - 1) * torch.rand(len(delta), 1, 1, device=delta.device)
    return torch.where(quiet, factor * delta, delta)


class MambaMiaCausalConv1d(nn.Conv1d):
    """Causal depthwise convolution and SiLU; a module that is called, so that offloading brings its weights."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """`(batch, length, channels)` to the same shape; `context` as in `causal_conv1d_silu`."""
        return causal_conv1d_silu(x, self.weight.squeeze(1), self.bias, context)


@use_kernelized_func([_kernel_chunk_scan, _kernel_causal_conv1d])
class MambaMiaMamba2SSM(nn.Module):
    """One direction of a Mamba-2 mixer: causal convolution, scan with one A a head, RMS norm."""

    def __init__(self, config: MambaMiaCompressorConfig):
        super().__init__()
        self.config = config
        state_width = config.n_groups * config.state_size
        self.x_split = [config.intermediate_size, state_width, state_width]
        channels = sum(self.x_split)
        self.input_split = [channels, config.num_heads]
        self.conv1d = MambaMiaCausalConv1d(channels, channels, config.conv_kernel, groups=channels)
        self.dt_bias = nn.Parameter(torch.empty(config.num_heads))
        self.A_log = nn.Parameter(torch.empty(config.num_heads))
        self.D = nn.Parameter(torch.empty(config.num_heads))
        self.norm = nn.Parameter(torch.empty(config.intermediate_size))

    def forward(
        self,
        inputs: Tensor,
        context: Tensor | None = None,
        initial_states: Tensor | None = None,
        states_only: bool = False,
        outputs: slice = slice(None),
        length_scale: float = 1.0,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """
        Args:
            inputs: `(batch, length, intermediate_size + 2 * n_groups * state_size + heads)`: x, B, C and dt.
            context: `(batch, conv_kernel - 1, ...)`, the inputs before these, zero where absent.
            initial_states: `(batch, heads, head_dim, state_size)`, zero where absent.
            states_only: whether to leave the output out, at a fraction of the price.
            outputs: the tokens whose output is asked for.
            length_scale: how many times longer than they are sequences may seem to the scan.

        Returns:
            The normed output of the scan `(batch, outputs, intermediate_size)`, before the gate; the step sizes Δ
            `(batch, length, heads)`, in float32, without any stretch; and the states after the last token.
        """
        config = self.config
        xBC, dt = inputs.split(self.input_split, dim=-1)
        context = None if context is None else context[..., : xBC.shape[-1]]
        x, B, C = self.conv1d(xBC, context).split(self.x_split, dim=-1)
        x = x.unflatten(-1, (-1, config.head_dim))
        B, C = (tensor.unflatten(-1, (config.n_groups, -1)) for tensor in (B, C))
        delta = nn.functional.softplus(_in_full(dt) + _in_full(self.dt_bias)).clamp(*config.time_step_limit)
        A = -_in_full(self.A_log).exp()
        if states_only:
            return None, delta, ssd_final_states(x, delta, A, B, initial_states)
        y, states = ssd_chunk_scan(
            x,
            _stretch_quiet_time(delta, length_scale),
            A,
            B,
            C,
            config.chunk_size,
            D=self.D,
            initial_states=initial_states,
            return_final_states=True,
        )
        y = y[:, outputs].flatten(2).unflatten(-1, (config.n_groups, -1))
        y = nn.functional.rms_norm(y, y.shape[-1:], eps=config.rms_norm_eps)
        return y.flatten(2) * self.norm, delta, states


@use_kernelized_func([_kernel_selective_scan, _kernel_causal_conv1d])
class MambaMiaMamba1SSM(nn.Module):
    """One direction of a Mamba-1 mixer: causal convolution, Δ, B and C from its output, scan with one A a channel."""

    def __init__(self, config: MambaMiaCompressorConfig):
        super().__init__()
        self.config = config
        channels, rank = config.intermediate_size, math.ceil(config.hidden_size / 16)
        self.input_split = [channels]
        self.x_split = [rank, config.state_size, config.state_size]
        self.conv1d = MambaMiaCausalConv1d(channels, channels, config.conv_kernel, groups=channels)
        self.x_proj = nn.Linear(channels, sum(self.x_split), bias=False)
        self.dt_proj = nn.Linear(rank, channels, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(channels))
        self.A_log = nn.Parameter(torch.empty(channels, config.state_size))
        self.D = nn.Parameter(torch.empty(channels))

    def forward(
        self, inputs: Tensor, outputs: slice = slice(None), length_scale: float = 1.0
    ) -> tuple[Tensor, Tensor, None]:
        """`(batch, length, intermediate_size)` to the output of the scan, for `outputs`, and Δ, for all tokens."""
        x = self.conv1d(inputs)
        dt, B, C = self.x_proj(x).split(self.x_split, dim=-1)
        delta = nn.functional.softplus(_in_full(self.dt_proj(dt)) + _in_full(self.dt_bias))
        delta = delta.clamp(*self.config.time_step_limit)
        steps = _stretch_quiet_time(delta, length_scale)
        return selective_scan(x, steps, -_in_full(self.A_log).exp(), B, C, self.D)[:, outputs], delta, None


class MambaMiaInputProjection(nn.Linear):
    """A linear layer that can be asked for some of its outputs only."""

    def forward(self, x: Tensor, outputs: slice = slice(None)) -> Tensor:
        """`(..., in_features)` to `(..., outputs)`."""
        return nn.functional.linear(x, self.weight[outputs])


class MambaMiaMixer(nn.Module):
    """State-space mixer, in one direction or both; what the directions share is `in_proj`, the gate and `out_proj`."""

    def __init__(self, config: MambaMiaCompressorConfig, bidirectional: bool):
        super().__init__()
        ssm_class = MambaMiaMamba2SSM if config.mixer_type == "mamba2" else MambaMiaMamba1SSM
        self.forward_ssm = ssm_class(config)
        self.backward_ssm = ssm_class(config) if bidirectional else None
        self.in_split = [config.intermediate_size, sum(self.forward_ssm.input_split)]
        self.in_proj = MambaMiaInputProjection(config.hidden_size, sum(self.in_split), bias=False)
        self.out_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, length_scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """`(batch, length, hidden_size)` to the same shape, and the forward scan's Δ `(batch, length, heads)`."""
        z, inputs = self.project(hidden_states)
        y, delta = self.scan(inputs, length_scale=length_scale)
        return self.out_proj(y * nn.functional.silu(z)), delta

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """The gate z and what the scans of both directions take."""
        return self.in_proj(hidden_states).split(self.in_split, dim=-1)

    def project_gate(self, hidden_states: Tensor) -> Tensor:
        """The gate z alone."""
        return self._project_part(hidden_states, slice(0, self.in_split[0]))

    def project_inputs(self, hidden_states: Tensor) -> Tensor:
        """What the scans of both directions take, alone."""
        return self._project_part(hidden_states, slice(self.in_split[0], None))

    def _project_part(self, hidden_states: Tensor, outputs: slice) -> Tensor:
        if isinstance(self.in_proj, MambaMiaInputProjection):
            return self.in_proj(hidden_states, outputs)
        return self.in_proj(hidden_states)[..., outputs]  # an adapter or a quantized layer in its place gives them all

    def scan(self, inputs: Tensor, every: int = 1, length_scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """The sum of both directions' normed outputs, for the last of `every` so many tokens, and the forward Δ."""
        y, delta, _ = self.forward_ssm(inputs, outputs=slice(every - 1, None, every), length_scale=length_scale)
        if self.backward_ssm is not None:
            backward = self.backward_ssm(inputs.flip(1), outputs=slice(0, None, every), length_scale=length_scale)
            y = y + backward[0].flip(1)
        return y, delta


class MambaMiaGatedPatchAggregation(nn.Module):
    r"""GPA: an anchor q gathers the K patches x_i of its row and decides how much of them to take in (paper, Eq. 1-3).

    $\alpha = \mathrm{softmax}(W_\alpha q + b_\alpha)$, $a = \sum_i \alpha_i x_i$, $g = \sigma(W_g q + b_g)$,
    $f = (1 - g) q + g a$.
    """

    def __init__(self, config: MambaMiaCompressorConfig):
        super().__init__()
        self.weight_proj = nn.Linear(config.hidden_size, config.patches_per_anchor)
        self.gate_proj = nn.Linear(config.hidden_size, 1)
        self.dropout = nn.Dropout(config.gpa_dropout)
        self.gate_margin = 0.01 if config.gpa_placement == "pre_mixer" else 0.0

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(batch, rows * (K + 1), hidden_size)` to the same, with f in place of every anchor q."""
        rows = hidden_states.unflatten(1, (-1, self.weight_proj.out_features + 1))
        patches, anchor = rows[:, :, :-1], rows[:, :, -1:]
        weights, gate = self.weigh(anchor)
        anchor = torch.lerp(anchor, weights @ patches, gate)
        return torch.cat([patches, anchor], dim=2).flatten(1, 2)

    def weigh(self, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """`(batch, rows, 1, hidden_size)` to α `(batch, rows, 1, K)` and g `(batch, rows, 1, 1)`."""
        query = self.dropout(anchor)
        weights = _in_full(self.weight_proj(query)).softmax(dim=-1).to(query.dtype)
        gate = self.gate_margin + (1 - 2 * self.gate_margin) * self.gate_proj(query).sigmoid()
        return weights, gate


class _Boundary(NamedTuple):
    """What a scan that goes on from a token has to know of those it has passed."""

    context: Tensor | None = None  # the inputs of the convolution's reach, in the order of the scan
    states: Tensor | None = None


class MambaMiaSpatialBlock(GradientCheckpointingLayer):
    """A block of stage 1: mixer and GPA over the patches and anchors of all frames, with a residual connection."""

    def __init__(self, config: MambaMiaCompressorConfig):
        super().__init__()
        self.taps, self.row_length = config.conv_kernel - 1, config.patches_per_anchor + 1
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = MambaMiaMixer(config, config.bidirectional)
        self.gpa = None if config.gpa_placement is None else MambaMiaGatedPatchAggregation(config)
        self.gpa_placement = config.gpa_placement

    def forward(self, hidden_states: Tensor, segment_length: int | None = None, anchors_only: bool = False) -> Tensor:
        """`(batch, rows * (K + 1), hidden_size)` to the same shape, or with `anchors_only` to one token a row.

        With a `segment_length` the sequence is overwritten segment by segment, in memory that does not grow with the
        length; exact, but without a gradient.
        """
        if segment_length is not None:
            return self._forward_in_segments(hidden_states, segment_length, anchors_only)
        mixer_input = self._mixer_input(hidden_states)
        if not anchors_only:
            return self._mixed(hidden_states, self.mixer(mixer_input)[0])
        if self.gpa_placement == "post_mixer":
            z, inputs = self.mixer.project(mixer_input)
            return self._read_out(hidden_states, self.mixer.scan(inputs)[0] * nn.functional.silu(z))
        y, _ = self.mixer.scan(self.mixer.project_inputs(mixer_input), every=self.row_length)
        z = self.mixer.project_gate(self._anchors(mixer_input))
        return self._read_out(hidden_states, y * nn.functional.silu(z))

    def _mixer_input(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.norm(hidden_states)
        return self.gpa(hidden_states) if self.gpa_placement == "pre_mixer" else hidden_states

    def _mixed(self, hidden_states: Tensor, mixer_output: Tensor) -> Tensor:
        hidden_states = hidden_states + mixer_output
        return self.gpa(hidden_states) if self.gpa_placement == "post_mixer" else hidden_states

    def _anchors(self, hidden_states: Tensor) -> Tensor:
        return hidden_states[:, self.row_length - 1 :: self.row_length]

    def _read_out(self, hidden_states: Tensor, gated: Tensor) -> Tensor:
        """The anchors of what `_mixed` gives, from the gated outputs u of the scans, before `out_proj`.

        `out_proj` is linear: Σ α_i (h_i + out_proj(u_i)) = Σ α_i h_i + out_proj(Σ α_i u_i). So GPA after the mixer
        needs the u of every patch, as the gate is not linear, but projects none. Otherwise u is of anchors alone.
        """
        if self.gpa_placement != "post_mixer":
            return self._anchors(hidden_states) + self.mixer.out_proj(gated)
        hidden_rows, gated_rows = (tensor.unflatten(1, (-1, self.row_length)) for tensor in (hidden_states, gated))
        anchor = hidden_rows[:, :, -1:] + self.mixer.out_proj(gated_rows[:, :, -1:])
        weights, gate = self.gpa.weigh(anchor)
        pooled = weights @ hidden_rows[:, :, :-1] + self.mixer.out_proj(weights @ gated_rows[:, :, :-1])
        return torch.lerp(anchor, pooled, gate).squeeze(2)

    @torch.no_grad()
    def _forward_in_segments(self, hidden_states: Tensor, segment_length: int, anchors_only: bool) -> Tensor:
        """First the backward scan's states at the boundaries are found from right to left, then one sweep from left to
        right finishes both directions. A segment is a whole number of rows."""
        mixer, length = self.mixer, hidden_states.shape[1]
        segments = [hidden_states[:, start : start + segment_length] for start in range(0, length, segment_length)]
        entering = [_Boundary()] * len(segments)
        for index in range(len(segments) - 1, 0, -1) if mixer.backward_ssm is not None else ():
            inputs = mixer.project_inputs(self._mixer_input(segments[index]))
            for _, _, leaving in self._tiles(inputs, entering[index], reverse=True, states_only=True):
                entering[index - 1] = leaving

        reads_anchors = anchors_only and self.gpa_placement != "post_mixer"
        every = self.row_length if reads_anchors else 1
        passed, anchors = _Boundary(), []
        for segment, ahead in zip(segments, entering, strict=True):
            mixer_input = self._mixer_input(segment)
            if reads_anchors:
                z, inputs = mixer.project_gate(self._anchors(mixer_input)), mixer.project_inputs(mixer_input)
            else:
                z, inputs = mixer.project(mixer_input)
            gated = z.new_zeros(z.shape)
            if mixer.backward_ssm is not None:
                for tokens, y, _ in self._tiles(inputs, ahead, reverse=True, every=every):
                    gated[:, tokens] = y
            for tokens, y, leaving in self._tiles(inputs, passed, every=every):
                gated[:, tokens] = y.add_(gated[:, tokens]).mul_(nn.functional.silu(z[:, tokens]))
                passed = leaving
            if anchors_only:
                anchors.append(self._read_out(segment, gated))
            else:
                segment.copy_(self._mixed(segment, mixer.out_proj(gated)))
        return torch.cat(anchors, dim=1) if anchors_only else hidden_states

    def _tiles(
        self, inputs: Tensor, boundary: _Boundary, reverse: bool = False, every: int = 1, states_only: bool = False
    ) -> Iterator[tuple[slice, Tensor | None, _Boundary]]:
        """One direction over a segment, tile by tile. For each tile: the place of its outputs among those of the last
        token of `every` so many, the outputs, and what a scan that goes on from here has to know."""
        ssm = self.mixer.backward_ssm if reverse else self.mixer.forward_ssm
        length = inputs.shape[1]
        rows = max(1, _TILE_TOKENS.get(inputs.device.type, length) // self.row_length)
        starts = range(0, length, rows * self.row_length)
        outputs = slice(0 if reverse else every - 1, None, every)
        for start in reversed(starts) if reverse else starts:
            end = min(start + starts.step, length)
            tile = inputs[:, start:end].flip(1) if reverse else inputs[:, start:end]
            y, _, states = ssm(tile, *boundary, states_only=states_only, outputs=outputs)
            context = tile[:, max(0, end - start - self.taps) :]
            if boundary.context is not None:
                context = torch.cat([boundary.context, context], dim=1)
            boundary = _Boundary(context[:, max(0, context.shape[1] - self.taps) :].clone(), states)
            yield slice(start // every, end // every), y.flip(1) if reverse and y is not None else y, boundary


class MambaMiaTemporalBlock(GradientCheckpointingLayer):
    """A block of stage 2, the Time Axis Aggregator (TAA): a mixer along time with a residual connection."""

    def __init__(self, config: MambaMiaCompressorConfig):
        super().__init__()
        self.config = config
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = MambaMiaMixer(config, config.temporal_bidirectional)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """`(batch, frames, anchors, hidden_size)` to the same shape, and Δ of every frame `(batch, frames)`."""
        batch_size = hidden_states.shape[0]
        over_time = self.norm(hidden_states).transpose(1, 2).flatten(0, 1)
        mixed, delta = self.mixer(over_time, self.config.length_scale if self.training else 1.0)
        mixed = mixed.unflatten(0, (batch_size, -1)).transpose(1, 2)
        return hidden_states + mixed, delta.unflatten(0, (batch_size, -1)).mean(dim=(1, 3))


class MambaMiaCompressorPreTrainedModel(PreTrainedModel):
    config: MambaMiaCompressorConfig
    config_class = MambaMiaCompressorConfig
    base_model_prefix = "compressor"
    main_input_name = "features"
    supports_gradient_checkpointing = True
    # There is no attention in it, so whichever the models around it use will do.
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["MambaMiaSpatialBlock", "MambaMiaTemporalBlock"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        config = self.config
        if isinstance(module, MambaMiaMamba2SSM | MambaMiaMamba1SSM):
            dt = torch.empty_like(module.dt_bias, dtype=torch.float32)
            dt.uniform_(math.log(config.time_step_min), math.log(config.time_step_max))
            dt = dt.exp().clamp(min=config.time_step_floor)
            init.copy_(module.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
            init.ones_(module.D)
            init.uniform_(module.conv1d.weight, -(config.conv_kernel**-0.5), config.conv_kernel**-0.5)
            if isinstance(module, MambaMiaMamba2SSM):
                init.copy_(module.A_log, torch.empty_like(module.A_log).uniform_(*config.A_init_range).log())
                init.ones_(module.norm)
            else:
                init.copy_(module.A_log, torch.arange(1, config.state_size + 1).log().expand_as(module.A_log))
        elif isinstance(module, MambaMiaCompressor):
            init.normal_(module.anchor, std=config.initializer_range)
            for layer in module.layers if config.gpa_placement is not None else ():
                for projection in (layer.gpa.weight_proj, layer.gpa.gate_proj):
                    init.normal_(projection.weight, std=1e-3 * config.initializer_range)


class MambaMiaCompressor(MambaMiaCompressorPreTrainedModel):
    r"""The two-stage compressor, usable alone between any vision tower and any language model.

    ```python
    >>> compressor = MambaMiaCompressor(MambaMiaCompressorConfig(hidden_size=256))
    >>> output = compressor(torch.randn(1, 8, 576, 1152))
    >>> output.last_hidden_state.shape, output.frame_deltas.shape
    (torch.Size([1, 8, 24, 3584]), torch.Size([1, 8]))
    ```"""

    def __init__(self, config: MambaMiaCompressorConfig):
        super().__init__(config)
        self.input_proj = nn.Linear(config.input_size, config.hidden_size)
        self.anchor = nn.Parameter(torch.empty(config.hidden_size))
        self.input_norm = nn.LayerNorm(config.hidden_size, eps=1e-6) if config.input_norm else nn.Identity()
        self.layers = nn.ModuleList(MambaMiaSpatialBlock(config) for _ in range(config.num_hidden_layers))
        self.temporal_layers = nn.ModuleList(MambaMiaTemporalBlock(config) for _ in range(config.num_temporal_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.output_proj = nn.Linear(config.hidden_size, config.output_size)
        self.post_init()

    def forward(
        self, features: Tensor, frame_mask: Tensor | None = None, return_dict: bool | None = None
    ) -> MambaMiaCompressorOutput | tuple[Tensor, ...]:
        """
        Args:
            features (`torch.FloatTensor` of shape `(batch_size, num_frames, num_patches, input_size)`):
                Patch features of the frames; a frame's patches in row-major order.
            frame_mask (`torch.BoolTensor` of shape `(batch_size, num_frames)`, *optional*):
                True for the frames of a video, False for padding. Every video gives what it gives alone.
            return_dict (`bool`, *optional*):
                Whether to return a [`MambaMiaCompressorOutput`] in place of a tuple.

        Raises:
            ValueError: if the patches are not a whole number of rows, or a video has no frame.
        """
        self.config.num_anchors(features.shape[2])
        if features.shape[-1] != self.config.input_size:
            raise ValueError(
                f"The features are {features.shape[-1]} wide and input_size is {self.config.input_size}; pass "
                f"features of this width, or set input_size={features.shape[-1]}."
            )
        if frame_mask is None or bool(frame_mask.all()):
            anchors, deltas = self._compress(features)
        else:
            anchors, deltas = self._compress_masked(features, frame_mask.bool())
        output = MambaMiaCompressorOutput(last_hidden_state=anchors, frame_deltas=deltas)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _compress(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        batch_size, num_frames = features.shape[:2]
        if num_frames == 0:
            raise ValueError("The compressor got a video without frames; give it one frame at least.")
        if torch.is_grad_enabled() or self.config.mixer_type != "mamba2":
            hidden_states, segment_length = self.embed(features), None
        else:
            row_length = self.config.patches_per_anchor + 1
            segment_length = max(1, _SEGMENT_TOKENS // row_length) * row_length
            hidden_states = self._embed_in_segments(features.flatten(1, 2), segment_length // row_length)
        for index, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, segment_length, anchors_only=index == len(self.layers) - 1)
        anchors = hidden_states.unflatten(1, (num_frames, -1))
        deltas = None
        for layer in self.temporal_layers:
            anchors, deltas = layer(anchors)
        return self.output_proj(self.norm(anchors)), deltas

    def embed(self, features: Tensor) -> Tensor:
        """`(batch, frames, patches, input_size)` to the sequence of stage 1, `(batch, length, hidden_size)`."""
        return self.input_norm(self.insert_anchors(self.input_proj(features)))

    def _embed_in_segments(self, patches: Tensor, rows: int) -> Tensor:
        """The same from `(batch, patches, input_size)`, so many rows at a time, so that no other tensor is as long."""
        patches_per_anchor = self.config.patches_per_anchor
        length, hidden_states = patches.shape[1] // patches_per_anchor * (patches_per_anchor + 1), None
        for index, segment in enumerate(patches.split(rows * patches_per_anchor, dim=1)):
            embedded = self.embed(segment.unsqueeze(1))
            if hidden_states is None:
                hidden_states = embedded.new_empty(len(patches), length, embedded.shape[-1])
            start = index * rows * (patches_per_anchor + 1)
            hidden_states[:, start : start + embedded.shape[1]] = embedded
        return hidden_states

    def insert_anchors(self, patches: Tensor) -> Tensor:
        """`(batch, frames, patches, hidden_size)` to one sequence: frame, row, the row's patches, then its anchor."""
        rows = patches.flatten(1, 2).unflatten(1, (-1, self.config.patches_per_anchor))
        anchors = self.anchor.to(rows.dtype).expand(*rows.shape[:2], 1, -1)
        return torch.cat([rows, anchors], dim=2).flatten(1, 2)

    def _compress_masked(self, features: Tensor, frame_mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Videos of one length run together and without their padding, so that nothing of it can leak into a scan."""
        lengths = frame_mask.sum(dim=1)
        anchors = deltas = None
        for length in lengths.unique().tolist():
            videos = (lengths == length).nonzero().squeeze(1)
            mask = frame_mask[videos]
            part, part_deltas = self._compress(features[videos][mask].unflatten(0, (len(videos), length)))
            if anchors is None:
                anchors = part.new_zeros(*frame_mask.shape, *part.shape[2:])
                deltas = None if part_deltas is None else part_deltas.new_zeros(frame_mask.shape)
            rows, frames = mask.nonzero(as_tuple=True)
            anchors = anchors.index_put((videos[rows], frames), part.flatten(0, 1))
            if deltas is not None:
                deltas = deltas.index_put((videos[rows], frames), part_deltas.flatten())
        return anchors, deltas


def select_frames(
    frame_deltas: Tensor,
    threshold: float | None = None,
    keep_frames: int | None = None,
    keep_ratio: float | None = None,
    frame_mask: Tensor | None = None,
) -> Tensor:
    r"""Delta sampling: which frames go on to the language model.

    With `threshold` δ, the paper's Algorithm 1: $A \leftarrow A + \Delta_t$, and where $A \ge \delta$ frame t is kept
    and A starts again from 0. When nothing reaches δ, the frame with the largest Δ is kept.

    With an exact budget of K frames, the same accumulation with the step chosen so that K frames come out: a frame
    counts for at most one step, c with $\sum_t \min(\Delta_t, c) = K c$, and is kept where the sum of
    $\min(\Delta_t, c)$ passes a multiple of c.

    Args:
        frame_deltas: `(batch, frames)`, not negative.
        threshold: δ, not negative; 0 keeps every frame.
        keep_frames: budget as a number of frames; a video that has fewer keeps them all.
        keep_ratio: budget as a share of the frames in (0, 1].
        frame_mask: `(batch, frames)`, True for frames; all are frames where absent.

    Returns:
        `(batch, frames)`, True for the frames that are kept. Without threshold and budget these are all frames.

    Raises:
        ValueError: for a threshold together with a budget, two budgets, or one out of range.
    """
    if threshold is not None and (keep_frames is not None or keep_ratio is not None):
        raise ValueError(
            f"threshold={threshold} and a budget (keep_frames={keep_frames}, keep_ratio={keep_ratio}) exclude each "
            f"other; give one of them."
        )
    if threshold is not None and threshold < 0:
        raise ValueError(f"threshold must not be negative, not {threshold}.")
    frame_budget(1, keep_frames, keep_ratio)
    if frame_mask is None:
        frame_mask = torch.ones_like(frame_deltas, dtype=torch.bool)
    selected = torch.zeros_like(frame_mask, dtype=torch.bool)
    for video, mask in enumerate(frame_mask.bool()):
        deltas = frame_deltas[video, mask].detach().double().cpu()
        if threshold is not None:
            kept = _keep_by_threshold(deltas, threshold)
        else:
            kept = _keep_by_budget(deltas, frame_budget(len(deltas), keep_frames, keep_ratio))
        selected[video, mask] = kept.to(selected.device)
    return selected


def _keep_by_threshold(deltas: Tensor, threshold: float) -> Tensor:
    kept, accumulated = [], 0.0
    for delta in deltas.tolist():
        accumulated += delta
        kept.append(accumulated >= threshold)
        if kept[-1]:
            accumulated = 0.0
    if not any(kept) and kept:
        kept[int(deltas.argmax())] = True
    return torch.tensor(kept, dtype=torch.bool)


def _keep_by_budget(deltas: Tensor, budget: int) -> Tensor:
    if budget >= len(deltas):
        return torch.ones(len(deltas), dtype=torch.bool)
    # Frames without any Δ still have to fill a budget that the others cannot.
    deltas = deltas.clamp(min=max(1e-6 * deltas.max().item(), 1e-30))
    # c: where the m largest count for one step each, the others share the remaining K - m steps.
    descending = deltas.sort(descending=True).values
    rest = deltas.sum() - nn.functional.pad(descending.cumsum(0), (1, 0))[:budget]
    steps = rest / (budget - torch.arange(budget))
    step = steps[(descending[:budget] <= steps * (1 + 1e-12)).int().argmax()]
    # The margin keeps a sum that should reach a multiple of c from missing it by a rounding error.
    passed = torch.floor((deltas.clamp(max=step) / step).cumsum(0) + 1e-6)
    return passed.diff(prepend=passed.new_zeros(1)) > 0


__all__ = [
    "MambaMiaCompressor",
    "MambaMiaCompressorOutput",
    "MambaMiaCompressorPreTrainedModel",
    "select_frames",
]
