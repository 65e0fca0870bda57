"""MambaMia: vision tower, compressor, frame selection, language model."""

import inspect
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    ModelOutput,
)
from transformers.utils import can_return_tuple

from .configuration_mambamia import MambaMiaCompressorConfig, MambaMiaConfig
from .frame_selection import select_frames
from .modeling_compressor import MambaMiaCompressor
from .tokenization_mambamia import load_tokenizer


# Where a checkpoint's own copy of the code has the classes; `save_pretrained` alone would name one of the models only.
_AUTO_MAP = {
    "AutoConfig": "configuration_mambamia.MambaMiaConfig",
    "AutoModel": "modeling_mambamia.MambaMiaModel",
    "AutoModelForImageTextToText": "modeling_mambamia.MambaMiaForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_mambamia.MambaMiaForConditionalGeneration",
}


@dataclass
class MambaMiaFeaturesOutput(BaseModelOutputWithPooling):
    """
    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(num_videos, num_frames, num_frame_tokens, hidden_size)`):
            The anchors of every frame, as wide as the language model, zero where `frame_mask` is; and the end-of-frame
            vector, where there is one.
        pooler_output (`list[torch.FloatTensor]` of shape `(num_kept_frames * num_frame_tokens, hidden_size)`):
            One a video, the tokens of the frames that were kept: what the language model reads.
        frame_deltas (`torch.FloatTensor` of shape `(num_videos, num_frames)`, *optional*):
            Δ, the importance of every frame.
        selected_frames (`torch.BoolTensor` of shape `(num_videos, num_frames)`):
            True for the frames that were kept.
        hidden_states, attentions (`tuple[torch.FloatTensor]`, *optional*, with `output_hidden_states=True` or
        `output_attentions=True`):
            The vision tower's, a layer each, for the frames of all videos in turn without padding.
    """

    frame_deltas: torch.FloatTensor | None = None
    selected_frames: torch.BoolTensor | None = None


@dataclass
class MambaMiaModelOutputWithPast(BaseModelOutputWithPast):
    """
    Args:
        image_hidden_states (`torch.FloatTensor` of shape `(num_image_tokens, hidden_size)`, *optional*):
            What the language model read of the images.
        video_hidden_states (`torch.FloatTensor` of shape `(num_video_tokens, hidden_size)`, *optional*):
            What the language model read of the videos.
        frame_deltas (`torch.FloatTensor` of shape `(num_videos, num_frames)`, *optional*):
            Δ, the importance of every frame.
        selected_frames (`torch.BoolTensor` of shape `(num_videos, num_frames)`, *optional*):
            True for the frames that were kept.
        token_indices (`torch.LongTensor` of shape `(batch_size, kept_length)`, *optional*):
            Where frames were dropped: the position in the prompt of every token that is left, -1 for padding.
        cache_params (`Cache`, *optional*): states of a Mamba language model, in place of `past_key_values`.
    """

    image_hidden_states: torch.FloatTensor | None = None
    video_hidden_states: torch.FloatTensor | None = None
    frame_deltas: torch.FloatTensor | None = None
    selected_frames: torch.BoolTensor | None = None
    token_indices: torch.LongTensor | None = None
    cache_params: Cache | None = None


@dataclass
class MambaMiaCausalLMOutputWithPast(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, with `labels`):
            Next-token loss, and what the Δ of the frames costs where the configuration has a `delta_loss_coef`.
        logits (`torch.FloatTensor` of shape `(batch_size, kept_length, vocab_size)`):
            Scores of the next token, for the tokens that are left where frames were dropped.
        past_key_values (`Cache`, *optional*): keys and values of the tokens that are left.

        The other fields are those of [`MambaMiaModelOutputWithPast`].
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: torch.FloatTensor | None = None
    video_hidden_states: torch.FloatTensor | None = None
    frame_deltas: torch.FloatTensor | None = None
    selected_frames: torch.BoolTensor | None = None
    token_indices: torch.LongTensor | None = None
    cache_params: Cache | None = None


