"""MambaMia: encode the frames, embed them in the prompt, run the language model."""

import inspect
import math
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    ModelOutput,
)
from transformers.utils import can_return_tuple

from .configuration_mambamia import MambaMiaCompressorConfig, MambaMiaConfig, config_beside
from .finite import check_result
from .frame_times import time_ids, time_token_ids
from .modeling_compressor import MambaMiaCompressor
from .modeling_encoder import (
    MambaMiaEncoderBase,
    MambaMiaFeaturesOutput,
    MambaMiaPreTrainedModel,
    frame_budgets,
    video_lengths,
)
from .prompt_tokens import (
    DroppedTokens,
    cached_length,
    check_cached_tokens,
    kept_indices,
    note_dropped_tokens,
    put_back_states,
    resolve_budgets,
    staying_tokens,
    take_tokens,
    tokens_to_keep,
)
from .quantization import check_not_quantized
from .request_errors import errors_for_servers
from .tokenization_mambamia import load_tokenizer
from .versions import CACHE_NAME, take_cache
from .video_memory import VideoMemory
from .video_stream import VideoStream
from .zero3 import largest_of_processes


if TYPE_CHECKING:
    from .video_sampling import SampledVideo

# Seconds `(num_videos, num_frames)`; numbers in lists stay exact where tensors are cast to the type of the weights.
Timestamps: TypeAlias = Tensor | Sequence[Sequence[float]]


class _MediaProperties:
    """What the outputs of both models tell of the images and videos, read off their features."""

    image_outputs: MambaMiaFeaturesOutput | None
    video_outputs: MambaMiaFeaturesOutput | None

    @property
    def image_hidden_states(self) -> Tensor | None:
        """`(num_image_tokens, hidden_size)`: what the language model read of the images."""
        return None if self.image_outputs is None else torch.cat(list(self.image_outputs.pooler_output))

    @property
    def video_hidden_states(self) -> Tensor | None:
        """`(num_video_tokens, hidden_size)`: what the language model read of the videos."""
        return None if self.video_outputs is None else torch.cat(list(self.video_outputs.pooler_output))

    @property
    def frame_deltas(self) -> Tensor | None:
        """`(num_videos, num_frames)`: Δ, the importance of each frame."""
        return None if self.video_outputs is None else self.video_outputs.frame_deltas

    @property
    def keep_mask(self) -> Tensor | None:
        """`(num_videos, num_frames)`: True for the kept frames."""
        return None if self.video_outputs is None else self.video_outputs.keep_mask


@dataclass
class MambaMiaModelOutputWithPast(_MediaProperties, BaseModelOutputWithPast):
    """The fields of `BaseModelOutputWithPast`, where a Mamba's cache keeps its own name, and:

    States are as long as the prompt. Where frames were dropped, the language model did not read their tokens, and the
    states there are zero, but for a place directly before a token that is left, which has the state from which that
    token follows. Attentions are among the tokens that are left.

    Args:
        image_outputs, video_outputs (`MambaMiaFeaturesOutput`, *optional*):
            Features of the images and of the videos.
        token_indices (`torch.LongTensor` of shape `(batch_size, kept_length)`, *optional*):
            Where frames were dropped: the position in the prompt of each token that is left, -1 for padding.
    """

    image_outputs: MambaMiaFeaturesOutput | None = None
    video_outputs: MambaMiaFeaturesOutput | None = None
    token_indices: Tensor | None = None


@dataclass
class MambaMiaCausalLMOutputWithPast(_MediaProperties, CausalLMOutputWithPast):
    """The fields of [`MambaMiaModelOutputWithPast`] but `last_hidden_state`, and:

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, with `labels`):
            Next-token loss, plus the cost of Δ where the configuration has a `delta_loss_coef`.
        logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`):
            Scores of the next token that is left; zero at dropped places, but for one directly before such a token.
    """

    image_outputs: MambaMiaFeaturesOutput | None = None
    video_outputs: MambaMiaFeaturesOutput | None = None
    token_indices: Tensor | None = None


class MultimodalEmbeddings(NamedTuple):
    """A prompt as the language model reads it: media in the places of their tokens, dropped frames gone."""

    inputs_embeds: Tensor  # (batch_size, kept_length, hidden_size)
    attention_mask: Tensor | None  # (batch_size, past_length + kept_length)
    position_ids: Tensor | None  # (batch_size, kept_length)
    token_indices: Tensor | None  # (batch_size, kept_length), -1 for padding; None where nothing was dropped
    outputs: dict[str, MambaMiaFeaturesOutput]  # features of "image" and "video", as far as there are


