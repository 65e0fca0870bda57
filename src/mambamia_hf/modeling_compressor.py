"""The compressor: patch features of every frame in, a few anchors and the importance Δ of every frame out.

In reading order: the state-space mixer, Gated Patch Aggregation (GPA), the blocks of the two stages (the second is the
Time Axis Aggregator, TAA), and the compressor that puts them together. An anchor is a token that stands for a row of
patches; checkpoints of the authors' code call the vector that all anchors start from `query_token`.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.integrations import is_deepspeed_zero3_enabled, use_kernelized_func
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput, can_return_tuple

from .compressor_segments import embed_in_segments, run_in_segments
from .configuration_mambamia import MambaMiaCompressorConfig
from .quantization import load_pretrained
from .selective_scan import _kernel_selective_scan, selective_scan
from .ssd import (
    _kernel_causal_conv1d,
    _kernel_chunk_scan,
    causal_conv1d_silu,
    gated,
    gated_norm,
    reads_backwards,
    ssd_chunk_scan,
    ssd_final_states,
)
from .vision_tower import does_more
from .zero3 import largest_of_processes


@dataclass
class MambaMiaCompressorOutput(ModelOutput):
    """
    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, num_frames, num_anchors, output_size)`):
            The tokens of every frame: its anchors, normed and projected; zero for padding. `None` with
            `anchors_only=True`.
        frame_deltas (`torch.FloatTensor` of shape `(batch_size, num_frames)`, *optional*):
            Δ, the importance of every frame: the mean step size of the TAA's scan. Never negative, zero for padding.
            `None` without a temporal layer.
        anchors (`torch.FloatTensor` of shape `(batch_size, num_frames, num_anchors, hidden_size)`):
            The anchors before final norm and output projection; zero for padding.
    """

    last_hidden_state: Tensor | None = None
    frame_deltas: Tensor | None = None
    anchors: Tensor | None = None


class ScanState(NamedTuple):
    """What one direction of a mixer carries from the tokens that it has passed to the next: the two parts of a Mamba
    cache. Two scans, the second from the state that the first left, equal one scan over both.

    Args:
        conv: `(batch_size, conv_kernel - 1, channels)`, the last inputs of the convolution.
        ssm: `(batch_size, num_heads, head_dim, state_size)`, the state h of the scan.
    """

    conv: Tensor
    ssm: Tensor


def _full_precision(tensor: Tensor) -> Tensor:
    """In float32, or float64 where the tensor is: the type that step sizes and decays are computed in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _lengthen_quiet_time(delta: Tensor, length_scale: float) -> Tensor:
    """Multiplies Δ of the quieter half of the tokens by a random factor, one for each sequence.

    Δ is how long a token lasts for the scan. The factor is uniform between 1 and `2 * length_scale - 1`, so a sequence
    seems 1 to `length_scale` times as long, and nothing happens in the added time.

    Args:
        delta: `(batch_size, length, num_heads)`.
        length_scale: at least 1; 1 changes nothing.
    """
    if length_scale == 1:
        return delta
    importance = delta.detach().mean(dim=-1, keepdim=True)
    quiet = importance <= importance.median(dim=1, keepdim=True).values
    factor = 1 + 2 * (length_scale - 1) * torch.rand(len(delta), 1, 1, device=delta.device)
    return torch.where(quiet, factor * delta, delta)


class MambaMiaCausalConv1d(nn.Conv1d):
    """Causal depthwise convolution and SiLU; its forward uses its weights, so that offloading hooks bring them."""

    bias: Tensor

    def forward(self, x: Tensor, context: Tensor | None = None, reverse: bool = False) -> Tensor:
        """`(batch_size, length, channels)` to the same shape; the rest as in `causal_conv1d_silu`."""
        return causal_conv1d_silu(x, self.weight.squeeze(1), self.bias, context, reverse)


@use_kernelized_func([_kernel_chunk_scan, _kernel_causal_conv1d])
class MambaMiaMamba2SSM(nn.Module):
    r"""One direction of a Mamba-2 mixer: causal convolution, scan with one A per head, RMS norm.

    $\Delta_t = \mathrm{softplus}(dt_t + b)$, $h_t = e^{\Delta_t A} h_{t-1} + \Delta_t B_t x_t$,
    $y_t = C_t h_t + D x_t$ with $A = -e^{A_{log}}$.
    """

    takes_state = True

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
        state: ScanState | None = None,
        stride: int | None = 1,
        length_scale: float = 1.0,
        reverse: bool = False,
        add: Tensor | None = None,
        z: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, ScanState]:
        """
        Args:
            inputs: `(batch_size, length, intermediate_size + 2 * n_groups * state_size + num_heads)`: x, B, C and dt.
            state: what the scan left after the tokens before these; by default these are the first.
            stride: the output of the last token of every `stride` is wanted. With `None` only Δ and the state are
                computed, at a fraction of the cost and without a gradient.
            length_scale: how many times longer a sequence may seem to the scan, see `_lengthen_quiet_time`.
            reverse: whether the scan runs from the last token to the first; then `state` is that behind the last.
            add: `(batch_size, length // stride, intermediate_size)`, the other direction's output, to add to this one.
            z: of the same shape, the gate.

        Returns:
            The output of the scan, normed, with `add` and gated `(batch_size, length // stride, intermediate_size)`; Δ
            `(batch_size, length, num_heads)` in float32, without any `length_scale`; and the state after the last
            token of the scan.
        """
        config = self.config
        flips = reverse and not reads_backwards(inputs)
        if flips:
            inputs, reverse = inputs.flip(1), False
        xBC, dt = inputs.split(self.input_split, dim=-1)
        conv, ssm = (None, None) if state is None else state
        x, B, C = self.conv1d(xBC, conv, reverse).split(self.x_split, dim=-1)
        x = x.unflatten(-1, (-1, config.head_dim))
        B, C = (tensor.unflatten(-1, (config.n_groups, -1)) for tensor in (B, C))
        delta = nn.functional.softplus(_full_precision(dt) + _full_precision(self.dt_bias))
        delta = delta.clamp(*config.time_step_limit)
        steps = _lengthen_quiet_time(delta, length_scale)
        A = -_full_precision(self.A_log).exp()
        inputs_left = self._last_inputs(xBC, conv, reverse)
        if stride is None:
            ssm = ssd_final_states(x, steps, A, B, ssm, reverse)
            return x[:, :0].flatten(2), delta, ScanState(inputs_left, ssm)
        y, ssm = ssd_chunk_scan(
            x, steps, A, B, C, config.chunk_size, D=self.D, initial_states=ssm, return_final_states=True,
            reverse=reverse,
        )  # fmt: skip
        y = y.flatten(2)
        if flips:  # the last token of every stride is the first here
            y, delta = y[:, ::stride].flip(1), delta.flip(1)
        else:
            y = y[:, stride - 1 :: stride]
        y = gated_norm(y, self.norm, config.rms_norm_eps, config.n_groups, add, z)
        return y, delta, ScanState(inputs_left, ssm)

    def _last_inputs(self, xBC: Tensor, conv: Tensor | None, reverse: bool) -> Tensor:
        """The convolution's part of the state after `xBC`: its last `conv_kernel - 1` tokens, zeros before them."""
        reach = self.config.conv_kernel - 1
        if reach == 0:
            return xBC[:, :0]
        before = xBC.new_zeros(len(xBC), reach, xBC.shape[2]) if conv is None else conv
        recent = xBC[:, :reach].flip(1) if reverse else xBC[:, -reach:]
        return torch.cat([before, recent], dim=1)[:, -reach:]


@use_kernelized_func([_kernel_selective_scan, _kernel_causal_conv1d])
class MambaMiaMamba1SSM(nn.Module):
    """One direction of a Mamba-1 mixer: causal convolution, from its output Δ, B and C, scan with a matrix A."""

    takes_state = False

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
        self,
        inputs: Tensor,
        state: None = None,
        stride: int = 1,
        length_scale: float = 1.0,
        reverse: bool = False,
        add: Tensor | None = None,
        z: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, None]:
        """As [`MambaMiaMamba2SSM`], but `inputs` is `(batch_size, length, intermediate_size)`, Δ is per channel, there
        is no norm, and no state: this scan runs over whole sequences only.

        Raises:
            ValueError: for a state.
        """
        if state is not None:
            raise ValueError("A Mamba-1 scan cannot start from a state; run it over the whole sequence.")
        x = self.conv1d(inputs.flip(1) if reverse else inputs)
        dt, B, C = self.x_proj(x).split(self.x_split, dim=-1)
        delta = nn.functional.softplus(_full_precision(self.dt_proj(dt)) + _full_precision(self.dt_bias))
        delta = delta.clamp(*self.config.time_step_limit)
        steps = _lengthen_quiet_time(delta, length_scale)
        y = selective_scan(x, steps, -_full_precision(self.A_log).exp(), B, C, self.D)
        if reverse:
            y, delta = y.flip(1), delta.flip(1)
        return gated(y[:, stride - 1 :: stride], add, z), delta, None