class MambaMiaPreTrainedModel(PreTrainedModel):
    config: MambaMiaConfig
    config_class = MambaMiaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["MambaMiaSpatialBlock", "MambaMiaTemporalBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, MambaMiaModel) and module.end_of_frame is not None:
            init.normal_(module.end_of_frame, std=module.end_of_frame.numel() ** -0.5)

    def save_pretrained(self, *args: Any, **kwargs: Any):
        """As any model's; the code goes along, so that it loads where this package is not installed."""
        self.config.auto_map = dict(_AUTO_MAP)
        super().save_pretrained(*args, **kwargs)


class MambaMiaModel(MambaMiaPreTrainedModel):
    """Vision tower, compressor and language model, without the language model's head."""

    def __init__(self, config: MambaMiaConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.compressor = MambaMiaCompressor._from_config(config.compressor_config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.end_of_frame = nn.Parameter(torch.empty(config.text_config.hidden_size)) if config.end_of_frame else None
        self.post_init()

    def train(self, mode: bool = True) -> "MambaMiaModel":
        """As any module's, but a frozen vision tower stays in evaluation mode: its features are always the same."""
        super().train(mode)
        if self.vision_tower_is_frozen:
            self.vision_tower.eval()
        return self

    @property
    def vision_tower_is_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.vision_tower.parameters())

    @property
    def cache_name(self) -> str:
        """What the language model calls its cache: `past_key_values`, or `cache_params` where that is a Mamba."""
        is_mamba = "cache_params" in inspect.signature(self.language_model.forward).parameters
        return "cache_params" if is_mamba else "past_key_values"

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def encode_frames(
        self,
        frames: Tensor,
        vision_feature_layer: int | None = None,
        vision_batch_size: int | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Patch features of frames, `vision_batch_size` frames at a time.

        Args:
            frames: `(num_frames, channels, height, width)`, on any device.
            vision_feature_layer: which hidden state of the vision tower, by default the config's.
            vision_batch_size: frames that go through the tower at once, by default the config's.
            output_hidden_states: whether to return the tower's hidden states too, by default as its config says.
            kwargs: more arguments of the tower.

        Returns:
            The features as `last_hidden_state (num_frames, num_patches, vision_size)`, and the `hidden_states` and
            `attentions` of the tower where they are asked for.
        """
        layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        layer = self.config.vision_layer(layer)
        batch_size = self.config.vision_batch_size if vision_batch_size is None else vision_batch_size
        if batch_size < 1:
            raise ValueError(f"vision_batch_size must be at least 1, not {batch_size}.")
        tower, num_patches = self.vision_tower, math.prod(self.config.patch_grid(*frames.shape[-2:]))
        if output_hidden_states is None:
            output_hidden_states = tower.config.output_hidden_states
        # Activation checkpointing would have the embeddings of a frozen tower require gradients.
        learns = frames.requires_grad or not self.vision_tower_is_frozen
        features, hidden_states, attentions = [], [], []
        for chunk in frames.split(batch_size):
            if tower.device.type != "meta":  # where the tower is offloaded, its own hooks move the frames
                chunk = chunk.to(tower.device)
            pixel_values, shape = self._tower_inputs(chunk.to(tower.dtype))
            with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
                outputs = tower(pixel_values, output_hidden_states=True, return_dict=True, **shape, **kwargs)
            patches = outputs.hidden_states[layer]
            if patches.ndim == 4:  # a feature map of ConvNeXt or ResNet
                patches = patches.flatten(2).mT
            features.append(patches[:, -num_patches:])  # without the class token that CLIP puts in front
            hidden_states.append(outputs.hidden_states if output_hidden_states else None)
            attentions.append(outputs.get("attentions"))
        return BaseModelOutput(
            last_hidden_state=torch.cat(features),
            hidden_states=_cat_layers(hidden_states),
            attentions=_cat_layers(attentions),
        )

    def _tower_inputs(self, frames: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Frames of any size as the vision tower takes them, and what it wants to be told of their shape."""
        vision = self.config.vision_config
        rows, columns = self.config.patch_grid(*frames.shape[-2:])
        if vision.model_type == "siglip2_vision_model":  # takes patches, of the pixels of each in order
            patches = frames.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))
            patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
            return patches, {
                "pixel_attention_mask": torch.ones_like(patches[:, :, 0], dtype=torch.long),
                "spatial_shapes": torch.tensor([[rows, columns]], device=frames.device).expand(len(frames), -1),
            }
        if (rows, columns) == self.config.patch_grid() or hasattr(vision, "hidden_sizes"):
            return frames, {}
        return frames, {"interpolate_pos_encoding": True}

    def compress(self, features: Tensor, frame_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The tokens of frames and their Δ.

        Args:
            features: `(num_videos, num_frames, num_patches, vision_size)`, on any device.
            frame_mask: `(num_videos, num_frames)`, True for real frames.

        Returns:
            `(num_videos, num_frames, num_frame_tokens, hidden_size)` and `(num_videos, num_frames)`.
        """
        compressor = self.compressor
        features = features.to(compressor.dtype)
        if compressor.device.type != "meta":  # where it is offloaded, its own hooks move the features
            features = features.to(compressor.device)
        frame_mask = None if frame_mask is None else frame_mask.to(features.device)
        compressed = compressor(features, frame_mask=frame_mask, return_dict=True)
        tokens = compressed.last_hidden_state
        if self.end_of_frame is not None:
            end_of_frame = self.end_of_frame.to(tokens).expand(*tokens.shape[:2], 1, -1)
            tokens = torch.cat([tokens, end_of_frame], dim=2)
        return tokens, compressed.frame_deltas

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        vision_feature_layer: int | None = None,
        vision_batch_size: int | None = None,
        image_features: Tensor | None = None,
        **kwargs: Any,
    ) -> MambaMiaFeaturesOutput | tuple:
        """The tokens of images; an image is a video of one frame.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`): the images.
            vision_feature_layer (`int`, *optional*): see [`MambaMiaConfig`].
            vision_batch_size (`int`, *optional*): see [`MambaMiaConfig`].
            image_features (`torch.FloatTensor` of shape `(num_images, num_patches, vision_size)`):
                What `encode_frames` gave for the images, of any floating type, in place of `pixel_values`.
            kwargs: more arguments of the vision tower, such as `output_hidden_states`.
        """
        _given_media(pixel_values=pixel_values, image_features=image_features)
        encoded = BaseModelOutput(last_hidden_state=image_features)
        if image_features is None:
            encoded = self.encode_frames(pixel_values, vision_feature_layer, vision_batch_size, **kwargs)
        tokens, deltas = self.compress(encoded.last_hidden_state.unsqueeze(1))
        return MambaMiaFeaturesOutput(
            last_hidden_state=tokens,
            pooler_output=list(tokens.flatten(1, 2)),
            frame_deltas=deltas,
            selected_frames=torch.ones_like(tokens[:, :, 0, 0], dtype=torch.bool),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: Tensor | None = None,
        frame_mask: Tensor | None = None,
        vision_feature_layer: int | None = None,
        vision_batch_size: int | None = None,
        delta_threshold: float | None = None,
        delta_min_frames: int | None = None,
        keep_frames: int | Sequence[int | None] | None = None,
        video_features: Tensor | None = None,
        **kwargs: Any,
    ) -> MambaMiaFeaturesOutput | tuple:
        """The tokens of videos, the importance of their frames, and which frames were kept.

        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(num_videos, num_frames, channels, height, width)`):
                The frames, on any device; shorter videos padded at the end.
            frame_mask (`torch.BoolTensor` of shape `(num_videos, num_frames)`, *optional*): True for real frames.
            vision_feature_layer (`int`, *optional*): see [`MambaMiaConfig`].
            vision_batch_size (`int`, *optional*): see [`MambaMiaConfig`].
            delta_threshold (`float`, *optional*): δ of the selection; 0 keeps every frame. The config's holds at
                inference only, one given here also in training.
            delta_min_frames (`int`, *optional*): videos of at most this many frames keep every frame.
            keep_frames (`int` or a list of one a video, *optional*): exact number of frames to keep in place of a
                threshold; None in a list stands for the threshold.
            video_features (`torch.FloatTensor` of shape `(num_videos, num_frames, num_patches, vision_size)`):
                What `encode_frames` gave for the frames, of any floating type, in place of `pixel_values_videos`.
            kwargs: more arguments of the vision tower, such as `output_hidden_states`.
        """
        frame_mask = _real_frames(frame_mask, pixel_values_videos, video_features)
        if keep_frames is None or isinstance(keep_frames, int):
            keep_frames = [keep_frames] * len(frame_mask)
        if delta_threshold and None not in keep_frames:
            raise ValueError(
                f"Every video has a budget (of {', '.join(map(str, keep_frames))} frames), so delta_threshold="
                f"{delta_threshold} is of no use; give one of them, and for a threshold a prompt of every frame "
                f"(keep_ratio=1.0)."
            )
        encoded = BaseModelOutput()
        if video_features is None:
            is_padded = not bool(frame_mask.all())
            frames = pixel_values_videos.flatten(0, 1)
            if is_padded:
                frames = frames[frame_mask.flatten().to(frames.device)]
            encoded = self.encode_frames(frames, vision_feature_layer, vision_batch_size, **kwargs)
            video_features = encoded.last_hidden_state
            if is_padded:
                padded = video_features.new_zeros(frame_mask.numel(), *video_features.shape[1:])
                places = frame_mask.flatten().nonzero().squeeze(1).to(padded.device)
                video_features = padded.index_put((places,), video_features)
            video_features = video_features.unflatten(0, frame_mask.shape)
        tokens, deltas = self.compress(video_features, frame_mask)
        frame_mask = frame_mask.to(tokens.device)

        selected = frame_mask.clone()
        for video, mask in enumerate(frame_mask):
            how = self._selection(int(mask.sum()), delta_threshold, delta_min_frames, keep_frames[video])
            if how and deltas is None:
                raise ValueError(
                    f"Selecting frames by {how} needs the Δ of a temporal layer, and num_temporal_layers is 0; keep "
                    f"every frame."
                )
            if how:
                selected[video] = select_frames(deltas[video : video + 1], frame_mask=mask[None], **how)[0]
            elif self.training and self.config.frame_dropout:
                share = self.config.frame_dropout * torch.rand((), device=mask.device)
                stays = mask & (torch.rand(mask.shape, device=mask.device) >= share)
                selected[video] = stays if stays.any() else mask
        return MambaMiaFeaturesOutput(
            last_hidden_state=tokens,
            pooler_output=[video[kept].flatten(0, 1) for video, kept in zip(tokens, selected, strict=True)],
            frame_deltas=deltas,
            selected_frames=selected,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def _selection(
        self, num_frames: int, delta_threshold: float | None, delta_min_frames: int | None, keep_frames: int | None
    ) -> dict[str, Any]:
        """The arguments of `select_frames` for one video; empty where every frame is kept."""
        if keep_frames is not None:
            return {"keep_frames": keep_frames}
        config = self.config
        if delta_threshold is None and not self.training:
            if config.keep_frames is not None or config.keep_ratio is not None:
                return {"keep_frames": config.keep_frames, "keep_ratio": config.keep_ratio}
            delta_threshold = config.delta_threshold
        min_frames = config.delta_min_frames if delta_min_frames is None else delta_min_frames
        return {} if not delta_threshold or num_frames <= min_frames else {"threshold": delta_threshold}

    def encode_videos(
        self,
        placeholders: Tensor,
        pixel_values_videos: Tensor | None = None,
        frame_mask: Tensor | None = None,
        video_features: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[MambaMiaFeaturesOutput, Tensor]:
        """Features of the videos of a prompt, with the number of frames to keep read off the prompt's placeholders.

        A video that has `num_frames * num_frame_tokens` placeholders goes through the selection by threshold (or the
        config's budget); one that has fewer, K * num_frame_tokens, keeps exactly K frames.

        Args:
            placeholders (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): where the video tokens stand.
            pixel_values_videos, frame_mask, video_features, kwargs: as in `get_video_features`.

        Returns:
            The features, and `(batch_size, sequence_length)`, True for the tokens of the prompt that stay.

        Raises:
            ValueError: if the placeholders of a video are not the tokens of a whole number of its frames.
        """
        frame_mask = _real_frames(frame_mask, pixel_values_videos, video_features)
        if video_features is None:
            num_frame_tokens = self.config.frame_tokens(*pixel_values_videos.shape[-2:])
        else:
            num_anchors = self.config.compressor_config.num_anchors(video_features.shape[2])
            num_frame_tokens = num_anchors + self.config.end_of_frame
        lengths = frame_mask.sum(dim=1).tolist()
        counts = _placeholder_runs(placeholders)
        if len(counts) != len(lengths) and sum(counts) == num_frame_tokens * sum(lengths):
            counts = [num_frame_tokens * length for length in lengths]  # videos without a token between them
        if len(counts) != len(lengths):
            raise ValueError(
                f"The prompt has {len(counts)} runs of video placeholders and there are {len(lengths)} videos; give "
                f"each video its own run."
            )
        keep_frames = []
        for count, length in zip(counts, lengths, strict=True):
            if count > length * num_frame_tokens or count % num_frame_tokens:
                raise ValueError(
                    f"A video of {length} frames has {count} placeholders in the prompt; expected "
                    f"{length * num_frame_tokens}, {num_frame_tokens} a frame, or {num_frame_tokens} times the frames "
                    f"to keep."
                )
            keep_frames.append(None if count == length * num_frame_tokens else count // num_frame_tokens)
        features = self.get_video_features(
            pixel_values_videos,
            frame_mask,
            keep_frames=keep_frames,
            video_features=video_features,
            return_dict=True,
            **kwargs,
        )
        # A run sized for the frames to keep stays whole; a full one loses the places of the frames that were dropped.
        staying = []
        for budget, selected, mask in zip(keep_frames, features.selected_frames, frame_mask, strict=True):
            frames = selected[mask.to(selected.device)] if budget is None else selected.new_ones(budget)
            staying.append(frames.repeat_interleave(num_frame_tokens))
        keep = torch.ones_like(placeholders)
        keep[placeholders] = torch.cat(staying).to(keep.device)
        return features, keep

    def _zero_of_compressor(self) -> Tensor:
        """Zero, with a gradient of zero for the compressor: where several processes train, each has to have one, also
        with a batch of text alone."""
        config = self.config.compressor_config
        tokens, _ = self.compress(torch.zeros(1, 1, config.patches_per_anchor, config.input_size))
        return 0.0 * tokens.sum()

    def get_placeholder_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, token_id: int) -> Tensor:
        """`(batch_size, sequence_length)`, True where the prompt holds the placeholder `token_id`."""
        if input_ids is not None:
            return input_ids == token_id
        embeddings = self.get_input_embeddings()
        if token_id >= embeddings.num_embeddings:
            return torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
        return (inputs_embeds == embeddings(torch.tensor(token_id, device=inputs_embeds.device))).all(dim=-1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        frame_mask: torch.BoolTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        image_features: torch.FloatTensor | None = None,
        video_features: torch.FloatTensor | None = None,
        vision_feature_layer: int | None = None,
        vision_batch_size: int | None = None,
        delta_threshold: float | None = None,
        delta_min_frames: int | None = None,
        mm_encoder_outputs: dict[str, MambaMiaFeaturesOutput] | None = None,
        **kwargs: Any,
    ) -> MambaMiaModelOutputWithPast | tuple:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                The prompt, with one placeholder a token of its images and videos; see `encode_videos` for how many.
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`): images, in order.
            pixel_values_videos, frame_mask: the videos, in order; see `get_video_features`.
            image_features (`torch.FloatTensor` of shape `(num_images, num_patches, vision_size)`),
            video_features (`torch.FloatTensor` of shape `(num_videos, num_frames, num_patches, vision_size)`):
                The vision tower's features, computed before, in place of `pixel_values` and `pixel_values_videos`.
            vision_feature_layer, vision_batch_size, delta_threshold, delta_min_frames: see `get_video_features`.
            mm_encoder_outputs (`dict`, *optional*): outputs of `get_image_features` and `get_video_features` under
                "image" and "video", in place of pixels; the prompt holds just their tokens.

        Where frames are dropped, their placeholders leave the sequence before the language model sees it, and padding
        with them; the rows are padded on the left again.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"Give input_ids or inputs_embeds, not {'neither' if input_ids is None else 'both'}.")
        encoded = dict(mm_encoder_outputs or {})
        vision = {"vision_feature_layer": vision_feature_layer, "vision_batch_size": vision_batch_size}
        token_indices = None
        image_tokens = self.get_placeholder_mask(input_ids, inputs_embeds, self.config.image_token_id)
        video_tokens = self.get_placeholder_mask(input_ids, inputs_embeds, self.config.video_token_id)
        if inputs_embeds is None:
            # Placeholders may be numbered beyond the vocabulary; what stands there is replaced.
            beyond = (image_tokens | video_tokens) & (input_ids >= self.get_input_embeddings().num_embeddings)
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(beyond, 0))
        if pixel_values is not None or image_features is not None:
            encoded["image"] = self.get_image_features(
                pixel_values, image_features=image_features, return_dict=True, **vision
            )
        if pixel_values_videos is not None or video_features is not None:
            encoded["video"], keep = self.encode_videos(
                video_tokens,
                pixel_values_videos,
                frame_mask,
                video_features,
                delta_threshold=delta_threshold,
                delta_min_frames=delta_min_frames,
                **vision,
            )
            if not keep.all():
                token_indices = _kept_indices(keep, attention_mask)
                inputs_embeds = _take_tokens(inputs_embeds, token_indices, 0.0)
                image_tokens, video_tokens = (
                    _take_tokens(tokens, token_indices, False) for tokens in (image_tokens, video_tokens)
                )
                past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
                attention_mask = _kept_mask(attention_mask, token_indices, past_length, keep.shape[1])
                if position_ids is None:
                    position_ids = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -token_indices.shape[1] :]
                else:
                    position_ids = _take_tokens(position_ids, token_indices, 0)

        if not encoded and self.training and torch.is_grad_enabled():
            inputs_embeds = inputs_embeds + self._zero_of_compressor()

        hidden_states = {}
        for modality, tokens in (("image", image_tokens), ("video", video_tokens)):
            if encoded.get(modality) is None:
                continue
            hidden_states[modality] = torch.cat(list(encoded[modality].pooler_output)).to(inputs_embeds)
            if tokens.sum() != len(hidden_states[modality]):
                raise ValueError(
                    f"The prompt has {int(tokens.sum())} {modality} placeholders and the {modality}s give "
                    f"{len(hidden_states[modality])} tokens; make the prompt with the processor, which puts as many."
                )
            inputs_embeds = inputs_embeds.masked_scatter(tokens.unsqueeze(-1), hidden_states[modality])

        kwargs.setdefault(self.cache_name, past_key_values)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        videos = encoded.get("video") or {}
        return MambaMiaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.get("past_key_values"),
            cache_params=outputs.get("cache_params"),
            hidden_states=outputs.hidden_states,
            attentions=outputs.get("attentions"),
            image_hidden_states=hidden_states.get("image"),
            video_hidden_states=hidden_states.get("video"),
            frame_deltas=videos.get("frame_deltas"),
            selected_frames=videos.get("selected_frames"),
            token_indices=token_indices,
        )


class MambaMiaForConditionalGeneration(MambaMiaPreTrainedModel, GenerationMixin):
    r"""MambaMia with the language model's head: questions about images and videos.

    ```python
    >>> from transformers import AutoModelForImageTextToText, AutoProcessor

    >>> model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    >>> processor = AutoProcessor.from_pretrained(checkpoint)
    >>> content = [{"type": "video", "path": "video.mp4"}, {"type": "text", "text": "What shape appears?"}]
    >>> inputs = processor.apply_chat_template(
    ...     [{"role": "user", "content": content}],
    ...     add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    ... )
    >>> output = model.generate(**inputs, max_new_tokens=20)
    >>> processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ['star']
    ```"""

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MambaMiaConfig):
        super().__init__(config)
        self.model = MambaMiaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str | os.PathLike,
        text: str | os.PathLike,
        dtype: str | torch.dtype = torch.float32,
        **compressor_kwargs: Any,
    ) -> "MambaMiaForConditionalGeneration":
        r"""A model to train: a pretrained vision tower and a pretrained language model, and a new compressor between.

        Its processor is made by [`MambaMiaProcessor.from_vision_text_pretrained`].

        ```python
        >>> model = MambaMiaForConditionalGeneration.from_vision_text_pretrained(vision, text, hidden_size=1024)
        >>> processor = MambaMiaProcessor.from_vision_text_pretrained(vision, text, model.config)
        ```

        Args:
            vision: folder or Hub name of a vision tower, or of a model of images and text that has one, as CLIP.
            text: folder or Hub name of a causal language model. Tokens that its tokenizer lacks are added.
            dtype: type of all weights.
            compressor_kwargs: of [`MambaMiaCompressorConfig`]. By default there is one anchor for each row of the
                tower's patches; the input and output sizes are those of the two models.

        Raises:
            ValueError: for an argument that is no setting of the compressor.
        """
        unknown = compressor_kwargs.keys() - {field.name for field in fields(MambaMiaCompressorConfig)}
        if unknown:
            raise ValueError(
                f"The compressor has no setting {', '.join(sorted(unknown))}; set those of the whole model on "
                f"`model.config` afterwards, and see MambaMiaCompressorConfig for the others."
            )
        config = AutoConfig.from_pretrained(vision)
        vision_config = getattr(config, "vision_config", config)
        if hasattr(vision_config, "vision_use_head"):
            vision_config.vision_use_head = False  # SigLIP's pooling, which nothing reads
        tower = AutoModel.from_pretrained(vision, config=config, dtype=dtype)
        tower = getattr(tower, "vision_model", tower)
        language_model = AutoModelForCausalLM.from_pretrained(text, dtype=dtype)
        tokenizer = load_tokenizer(text)
        if len(tokenizer) > language_model.config.vocab_size:
            language_model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
        language_model.config.pad_token_id = tokenizer.pad_token_id

        config = MambaMiaConfig(
            vision_config=tower.config,
            text_config=language_model.config,
            compressor_config={"patches_per_anchor": 1, **compressor_kwargs},
            image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
            video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        )
        if "patches_per_anchor" not in compressor_kwargs:
            _, config.compressor_config.patches_per_anchor = config.patch_grid()
        with torch.device("meta"):
            model = cls(config)
        model.model.vision_tower = tower
        model.model.language_model = language_model.base_model
        model.model.compressor = MambaMiaCompressor(config.compressor_config).to(tower.dtype)
        model.lm_head = language_model.get_output_embeddings()
        model.generation_config = language_model.generation_config
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        return model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, pixel_values: Tensor | None = None, **kwargs: Any) -> MambaMiaFeaturesOutput | tuple:
        """See [`MambaMiaModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def get_video_features(
        self, pixel_values_videos: Tensor | None = None, **kwargs: Any
    ) -> MambaMiaFeaturesOutput | tuple:
        """See [`MambaMiaModel.get_video_features`]."""
        return self.model.get_video_features(pixel_values_videos, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        frame_mask: torch.BoolTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        image_features: torch.FloatTensor | None = None,
        video_features: torch.FloatTensor | None = None,
        vision_feature_layer: int | None = None,
        vision_batch_size: int | None = None,
        delta_threshold: float | None = None,
        delta_min_frames: int | None = None,
        mm_encoder_outputs: dict[str, MambaMiaFeaturesOutput] | None = None,
        **kwargs: Any,
    ) -> MambaMiaCausalLMOutputWithPast | tuple:
        """
        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Tokens to predict, -100 for those that do not count; they follow the prompt where frames are dropped.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                How many last positions, or which, get logits; 0 for all.

        The other arguments are those of [`MambaMiaModel.forward`].
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            frame_mask=frame_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            image_features=image_features,
            video_features=video_features,
            vision_feature_layer=vision_feature_layer,
            vision_batch_size=vision_batch_size,
            delta_threshold=delta_threshold,
            delta_min_frames=delta_min_frames,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, positions])
        loss = None
        if labels is not None:
            if outputs.token_indices is not None:
                labels = _take_tokens(labels, outputs.token_indices, -100)
            num_items = (labels[:, 1:] != -100).sum()
            if kwargs.get("num_items_in_batch") is None:
                kwargs["num_items_in_batch"] = num_items
            # Without anything to learn the loss is zero, not zero by zero.
            kwargs["num_items_in_batch"] = torch.as_tensor(kwargs["num_items_in_batch"]).clamp(min=1)
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
            if self.config.delta_loss_coef and outputs.frame_deltas is not None:
                deltas = outputs.frame_deltas if frame_mask is None else outputs.frame_deltas[frame_mask.bool()]
                # A part of a batch counts by what there is to learn in it, as in the next-token loss.
                share = (num_items / kwargs["num_items_in_batch"]).to(deltas.device)
                loss = loss + self.config.delta_loss_coef * share * deltas.mean()
        return MambaMiaCausalLMOutputWithPast(
            loss=loss, logits=logits, **{key: value for key, value in outputs.items() if key != "last_hidden_state"}
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        streamer: BaseStreamer | None = None,
        **kwargs: Any,
    ) -> Tensor | ModelOutput:
        """As Transformers' `generate`; frames that the selection drops never reach prefill or KV cache.

        The videos are encoded first and the placeholders of dropped frames taken out of the prompt; what comes back
        starts with the prompt as it was given. Length limits count the prompt as it was given, too.
        """
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        image_features = kwargs.pop("image_features", None)
        if image_features is not None:
            images = self.model.get_image_features(
                kwargs.pop("pixel_values", None), image_features=image_features, return_dict=True
            )
            kwargs["mm_encoder_outputs"] = {**(kwargs.get("mm_encoder_outputs") or {}), "image": images}
        videos = {name: kwargs.pop(name, None) for name in ("pixel_values_videos", "video_features")}
        if all(video is None for video in videos.values()):
            return super().generate(
                input_ids, generation_config=generation_config, streamer=streamer, **_without_video_arguments(kwargs)
            )
        embeds = kwargs.get("inputs_embeds")
        placeholders = self.model.get_placeholder_mask(input_ids, embeds, self.config.video_token_id)
        arguments = {name: kwargs.pop(name) for name in _VIDEO_ARGUMENTS if name in kwargs}
        vision = {name: kwargs[name] for name in _VISION_ARGUMENTS if name in kwargs}
        features, keep = self.model.encode_videos(placeholders, **videos, **arguments, **vision)
        kwargs["mm_encoder_outputs"] = {**(kwargs.get("mm_encoder_outputs") or {}), "video": features}
        if keep.all():
            return super().generate(input_ids, generation_config=generation_config, streamer=streamer, **kwargs)

        indices = _kept_indices(keep, kwargs.get("attention_mask"))
        kwargs["attention_mask"] = (indices >= 0).long()
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = _take_tokens(kwargs["position_ids"], indices, 0)
        if embeds is not None:
            kwargs["inputs_embeds"] = _take_tokens(embeds, indices, 0.0)
        prompt = input_ids
        if prompt is not None:
            input_ids = _take_tokens(prompt, indices, self.config.text_config.pad_token_id or 0)
            streamer = None if streamer is None else _PromptStreamer(streamer, prompt)
        for name in ("max_length", "min_length"):
            given = (kwargs.get(name), getattr(generation_config, name, None), getattr(self.generation_config, name))
            limit = next((limit for limit in given if limit is not None), None)
            if limit is not None:
                kwargs[name] = max(limit - (keep.shape[1] - indices.shape[1]), 0)
        output = super().generate(input_ids, generation_config=generation_config, streamer=streamer, **kwargs)
        if prompt is None:
            return output
        sequences = output.sequences if isinstance(output, ModelOutput) else output
        prompts = prompt.repeat_interleave(len(sequences) // len(prompt), dim=0).to(sequences.device)
        sequences = torch.cat([prompts, sequences[:, indices.shape[1] :]], dim=1)
        if not isinstance(output, ModelOutput):
            return sequences
        output.sequences = sequences
        return output

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict[str, Any], *args: Any):
        # Transformers takes any class with "mamba" in its name for one whose cache is called `cache_params`.
        name = self.model.cache_name
        if name in model_kwargs:
            model_kwargs["cache_params"] = model_kwargs.pop(name)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        if "cache_params" in model_kwargs:
            model_kwargs[name] = model_kwargs.pop("cache_params")


# Arguments of a call that concern the videos alone, and those that images share.
_VIDEO_ARGUMENTS = ("frame_mask", "delta_threshold", "delta_min_frames")
_VISION_ARGUMENTS = ("vision_feature_layer", "vision_batch_size")


def _without_video_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in _VIDEO_ARGUMENTS}


class _PromptStreamer(BaseStreamer):
    """Hands the prompt as it was given to a streamer, in place of the one without the dropped frames."""

    def __init__(self, streamer: BaseStreamer, prompt: Tensor):
        self.streamer = streamer
        self.prompt = prompt

    def put(self, value: Tensor):
        self.streamer.put(value if self.prompt is None else self.prompt.cpu())
        self.prompt = None

    def end(self):
        self.streamer.end()


# What the tensors of media hold along their dimensions.
_MEDIA_SHAPES = {
    "pixel_values": "(num_images, channels, height, width)",
    "image_features": "(num_images, num_patches, vision_size)",
    "pixel_values_videos": "(num_videos, num_frames, channels, height, width)",
    "video_features": "(num_videos, num_frames, num_patches, vision_size)",
}


def _given_media(**media: Tensor | None) -> Tensor:
    """The one tensor that is given of pixels and features in their place."""
    given = [name for name, tensor in media.items() if tensor is not None]
    if len(given) != 1:
        raise ValueError(f"Give exactly one of {' and '.join(media)}, not {' and '.join(given) or 'none'}.")
    (name,) = given
    expected = _MEDIA_SHAPES[name]
    if media[name].ndim != expected.count(",") + 1:
        raise ValueError(
            f"{name} must be {expected}, not {tuple(media[name].shape)}; images go into pixel_values or "
            f"image_features, videos into pixel_values_videos or video_features."
        )
    return media[name]


def _real_frames(
    frame_mask: Tensor | None, pixel_values_videos: Tensor | None, video_features: Tensor | None
) -> Tensor:
    """`frame_mask` as booleans, all True where it is None."""
    videos = _given_media(pixel_values_videos=pixel_values_videos, video_features=video_features)
    if frame_mask is None:
        return torch.ones(videos.shape[:2], dtype=torch.bool)
    if frame_mask.shape != videos.shape[:2]:
        raise ValueError(
            f"frame_mask must be (num_videos, num_frames), {tuple(videos.shape[:2])} here, not "
            f"{tuple(frame_mask.shape)}."
        )
    return frame_mask.bool()


def _placeholder_runs(placeholders: Tensor) -> list[int]:
    """Lengths of the runs of True, row after row."""
    edges = nn.functional.pad(placeholders.int(), (1, 1)).diff(dim=1)
    starts, ends = (edges == 1).nonzero(), (edges == -1).nonzero()
    return (ends[:, 1] - starts[:, 1]).tolist()


def _kept_indices(keep: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Positions of each row's tokens that stay and are no padding, aligned to the right, with -1 in front of them."""
    if attention_mask is not None:
        keep = keep & attention_mask[:, -keep.shape[1] :].bool()
    order = keep.int().argsort(dim=1, stable=True)[:, -int(keep.sum(dim=1).max()) :]
    return order.masked_fill(~keep.gather(1, order), -1)


def _take_tokens(tensor: Tensor, indices: Tensor, padding: float) -> Tensor:
    """Rows' entries at `indices (batch, length)`; `padding` where the index is -1."""
    indices = indices.to(tensor.device)
    taken = tensor[torch.arange(len(indices), device=tensor.device)[:, None], indices.clamp(min=0)]
    return taken.masked_fill((indices < 0).view(*indices.shape, *[1] * (tensor.ndim - 2)), padding)


def _kept_mask(attention_mask: Tensor | None, indices: Tensor, past_length: int, length: int) -> Tensor:
    """The attention mask of `past_length` cached tokens and of those at `indices` of the `length` new ones."""
    past = indices.new_ones(len(indices), past_length) if attention_mask is None else attention_mask[:, :-length]
    return torch.cat([past, (indices >= 0).to(past)], dim=1)


def _cat_layers(chunks: list[tuple[Tensor, ...] | None]) -> tuple[Tensor, ...] | None:
    """One tensor a layer from the chunks' tensors a layer."""
    return None if chunks[0] is None else tuple(torch.cat(layer) for layer in zip(*chunks, strict=True))


__all__ = [
    "MambaMiaCausalLMOutputWithPast",
    "MambaMiaFeaturesOutput",
    "MambaMiaForConditionalGeneration",
    "MambaMiaModel",
    "MambaMiaModelOutputWithPast",
    "MambaMiaPreTrainedModel",
]
