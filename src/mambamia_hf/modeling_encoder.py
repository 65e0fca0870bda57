"""The encoder: vision tower, compressor and frame selection; from pixels to the tokens of the kept frames."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.utils import can_return_tuple
from transformers.utils.generic import accepts_precomputed_kwargs

from .configuration_mambamia import MambaMiaConfig
from .frame_selection import frame_budget, select_frames
from .modeling_compressor import MambaMiaCompressor
from .versions import CACHE_NAME


# Seconds `(num_videos, num_frames)`; numbers in lists keep their precision where tensors are cast to the model's type.
Timestamps: TypeAlias = Tensor | Sequence[Sequence[float]]

# Where a checkpoint's own copy of the code has the classes; `save_pretrained` alone would name one of the models only.
_AUTO_MAP = {
    "AutoConfig": "configuration_mambamia.MambaMiaConfig",
    "AutoModel": "modeling_mambamia.MambaMiaModel",
    "AutoModelForImageTextToText": "modeling_mambamia.MambaMiaForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_mambamia.MambaMiaForConditionalGeneration",
}


@dataclass
class MambaMiaPatchFeaturesOutput(BaseModelOutput):
    """
    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(num_frames, num_patches, vision_size)`):
            The patch features of each frame.
        hidden_states, attentions (`tuple[torch.FloatTensor]`, *optional*): of each layer of the vision tower.
    """

    last_hidden_state: Tensor = None  # type: ignore[assignment]  # optional as in any output, but always set


@dataclass
class MambaMiaFeaturesOutput(BaseModelOutputWithPooling):
    """
    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(num_videos, num_frames, tokens_per_frame, hidden_size)`):
            The anchors of every frame, as wide as the language model, and the end-of-frame vector if there is one;
            zero where `frame_mask` is False.
        pooler_output (`list[torch.FloatTensor]` of shape `(num_kept_frames * placeholders_per_frame, hidden_size)`):
            The tokens of the kept frames of each video, each frame after its time where the model writes times: what
            the language model reads.
        hidden_states, attentions (`tuple[torch.FloatTensor]`, *optional*):
            Of each layer of the vision tower, for the frames of all videos in turn, without padding; with
            `output_hidden_states=True` or `output_attentions=True`.
        frame_deltas (`torch.FloatTensor` of shape `(num_videos, num_frames)`, *optional*):
            Δ, the importance of each frame. None without a temporal layer.
        keep_mask (`torch.BoolTensor` of shape `(num_videos, num_frames)`, *optional*):
            True for the kept frames.
        frame_mask (`torch.BoolTensor` of shape `(num_videos, num_frames)`, *optional*):
            True for real frames, False for padding.
    """

    last_hidden_state: Tensor = None  # type: ignore[assignment]  # optional as in any output, but nearly always set
    pooler_output: list[Tensor] = None  # type: ignore[assignment]  # one tensor per image or video
    frame_deltas: Tensor | None = None
    keep_mask: Tensor | None = None
    frame_mask: Tensor | None = None


class MambaMiaPreTrainedModel(PreTrainedModel):
    config: MambaMiaConfig
    config_class = MambaMiaConfig
    base_model_prefix = "model"
    input_modalities = ["image", "video", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["MambaMiaSpatialBlock", "MambaMiaTemporalBlock"]
    _skip_keys_device_placement = [CACHE_NAME]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MambaMiaEncoderBase) and module.end_of_frame is not None:
            init.normal_(module.end_of_frame, std=module.end_of_frame.numel() ** -0.5)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As any model's; the code goes along, so that it loads where this package is not installed."""
        self.config.auto_map = dict(_AUTO_MAP)
        super().save_pretrained(*args, **kwargs)


