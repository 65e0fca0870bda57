"""The encoder: vision tower, compressor and frame selection; from pixels to the tokens of the kept frames."""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.utils import can_return_tuple
from transformers.utils.generic import accepts_precomputed_kwargs

from .configuration_mambamia import MambaMiaConfig
from .finite import check_finite, check_result, is_finite
from .frame_selection import frame_budget, select_frames
from .messages import without_secrets
from .model_card import TAGS, fill_card
from .modeling_compressor import MambaMiaCompressor
from .quantization import load_pretrained
from .versions import CACHE_NAME
from .video_memory import VideoMemory, describe_images, encoder_fingerprint, is_video_memory
from .vision_tower import tower_until
from .zero3 import largest_of_processes


if TYPE_CHECKING:
    from .video_sampling import SampledVideo

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
        last_hidden_state (`torch.FloatTensor` of shape `(num_videos, num_frames, num_anchors, hidden_size)`):
            The anchors of every frame, as wide as the compressor, before its final norm and output projection; zero
            where `frame_mask` is False. None where videos are memories, which have them.
        pooler_output (`list[torch.FloatTensor]` of shape `(num_kept_frames * placeholders_per_frame, hidden_size)`):
            The tokens of the kept frames of each video: what the language model reads. These are of each frame its
            time where the model writes times, its anchors, normed and projected, and the end-of-frame vector if there
            is one.
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


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


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

    def __init__(self, config: MambaMiaConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self.model_tags = list(TAGS)  # a list of its own: Transformers adds to it

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As any model's, with one sentence for a checkpoint that is damaged or does not fit, and with a quantisation
        of the language model alone; see `load_pretrained`."""
        return load_pretrained(super().from_pretrained, *args, **kwargs)

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """As any model's; a vision tower that lacks the attention asked for of the whole model keeps its own."""
        if isinstance(attn_implementation, str) and not _supports(self.config.vision_config, attn_implementation):
            parts = dict.fromkeys(["", *self.config.sub_configs], attn_implementation)
            attn_implementation = {**parts, "vision_config": "eager"}
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MambaMiaEncoderBase) and module.end_of_frame is not None:
            init.normal_(module.end_of_frame, std=module.end_of_frame.numel() ** -0.5)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As any model's; the code goes along, so that it loads where this package is not installed."""
        self.config.auto_map = dict(_AUTO_MAP)
        super().save_pretrained(*args, **kwargs)

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """As any model's, with a model card that says something."""
        fill_card(working_dir, repo_id, self.config)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