class MambaMiaModel(MambaMiaEncoderBase):
    """Vision tower, compressor and language model, without the language model's head."""

    def __init__(self, config: MambaMiaConfig):
        if str(config.text_config._attn_implementation).startswith("vllm"):
            raise ValueError(
                "vLLM's backend for models of Transformers would read the first frames of a video in place of the "
                "chosen ones: install the package mambamia_hf beside vLLM, which has a plugin for these checkpoints, "
                "and leave out --model-impl."
            )
        super().__init__(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    @property
    def cache_name(self) -> str:
        """The name of the cache in the language model's own `forward` and outputs."""
        names = inspect.signature(self.language_model.forward).parameters
        return next((name for name in ("cache", "past_key_values", "cache_params") if name in names), CACHE_NAME)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_placeholder_mask(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        image_features: Tensor | None = None,
        video_features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The places of the image tokens and of the video tokens in a prompt.

        Args:
            input_ids: `(batch_size, sequence_length)`, or None.
            inputs_embeds: `(batch_size, sequence_length, hidden_size)`, where there are no `input_ids`.
            image_features, video_features: `(num_tokens, hidden_size)`; there must be as many places.

        Returns:
            Two masks `(batch_size, sequence_length, 1)`.

        Raises:
            ValueError: if there are more or fewer places than tokens.
        """
        masks = []
        for modality, token_id, features in (
            ("image", self.config.image_token_id, image_features),
            ("video", self.config.video_token_id, video_features),
        ):
            if input_ids is not None:
                mask = input_ids == token_id
            elif inputs_embeds is None:
                raise ValueError("Give input_ids or inputs_embeds, not neither.")
            elif token_id >= self.config.text_config.vocab_size:  # has no embedding that could be found
                mask = torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
            else:
                token = self.get_input_embeddings()(torch.tensor([[token_id]], device=inputs_embeds.device))
                tolerance = 4 * torch.finfo(token.dtype).eps * token.abs().max()  # an adapter computes embeddings
                mask = ((inputs_embeds - token).abs() <= tolerance).all(dim=-1)
            if features is not None:
                _check_places(modality, mask, features)
            masks.append(mask.unsqueeze(-1))
        return masks[0], masks[1]

    @can_return_tuple
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
        video_memories: Sequence[VideoMemory | None] | None = None,
        **kwargs: Any,
    ) -> MambaMiaFeaturesOutput | tuple:
        """See [`MambaMiaEncoderBase.get_video_features`]; with a `frame_time_format` in the configuration, the digits
        of its time stand before the tokens of each kept frame, as the language model's own embeddings.

        Args:
            video_timestamps (`torch.DoubleTensor` of shape `(num_videos, num_frames)`, *optional*):
                Times in seconds, as the processor returns them, or a list of numbers for each video. Not used without
                a `frame_time_format`; where all videos are memories, these have them.
            kwargs: further arguments of the vision tower; the others are those of
                [`MambaMiaEncoderBase.get_video_features`].

        Raises:
            ValueError: also if the times are missing or do not fit the videos or the format.
        """
        features: Any = super().get_video_features(
            pixel_values_videos,
            frame_mask,
            num_kept_frames,
            keep_frames,
            keep_ratio,
            delta_threshold,
            delta_min_frames,
            vision_feature_layer,
            vision_batch_size,
            patch_features_videos,
            video_memories=video_memories,
            return_dict=True,
            **kwargs,
        )
        ids = self._time_ids(features.keep_mask, _times_of(video_memories, video_timestamps))
        if ids:
            embeddings = self.get_input_embeddings()
            _write_times(features, [embeddings(video.to(features.keep_mask.device)) for video in ids])
        return features

    def _time_ids(self, keep_mask: Tensor, video_timestamps: Timestamps | None) -> list[Tensor]:
        """The tokens `(num_kept_frames, width)` of the times of the kept frames of each video; none without a format.

        Args:
            keep_mask: `(num_videos, num_frames)`, True for the kept frames.
            video_timestamps: see `get_video_features`.
        """
        time_format, token_ids = self.config.frame_time_format, self.config.time_token_ids
        if time_format is None:
            return []
        assert token_ids is not None  # the configuration has checked
        ids = []
        for kept, times in zip(keep_mask.tolist(), _seconds(video_timestamps, keep_mask), strict=True):
            kept_times = [seconds for seconds, stays in zip(times, kept, strict=True) if stays]
            ids.append(torch.tensor(time_ids(kept_times, time_format, token_ids)))
        return ids

    def _embed(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, placeholders: Tensor, others: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The embeddings of a prompt and of other tokens.

        Args:
            input_ids: `(batch_size, sequence_length)`, or None.
            inputs_embeds: `(batch_size, sequence_length, hidden_size)`, where there are no `input_ids`.
            placeholders: `(batch_size, sequence_length, 1)`, True where features will take the places of tokens.
            others: `(num_kept_frames, width)` of each video.

        Returns:
            `(batch_size, sequence_length, hidden_size)`, and `(num_kept_frames, width, hidden_size)` of each video.
        """
        embeddings = self.get_input_embeddings()
        if input_ids is None:
            assert inputs_embeds is not None
            return inputs_embeds, [embeddings(ids.to(inputs_embeds.device)) for ids in others]
        batch_size, length = input_ids.shape
        # Placeholders may be numbered beyond the vocabulary.
        beyond = placeholders.squeeze(-1) & (input_ids >= self.config.text_config.vocab_size)
        input_ids = input_ids.masked_fill(beyond, 0)
        if not others:
            return embeddings(input_ids), []
        # By one call: processes that train together gather embeddings equally often, also one with text alone.
        more = torch.cat([ids.flatten() for ids in others]).to(input_ids)
        more = nn.functional.pad(more, (0, -len(more) % batch_size)).view(batch_size, -1)
        embedded = embeddings(torch.cat([input_ids, more], dim=1))
        sizes = [ids.numel() for ids in others]
        parts = embedded[:, length:].flatten(0, 1)[: sum(sizes)].split(sizes)
        return embedded[:, :length], [part.view(*ids.shape, -1) for part, ids in zip(parts, others, strict=True)]

    def embed_multimodal(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_length: int = 0,
        pixel_values: Tensor | None = None,
        patch_features: Tensor | None = None,
        mm_encoder_outputs: dict[str, MambaMiaFeaturesOutput] | None = None,
        vision_feature_layer: int | None = None,
        vision_batch_size: int | None = None,
        **videos: Any,
    ) -> MultimodalEmbeddings:
        """Encodes the media of a prompt, drops frames, and puts the tokens that are left in their places.

        A video that has placeholders for all of its frames loses the places of those that are dropped; padding leaves
        with them, and the rows are padded on the left again. A video with placeholders for fewer frames keeps exactly
        so many, the most important ones.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                The prompt, with one placeholder per token of its images and videos.
            inputs_embeds, attention_mask, position_ids: as in `forward`.
            past_length (`int`, defaults to 0): cached tokens before the prompt.
            pixel_values, patch_features, vision_feature_layer, vision_batch_size: see `get_image_features`.
            mm_encoder_outputs (`dict`, *optional*): outputs of `get_image_features` and `get_video_features` under
                "image" and "video", in place of pixels.
            videos: the other arguments of `get_video_features`.

        Raises:
            ValueError: if media and placeholders do not fit each other.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"Give input_ids or inputs_embeds, not {'neither' if input_ids is None else 'both'}.")
        outputs = dict(mm_encoder_outputs or {})
        vision: dict[str, Any] = {
            "vision_feature_layer": vision_feature_layer,
            "vision_batch_size": vision_batch_size,
        }
        image_places, video_places = self.get_placeholder_mask(input_ids, inputs_embeds)
        if pixel_values is not None or patch_features is not None:
            outputs["image"] = self.get_image_features(
                pixel_values, patch_features=patch_features, return_dict=True, **vision
            )
        ids_of_times: list[Tensor] = []
        if any(videos.get(name) is not None for name in _VIDEOS):
            timestamps = _times_of(videos.get("video_memories"), videos.pop("video_timestamps", None))
            outputs["video"] = self._encode_videos_of_prompt(video_places.squeeze(-1), **videos, **vision)
            assert outputs["video"].keep_mask is not None
            ids_of_times = self._time_ids(outputs["video"].keep_mask, timestamps)
        placeholders = image_places | video_places
        inputs_embeds, times = self._embed(input_ids, inputs_embeds, placeholders, ids_of_times)
        if times:
            _write_times(outputs["video"], times)

        if inputs_embeds.shape[1] > 1:  # one token is what the language model came up with itself
            for modality, places in (("image", image_places), ("video", video_places)):
                if outputs.get(modality) is None and places.any():
                    raise ValueError(
                        f"The prompt has {int(places.sum())} {modality} placeholders and there are no {modality}s; "
                        f"pass what the processor returns for them, or features."
                    )

        token_indices = self._token_indices(video_places.squeeze(-1), attention_mask, outputs.get("video"))
        if token_indices is not None:
            length = inputs_embeds.shape[1]
            inputs_embeds, image_places, video_places = (
                take_tokens(tensor, token_indices, 0) for tensor in (inputs_embeds, image_places, video_places)
            )
            stays = (token_indices >= 0).long()
            past = stays.new_ones(len(stays), past_length) if attention_mask is None else attention_mask[:, :-length]
            attention_mask = torch.cat([past, stays.to(past)], dim=1)
            if position_ids is None:
                position_ids = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -stays.shape[1] :]
            else:
                position_ids = take_tokens(position_ids, token_indices, 0)

        for modality, places in (("image", image_places), ("video", video_places)):
            if outputs.get(modality) is not None:
                tokens = torch.cat(list(outputs[modality].pooler_output)).to(inputs_embeds)
                _check_places(modality, places, tokens)
                inputs_embeds = inputs_embeds.masked_scatter(places, tokens)
        return MultimodalEmbeddings(inputs_embeds, attention_mask, position_ids, token_indices, outputs)

    def _encode_videos_of_prompt(
        self,
        video_places: Tensor,
        num_kept_frames: Tensor | None = None,
        keep_frames: int | None = None,
        keep_ratio: float | None = None,
        **videos: Any,
    ) -> MambaMiaFeaturesOutput:
        """`get_video_features` with the budgets that a prompt has room for, without times.

        Args:
            video_places: `(batch_size, sequence_length)`, True where the video tokens stand.
            num_kept_frames, keep_frames, keep_ratio, videos: arguments of `get_video_features`.
        """
        num_frames = video_lengths(videos.get("frame_mask"), *(videos.get(name) for name in _VIDEOS))
        tokens_per_frame = self._tokens_per_frame(*(videos.get(name) for name in _VIDEOS))
        budgets = frame_budgets(num_frames, num_kept_frames, keep_frames, keep_ratio)
        placeholders_per_frame = self.config.frame_time_width + tokens_per_frame
        budgets = resolve_budgets(video_places, num_frames, placeholders_per_frame, budgets)
        return super().get_video_features(num_kept_frames=torch.tensor(budgets), return_dict=True, **videos)

    def _tokens_per_frame(
        self,
        pixel_values_videos: Tensor | None,
        patch_features_videos: Tensor | None,
        video_memories: Sequence[VideoMemory | None] | None,
    ) -> int:
        """Tokens per frame of the videos of a prompt, which have to agree.

        Raises:
            ValueError: if they do not.
        """
        num_anchors = {memory.anchors.shape[1] for memory in video_memories or () if memory is not None}
        if pixel_values_videos is not None:
            num_anchors.add(self.config.tokens_per_frame(*pixel_values_videos.shape[-2:]) - self.config.end_of_frame)
        if patch_features_videos is not None:
            num_anchors.add(self.config.compressor_config.num_anchors(patch_features_videos.shape[2]))
        if len(num_anchors) > 1:
            raise ValueError(
                f"The videos of a prompt have {' and '.join(map(str, sorted(num_anchors)))} anchors per frame; make "
                f"their frames of one size."
            )
        return num_anchors.pop() + self.config.end_of_frame

    def _token_indices(
        self, video_places: Tensor, attention_mask: Tensor | None, videos: MambaMiaFeaturesOutput | None
    ) -> Tensor | None:
        """The positions `(batch_size, kept_length)` of the tokens that stay; None where all do."""
        if videos is None or videos.keep_mask is None:  # tokens without a mask are those of the places that are left
            return None
        num_tokens = len(videos.pooler_output[0]) // int(videos.keep_mask[0].sum())
        keep = tokens_to_keep(video_places, videos.keep_mask, videos.frame_mask, num_tokens)
        return None if keep.all() else kept_indices(keep, attention_mask)

    def _zero_of_encoder(self, num_passes: int, *pixels: Tensor | None) -> Tensor | None:
        """Zero, with a gradient of zero, of passes on nothing through the encoder; None where no pass is missing.

        Processes that train together need a gradient of the compressor from each, also from one with a batch of text
        alone, and with ZeRO-3 as many passes as the one that encodes most: its images, its videos.

        Args:
            num_passes: how many this process makes.
            pixels: those of its images and videos, None for features.
        """
        needed_passes, height, width = max(num_passes, int(self.training and torch.is_grad_enabled())), 0, 0
        if is_deepspeed_zero3_enabled():
            sizes = [(0, 0), *(frames.shape[-2:] for frames in pixels if frames is not None)]
            height, width = map(max, zip(*sizes, strict=True))
            needed_passes, height, width = largest_of_processes(needed_passes, height, width, device=self.device)
        config, zeros = self.config.compressor_config, []
        for _ in range(needed_passes - num_passes):
            features = torch.zeros(1, config.patches_per_anchor, config.input_size)
            if height:  # others have pixels
                frame = torch.zeros(1, self.config.vision_config.num_channels, height, width)
                features = self.encode_frames(frame).last_hidden_state
            anchors, _ = self.compress(features[None])
            zeros.append(0.0 * self.project(anchors[0]).sum())
        return torch.stack(zeros).sum() if zeros else None

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        frame_mask: Tensor | None = None,
        num_kept_frames: Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        keep_frames: int | None = None,
        keep_ratio: float | None = None,
        delta_threshold: float | None = None,
        delta_min_frames: int | None = None,
        patch_features: Tensor | None = None,
        patch_features_videos: Tensor | None = None,
        video_timestamps: Timestamps | None = None,
        video_memories: Sequence[VideoMemory | None] | None = None,
        vision_feature_layer: int | None = None,
        vision_batch_size: int | None = None,
        mm_encoder_outputs: dict[str, MambaMiaFeaturesOutput] | None = None,
        mm_token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> MambaMiaModelOutputWithPast | tuple:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                The prompt, with one placeholder per token of its images and videos; see `embed_multimodal`.
            pixel_values, patch_features: the images, in order; see `get_image_features`.
            pixel_values_videos, patch_features_videos, frame_mask, video_timestamps, video_memories: the videos, in
                order; see `get_video_features`.
            num_kept_frames, keep_frames, keep_ratio, delta_threshold, delta_min_frames: the selection of their frames;
                see `get_video_features`.
            attention_mask (`torch.LongTensor` of shape `(batch_size, past_length + sequence_length)`, *optional*):
                1 for tokens, 0 for padding.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): of the prompt.
            cache (`Cache`, *optional*): of earlier tokens; `past_key_values` and `cache_params` are taken as well.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                In place of `input_ids`; the placeholders are found by their embeddings.
            use_cache (`bool`, *optional*): whether to return a cache.
            vision_feature_layer, vision_batch_size (`int`, *optional*): see [`MambaMiaConfig`].
            mm_encoder_outputs (`dict`, *optional*): see `embed_multimodal`.
            mm_token_type_ids: what some processors return beside `input_ids`; nothing needs it here.
            kwargs: further arguments of the language model.
        """
        kwargs["cache"] = cache
        cache = take_cache(kwargs)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        length = 0 if tokens is None else tokens.shape[1]
        past_length = cached_length(cache)
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            attention_mask = _cut_mask(cache, attention_mask, past_length + length)
        images, videos = (pixel_values, patch_features), (pixel_values_videos, patch_features_videos, video_memories)
        media = (images, videos, (mm_encoder_outputs or None,))
        num_passes = sum(any(given is not None for given in modality) for modality in media)
        # Before the tokens are embedded, as media are: gradients of all processes come in one order.
        zero = self._zero_of_encoder(num_passes, pixel_values, pixel_values_videos)
        embedded = self.embed_multimodal(
            input_ids,
            inputs_embeds,
            attention_mask,
            position_ids,
            past_length,
            pixel_values=pixel_values,
            patch_features=patch_features,
            pixel_values_videos=pixel_values_videos,
            patch_features_videos=patch_features_videos,
            video_memories=video_memories,
            frame_mask=frame_mask,
            num_kept_frames=num_kept_frames,
            keep_frames=keep_frames,
            keep_ratio=keep_ratio,
            delta_threshold=delta_threshold,
            delta_min_frames=delta_min_frames,
            video_timestamps=video_timestamps,
            vision_feature_layer=vision_feature_layer,
            vision_batch_size=vision_batch_size,
            mm_encoder_outputs=mm_encoder_outputs,
        )
        cache_name = self.cache_name
        outputs = self.language_model(
            inputs_embeds=embedded.inputs_embeds if zero is None else embedded.inputs_embeds + zero,
            attention_mask=embedded.attention_mask,
            position_ids=embedded.position_ids,
            use_cache=use_cache,
            return_dict=True,
            **{cache_name: cache},
            **kwargs,
        )
        last_hidden_state: Tensor = outputs.last_hidden_state
        hidden_states = outputs.get("hidden_states")
        if (indices := embedded.token_indices) is not None:
            last_hidden_state = put_back_states(last_hidden_state, indices, length)
            if hidden_states is not None:
                hidden_states = tuple(put_back_states(states, indices, length) for states in hidden_states)
        output = MambaMiaModelOutputWithPast(
            last_hidden_state=last_hidden_state,
            hidden_states=hidden_states,
            attentions=outputs.get("attentions"),
            image_outputs=embedded.outputs.get("image"),
            video_outputs=embedded.outputs.get("video"),
            token_indices=indices,
        )
        if (cache := outputs.get(cache_name)) is not None:
            output[cache_name] = cache
            if indices is not None:
                note_dropped_tokens(cache, past_length, indices, length)
        return output


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
        frame_time_format: str | None = None,
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
            frame_time_format: see [`MambaMiaConfig`].
            compressor_kwargs: of [`MambaMiaCompressorConfig`]. By default there is one anchor for each row of the
                tower's patches, and the compressor is about as wide as the language model, 3,072 at most; the input
                and output sizes are those of the two models.

        Raises:
            ValueError: for an argument that is no setting of the compressor, a format of times that does not exist or
                for which the tokenizer lacks a token, or a model that is quantised or in the layout of the authors'
                code.
        """
        unknown = compressor_kwargs.keys() - {field.name for field in fields(MambaMiaCompressorConfig)}
        if unknown:
            raise ValueError(
                f"The compressor has no setting {', '.join(sorted(unknown))}; set those of the whole model on "
                f"`model.config` afterwards, and see MambaMiaCompressorConfig for the others."
            )
        for name in (vision, text):
            # Raises for the layout of the authors' code, too, which Auto classes do not know.
            check_not_quantized(name, config_beside(name, {}))
        config = AutoConfig.from_pretrained(vision)
        vision_config = getattr(config, "vision_config", config)
        if hasattr(vision_config, "vision_use_head"):
            vision_config.vision_use_head = False  # SigLIP's pooling, which nothing reads
        tower = AutoModel.from_pretrained(vision, config=config, dtype=dtype)
        tower = getattr(tower, "vision_model", tower)
        language_model = AutoModelForCausalLM.from_pretrained(text, dtype=dtype)
        tokenizer = load_tokenizer(text)
        time_tokens = None if frame_time_format is None else time_token_ids(tokenizer, frame_time_format)
        if len(tokenizer) > language_model.config.vocab_size:
            language_model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
        language_model.config.pad_token_id = tokenizer.pad_token_id

        vocabulary = tokenizer.get_vocab()
        config = MambaMiaConfig(
            vision_config=tower.config,
            text_config=language_model.config,
            compressor_config=MambaMiaCompressorConfig.for_language_model(language_model.config, **compressor_kwargs),
            image_token_id=vocabulary["<|image_pad|>"],
            video_token_id=vocabulary["<|video_pad|>"],
            frame_time_format=frame_time_format,
            time_token_ids=time_tokens,
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

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def stream(self, processor: Any, keep_frames: int = 256, **settings: Any) -> VideoStream:
        """A video that has not ended: frames are pushed as they come, and questions are asked at any moment.

        Args:
            processor: of this model.
            keep_frames: how many frames are held at most; what a stream holds does not grow.
            settings: the others of [`VideoStream`].

        Raises:
            ValueError: for a setting out of range, or a model that cannot read a video piece by piece.
        """
        return VideoStream(self, processor, keep_frames, **settings)

    def get_image_features(self, pixel_values: Tensor | None = None, **kwargs: Any) -> MambaMiaFeaturesOutput | tuple:
        """See [`MambaMiaEncoderBase.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def get_video_features(
        self, pixel_values_videos: Tensor | None = None, **kwargs: Any
    ) -> MambaMiaFeaturesOutput | tuple:
        """See [`MambaMiaEncoderBase.get_video_features`]."""
        return self.model.get_video_features(pixel_values_videos, **kwargs)

    def encode_video(
        self,
        video: "str | os.PathLike[str] | Mapping[str, Any] | SampledVideo",
        processor: Any = None,
        **kwargs: Any,
    ) -> VideoMemory:
        """See [`MambaMiaEncoderBase.encode_video`]."""
        return self.model.encode_video(video, processor, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        frame_mask: Tensor | None = None,
        num_kept_frames: Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        keep_frames: int | None = None,
        keep_ratio: float | None = None,
        delta_threshold: float | None = None,
        delta_min_frames: int | None = None,
        patch_features: Tensor | None = None,
        patch_features_videos: Tensor | None = None,
        video_timestamps: Timestamps | None = None,
        video_memories: Sequence[VideoMemory | None] | None = None,
        mm_encoder_outputs: dict[str, MambaMiaFeaturesOutput] | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> MambaMiaCausalLMOutputWithPast | tuple:
        """
        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Tokens to predict, -100 for those that do not count, nor do those of dropped frames.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                The last positions, or the indices of the positions, of all rows or `(batch_size, num_positions)`, that
                get logits; 0 for all. Negative indices count from the end.
            num_items_in_batch (`int`, *optional*): tokens to predict in the whole batch, over all its parts.

        The other arguments are those of [`MambaMiaModel.forward`].
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            frame_mask=frame_mask,
            num_kept_frames=num_kept_frames,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            keep_frames=keep_frames,
            keep_ratio=keep_ratio,
            delta_threshold=delta_threshold,
            delta_min_frames=delta_min_frames,
            patch_features=patch_features,
            patch_features_videos=patch_features_videos,
            video_timestamps=video_timestamps,
            video_memories=video_memories,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(_positions_of(outputs.last_hidden_state, logits_to_keep))
        loss = None if labels is None else self._loss(labels, outputs, num_items_in_batch, **kwargs)
        output = MambaMiaCausalLMOutputWithPast(loss=loss, logits=logits)
        for name, value in outputs.items():
            if name != "last_hidden_state":
                output[name] = value
        return output

    def _loss(
        self,
        labels: Tensor,
        outputs: MambaMiaModelOutputWithPast,
        num_items_in_batch: int | Tensor | None,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Next-token loss, plus `delta_loss_coef` times the mean Δ of the videos.

        Only the positions that count go through the head: a prompt may have thousands of tokens and an answer a few.
        """
        states: Any = outputs.last_hidden_state
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100) if shift_labels is None else shift_labels
        targets = targets.to(states.device)
        if outputs.token_indices is not None:
            stays = staying_tokens(outputs.token_indices.to(states.device), states.shape[1])
            targets = targets.masked_fill(~nn.functional.pad(stays[:, 1:], (0, 1)), -100)
        counts = targets != -100
        num_items = counts.sum()
        items_in_batch = torch.as_tensor(num_items if num_items_in_batch is None else num_items_in_batch)
        items_in_batch = items_in_batch.clamp(min=1)  # avoids 0/0 when all labels are -100
        loss = self.loss_function(
            self.lm_head(states[counts]),
            None,
            vocab_size=self.config.text_config.vocab_size,
            num_items_in_batch=items_in_batch,
            shift_labels=targets[counts],
            **kwargs,
        )
        videos = outputs.video_outputs
        if self.config.delta_loss_coef and videos is not None and videos.frame_deltas is not None:
            deltas = videos.frame_deltas[videos.frame_mask]
            # A part of a batch counts by its share of the labels, as in the next-token loss.
            share = (num_items / items_in_batch).to(deltas.device)
            loss = loss + self.config.delta_loss_coef * share * deltas.mean()
        return loss

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        streamer: BaseStreamer | None = None,
        **kwargs: Any,
    ) -> Tensor | ModelOutput:
        """As Transformers' `generate`; dropped frames reach neither the prefill nor the KV cache.

        The media are encoded and embedded first, and the placeholders of dropped frames leave the prompt. The returned
        sequences begin with the prompt as given, and length limits count it so. With the sequences and the cache of a
        former call, a dialogue goes on from the cache.

        Args:
            inputs, generation_config, streamer: as in Transformers; `inputs` are the `input_ids`.
            kwargs: arguments of `forward` and of Transformers' `generate`.

        Raises:
            ValueError: if media, placeholders or cache do not fit each other.
        """
        prompt = kwargs.pop("input_ids", None) if inputs is None else inputs
        cache = take_cache(kwargs)
        kwargs["logits_processor"] = LogitsProcessorList(
            [*(kwargs.get("logits_processor") or ()), _FiniteScores(self)]
        )
        media = {name: kwargs.pop(name) for name in _MEDIA_ARGUMENTS if name in kwargs}
        kwargs.pop("mm_token_type_ids", None)
        if cache is not None:
            if self._learns_prompt:
                raise ValueError(
                    "With a prompt that PEFT learned, `generate` cannot go on from a cache; pass the whole dialogue "
                    "without one."
                )
            kwargs[self._generation_cache_name] = cache
        indices, length = None, 0
        if any(media.get(name) is not None for name in _MEDIA):
            with errors_for_servers():
                indices, length = self._embed_prompt(prompt, cache, media, generation_config, kwargs)
        elif prompt is not None and (dropped := DroppedTokens.of(cache)) is not None:
            indices, length = self._drop_as_cached(prompt, cached_length(cache), dropped, kwargs), prompt.shape[1]
        if indices is None:
            return super().generate(prompt, generation_config=generation_config, streamer=streamer, **kwargs)

        for name in ("max_length", "min_length"):
            limits = (kwargs.get(name), getattr(generation_config, name, None), getattr(self.generation_config, name))
            limit = next((limit for limit in limits if limit is not None), None)
            if limit is not None:
                kwargs[name] = max(limit - (length - indices.shape[1]), 0)
        kept_prompt = None
        if prompt is not None:
            kept_prompt = take_tokens(prompt, indices, self.config.text_config.pad_token_id or 0)
            streamer = None if streamer is None else _PromptStreamer(streamer, prompt)
        output = super().generate(kept_prompt, generation_config=generation_config, streamer=streamer, **kwargs)
        if cache is None and (new_cache := getattr(output, CACHE_NAME, None)) is not None:
            note_dropped_tokens(new_cache, 0, indices, length)
        return output if prompt is None else _with_whole_prompt(output, prompt, indices.shape[1])

    def _embed_prompt(
        self,
        prompt: Tensor | None,
        cache: Cache | None,
        media: dict[str, Any],
        generation_config: GenerationConfig | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor | None, int]:
        """Puts the embedded prompt into the arguments of Transformers' `generate`.

        Returns:
            The positions of the tokens that are left, None where all are, and the length of the prompt as given.
        """
        inputs_embeds, attention_mask = kwargs.pop("inputs_embeds", None), kwargs.pop("attention_mask", None)
        tokens = prompt if inputs_embeds is None else inputs_embeds
        if tokens is None:
            raise ValueError("There are media and no prompt; give input_ids or inputs_embeds.")
        length = tokens.shape[1]
        if attention_mask is None and inputs_embeds is None:
            attention_mask = self._mask_of_padding(tokens, generation_config, kwargs)
        # A mask that is longer than the prompt covers what the cache holds already.
        past_length = 0
        if attention_mask is not None and attention_mask.shape[1] > length:
            past_length = cached_length(cache)
            attention_mask = _cut_mask(cache, attention_mask, past_length + length)
        embedded = self.model.embed_multimodal(
            prompt if inputs_embeds is None else None,
            inputs_embeds,
            attention_mask,
            kwargs.pop("position_ids", None),
            past_length,
            **media,
        )
        if not past_length:
            check_cached_tokens(cache, embedded.token_indices, length)
        self._check_context(past_length + embedded.inputs_embeds.shape[1])
        if embedded.attention_mask is not None:
            kwargs["attention_mask"] = embedded.attention_mask
        if embedded.position_ids is not None:
            kwargs["position_ids"] = embedded.position_ids
        in_chunks = any(
            getattr(settings, "prefill_chunk_size", None)
            for settings in (SimpleNamespace(**kwargs), generation_config, self.generation_config)
        )
        if past_length or in_chunks or self._learns_prompt:
            # Transformers takes embeddings for a whole sequence only, features also for a part of it. What learns
            # prompts embeds the tokens itself.
            kwargs["mm_encoder_outputs"] = {
                modality: MambaMiaFeaturesOutput(pooler_output=output.pooler_output)
                for modality, output in embedded.outputs.items()
            }
        else:
            kwargs["inputs_embeds"] = embedded.inputs_embeds
        if cache is not None and embedded.token_indices is not None:
            note_dropped_tokens(cache, past_length, embedded.token_indices, length)
        return embedded.token_indices, length

    def _check_context(self, length: int) -> None:
        """Refuses a prompt that is longer than what the language model reads."""
        text = self.config.text_config
        limit, rope = getattr(text, "max_position_embeddings", None), getattr(text, "rope_parameters", None) or {}
        if limit is not None and "original_max_position_embeddings" in rope:
            limit = max(limit, int(rope["original_max_position_embeddings"] * rope.get("factor", 1)))
        if limit is not None and length > limit:
            raise ValueError(
                f"The prompt has {length} tokens without those of dropped frames, and the language model reads at "
                f"most {limit}: keep fewer frames (`keep_frames`, `keep_ratio`) or sample fewer (`max_frames`)."
            )

    def _mask_of_padding(
        self, prompt: Tensor, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> Tensor | None:
        """The mask of a prompt that came without one, as Transformers infers it: 0 for the padding before it, None
        without any. The same token further on is one that a model wrote in a dialogue."""

        def setting(name: str) -> Any:
            given = (kwargs.get(name), getattr(generation_config, name, None), getattr(self.generation_config, name))
            return next((value for value in given if value is not None), None)

        padding, end = setting("pad_token_id"), setting("eos_token_id")
        ends = end if isinstance(end, list) else [end]
        if padding is None or padding in ends or not (prompt[:, 0] == padding).any():
            return None
        return (prompt != padding).long().cummax(dim=1).values

    @staticmethod
    def _drop_as_cached(
        prompt: Tensor, past_length: int, dropped: DroppedTokens, kwargs: dict[str, Any]
    ) -> Tensor | None:
        """Drops from a dialogue that goes on the tokens that its cache lacks.

        Returns:
            The positions of the tokens that are left; None where the prompt holds new tokens alone.
        """
        attention_mask, length = kwargs.get("attention_mask"), prompt.shape[1]
        if attention_mask is not None and attention_mask.shape[1] > length:
            kwargs["attention_mask"] = dropped.cut_mask(attention_mask, past_length + length)
            return None
        if length < dropped.prompt_length or len(prompt) != len(dropped.token_indices):
            raise ValueError(
                f"The cache is that of a prompt of {len(dropped.token_indices)} rows of {dropped.prompt_length} "
                f"tokens, of which frames were dropped, and input_ids has shape {tuple(prompt.shape)}; pass the whole "
                f"dialogue, or its new tokens with an attention mask that covers the cached ones, too."
            )
        indices = dropped.indices(length)
        attention_mask = torch.ones_like(prompt) if attention_mask is None else attention_mask
        kwargs["attention_mask"] = take_tokens(attention_mask, indices, 0)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = take_tokens(kwargs["position_ids"], indices, 0)
        return indices

    @property
    def _learns_prompt(self) -> bool:
        """Whether PEFT's prompt learning makes the inputs of `generate`: its method, in place of the model's own,
        takes no embeddings."""
        return "inputs_embeds" not in inspect.signature(self.prepare_inputs_for_generation).parameters

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # whose arguments `generate` looks up
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As Transformers', with the cache under the name by which PEFT's prompt learning knows it."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if "cache" in inputs:  # since Transformers 5.24
            inputs["past_key_values"] = inputs.pop("cache")
        return inputs

    @property
    def _generation_cache_name(self) -> str:
        """The cache in the arguments of Transformers' `generate`: before 5.24 it depends on the language model."""
        return self.model.cache_name if CACHE_NAME == "past_key_values" else CACHE_NAME

    if CACHE_NAME == "past_key_values":

        def _prepare_cache_for_generation(self: Any, generation_config: Any, model_kwargs: Any, *args: Any) -> Any:
            # Before 5.24, Transformers calls the cache of any class with "mamba" in its name `cache_params`.
            name = self._generation_cache_name
            if name in model_kwargs:
                model_kwargs["cache_params"] = model_kwargs.pop(name)
            prepare: Any = GenerationMixin._prepare_cache_for_generation
            prepare(self, generation_config, model_kwargs, *args)
            if "cache_params" in model_kwargs:
                model_kwargs[name] = model_kwargs.pop("cache_params")


# Arguments of `generate` that `embed_multimodal` takes; the first of them are media.
_VIDEOS = ("pixel_values_videos", "patch_features_videos", "video_memories")
_MEDIA = ("pixel_values", "patch_features", *_VIDEOS, "mm_encoder_outputs")
_MEDIA_ARGUMENTS = (
    *_MEDIA,
    "frame_mask",
    "num_kept_frames",
    "video_timestamps",
    "keep_frames",
    "keep_ratio",
    "delta_threshold",
    "delta_min_frames",
    "vision_feature_layer",
    "vision_batch_size",
)


def _positions_of(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The hidden states `(batch_size, num_positions, hidden_size)` that get logits."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, slice(-logits_to_keep, None)]
    if logits_to_keep.ndim == 2:
        places = logits_to_keep.to(hidden_states.device)
        places = torch.where(places < 0, places + hidden_states.shape[1], places)
        return hidden_states.take_along_dim(places[..., None], dim=1)
    return hidden_states[:, logits_to_keep]


class _FiniteScores(LogitsProcessor):
    """Stops a generation whose scores are NaN or infinite, which would end in some answer."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        check_result("The scores of the next token", scores.masked_fill(scores == -math.inf, 0), self.model)
        return scores


def _cut_mask(cache: Cache | None, attention_mask: Tensor, length: int) -> Tensor:
    """The attention mask of cached and new tokens, without what the cache lacks."""
    dropped = DroppedTokens.of(cache)
    return attention_mask if dropped is None else dropped.cut_mask(attention_mask, length)


def _with_whole_prompt(output: Tensor | ModelOutput, prompt: Tensor, kept_length: int) -> Tensor | ModelOutput:
    """The result of `generate` with the prompt as given in place of the one without dropped tokens."""
    sequences = output["sequences"] if isinstance(output, ModelOutput) else output
    prompts = prompt.repeat_interleave(len(sequences) // len(prompt), dim=0).to(sequences.device)
    sequences = torch.cat([prompts, sequences[:, kept_length:]], dim=1)
    if not isinstance(output, ModelOutput):
        return sequences
    output["sequences"] = sequences
    return output


class _PromptStreamer(BaseStreamer):
    """Hands the prompt as given to a streamer, in place of the prompt without dropped tokens."""

    def __init__(self, streamer: BaseStreamer, prompt: Tensor):
        self.streamer = streamer
        self.prompt: Tensor | None = prompt

    def put(self, value: Tensor) -> None:
        self.streamer.put(value if self.prompt is None else self.prompt.cpu())
        self.prompt = None

    def end(self) -> None:
        self.streamer.end()


def _write_times(videos: MambaMiaFeaturesOutput, times: list[Tensor]) -> None:
    """Puts the embeddings of times `(num_kept_frames, width, hidden_size)` before the tokens of the kept frames."""
    timed = [
        torch.cat([digits.to(tokens), tokens.unflatten(0, (len(digits), -1))], dim=1).flatten(0, 1)
        for tokens, digits in zip(videos.pooler_output, times, strict=True)
    ]
    videos.pooler_output = timed


def _times_of(memories: Sequence[VideoMemory | None] | None, timestamps: Timestamps | None) -> Timestamps | None:
    """The times of videos: those given, or where all videos are memories, theirs."""
    times = [memory.timestamps for memory in memories or () if memory is not None]
    return times if memories and timestamps is None and len(times) == len(memories) else timestamps


def _seconds(timestamps: Timestamps | None, keep_mask: Tensor) -> list[list[float]]:
    """The time of each frame `(num_videos, num_frames)`, NaN where a video has none."""
    if timestamps is None:
        raise ValueError(
            "The model writes the times of frames and video_timestamps is missing; pass what the processor returns, "
            "or the seconds of each frame."
        )
    if isinstance(timestamps, Tensor) and timestamps.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"video_timestamps is {timestamps.dtype}, which may have lost seconds; pass float64, or numbers in lists, "
            f"which nothing casts."
        )
    videos = timestamps.tolist() if isinstance(timestamps, Tensor) else list(timestamps)
    num_videos, num_frames = keep_mask.shape
    if len(videos) != num_videos or not all(
        isinstance(times, Sequence) and len(times) <= num_frames for times in videos
    ):
        raise ValueError(
            f"video_timestamps must be (num_videos, num_frames), {(num_videos, num_frames)} here, or a list of at "
            f"most {num_frames} numbers for each of {num_videos} videos, not {reprlib.repr(videos)}."
        )
    return [[*times, *(num_frames - len(times)) * [float("nan")]] for times in videos]


def _check_places(modality: str, places: Tensor, tokens: Tensor) -> None:
    """Raises unless there are as many places as tokens."""
    if int(places.sum()) != len(tokens):
        raise ValueError(
            f"The prompt has {int(places.sum())} {modality} placeholders and the {modality}s give {len(tokens)} "
            f"tokens; make the prompt with the processor, which puts as many."
        )


__all__ = [
    "MambaMiaCausalLMOutputWithPast",
    "MambaMiaForConditionalGeneration",
    "MambaMiaModel",
    "MambaMiaModelOutputWithPast",
    "MultimodalEmbeddings",
]
