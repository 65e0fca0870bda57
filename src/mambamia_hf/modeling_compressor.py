"""The compressor: many patch features a frame in, a few anchors a frame and the importance of each frame out."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.integrations import use_kernelized_func
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .configuration_mambamia import MambaMiaCompressorConfig, num_kept_frames
from .selective_scan import _kernel_selective_scan, selective_scan
from .ssd import _kernel_causal_conv1d, _kernel_chunk_scan, causal_conv1d_silu, ssd_chunk_scan, ssd_final_states


# Longer sequences run through stage 1 in segments of so many tokens, where no gradient is asked for.
_SEGMENT_TOKENS = 4800


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
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """
        Args:
            inputs: `(batch, length, intermediate_size + 2 * n_groups * state_size + heads)`: x, B, C and dt.
            context: `(batch, conv_kernel - 1, ...)`, the inputs before these, zero where absent.
            initial_states: `(batch, heads, head_dim, state_size)`, zero where absent.
            states_only: whether to leave the output out, at a fraction of the price.

        Returns:
            The normed output of the scan `(batch, length, intermediate_size)`, before the gate; the step sizes Δ that
            the scan took `(batch, length, heads)`, in float32; and the states after the last token.
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
            delta,
            A,
            B,
            C,
            config.chunk_size,
            D=self.D,
            initial_states=initial_states,
            return_final_states=True,
        )
        y = y.flatten(2).unflatten(-1, (config.n_groups, -1))
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

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, None]:
        """`(batch, length, intermediate_size)` to the output of the scan and its Δ, both of the same shape."""
        x = self.conv1d(inputs)
        dt, B, C = self.x_proj(x).split(self.x_split, dim=-1)
        delta = nn.functional.softplus(_in_full(self.dt_proj(dt)) + _in_full(self.dt_bias))
        delta = delta.clamp(*self.config.time_step_limit)
        return selective_scan(x, delta, -_in_full(self.A_log).exp(), B, C, self.D), delta, None


class MambaMiaMixer(nn.Module):
    """State-space mixer, in one direction or both; what the directions share is `in_proj`, the gate and `out_proj`."""

    def __init__(self, config: MambaMiaCompressorConfig, bidirectional: bool):
        super().__init__()
        self.conv_kernel, self.patches_per_anchor = config.conv_kernel, config.patches_per_anchor
        ssm_class = MambaMiaMamba2SSM if config.mixer_type == "mamba2" else MambaMiaMamba1SSM
        self.forward_ssm = ssm_class(config)
        self.backward_ssm = ssm_class(config) if bidirectional else None
        self.in_split = [config.intermediate_size, sum(self.forward_ssm.input_split)]
        self.in_proj = nn.Linear(config.hidden_size, sum(self.in_split), bias=False)
        self.out_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """`(batch, length, hidden_size)` to the same shape, and the forward scan's Δ `(batch, length, heads)`."""
        z, inputs = self.project(hidden_states)
        y, delta, _ = self.forward_ssm(inputs)
        if self.backward_ssm is not None:
            y = y + self.backward_ssm(inputs.flip(1))[0].flip(1)
        return self.gate_and_project(y, z), delta

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """The gate z and what the scans of both directions take."""
        return self.in_proj(hidden_states).split(self.in_split, dim=-1)

    def gate_and_project(self, y: Tensor, z: Tensor) -> Tensor:
        return self.out_proj(y * nn.functional.silu(z))


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
        query = self.dropout(anchor)
        weights = _in_full(self.weight_proj(query)).softmax(dim=-1).to(query.dtype)
        gate = self.gate_margin + (1 - 2 * self.gate_margin) * self.gate_proj(query).sigmoid()
        anchor = torch.lerp(anchor, weights @ patches, gate)
        return torch.cat([patches, anchor], dim=2).flatten(1, 2)