class MambaMiaEncoderBase(MambaMiaPreTrainedModel):
    """What encoder and whole model share: from pixels to the tokens of the kept frames."""

    def __init__(self, config: MambaMiaConfig):
        super().__init__(config)
        attention = config.vision_config._attn_implementation
        if attention is not None and not _supports(config.vision_config, attention):
            config.vision_config._attn_implementation = "eager"
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.compressor = MambaMiaCompressor._from_config(config.compressor_config)
        self.end_of_frame = nn.Parameter(torch.empty(config.text_config.hidden_size)) if config.end_of_frame else None

    def train(self, mode: bool = True) -> "MambaMiaEncoderBase":
        """As any module's, but a frozen vision tower stays in evaluation mode: its features never change. So do the
        batch norms of any tower: a batch is the frames of a few videos, whose statistics are not those of all."""
        super().train(mode)
        is_frozen = self.vision_tower_is_frozen
        for module in self.vision_tower.modules():
            if is_frozen or isinstance(module, _BATCH_NORMS):
                module.training = False
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
        all_layers = output_hidden_states or kwargs or tower.config.output_attentions or torch.compiler.is_compiling()
        view = None if all_layers else tower_until(tower, layer)
        # Activation checkpointing would make the embeddings of a frozen tower require gradients.
        learns = frames.requires_grad or not self.vision_tower_is_frozen
        features: list[Tensor] = []
        hidden_states: list[tuple[Tensor, ...] | None] = []
        attentions: list[tuple[Tensor, ...] | None] = []
        batches = frames.split(batch_size)
        (num_calls,) = largest_of_processes(len(batches), device=tower.device)
        for batch in batches + (num_calls - len(batches)) * (torch.zeros_like(frames[:1]),):
            if tower.device.type != "meta":  # the hooks of an offloaded tower move the frames
                batch = batch.to(tower.device)
            pixel_values, shape = self._tower_inputs(batch.to(tower.dtype))
            with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
                if view is not None:
                    outputs = view(pixel_values, return_dict=True, **shape)
                    patches = outputs.last_hidden_state
                else:
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
            last_hidden_state=torch.cat(features)[: len(frames)],
            hidden_states=_cat_layers(hidden_states[: len(batches)]),
            attentions=_cat_layers(attentions[: len(batches)]),
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
        """The anchors and the Δ of frames.

        Args:
            patch_features: `(num_videos, num_frames, num_patches, vision_size)`, on any device.
            frame_mask: `(num_videos, num_frames)`, True for real frames.

        Returns:
            Anchors before final norm and output projection `(num_videos, num_frames, num_anchors, hidden_size)`, and Δ
            `(num_videos, num_frames)` or None without a temporal layer.
        """
        patch_features = self._for_compressor(patch_features)
        frame_mask = None if frame_mask is None else frame_mask.to(patch_features.device)
        compressed = self.compressor(patch_features, frame_mask=frame_mask, anchors_only=True, return_dict=True)
        check_result("The anchors of the frames", compressed.anchors, self)
        return compressed.anchors, compressed.frame_deltas

    def project(self, anchors: Tensor) -> Tensor:
        """The tokens of frames.

        Args:
            anchors: `(num_frames, num_anchors, hidden_size)`, as of `compress`, on any device.

        Returns:
            `(num_frames, tokens_per_frame, text_hidden_size)`.
        """
        tokens = self.compressor(None, anchors=self._for_compressor(anchors), return_dict=True).last_hidden_state
        check_result("The tokens of the frames", tokens, self)
        if self.end_of_frame is not None:
            tokens = torch.cat([tokens, self.end_of_frame.to(tokens).expand(len(tokens), 1, -1)], dim=1)
        return tokens

    def _for_compressor(self, tensor: Tensor) -> Tensor:
        """In the compressor's type and on its device; the hooks of an offloaded compressor move it themselves."""
        compressor = self.compressor
        tensor = tensor.to(compressor.dtype)
        return tensor if compressor.device.type == "meta" else tensor.to(compressor.device)

    @torch.no_grad()
    def encode_video(
        self,
        video: "str | os.PathLike[str] | Mapping[str, Any] | SampledVideo",
        processor: Any = None,
        *,
        num_frames: int | None = None,
        fps: float | None = None,
        start: float = 0.0,
        end: float | None = None,
        seek_mode: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> VideoMemory:
        """Looks at a video once, for any number of questions.

        Frames of a file are decoded while those before go through the vision tower. Their pixels are never held all at
        once; their patch features are, since the compressor reads them in both directions.

        Args:
            video: path or URL of a video file, a folder of its frames as images in the order of their names, or what
                the processor returned for one video whose times it knows. A [`SampledVideo`] is of a video that is
                open already.
            processor ([`MambaMiaProcessor`], *optional*): needed for a path or URL.
            num_frames: how many frames to sample, at most all; by default as the video processor samples.
            fps: how many frames to sample per second. The frames of a folder count as so many per second.
            start, end: sample between these seconds only.
            seek_mode: "exact" or "keyframe", see [`VideoReader`]; by default as the video processor says.
            progress: called with how many frames have gone through the vision tower, and how many there are.

        Raises:
            FileNotFoundError: if there is nothing at the path.
            ValueError: for a video or a setting that cannot be used, or a model in training mode.
        """
        if self.training:
            raise ValueError("A model in training mode remembers with dropout; call `model.eval()` before.")
        if isinstance(video, Mapping):
            return self._remember_processed(video, processor, progress)
        if not isinstance(video, str | os.PathLike):
            return self._remember_sampled(video, progress)
        if processor is None:
            raise ValueError(f"Pass the processor, too, for the video '{os.fspath(video)}'.")
        from .video_sampling import SampledVideo, open_video  # need PyAV, as nothing else of a model does

        with closing(open_video(video, processor.video_processor, fps, seek_mode)) as reader:
            sampling: Any = {"num_frames": num_frames, "fps": fps, "start": start, "end": end, "seek_mode": seek_mode}
            sampled = SampledVideo(
                reader, processor.video_processor, name=without_secrets(os.fspath(video)), **sampling
            )
            return self._remember_sampled(sampled, progress)

    def _remember_sampled(self, video: "SampledVideo", progress: Callable[[int, int], None] | None) -> VideoMemory:
        with closing(video.batches(self.config.vision_batch_size)) as batches:
            features = self._encode_batches(batches, len(video), progress)
        is_decoded = torch.from_numpy(video.numbers >= 0)
        if not is_decoded.all():
            features = features[is_decoded.to(features.device)]
        return self._memory(features, video.timestamps, video.fingerprint, **video.about)

    def _remember_processed(
        self, inputs: Mapping[str, Any], processor: Any, progress: Callable[[int, int], None] | None
    ) -> VideoMemory:
        pixels, times = inputs.get("pixel_values_videos"), inputs.get("video_timestamps")
        if pixels is None or len(pixels) != 1:
            raise ValueError(
                f"encode_video takes what the processor returned for one video, not for "
                f"{0 if pixels is None else len(pixels)}; call it once for each."
            )
        if times is None:
            raise ValueError(
                "The times of the frames are missing; have the processor make them: pass a file, or `video_metadata` "
                "with `fps` or `timestamps`."
            )
        mask = real_frames(inputs.get("frame_mask"), pixels, None)[0].cpu()
        frames, size = pixels[0][mask.to(pixels.device)], self.config.vision_batch_size
        batches = zip(torch.arange(len(frames)).split(size), frames.split(size), strict=True)
        parts = {} if processor is None else {"images": describe_images(processor.video_processor)}
        times = torch.as_tensor(times[0], dtype=torch.float64)[mask].tolist()
        return self._memory(self._encode_batches(batches, len(frames), progress), times, parts)

    def _encode_batches(
        self,
        batches: Iterable[tuple[Any, Tensor]],
        num_frames: int,
        progress: Callable[[int, int], None] | None,
    ) -> Tensor:
        """The patch features `(num_frames, num_patches, vision_size)` of frames that come with their places."""
        features: Tensor | None = None
        for places, frames in batches:
            check_finite("pixel_values_videos", frames, "check the pictures, and image_std of the processor")
            encoded = self.encode_frames(frames).last_hidden_state
            if features is None:
                features = encoded.new_zeros(num_frames, *encoded.shape[1:])
            features[torch.as_tensor(places, device=features.device)] = encoded
            if progress is not None:
                progress(int(places[-1]) + 1, num_frames)
        assert features is not None  # a video without frames is an error before
        return features

    def _memory(
        self, features: Tensor, timestamps: list[float], parts: Mapping[str, str], **about: Any
    ) -> VideoMemory:
        """The memory of frames with these patch features; `parts` of its fingerprint that the model does not tell."""
        anchors, deltas = self.compress(features[None])
        deltas = None if deltas is None else deltas[0].float()
        return VideoMemory(anchors[0], deltas, timestamps, {**encoder_fingerprint(self), **parts}, **about)

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
        _check_media(pixel_values=pixel_values, patch_features=patch_features)
        encoded = MambaMiaPatchFeaturesOutput(last_hidden_state=images)
        if patch_features is None:
            encoded = self.encode_frames(images, vision_feature_layer, vision_batch_size, **kwargs)
        anchors, deltas = self.compress(encoded.last_hidden_state.unsqueeze(1))
        all_frames = torch.ones_like(anchors[:, :, 0, 0], dtype=torch.bool)
        return MambaMiaFeaturesOutput(
            last_hidden_state=anchors,
            pooler_output=list(self.project(anchors.squeeze(1))),
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
        video_timestamps: Any = None,
        video_memories: Sequence[VideoMemory | None] | None = None,
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
            video_timestamps: for [`MambaMiaModel`]; the encoder has no embeddings of digits and writes no times.
            video_memories (`list[VideoMemory | None]`, *optional*):
                For each video its memory, or None for the next of the videos in pixels or features. Budgets are given
                for all videos, `frame_mask` for those in pixels or features.
            kwargs: further arguments of the vision tower, such as `output_hidden_states`.

        Raises:
            ValueError: unless every video is given once, in pixels, features or a memory of this model; for a budget
                or a threshold that is out of range, that nothing uses, or that lacks a Δ.
        """
        num_frames = video_lengths(frame_mask, pixel_values_videos, patch_features_videos, video_memories)
        _check_media(frame_mask, pixel_values_videos=pixel_values_videos, patch_features_videos=patch_features_videos)
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
        others: _Videos | None = None
        if pixel_values_videos is not None or patch_features_videos is not None:
            frame_mask = real_frames(frame_mask, pixel_values_videos, patch_features_videos)
            if pixel_values_videos is not None:
                vision = {"vision_feature_layer": vision_feature_layer, "vision_batch_size": vision_batch_size}
                encoded = self._encode_videos(pixel_values_videos, frame_mask, **vision, **kwargs)
                patch_features_videos = encoded.last_hidden_state
            assert patch_features_videos is not None
            anchors, deltas = self.compress(patch_features_videos, frame_mask)
            others = _Videos(anchors, deltas, frame_mask.to(anchors.device))
        if video_memories is None:
            assert others is not None  # `video_lengths` has raised otherwise
            videos = others
        else:
            videos = self._with_memories(video_memories, others)
            budgets = [
                len(memory) if memory is not None and memory.is_selected else budget
                for memory, budget in zip(video_memories, budgets, strict=True)
            ]
        keep_mask = self._select_frames(videos.deltas, videos.frame_mask, budgets, delta_threshold, delta_min_frames)
        return MambaMiaFeaturesOutput(
            last_hidden_state=videos.anchors if isinstance(videos.anchors, Tensor) else None,  # type: ignore[arg-type]
            pooler_output=[frames.flatten(0, 1) for frames in self._project_kept(videos.anchors, keep_mask)],
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            frame_deltas=videos.deltas,
            keep_mask=keep_mask,
            frame_mask=videos.frame_mask,
        )

    def _encode_videos(
        self, pixel_values_videos: Tensor, frame_mask: Tensor, **kwargs: Any
    ) -> MambaMiaPatchFeaturesOutput:
        """What `encode_frames` gives for the real frames; the features in the shape of the padded videos."""
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
        encoded.last_hidden_state = features.unflatten(0, frame_mask.shape)
        return encoded

    def _with_memories(self, memories: Sequence[VideoMemory | None], others: "_Videos | None") -> "_Videos":
        """Videos of which some are memories, of this model, and the others come where None is."""
        fingerprint = encoder_fingerprint(self)
        for memory in {id(memory): memory for memory in memories}.values():
            if memory is not None:
                memory.check(fingerprint)
        rest = iter([] if others is None else others.one_by_one())
        videos = [next(rest) if memory is None else _Videos.of(memory) for memory in memories]
        device = videos[0].frame_mask.device if others is None else others.frame_mask.device
        deltas = [video.deltas[0].to(device) for video in videos if video.deltas is not None]
        return _Videos(
            [video.anchors[0] for video in videos],
            pad_sequence(deltas, batch_first=True) if deltas else None,
            pad_sequence([video.frame_mask[0].to(device) for video in videos], batch_first=True),
        )

    def _project_kept(self, videos: Iterable[Tensor], keep_mask: Tensor) -> list[Tensor]:
        """The tokens `(num_kept_frames, tokens_per_frame, text_hidden_size)` of the kept frames of each video.

        Args:
            videos: for each, the anchors of its frames `(num_frames, num_anchors, hidden_size)`, padding behind them.
            keep_mask: `(num_videos, longest video)`.
        """
        kept = [
            self._for_compressor(frames[keep[: len(frames)].to(frames.device)])
            for frames, keep in zip(videos, keep_mask, strict=True)
        ]
        return list(self.project(torch.cat(kept)).split([len(frames) for frames in kept]))

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


class _Videos(NamedTuple):
    """What the compressor gave for videos, now or when they became memories."""

    anchors: Tensor | list[Tensor]  # of each video (num_frames, num_anchors, hidden_size), any padding behind them
    deltas: Tensor | None  # (num_videos, num_frames)
    frame_mask: Tensor  # (num_videos, num_frames)

    @classmethod
    def of(cls, memory: VideoMemory) -> "_Videos":
        deltas = None if memory.frame_deltas is None else memory.frame_deltas[None]
        mask = torch.ones(1, len(memory), dtype=torch.bool, device=memory.anchors.device)
        return cls([memory.anchors], deltas, mask)

    def one_by_one(self) -> "list[_Videos]":
        deltas = [None] * len(self.anchors) if self.deltas is None else list(self.deltas.split(1))
        masks = self.frame_mask.split(1)
        return [_Videos([video], *about) for video, *about in zip(self.anchors, deltas, masks, strict=True)]


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


def _check_media(frame_mask: Tensor | None = None, **media: Tensor | None) -> None:
    """Raises if a number of the pixels or features is not finite; what stands in the padding is of no concern."""
    for name, tensor in media.items():
        if tensor is not None and not is_finite(tensor):
            if frame_mask is not None:
                is_padding = ~frame_mask.to(tensor.device, torch.bool)
                tensor = tensor.masked_fill(is_padding.view(*is_padding.shape, *[1] * (tensor.ndim - 2)), 0)
            remedy = f"check the pictures, and image_std of the processor; {name} is {_MEDIA_SHAPES[name]}"
            check_finite(name, tensor, remedy)


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


def video_lengths(
    frame_mask: Tensor | None,
    pixel_values_videos: Tensor | None,
    patch_features_videos: Tensor | None,
    video_memories: Sequence[VideoMemory | None] | None,
) -> list[int]:
    """The number of frames of each video, those that are memories among them."""
    others: list[int] = []
    if video_memories is None or pixel_values_videos is not None or patch_features_videos is not None:
        others = real_frames(frame_mask, pixel_values_videos, patch_features_videos).sum(dim=1).tolist()
    if video_memories is None:
        return others
    strange = [type(memory).__name__ for memory in video_memories if not (memory is None or is_video_memory(memory))]
    if strange:
        raise ValueError(f"video_memories holds a {strange[0]}; give a VideoMemory or None for each video.")
    missing = sum(memory is None for memory in video_memories)
    if missing != len(others):
        raise ValueError(
            f"{missing} of {len(video_memories)} videos are None in video_memories, and pixels or features hold "
            f"{len(others)}; give each video once."
        )
    lengths = iter(others)
    return [next(lengths) if memory is None else len(memory) for memory in video_memories]


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


def _supports(vision_config: PreTrainedConfig, attention: str) -> bool:
    """Whether a vision tower has an implementation of attention; one of convolutions has none but "eager"."""
    flag = {
        "sdpa": "_supports_sdpa",
        "flash_attention_2": "_supports_flash_attn",
        "flash_attention_3": "_supports_flash_attn",
        "flex_attention": "_supports_flex_attn",
    }.get(attention)
    tower = MODEL_MAPPING.get(type(vision_config), None)
    return flag is None or tower is None or getattr(tower, flag)


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
]