class MambaMiaEncoderBase(MambaMiaPreTrainedModel):
    """What encoder and whole model share: from pixels to the tokens of the kept frames."""

    def __init__(self, config: MambaMiaConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.compressor = MambaMiaCompressor._from_config(config.compressor_config)
        self.end_of_frame = nn.Parameter(torch.empty(config.text_config.hidden_size)) if config.end_of_frame else None

    def train(self, mode: bool = True) -> "MambaMiaEncoderBase":
        """As any module's, but a frozen vision tower stays in evaluation mode: its features never change."""
        super().train(mode)
        if self.vision_tower_is_frozen:
            self.vision_tower.eval()
        return self

    @property
    def vision_tower_is_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.vision_tower.parameters())

    def encode_frames(
        self,
        frames: Tensor,
        vision_feature_layer: int | None = None,
        vision_batch_size: int | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> MambaMiaPatchFeaturesOutput:
        """Patch features of frames, `vision_batch_size` frames at a time.

        Args:
            frames (`torch.FloatTensor` of shape `(num_frames, channels, height, width)`): on any device.
            vision_feature_layer (`int`, *optional*): the hidden state of the vision tower, by default the config's.
            vision_batch_size (`int`, *optional*): frames per call of the tower, by default the config's.
            output_hidden_states (`bool`, *optional*): whether to return the tower's hidden states, by default as its
                config says.
            kwargs: further arguments of the tower.

        Returns:
            The features as `last_hidden_state (num_frames, num_patches, vision_size)`, and the tower's `hidden_states`
            and `attentions` where they are asked for.

        Raises:
            ValueError: for a layer that the tower lacks, or a batch size below 1.
        """
        layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        layer = self.config.vision_layer(layer)
        batch_size = self.config.vision_batch_size if vision_batch_size is None else vision_batch_size
        if batch_size < 1:
            raise ValueError(f"vision_batch_size must be at least 1, not {batch_size}.")
        tower, num_patches = self.vision_tower, math.prod(self.config.patch_grid(*frames.shape[-2:]))
        if output_hidden_states is None:
            output_hidden_states = tower.config.output_hidden_states
        # Activation checkpointing would make the embeddings of a frozen tower require gradients.
        learns = frames.requires_grad or not self.vision_tower_is_frozen
        features: list[Tensor] = []
        hidden_states: list[tuple[Tensor, ...] | None] = []
        attentions: list[tuple[Tensor, ...] | None] = []
        for batch in frames.split(batch_size):
            if tower.device.type != "meta":  # the hooks of an offloaded tower move the frames
                batch = batch.to(tower.device)
            pixel_values, shape = self._tower_inputs(batch.to(tower.dtype))
            with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
                outputs = tower(pixel_values, output_hidden_states=True, return_dict=True, **shape, **kwargs)
            patches = outputs.hidden_states[layer]
            if patches.ndim == 4:  # a feature map of ConvNeXt or ResNet
                patches = patches.flatten(2).mT
            elif self.config.vision_feature_norm:
                patches = tower.post_layernorm(patches)
            features.append(patches[:, -num_patches:])  # without the class token that CLIP puts in front
            hidden_states.append(outputs.hidden_states if output_hidden_states else None)
            attentions.append(outputs.get("attentions"))
        return MambaMiaPatchFeaturesOutput(
            last_hidden_state=torch.cat(features),
            hidden_states=_cat_layers(hidden_states),
            attentions=_cat_layers(attentions),
        )

    def _tower_inputs(self, frames: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Frames of any size as the vision tower takes them, and its arguments about their shape."""
        vision = self.config.vision_config
        rows, columns = self.config.patch_grid(*frames.shape[-2:])
        if vision.model_type == "siglip2_vision_model":  # takes patches: the pixels of each in order
            patches = frames.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))
            patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
            return patches, {
                "pixel_attention_mask": torch.ones_like(patches[:, :, 0], dtype=torch.long),
                "spatial_shapes": torch.tensor([[rows, columns]], device=frames.device).expand(len(frames), -1),
            }
        if (rows, columns) == self.config.patch_grid() or hasattr(vision, "hidden_sizes"):
            return frames, {}
        return frames, {"interpolate_pos_encoding": True}

    def compress(self, patch_features: Tensor, frame_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The tokens and the Δ of frames.

        Args:
            patch_features: `(num_videos, num_frames, num_patches, vision_size)`, on any device.
            frame_mask: `(num_videos, num_frames)`, True for real frames.

        Returns:
            Tokens `(num_videos, num_frames, tokens_per_frame, hidden_size)`, and Δ `(num_videos, num_frames)` or None
            without a temporal layer.
        """
        compressor = self.compressor
        patch_features = patch_features.to(compressor.dtype)
        if compressor.device.type != "meta":  # the hooks of an offloaded compressor move the features
            patch_features = patch_features.to(compressor.device)
        frame_mask = None if frame_mask is None else frame_mask.to(patch_features.device)
        compressed = compressor(patch_features, frame_mask=frame_mask, return_dict=True)
        tokens = compressed.last_hidden_state
        if self.end_of_frame is not None:
            end_of_frame = self.end_of_frame.to(tokens).expand(*tokens.shape[:2], 1, -1)
            tokens = torch.cat([tokens, end_of_frame], dim=2)
        return tokens, compressed.frame_deltas

    @can_return_tuple
    @accepts_precomputed_kwargs("image")
    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        vision_feature_layer: int | None = None,
        vision_batch_size: int | None = None,
        patch_features: Tensor | None = None,
        **kwargs: Any,
    ) -> MambaMiaFeaturesOutput | tuple:
        """The tokens of images; an image is a video of one frame.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`): the images.
            vision_feature_layer, vision_batch_size (`int`, *optional*): see [`MambaMiaConfig`].
            patch_features (`torch.FloatTensor` of shape `(num_images, num_patches, vision_size)`, *optional*):
                Result of `encode_frames` for the images, of any floating type, in place of `pixel_values`.
            kwargs: further arguments of the vision tower, such as `output_hidden_states`.

        Raises:
            ValueError: unless exactly one of pixels and features is given, in its shape.
        """
        images = _given_media(pixel_values=pixel_values, patch_features=patch_features)
        encoded = MambaMiaPatchFeaturesOutput(last_hidden_state=images)
        if patch_features is None:
            encoded = self.encode_frames(images, vision_feature_layer, vision_batch_size, **kwargs)
        tokens, deltas = self.compress(encoded.last_hidden_state.unsqueeze(1))
        all_frames = torch.ones_like(tokens[:, :, 0, 0], dtype=torch.bool)
        return MambaMiaFeaturesOutput(
            last_hidden_state=tokens,
            pooler_output=list(tokens.flatten(1, 2)),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            frame_deltas=deltas,
            keep_mask=all_frames,
            frame_mask=all_frames,
        )

    @can_return_tuple
    @accepts_precomputed_kwargs("video")
    def get_video_features(
        self,
        pixel_values_videos: Tensor | None = None,
        frame_mask: Tensor | None = None,
        num_kept_frames: Tensor | None = None,
        keep_frames: int | None = None,
        keep_ratio: float | None = None,
        delta_threshold: float | None = None,
        delta_min_frames: int | None = None,
        vision_feature_layer: int | None = None,
        vision_batch_size: int | None = None,
        patch_features_videos: Tensor | None = None,
        video_timestamps: Timestamps | None = None,
        **kwargs: Any,
    ) -> MambaMiaFeaturesOutput | tuple:
        """The tokens of videos, the importance of their frames, and which frames are kept.

        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(num_videos, num_frames, channels, height, width)`):
                The frames, on any device; shorter videos are padded at the end.
            frame_mask (`torch.BoolTensor` of shape `(num_videos, num_frames)`, *optional*): True for real frames.
            num_kept_frames (`torch.LongTensor` of shape `(num_videos,)`, *optional*):
                Exact budget of each video, as the processor returns it; 0 leaves a video to the threshold.
            keep_frames (`int`, *optional*): exact budget for all videos, in place of `num_kept_frames`.
            keep_ratio (`float`, *optional*): the same as a share of the frames of each video.
            delta_threshold (`float`, *optional*): δ of the paper's Algorithm 1; 0 keeps every frame. The config's
                applies at inference only, one given here also in training.
            delta_min_frames (`int`, *optional*): videos of at most so many frames keep every frame.
            vision_feature_layer, vision_batch_size (`int`, *optional*): see [`MambaMiaConfig`].
            patch_features_videos (`torch.FloatTensor` of shape `(num_videos, num_frames, num_patches, vision_size)`):
                Result of `encode_frames` for the frames, of any floating type, in place of `pixel_values_videos`.
            video_timestamps (`torch.DoubleTensor` of shape `(num_videos, num_frames)`, *optional*):
                Times in seconds, as the processor returns them, or a list of numbers for each video; a model with a
                `frame_time_format` needs them, and any other ignores them.
            kwargs: further arguments of the vision tower, such as `output_hidden_states`.

        Raises:
            ValueError: unless exactly one of pixels and features is given, in its shape; for a budget or a threshold
                that is out of range, that nothing uses, or that lacks a Δ; without the times that the model writes.
        """
        frame_mask = real_frames(frame_mask, pixel_values_videos, patch_features_videos)
        num_frames = frame_mask.sum(dim=1).tolist()
        budgets = frame_budgets(num_frames, num_kept_frames, keep_frames, keep_ratio)
        if delta_threshold is not None:  # a budget of every frame leaves it room
            budgets = [0 if k == n else k for k, n in zip(budgets, num_frames, strict=True)]
        if delta_threshold and all(budgets):
            raise ValueError(
                f"Every video has a budget (of {', '.join(map(str, budgets))} frames), so delta_threshold="
                f"{delta_threshold} is of no use; give one of them, and for a threshold a prompt of every frame "
                f"(keep_ratio=1.0)."
            )
        encoded = MambaMiaPatchFeaturesOutput()
        if patch_features_videos is None:
            assert pixel_values_videos is not None  # one of both, `real_frames` has checked
            encoded, patch_features_videos = self._encode_videos(
                pixel_values_videos,
                frame_mask,
                vision_feature_layer=vision_feature_layer,
                vision_batch_size=vision_batch_size,
                **kwargs,
            )
        tokens, deltas = self.compress(patch_features_videos, frame_mask)
        frame_mask = frame_mask.to(tokens.device)
        keep_mask = self._select_frames(deltas, frame_mask, budgets, delta_threshold, delta_min_frames)
        kept_frames = [video[kept] for video, kept in zip(tokens, keep_mask, strict=True)]
        return MambaMiaFeaturesOutput(
            last_hidden_state=tokens,
            pooler_output=[
                frames.flatten(0, 1) for frames in self.with_times(kept_frames, keep_mask, video_timestamps)
            ],
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            frame_deltas=deltas,
            keep_mask=keep_mask,
            frame_mask=frame_mask,
        )

    def with_times(
        self, kept_frames: list[Tensor], keep_mask: Tensor, video_timestamps: Timestamps | None
    ) -> list[Tensor]:
        """The kept frames of videos as the language model reads them; the encoder alone has no embeddings of times.

        Args:
            kept_frames: `(num_kept_frames, tokens_per_frame, hidden_size)` of each video.
            keep_mask: `(num_videos, num_frames)`, True for the kept frames.
            video_timestamps: see `get_video_features`.

        Returns:
            `(num_kept_frames, placeholders_per_frame, hidden_size)` of each video.
        """
        return kept_frames

    def _encode_videos(
        self, pixel_values_videos: Tensor, frame_mask: Tensor, **kwargs: Any
    ) -> tuple[MambaMiaPatchFeaturesOutput, Tensor]:
        """What `encode_frames` gives for the real frames, and the features in the shape of the padded videos."""
        is_padded = not bool(frame_mask.all())
        frames = pixel_values_videos.flatten(0, 1)
        if is_padded:
            frames = frames[frame_mask.flatten().to(frames.device)]
        encoded = self.encode_frames(frames, **kwargs)
        features = encoded.last_hidden_state
        if is_padded:
            padded = features.new_zeros(frame_mask.numel(), *features.shape[1:])
            places = frame_mask.flatten().nonzero().squeeze(1).to(padded.device)
            features = padded.index_put((places,), features)
        return encoded, features.unflatten(0, frame_mask.shape)

    def _select_frames(
        self,
        deltas: Tensor | None,
        frame_mask: Tensor,
        budgets: list[int],
        delta_threshold: float | None,
        delta_min_frames: int | None,
    ) -> Tensor:
        """The keep mask `(num_videos, num_frames)`, by the budget of each video or else by the threshold."""
        keep_mask = frame_mask.clone()
        for video, mask in enumerate(frame_mask):
            how = self._selection(int(mask.sum()), budgets[video], delta_threshold, delta_min_frames)
            if how:
                if deltas is None:
                    raise ValueError(
                        f"Selecting frames by {how} needs the Δ of a temporal layer, and num_temporal_layers is 0; "
                        f"keep every frame."
                    )
                keep_mask[video] = select_frames(deltas[video : video + 1], frame_mask=mask[None], **how)[0]
            elif self.training and self.config.frame_dropout:
                share = self.config.frame_dropout * torch.rand((), device=mask.device)
                stays = mask & (torch.rand(mask.shape, device=mask.device) >= share)
                keep_mask[video] = stays if stays.any() else mask
        return keep_mask

    def _selection(
        self, num_frames: int, budget: int, delta_threshold: float | None, delta_min_frames: int | None
    ) -> dict[str, Any]:
        """The arguments of `select_frames` for a video; none where every frame is kept."""
        if budget:
            return {"keep_frames": budget} if budget < num_frames else {}
        config = self.config
        if delta_threshold is None and not self.training:
            if config.keep_frames is not None or config.keep_ratio is not None:
                return {"keep_frames": config.keep_frames, "keep_ratio": config.keep_ratio}
            delta_threshold = config.delta_threshold
        min_frames = config.delta_min_frames if delta_min_frames is None else delta_min_frames
        return {} if not delta_threshold or num_frames <= min_frames else {"threshold": delta_threshold}


class MambaMiaEncoder(MambaMiaEncoderBase):
    """Vision tower, compressor and frame selection, without a language model: the part that serving engines run.

    It loads from the checkpoint of a whole model.
    """

    _keys_to_ignore_on_load_unexpected = [r"language_model\.", r"^lm_head\."]

    def __init__(self, config: MambaMiaConfig):
        super().__init__(config)
        self.post_init()


# The shapes of the tensors of media.
_MEDIA_SHAPES = {
    "pixel_values": "(num_images, channels, height, width)",
    "patch_features": "(num_images, num_patches, vision_size)",
    "pixel_values_videos": "(num_videos, num_frames, channels, height, width)",
    "patch_features_videos": "(num_videos, num_frames, num_patches, vision_size)",
}


def _given_media(**media: Tensor | None) -> Tensor:
    """The one tensor that is given of pixels and features in their place."""
    given = {name: tensor for name, tensor in media.items() if tensor is not None}
    if len(given) != 1:
        raise ValueError(f"Give exactly one of {' and '.join(media)}, not {' and '.join(given) or 'none'}.")
    ((name, tensor),) = given.items()
    expected = _MEDIA_SHAPES[name]
    if tensor.ndim != expected.count(",") + 1:
        raise ValueError(
            f"{name} must be {expected}, not {tuple(tensor.shape)}; images go into pixel_values or patch_features, "
            f"videos into pixel_values_videos or patch_features_videos."
        )
    return tensor


def real_frames(
    frame_mask: Tensor | None, pixel_values_videos: Tensor | None, patch_features_videos: Tensor | None
) -> Tensor:
    """`frame_mask` as booleans, all True where it is None."""
    videos = _given_media(pixel_values_videos=pixel_values_videos, patch_features_videos=patch_features_videos)
    if frame_mask is None:
        return torch.ones(videos.shape[:2], dtype=torch.bool)
    if frame_mask.shape != videos.shape[:2]:
        raise ValueError(
            f"frame_mask must be (num_videos, num_frames), {tuple(videos.shape[:2])} here, not "
            f"{tuple(frame_mask.shape)}."
        )
    return frame_mask.bool()


def frame_budgets(
    num_frames: list[int], num_kept_frames: Tensor | None, keep_frames: int | None, keep_ratio: float | None
) -> list[int]:
    """The exact number of frames to keep of each video, 0 without a budget; keep_frames and keep_ratio come first."""
    if keep_frames is not None or keep_ratio is not None:
        return [frame_budget(count, keep_frames, keep_ratio) for count in num_frames]
    if num_kept_frames is None:
        return [0] * len(num_frames)
    budgets = [int(budget) for budget in num_kept_frames]
    if len(budgets) != len(num_frames) or any(not 0 <= k <= n for k, n in zip(budgets, num_frames, strict=True)):
        raise ValueError(
            f"num_kept_frames must hold a number per video, at most its frames ({num_frames}) and 0 for none, not "
            f"{budgets}."
        )
    return budgets


def _cat_layers(batches: list[tuple[Tensor, ...] | None]) -> tuple[Tensor, ...] | None:
    """One tensor per layer from the tensors per layer of each batch."""
    layers = [batch for batch in batches if batch is not None]
    return tuple(torch.cat(layer) for layer in zip(*layers, strict=True)) if layers else None


__all__ = [
    "MambaMiaEncoder",
    "MambaMiaEncoderBase",
    "MambaMiaFeaturesOutput",
    "MambaMiaPatchFeaturesOutput",
    "MambaMiaPreTrainedModel",
    "Timestamps",
]