class MambaMiaSpatialBlock(GradientCheckpointingLayer):
    """A block of stage 1: mixer and GPA over the patches and anchors of all frames, with a residual connection."""

    def __init__(self, config: MambaMiaCompressorConfig):
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = MambaMiaMixer(config, config.bidirectional)
        self.gpa = None if config.gpa_placement is None else MambaMiaGatedPatchAggregation(config)
        self.gpa_placement = config.gpa_placement

    def forward(self, hidden_states: Tensor, segment_length: int | None = None) -> Tensor:
        """`(batch, rows * (K + 1), hidden_size)` to the same shape.

        With a `segment_length`, longer sequences are overwritten segment by segment, in memory that does not grow with
        the length; exact, but without a gradient.
        """
        if segment_length is not None and hidden_states.shape[1] > segment_length:
            return self._forward_in_segments(hidden_states, segment_length)
        return self._mixed(hidden_states, self.mixer(self._mixer_input(hidden_states))[0])

    def _mixer_input(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.norm(hidden_states)
        return self.gpa(hidden_states) if self.gpa_placement == "pre_mixer" else hidden_states

    def _mixed(self, hidden_states: Tensor, mixer_output: Tensor) -> Tensor:
        hidden_states = hidden_states + mixer_output
        return self.gpa(hidden_states) if self.gpa_placement == "post_mixer" else hidden_states

    @torch.no_grad()
    def _forward_in_segments(self, hidden_states: Tensor, segment_length: int) -> Tensor:
        """First the backward scan's states at the boundaries are found from right to left, then one sweep from left to
        right finishes both directions. A segment is a whole number of rows, and no shorter than the convolution."""
        mixer, length = self.mixer, hidden_states.shape[1]
        taps, row = mixer.conv_kernel - 1, mixer.patches_per_anchor + 1
        look_ahead = math.ceil(taps / row) * row  # GPA needs whole rows, the convolution `taps` tokens
        segments = [(start, min(start + segment_length, length)) for start in range(0, length, segment_length)]

        def project(start: int, end: int) -> tuple[Tensor, Tensor]:
            z, inputs = mixer.project(self._mixer_input(hidden_states[:, start : min(end + look_ahead, length)]))
            return z[:, : end - start], inputs[:, : end - start + taps]

        entering = [None] * len(segments)
        for index in range(len(segments) - 1, 0, -1) if mixer.backward_ssm is not None else ():
            start, end = segments[index]
            _, inputs = project(start, end)
            following, inputs = inputs[:, end - start :].flip(1), inputs[:, : end - start].flip(1)
            following = following if following.shape[1] else None
            _, _, entering[index - 1] = mixer.backward_ssm(inputs, following, entering[index], states_only=True)
        previous = states = None
        for (start, end), backward_states in zip(segments, entering, strict=True):
            z, inputs = project(start, end)
            following, inputs = inputs[:, end - start :].flip(1), inputs[:, : end - start]
            y, _, states = mixer.forward_ssm(inputs, previous, states)
            if mixer.backward_ssm is not None:
                following = following if following.shape[1] else None
                y += mixer.backward_ssm(inputs.flip(1), following, backward_states)[0].flip(1)
            previous = inputs[:, -taps:].clone()
            segment = hidden_states[:, start:end]
            segment.copy_(self._mixed(segment, mixer.gate_and_project(y, z)))
        return hidden_states


class MambaMiaTemporalBlock(GradientCheckpointingLayer):
    """A block of stage 2, the Time Axis Aggregator (TAA): a mixer along time with a residual connection."""

    def __init__(self, config: MambaMiaCompressorConfig):
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = MambaMiaMixer(config, config.temporal_bidirectional)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """`(batch, frames, anchors, hidden_size)` to the same shape, and Δ of every frame `(batch, frames)`."""
        batch_size = hidden_states.shape[0]
        over_time = self.norm(hidden_states).transpose(1, 2).flatten(0, 1)
        mixed, delta = self.mixer(over_time)
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
            raise ValueError(f"The features are {features.shape[-1]} wide; input_size is {self.config.input_size}.")
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
        hidden_states = self.input_norm(self.insert_anchors(self.input_proj(features)))
        segment_length = None
        if not torch.is_grad_enabled() and self.config.mixer_type == "mamba2":
            row_length = self.config.patches_per_anchor + 1
            segment_length = max(_SEGMENT_TOKENS // row_length, self.config.conv_kernel) * row_length
        for layer in self.layers:
            hidden_states = layer(hidden_states, segment_length)
        anchors = hidden_states.unflatten(1, (num_frames, -1, self.config.patches_per_anchor + 1))[:, :, :, -1]
        deltas = None
        for layer in self.temporal_layers:
            anchors, deltas = layer(anchors)
        return self.output_proj(self.norm(anchors)), deltas

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
    num_kept_frames(1, keep_frames, keep_ratio)
    if frame_mask is None:
        frame_mask = torch.ones_like(frame_deltas, dtype=torch.bool)
    selected = torch.zeros_like(frame_mask, dtype=torch.bool)
    for video, mask in enumerate(frame_mask.bool()):
        deltas = frame_deltas[video, mask].detach().double().cpu()
        if threshold is not None:
            kept = _keep_by_threshold(deltas, threshold)
        else:
            kept = _keep_by_budget(deltas, num_kept_frames(len(deltas), keep_frames, keep_ratio))
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
