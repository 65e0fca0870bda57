"""MambaMia for vLLM: vision tower, compressor and frame selection are this package's, the language model is vLLM's."""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMultiModal
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from ..configuration_mambamia import MambaMiaConfig
from ..modeling_encoder import MambaMiaEncoder
from .processing import (
    LANGUAGE_MODELS,
    MambaMiaDummyInputsBuilder,
    MambaMiaMultiModalProcessor,
    MambaMiaProcessingInfo,
)


@MULTIMODAL_REGISTRY.register_processor(
    MambaMiaMultiModalProcessor, info=MambaMiaProcessingInfo, dummy_inputs=MambaMiaDummyInputsBuilder
)
class MambaMiaForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsLoRA):
    """Loads from the same checkpoints as the class of this name for Transformers."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.language_model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
            "model.": "encoder.",
        }
    )
    # vLLM has these projections in one; an adapter has them one by one.
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return f"<|vision_start|><|{modality}_pad|><|vision_end|>"

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config: MambaMiaConfig = deepcopy(vllm_config.model_config.hf_config)
        config = self.config
        text_config = config.text_config
        text_config.tie_word_embeddings = config.tie_word_embeddings
        vllm: Any = self  # for what vLLM's classes add, which a type checker does not see
        with vllm._mark_tower_model(vllm_config, {"image", "video"}), no_init_weights():
            self.encoder = MambaMiaEncoder._from_config(config, dtype=vllm_config.model_config.dtype)
        with vllm._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=text_config,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=[LANGUAGE_MODELS[text_config.model_type]],
            )
        vllm.configure_mm_token_handling(text_config.vocab_size, [config.image_token_id, config.video_token_id])

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """The tokens of images or of videos.

        Args:
            kwargs: what [`MambaMiaMultiModalProcessor`] made of each item: tensors with an item per row, or lists.

        Returns:
            For each item `(num_placeholders, text_hidden_size)`. vLLM keeps them by the item and its options.

        Raises:
            RuntimeError: if an item gives another number of tokens than it has placeholders.
        """
        if kwargs.get("pixel_values_videos") is not None:
            items, counts = self._embed_videos(**kwargs), kwargs["num_video_tokens"]
        elif kwargs.get("pixel_values") is not None:
            features: Any = self.encoder.get_image_features(kwargs["pixel_values"], return_dict=True)
            items, counts = list(features.pooler_output), kwargs["num_image_tokens"]
        else:
            return []
        expected = [int(count) for count in counts]
        if [len(tokens) for tokens in items] != expected:
            raise RuntimeError(
                f"Images or videos gave {[len(tokens) for tokens in items]} tokens and have {expected} placeholders: "
                "the processor of this checkpoint does not belong to its model."
            )
        return items

    def _embed_videos(
        self,
        pixel_values_videos: Sequence[Tensor] | Tensor,
        num_kept_frames: Sequence[Tensor] | Tensor,
        video_time_ids: Sequence[Tensor] | Tensor | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        embedded = []
        for video, (frames, kept) in enumerate(zip(pixel_values_videos, num_kept_frames, strict=True)):
            features: Any = self.encoder.get_video_features(
                frames[None], num_kept_frames=kept.reshape(1), return_dict=True
            )
            tokens = features.pooler_output[0]
            if video_time_ids is not None:
                stays = features.keep_mask[0]
                times = self.language_model.embed_input_ids(video_time_ids[video].to(tokens.device)[stays])
                tokens = torch.cat([times.to(tokens), tokens.unflatten(0, (len(times), -1))], dim=1).flatten(0, 1)
            embedded.append(tokens)
        return embedded

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | IntermediateTensors:
        return self.language_model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(
            language_model="language_model", connector="encoder.compressor", tower_model="encoder.vision_tower"
        )


__all__ = ["MambaMiaForConditionalGeneration"]
