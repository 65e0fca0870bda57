"""How vLLM turns images and videos into what the model takes, and how many placeholders each of them gets.

vLLM sizes a prompt before the model runs. So it has to know then how many frames of a video the language model will
read: by a budget, never by a threshold.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import BatchFeature
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.inputs import MultiModalDataDict, MultiModalInput
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    ProcessorInputs,
    PromptReplacement,
    TimingContext,
)
from vllm.transformers_utils.processor import cached_get_processor

from ..configuration_mambamia import MambaMiaConfig
from ..finite import check_finite
from ..frame_selection import frame_budget
from ..frame_times import time_ids
from ..processing_mambamia import MambaMiaProcessor, unknown_option


# The language models that are vLLM's, by the type of the checkpoint's.
LANGUAGE_MODELS = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}

_BUDGETS = ("keep_frames", "keep_ratio")


class MambaMiaDataParser(MultiModalDataParser):
    """Videos with what is known of them, which may be nothing: `{}`."""

    def _get_video_with_metadata(self, video: Any) -> tuple[Any, dict[str, Any]]:
        frames, metadata = super()._get_video_with_metadata(video)
        return frames, {} if metadata is None else metadata


class MambaMiaProcessingInfo(BaseProcessingInfo):
    """What vLLM has to know of the inputs of a checkpoint."""

    @cached_property
    def config(self) -> MambaMiaConfig:
        return self.ctx.get_hf_config(MambaMiaConfig)

    @cached_property
    def processor(self) -> MambaMiaProcessor:
        """The checkpoint's own, without the options of the server: these are options of each call."""
        model = self.ctx.model_config
        return cached_get_processor(model.model, revision=model.revision, processor_cls=MambaMiaProcessor)

    def get_hf_processor(self, **kwargs: object) -> MambaMiaProcessor:
        return self.processor

    def get_data_parser(self) -> MambaMiaDataParser:
        return MambaMiaDataParser(video_needs_metadata=True, expected_hidden_size=self._get_expected_hidden_size())

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None, "video": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        most = {
            "image": self.processor.tokens_per_frame,
            "video": min(self.longest_video(seq_len)) * self.processor.placeholders_per_frame,
        }
        return {kind: most[kind] for kind in mm_counts}

    def longest_video(self, seq_len: int) -> tuple[int, int]:
        """How many frames are sampled of the longest video by default, and how many a prompt of `seq_len` takes."""
        fitting = max(seq_len // self.processor.placeholders_per_frame, 1)
        options = self.options("videos", {})
        sampled = options.get("num_frames") or options.get("max_frames") or self.processor.video_processor.num_frames
        return sampled or fitting, fitting

    def options(self, kind: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """The options of the processor for a request.

        Args:
            kind: `"images"` or `"videos"`.
            request: its `mm_processor_kwargs`. They come before those of the server; a budget takes the place of any.

        Returns:
            Those about inputs of this kind, for videos with a budget.

        Raises:
            ValueError: for an option that is none.
        """
        server = self._options_of(kind, self.ctx.get_mm_config().mm_processor_kwargs or {})
        request = self._options_of(kind, request)
        if any(request.get(name) is not None for name in _BUDGETS):
            server = {name: value for name, value in server.items() if name not in _BUDGETS}
        options = {**server, **request}
        if kind == "videos" and all(options.get(name) is None for name in _BUDGETS):
            options.update(self._budget_of_checkpoint() or {"keep_ratio": 1.0})
        return options

    def _options_of(self, kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Of options, those about inputs of one kind, be they under its name or not."""
        scopes = ("images_kwargs", "videos_kwargs")
        flat = {name: value for name, value in given.items() if name not in scopes}
        known = {"images": self.processor.option_names("images"), "videos": self.processor.option_names("videos")}
        for options, names in (
            (flat, known["images"] | known["videos"]),
            *((given.get(f"{kind}_kwargs") or {}, names) for kind, names in known.items()),
        ):
            for name in options:
                if name not in names:
                    raise ValueError(f"The processor has no {unknown_option(name, names)}")
        own = {name: value for name, value in flat.items() if name in known[kind]}
        return {**own, **(given.get(f"{kind}_kwargs") or {})}

    def _budget_of_checkpoint(self) -> dict[str, Any]:
        for part in (self.processor, self.config):
            if any(getattr(part, name) is not None for name in _BUDGETS):
                return {name: getattr(part, name) for name in _BUDGETS}
        return {}

    def check_servable(self) -> None:
        """Checks what vLLM cannot do.

        Raises:
            ValueError: if the checkpoint, or an option of the server, is beyond it.
        """
        config, processor = self.config, self.processor
        server = self._options_of("videos", self.ctx.get_mm_config().mm_processor_kwargs or {})
        budget = {name: server.get(name) for name in _BUDGETS if server.get(name) is not None}
        frame_budget(1, **budget)  # raises for one that is none
        if config.delta_threshold and not (budget or self._budget_of_checkpoint()):
            raise ValueError(
                f"delta_threshold={config.delta_threshold} of this checkpoint decides how many frames stay only once "
                "the model has seen them, and vLLM has to know before: set a budget in its place, "
                """--mm-processor-kwargs '{"keep_ratio": 0.5}', or '{"keep_ratio": 1.0}' to keep every frame."""
            )
        if config.text_config.model_type not in LANGUAGE_MODELS:
            raise ValueError(
                f"The language model of this checkpoint is a {config.text_config.model_type}, and those that run in "
                f"vLLM are {' and '.join(LANGUAGE_MODELS)}: use Transformers for this one."
            )
        if processor.time_instruction:
            raise ValueError(
                "time_instruction=True of this checkpoint's processor writes a line behind each video, which vLLM "
                "does not: set it to false in processor_config.json, and write the line into the question yourself."
            )
        if processor.frame_time_format != config.frame_time_format:
            raise ValueError(
                f"The processor of this checkpoint has frame_time_format={processor.frame_time_format!r} and its "
                f"model {config.frame_time_format!r}: set that of the model in processor_config.json."
            )


class MambaMiaDummyInputsBuilder(BaseDummyInputsBuilder[MambaMiaProcessingInfo]):
    """The largest inputs, by which vLLM measures the memory that it needs."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        processor = self.info.processor
        return processor.image_token * mm_counts.get("image", 0) + processor.video_token * mm_counts.get("video", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> MultiModalDataDict:
        size = self.info.processor.video_processor.size
        size = {"width": size["width"], "height": size["height"]}
        num_frames, _ = self.info.longest_video(seq_len)
        videos = self._get_dummy_videos(
            **size, num_frames=num_frames, num_videos=mm_counts.get("video", 0), overrides=mm_options.get("video")
        )
        images = self._get_dummy_images(
            **size, num_images=mm_counts.get("image", 0), overrides=mm_options.get("image")
        )
        # In one second, so that any format of times can write them.
        about = [{"do_sample_frames": False, "fps": float(len(video))} for video in videos]
        return {"image": images, "video": list(zip(videos, about, strict=True))}


class MambaMiaMultiModalProcessor(BaseMultiModalProcessor[MambaMiaProcessingInfo]):
    """Runs the checkpoint's own processor on each image and each video.

    Raises:
        ValueError: if the checkpoint cannot be served as it is.
    """

    def __init__(self, info: MambaMiaProcessingInfo, dummy_inputs: MambaMiaDummyInputsBuilder) -> None:
        super().__init__(info, dummy_inputs)
        info.check_servable()  # not when `info` is made: vLLM takes an error there for a model of text alone

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        """As any model's.

        Raises:
            ValueError: also if the prompt has not one token per image and video, or gets longer than the model reads.
        """
        processor, counts = self.info.processor, inputs.mm_data_items.get_all_counts()
        for kind, token, token_id in (
            ("image", processor.image_token, processor.image_token_id),
            ("video", processor.video_token, processor.video_token_id),
        ):
            written = list(inputs.prompt).count(token_id)
            if written != counts.get(kind, 0):
                raise ValueError(
                    f"The prompt has {written} {token} for {counts.get(kind, 0)} {kind}s: write one for each, or use "
                    "a chat."
                )
        processed = super().apply(inputs, timing_ctx)
        length, limit = len(processed["prompt_token_ids"]), self.info.ctx.model_config.max_model_len
        if length > limit:
            of_videos = processed["prompt_token_ids"].count(processor.video_token_id)
            raise ValueError(
                f"The prompt has {length} tokens, {of_videos} of them of videos, and the model reads at most {limit} "
                "(max_model_len): keep fewer frames, by mm_processor_kwargs with keep_frames or keep_ratio."
            )
        return processed

    def get_dummy_inputs(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> ProcessorInputs:
        inputs = super().get_dummy_inputs(seq_len, mm_counts, mm_options)
        inputs.hf_processor_mm_kwargs = {"keep_frames": min(self.info.longest_video(seq_len))}
        return inputs

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        # One by one: each is as long as it is, so that what is cached of it depends on nothing beside it.
        items: dict[str, list[Any]] = {}
        for kind, process in (("images", self._process_image), ("videos", self._process_video)):
            options = self.info.options(kind, hf_kwargs)
            for item in hf_data.get(kind, ()):
                for name, value in _explained(process, item, options).items():
                    items.setdefault(name, []).append(value)
        return BatchFeature(items)

    def _process_image(self, image: Any, options: dict[str, Any]) -> dict[str, Any]:
        processor = self.info.processor
        text = processor.image_token
        inputs = processor(text=text, images=[image], images_kwargs=options, return_tensors="pt")
        return {
            "pixel_values": self._checked("pixel_values", inputs["pixel_values"][0]),
            "num_image_tokens": torch.tensor(processor.tokens_per_frame),
        }

    def _process_video(self, video: tuple[Any, dict[str, Any]], options: dict[str, Any]) -> dict[str, Any]:
        processor, config = self.info.processor, self.info.config
        frames, about = video
        if about.get("is_file"):
            source, known = frames.tobytes(), None
        else:
            source, known = frames, {name: value for name, value in about.items() if name != "do_sample_frames"}
            if "do_sample_frames" in about:
                options = {**options, "do_sample_frames": about["do_sample_frames"]}
        inputs = processor(
            text=processor.video_token,
            videos=[source],
            videos_kwargs={**options, "video_metadata": [known] if known else None},
            return_tensors="pt",
        )
        pixels, kept = inputs["pixel_values_videos"][0], int(inputs["num_kept_frames"][0])
        if kept < len(pixels) and not config.compressor_config.num_temporal_layers:
            raise ValueError(
                f"A budget of {kept} of {len(pixels)} frames needs the Δ of a temporal layer, which this model has "
                "not: keep every frame."
            )
        processed = {
            "pixel_values_videos": self._checked("pixel_values_videos", pixels),
            "num_kept_frames": torch.tensor(kept),
            "num_video_tokens": torch.tensor(kept * processor.placeholders_per_frame),
        }
        if config.frame_time_format is not None:
            assert config.time_token_ids is not None  # the configuration has checked
            times = inputs["video_timestamps"][0].tolist()
            processed["video_time_ids"] = torch.tensor(
                time_ids(times, config.frame_time_format, config.time_token_ids)
            )
        return processed

    def _checked(self, name: str, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels in the model's type, of which it will make as many tokens as there are placeholders."""
        expected = self.info.processor.tokens_per_frame
        tokens = self.info.config.tokens_per_frame(*pixels.shape[-2:])
        if tokens != expected:
            raise ValueError(
                f"A picture of {pixels.shape[-2]} x {pixels.shape[-1]} pixels has {tokens} tokens, and the processor "
                f"puts {expected} placeholders: leave `size` as the checkpoint has it."
            )
        check_finite(name, pixels, "check the pictures, and image_std of the processor")
        return pixels.to(self.info.ctx.model_config.dtype)

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        # The frames of a video go to the device batch by batch, as the vision tower takes them.
        return {
            "pixel_values": MultiModalFieldConfig.batched("image"),
            "num_image_tokens": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            "pixel_values_videos": MultiModalFieldConfig.batched("video", keep_on_cpu=True),
            "num_kept_frames": MultiModalFieldConfig.batched("video", keep_on_cpu=True),
            "num_video_tokens": MultiModalFieldConfig.batched("video", keep_on_cpu=True),
            "video_time_ids": MultiModalFieldConfig.batched("video"),
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptReplacement]:
        def replacement(kind: str, token_id: int) -> PromptReplacement:
            def placeholders(index: int) -> list[int]:
                return [token_id] * int(out_mm_kwargs[kind][index][f"num_{kind}_tokens"].data)

            return PromptReplacement(kind, [token_id], placeholders)

        processor = self.info.processor
        return [replacement("image", processor.image_token_id), replacement("video", processor.video_token_id)]


def _explained(process: Callable[[Any, dict[str, Any]], dict[str, Any]], item: Any, options: dict[str, Any]) -> Any:
    """What a function makes of an input; options of a wrong type are a `ValueError`, which is the client's fault."""
    try:
        return process(item, options)
    except StrictDataclassError as error:
        raise ValueError(" ".join(str(error).split())) from error


__all__ = ["LANGUAGE_MODELS", "MambaMiaDummyInputsBuilder", "MambaMiaMultiModalProcessor", "MambaMiaProcessingInfo"]