def _part_of(linear: nn.Module, x: Tensor, features: slice) -> Tensor:
    """Some of the output features of a linear layer without a bias: `(..., in_features)` to `(..., num_features)`.

    Adapters, quantised weights and hooks, as those of offloading are, compute all features, of which some are taken.
    """
    if type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and not does_more(linear):
        return nn.functional.linear(x, linear.weight[features])
    return linear(x)[..., features]


class MambaMiaMixer(nn.Module):
    r"""State-space mixer, forward or in both directions.

    With z and the inputs u from one `in_proj`: $\mathrm{out\_proj}((y^\rightarrow(u) + y^\leftarrow(u)) \odot
    \mathrm{silu}(z))$. The directions share `in_proj`, the gate and `out_proj`; the backward one runs over the flipped
    sequence.
    """

    def __init__(self, config: MambaMiaCompressorConfig, bidirectional: bool):
        super().__init__()
        ssm_class: type[MambaMiaMamba2SSM] | type[MambaMiaMamba1SSM]
        ssm_class = MambaMiaMamba2SSM if config.mixer_type == "mamba2" else MambaMiaMamba1SSM
        self.forward_ssm = ssm_class(config)
        self.backward_ssm = ssm_class(config) if bidirectional else None
        self.in_split = [config.intermediate_size, sum(self.forward_ssm.input_split)]
        self.in_proj = nn.Linear(config.hidden_size, sum(self.in_split), bias=False)
        self.out_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        forward_state: ScanState | None = None,
        backward_state: ScanState | None = None,
        length_scale: float = 1.0,
        inputs: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, ScanState | None]:
        """
        Args:
            hidden_states: `(batch_size, length, hidden_size)`.
            forward_state: the forward scan's state after the tokens before these; by default there are none.
            backward_state: the backward scan's state after the tokens behind these; by default there are none.
            length_scale: see `_lengthen_quiet_time`.
            inputs: what `project_inputs` gave for `hidden_states`, where that is known.

        Returns:
            `(batch_size, length, hidden_size)`; the forward scan's Δ `(batch_size, length, num_heads)`; and its state
            after the last token (`None` for Mamba-1).
        """
        z, inputs = self.project(hidden_states, inputs)
        u, delta, state = self.scan(z, inputs, forward_state, backward_state, length_scale=length_scale)
        return self.out_proj(u), delta, state

    def scan(
        self,
        z: Tensor,
        inputs: Tensor,
        forward_state: ScanState | None = None,
        backward_state: ScanState | None = None,
        stride: int = 1,
        length_scale: float = 1.0,
    ) -> tuple[Tensor, Tensor, ScanState | None]:
        """The gated sum of both directions' outputs, for the last token of every `stride`, for which z is given; the
        rest as in `forward`."""
        y = None
        if self.backward_ssm is not None:
            y, _, _ = self.backward_ssm(inputs, backward_state, stride, length_scale, reverse=True)
        return self.forward_ssm(inputs, forward_state, stride, length_scale, add=y, z=z)

    def project(self, hidden_states: Tensor, inputs: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The gate z and the inputs of the scans, unless the latter are known."""
        if inputs is None:
            z, inputs = self.in_proj(hidden_states).split(self.in_split, dim=-1)
            return z, inputs
        return self.project_gate(hidden_states), inputs

    def project_gate(self, hidden_states: Tensor) -> Tensor:
        """The gate z `(..., intermediate_size)` alone."""
        return _part_of(self.in_proj, hidden_states, slice(0, self.in_split[0]))

    def project_inputs(self, hidden_states: Tensor) -> Tensor:
        """The inputs of the scans alone."""
        return _part_of(self.in_proj, hidden_states, slice(self.in_split[0], None))


class MambaMiaGatedPatchAggregation(nn.Module):
    r"""GPA: the anchor q of a row takes in a gated average of the row's K patches x_i (paper, Eq. 1-3).

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
        """`(batch_size, num_rows * (K + 1), hidden_size)` to the same shape, with f in place of every anchor q."""
        rows = hidden_states.unflatten(1, (-1, self.weight_proj.out_features + 1))
        patches, anchor = rows[:, :, :-1], rows[:, :, -1:]
        weights, gate = self.weigh(anchor)
        anchor = torch.lerp(anchor, weights @ patches, gate)
        return torch.cat([patches, anchor], dim=2).flatten(1, 2)

    def weigh(self, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """`(batch_size, num_rows, 1, hidden_size)` to α `(..., 1, K)` and g `(..., 1, 1)`."""
        query = self.dropout(anchor).squeeze(2)
        weights = _full_precision(self.weight_proj(query)).softmax(dim=-1).to(query.dtype)
        gate = self.gate_margin + (1 - 2 * self.gate_margin) * self.gate_proj(query).sigmoid()
        return weights.unsqueeze(2), gate.unsqueeze(2)


class MambaMiaSpatialBlock(GradientCheckpointingLayer):
    r"""A block of stage 1, over the patches and anchors of all frames.

    What it computes depends on `gpa_placement`:

    - `"post_mixer"` (the paper): $h \leftarrow \mathrm{gpa}(h + \mathrm{mixer}(\mathrm{norm}(h)))$
    - `"pre_mixer"` (the authors' code): $h \leftarrow h + \mathrm{mixer}(\mathrm{gpa}(\mathrm{norm}(h)))$
    - `None`: $h \leftarrow h + \mathrm{mixer}(\mathrm{norm}(h))$
    """

    def __init__(self, config: MambaMiaCompressorConfig):
        super().__init__()
        self.row_length = config.patches_per_anchor + 1
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = MambaMiaMixer(config, config.bidirectional)
        self.gpa = None if config.gpa_placement is None else MambaMiaGatedPatchAggregation(config)
        self.gpa_placement = config.gpa_placement

    def forward(self, hidden_states: Tensor, anchors_only: bool = False, needs_gradient: bool = True) -> Tensor:
        """
        Args:
            hidden_states: `(batch_size, num_rows * (K + 1), hidden_size)`.
            anchors_only: whether to return the anchors alone, which costs less.
            needs_gradient: False lets the block run segment by segment: the same result in bounded memory, but
                without a gradient, and `hidden_states` is overwritten. A Mamba-1 block always runs whole, and so does
                a compiled one, whose graph has no loop over segments.

        Returns:
            `(batch_size, num_rows * (K + 1), hidden_size)`, or `(batch_size, num_rows, hidden_size)` with
            `anchors_only`.
        """
        if not needs_gradient and self.mixer.forward_ssm.takes_state and not torch.compiler.is_compiling():
            return run_in_segments(self, hidden_states, anchors_only)
        return self.run_segment(hidden_states, anchors_only=anchors_only)[0]

    def run_segment(
        self,
        hidden_states: Tensor,
        forward_state: ScanState | None = None,
        backward_state: ScanState | None = None,
        anchors_only: bool = False,
        inputs: Tensor | None = None,
    ) -> tuple[Tensor, ScanState | None]:
        """The block over whole rows of a sequence, given the states of [`MambaMiaMixer`] on either side of them, and
        the inputs of its scans where they are known.

        Returns:
            As `forward`, and the forward scan's state after the last token.
        """
        mixer_input = self.mixer_input(hidden_states)
        if anchors_only:
            return self._read_anchors(hidden_states, mixer_input, forward_state, backward_state, inputs)
        mixed, _, state = self.mixer(mixer_input, forward_state, backward_state, inputs=inputs)
        hidden_states = hidden_states + mixed
        if self.gpa is not None and self.gpa_placement == "post_mixer":
            hidden_states = self.gpa(hidden_states)
        return hidden_states, state

    def mixer_input(self, hidden_states: Tensor) -> Tensor:
        """What the mixer takes, of the same shape as `hidden_states`."""
        hidden_states = self.norm(hidden_states)
        if self.gpa is not None and self.gpa_placement == "pre_mixer":
            hidden_states = self.gpa(hidden_states)
        return hidden_states

    def _read_anchors(
        self,
        hidden_states: Tensor,
        mixer_input: Tensor,
        forward_state: ScanState | None,
        backward_state: ScanState | None,
        inputs: Tensor | None,
    ) -> tuple[Tensor, ScanState | None]:
        r"""The anchors that `run_segment` gives, without `out_proj` of every patch.

        GPA after the mixer averages $h_i + \mathrm{out\_proj}(u_i)$, where u is the gated output of the scans. As
        `out_proj` is linear, this is $\sum_i \alpha_i h_i + \mathrm{out\_proj}(\sum_i \alpha_i u_i)$: it needs u of
        every patch, but projects only their average. In the other placements only u of the anchors matters.
        """
        mixer, states = self.mixer, (forward_state, backward_state)
        if self.gpa is None or self.gpa_placement != "post_mixer":
            inputs = mixer.project_inputs(mixer_input) if inputs is None else inputs
            z = mixer.project_gate(self._anchors(mixer_input))
            u, _, state = mixer.scan(z, inputs, *states, stride=self.row_length)
            return self._anchors(hidden_states) + mixer.out_proj(u), state
        z, inputs = mixer.project(mixer_input, inputs)
        u, _, state = mixer.scan(z, inputs, *states)
        h, u = (tensor.unflatten(1, (-1, self.row_length)) for tensor in (hidden_states, u))
        anchor = h[:, :, -1] + mixer.out_proj(u[:, :, -1])
        weights, gate = self.gpa.weigh(anchor.unsqueeze(2))
        averages = [(weights @ tensor[:, :, :-1]).squeeze(2) for tensor in (h, u)]
        return torch.lerp(anchor, averages[0] + mixer.out_proj(averages[1]), gate.squeeze(2)), state

    def _anchors(self, hidden_states: Tensor) -> Tensor:
        return hidden_states[:, self.row_length - 1 :: self.row_length]


class MambaMiaTemporalBlock(GradientCheckpointingLayer):
    r"""A block of stage 2, the TAA: $f \leftarrow f + \mathrm{mixer}(\mathrm{norm}(f))$ along time.

    The anchors of one row position form one sequence over all frames. The step size of its scan is the importance of a
    frame: $\Delta_t$ is the mean over the heads and over the row positions.
    """

    def __init__(self, config: MambaMiaCompressorConfig):
        super().__init__()
        self.config = config
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = MambaMiaMixer(config, config.temporal_bidirectional)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """`(batch_size, num_frames, num_anchors, hidden_size)` to the same shape, and Δ `(batch_size, num_frames)`."""
        hidden_states, delta, _ = self.run_segment(hidden_states)
        return hidden_states, delta

    def run_segment(
        self, hidden_states: Tensor, forward_state: ScanState | None = None
    ) -> tuple[Tensor, Tensor, ScanState | None]:
        """The block over frames that follow others, given the scan's state after these.

        Returns:
            As `forward`, and the state after the last frame, of `batch_size * num_anchors` sequences (`None` for
            Mamba-1).
        """
        batch_size = hidden_states.shape[0]
        over_time = self.norm(hidden_states).transpose(1, 2).flatten(0, 1)
        length_scale = self.config.length_scale if self.training else 1.0
        mixed, delta, state = self.mixer(over_time, forward_state, length_scale=length_scale)
        mixed = mixed.unflatten(0, (batch_size, -1)).transpose(1, 2)
        return hidden_states + mixed, delta.unflatten(0, (batch_size, -1)).mean(dim=(1, 3)), state


class MambaMiaCompressorPreTrainedModel(PreTrainedModel):
    config: MambaMiaCompressorConfig
    config_class = MambaMiaCompressorConfig
    base_model_prefix = "compressor"
    main_input_name = "patch_features"
    supports_gradient_checkpointing = True
    # The compressor has no attention, so it works with every implementation that the models around it use.
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["MambaMiaSpatialBlock", "MambaMiaTemporalBlock"]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As any model's, with one sentence for a checkpoint that is damaged or does not fit, and with a quantisation
        of the language model alone; see `load_pretrained`."""
        return load_pretrained(super().from_pretrained, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
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
                decay = torch.empty_like(module.A_log).uniform_(*config.A_init_range)
                if config.initialization == "released":
                    decay = torch.arange(1, len(decay) + 1).to(decay)
                init.copy_(module.A_log, decay.log())
                init.ones_(module.norm)
            else:
                init.copy_(module.A_log, torch.arange(1, config.state_size + 1).log().expand_as(module.A_log))
        elif isinstance(module, MambaMiaCompressor):
            init.normal_(module.anchor, std=config.initializer_range)
            if config.initialization == "released":
                init.normal_(module.anchor, std=config.hidden_size**-0.5)
                init.xavier_uniform_(module.input_proj.weight)
                init.xavier_uniform_(module.output_proj.weight)
            for gpa in module.modules():
                if isinstance(gpa, MambaMiaGatedPatchAggregation):
                    init.normal_(gpa.weight_proj.weight, std=1e-3 * config.initializer_range)
                    init.normal_(gpa.gate_proj.weight, std=1e-3 * config.initializer_range)


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

    @can_return_tuple
    def forward(
        self,
        patch_features: Tensor | None = None,
        frame_mask: Tensor | None = None,
        anchors: Tensor | None = None,
        anchors_only: bool = False,
    ) -> MambaMiaCompressorOutput:
        """
        Args:
            patch_features (`torch.FloatTensor` of shape `(batch_size, num_frames, num_patches, input_size)`):
                The vision tower's features of every frame, the patches of a frame in row-major order.
            frame_mask (`torch.BoolTensor` of shape `(batch_size, num_frames)`, *optional*):
                True for the frames of a video, False for padding. Every video gives what it gives alone.
            anchors (`torch.FloatTensor` of shape `(..., hidden_size)`, *optional*):
                In place of `patch_features`: anchors of an earlier call, some or all of them, to norm and project.
            anchors_only (`bool`, defaults to `False`): whether to leave out final norm and output projection.
            return_dict (`bool`, *optional*):
                False returns a tuple in place of a [`MambaMiaCompressorOutput`].

        Raises:
            ValueError: if the shapes do not fit the configuration or each other, a video has no frame, or not exactly
                one of features and anchors is given.
        """
        if (patch_features is None) == (anchors is None):
            raise ValueError("Give patch_features, or anchors in their place.")
        if patch_features is None:
            return MambaMiaCompressorOutput(last_hidden_state=self.output_proj(self.norm(anchors)), anchors=anchors)
        self._check_features(patch_features, frame_mask)
        if is_deepspeed_zero3_enabled() and frame_mask is None:  # length by length, as processes with padding do
            frame_mask = torch.ones(patch_features.shape[:2], dtype=torch.bool, device=patch_features.device)
        if frame_mask is None or (bool(frame_mask.all()) and not is_deepspeed_zero3_enabled()):
            anchors, frame_deltas = self._compress(patch_features)
        else:
            anchors, frame_deltas = self._compress_masked(patch_features, frame_mask.bool())
        tokens = None
        if not anchors_only:
            tokens = self.output_proj(self.norm(anchors).flatten(1, 2)).unflatten(1, anchors.shape[1:3])
            if frame_mask is not None:
                tokens = tokens.masked_fill(~frame_mask.bool()[:, :, None, None], 0.0)
        return MambaMiaCompressorOutput(last_hidden_state=tokens, anchors=anchors, frame_deltas=frame_deltas)

    def _check_features(self, patch_features: Tensor, frame_mask: Tensor | None) -> None:
        if patch_features.ndim != 4:
            raise ValueError(
                f"patch_features must be (batch_size, num_frames, num_patches, input_size), not "
                f"{tuple(patch_features.shape)}."
            )
        if patch_features.shape[-1] != self.config.input_size:
            raise ValueError(
                f"patch_features are {patch_features.shape[-1]} wide and input_size is {self.config.input_size}; pass "
                f"features of this width, or set input_size={patch_features.shape[-1]}."
            )
        self.config.num_anchors(patch_features.shape[2])  # raises for an incomplete row of patches
        if frame_mask is not None and frame_mask.shape != patch_features.shape[:2]:
            raise ValueError(
                f"frame_mask must be (batch_size, num_frames), {tuple(patch_features.shape[:2])} here, not "
                f"{tuple(frame_mask.shape)}."
            )

    def _compress(self, patch_features: Tensor) -> tuple[Tensor, Tensor | None]:
        """The anchors, before final norm and output projection, and the Δ of videos without padding."""
        num_frames = patch_features.shape[1]
        if num_frames == 0:
            raise ValueError("The compressor got a video without frames; give it at least one frame.")
        # With ZeRO-3 in one piece, too: the number of segments depends on the videos of a process.
        needs_gradient = self._needs_gradient(patch_features) or is_deepspeed_zero3_enabled()
        whole = needs_gradient or torch.compiler.is_compiling()
        hidden_states = self.embed(patch_features) if whole else embed_in_segments(self, patch_features)
        for index, layer in enumerate(self.layers):
            is_last = index == len(self.layers) - 1
            hidden_states = layer(hidden_states, anchors_only=is_last, needs_gradient=needs_gradient)
        anchors = hidden_states.unflatten(1, (num_frames, -1))
        frame_deltas = None
        for layer in self.temporal_layers:
            anchors, frame_deltas = layer(anchors)
        return anchors, frame_deltas

    def _needs_gradient(self, patch_features: Tensor) -> bool:
        learns = patch_features.requires_grad or any(parameter.requires_grad for parameter in self.parameters())
        return torch.is_grad_enabled() and learns

    def embed(self, patch_features: Tensor) -> Tensor:
        """`(batch_size, num_frames, num_patches, input_size)` to the sequence of `insert_anchors`."""
        # Linear layers get three dimensions here: some adapters take four for those of images.
        patches = self.input_proj(patch_features.flatten(1, 2)).unflatten(1, patch_features.shape[1:3])
        return self.input_norm(self.insert_anchors(patches))

    def insert_anchors(self, patches: Tensor) -> Tensor:
        """`(batch_size, num_frames, num_patches, hidden_size)` to `(batch_size, num_rows * (K + 1), hidden_size)`:
        frame by frame and row by row, the K patches of the row and then its anchor."""
        rows = patches.flatten(1, 2).unflatten(1, (-1, self.config.patches_per_anchor))
        anchors = self.anchor.to(rows.dtype).expand(*rows.shape[:2], 1, -1)
        return torch.cat([rows, anchors], dim=2).flatten(1, 2)

    def _compress_masked(self, patch_features: Tensor, frame_mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compresses videos of one length together and without their padding, which so cannot leak into a scan."""
        lengths = frame_mask.sum(dim=1)
        different_lengths = lengths.unique().tolist()
        (num_calls,) = largest_of_processes(len(different_lengths), device=patch_features.device)
        anchors, frame_deltas, places = [], [], []
        for length in different_lengths:
            videos = lengths == length
            mask = frame_mask & videos.unsqueeze(1)
            frames = patch_features[mask].unflatten(0, (int(videos.sum()), length))
            compressed, deltas = self._compress(frames)
            anchors.append(compressed.flatten(0, 1))
            frame_deltas += [] if deltas is None else [deltas.flatten()]
            places.append(mask.flatten().nonzero().squeeze(1))
        for _ in range(num_calls - len(different_lengths)):
            compressed, _ = self._compress(torch.zeros_like(patch_features[:1, :1]))
            anchors.append(compressed.flatten(0, 1))  # behind those that have a place

        def padded(frames: list[Tensor]) -> Tensor:
            found, indices = torch.cat(frames), torch.cat(places)
            empty = found.new_zeros(frame_mask.numel(), *found.shape[1:])
            return empty.index_put((indices,), found[: len(indices)]).unflatten(0, frame_mask.shape)

        return padded(anchors), padded(frame_deltas) if frame_deltas else None


__all__ = ["MambaMiaCompressor", "MambaMiaCompressorOutput", "MambaMiaCompressorPreTrainedModel", "ScanState"]
