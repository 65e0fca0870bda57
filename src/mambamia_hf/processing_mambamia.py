"""Processor of MambaMia: joins tokenizer, image processor and video processor, and makes room for the video tokens."""

import difflib
import inspect
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedTokenizerBase, SiglipImageProcessor
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin
from transformers.tokenization_utils_base import TextInput

from .checkpoint_files import well_typed
from .configuration_mambamia import MambaMiaConfig, config_beside
from .frame_selection import frame_budget
from .frame_times import format_time, time_width
from .model_card import fill_card
from .request_errors import errors_for_servers
from .tokenization_mambamia import load_tokenizer
from .video_memory import VideoMemory, is_video_memory
from .video_processing_mambamia import (
    MambaMiaVideoProcessor,
    MambaMiaVideoProcessorKwargs,
    TimedBatch,
    duration_of,
    warn_of_rescaled,
)
from .video_sources import image_source, part_of


# The dialogue format of Qwen2, with the assistant's turns marked for training. A checkpoint brings its own template.
_CHAT_TEMPLATE = Path(__file__).with_name("checkpoint") / "chat_template.jinja"


# What the authors' code writes after a video; `fps` is that of the sampled frames.
_TIME_INSTRUCTION = (
    "The video lasts for {duration:.3f} seconds, and {num_frames} frames are sampled from it with FPS {fps:.3f}. "
    "Please answer the following questions related to this video."
)

# What may close a video in a prompt, before the text goes on.
_END_OF_VIDEO = re.compile(r"((?:<\|vision_end\|>)?)\n?")

# What servers set for templates of any model.
_FLAGS_OF_TEMPLATES = ("enable_thinking",)


class MambaMiaVideosKwargs(MambaMiaVideoProcessorKwargs, total=False):
    """
    keep_frames (`int`, *optional*):
        The number of frames of each video whose tokens the language model is to see.
    keep_ratio (`float`, *optional*):
        The same as a share of the frames of each video.
    """

    keep_frames: int | None
    keep_ratio: float | int | None


class MambaMiaProcessorKwargs(ProcessingKwargs, total=False):
    videos_kwargs: MambaMiaVideosKwargs  # type: ignore[misc]  # narrower, as in Transformers' own processors
    _defaults = {}  # type: ignore[misc]  # Transformers 5.20 looks it up, and typed dictionaries do not inherit it


class MambaMiaProcessor(ProcessorMixin):
    """
    Joins an image processor, a tokenizer and a video processor, and replaces the one placeholder of each video and
    image in a text by as many as there will be tokens: `tokens_per_frame` for an image or a frame of a video.

    A video may be a [`VideoMemory`], which takes the place of its frames.

    With `keep_frames` or `keep_ratio` there are placeholders for so many frames of each video only, and the model
    keeps exactly so many, the most important ones.

    Args:
        image_processor, tokenizer, video_processor:
            The processors of each kind of input. The tokenizer needs the tokens `<|image_pad|>` and `<|video_pad|>`.
        chat_template (`str`, *optional*):
            A Jinja template for conversations; the dialogue format of Qwen2 by default.
        tokens_per_frame (`int`, *optional*, defaults to 24):
            Tokens a frame: its anchors, and the end-of-frame vector where the model has one.
        keep_frames (`int`, *optional*):
            How many frames of each video to keep; a call may set another number.
        keep_ratio (`float`, *optional*):
            Which share of the frames of each video to keep, instead of `keep_frames`; a call may set another share.
        frame_time_format (`str`, *optional*):
            That of the model: `"mm:ss"`, `"h:mm:ss"` or `"mm:ss.d"`. Each frame of a video has a placeholder for each
            character of its time, before the others.
        time_instruction (`bool`, *optional*, defaults to `False`):
            Whether each video is followed by the line "The video lasts for 60.000 seconds, and 120 frames are sampled
            from it with FPS 2.000. Please answer the following questions related to this video.", for checkpoints that
            were trained with it. FPS is that of the video processor where it decides, and else the average.

    Raises:
        `ValueError`: if `keep_frames` and `keep_ratio` are both given, one of them or `tokens_per_frame` is out of
            range, or the tokenizer lacks a token.
    """

    valid_processor_kwargs = MambaMiaProcessorKwargs  # type: ignore[assignment]  # as in Transformers' own processors
    skip_tensor_conversion = [*ProcessorMixin.skip_tensor_conversion, "video_memories"]

    def __init__(
        self,
        image_processor: BaseImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        video_processor: MambaMiaVideoProcessor | None = None,
        chat_template: str | None = None,
        tokens_per_frame: int = 24,
        keep_frames: int | None = None,
        keep_ratio: float | None = None,
        frame_time_format: str | None = None,
        time_instruction: bool = False,
    ):
        frame_budget(1, keep_frames, keep_ratio)  # raises for an impossible budget
        time_width(frame_time_format)  # raises for an unknown format
        if not isinstance(tokens_per_frame, int) or tokens_per_frame < 1:
            raise ValueError(f"tokens_per_frame={tokens_per_frame!r} has to be a whole number, at least 1.")
        if chat_template is None and _CHAT_TEMPLATE.is_file():
            chat_template = _CHAT_TEMPLATE.read_text(encoding="utf-8")
        self.tokens_per_frame = tokens_per_frame
        self.keep_frames = keep_frames
        self.keep_ratio = keep_ratio
        self.frame_time_format = frame_time_format
        self.time_instruction = time_instruction
        self.image_token = "<|image_pad|>"
        self.video_token = "<|video_pad|>"
        self.image_token_id = _token_id(tokenizer, self.image_token)
        self.video_token_id = _token_id(tokenizer, self.video_token)
        super().__init__(
            image_processor,
            tokenizer,
            video_processor,
            chat_template=chat_template,
        )

    @classmethod
    def from_vision_text_pretrained(
        cls, vision: str | os.PathLike, text: str | os.PathLike, config: MambaMiaConfig
    ) -> "MambaMiaProcessor":
        """The processor to go with [`MambaMiaForConditionalGeneration.from_vision_text_pretrained`].

        Images and frames are resized to the vision tower's own size as a whole, without cropping, and normalised as
        its image processor does.

        Args:
            vision: folder or Hub name of the vision tower, as given to the model.
            text: folder or Hub name of the language model, as given to the model.
            config: of the model.
        """
        tower = config.vision_config
        # SigLIP2 that takes any size is trained on so many patches.
        size = getattr(tower, "image_size", None) or math.isqrt(tower.num_patches) * tower.patch_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        given = AutoImageProcessor.from_pretrained(vision)
        names = ("resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
        settings = {name: getattr(given, name) for name in names}
        settings["size"] = {"height": height, "width": width}
        return cls(
            image_processor=SiglipImageProcessor(**settings),
            tokenizer=load_tokenizer(text),
            video_processor=MambaMiaVideoProcessor(**settings),
            tokens_per_frame=config.tokens_per_frame(),
            frame_time_format=config.frame_time_format,
        )

    def __call__(
        self,
        images: Any = None,
        text: TextInput | list[TextInput] | None = None,
        videos: Any = None,
        audio: Any = None,
        **kwargs: Any,
    ) -> TimedBatch:
        """As any processor's; see [`MambaMiaVideoProcessor.preprocess`] for what it returns of videos."""
        return TimedBatch(super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs))

    @property
    def placeholders_per_frame(self) -> int:
        """Placeholders of a frame of a video: those of its time, then `tokens_per_frame`."""
        return time_width(self.frame_time_format) + self.tokens_per_frame

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> list[str]:  # type: ignore[override]
        """As any processor's; the video processor's settings stand in a file of their own as well, where servers look
        for them. Those in `processor_config.json` count when a processor is loaded."""
        self.video_processor.save_pretrained(save_directory)
        return super().save_pretrained(save_directory, **kwargs)

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """As any processor's, with a model card that says something."""
        fill_card(working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "MambaMiaProcessor":  # type: ignore[override]  # all options have names
        """As any processor's; compares its tokens with the configuration of the model that lies beside it.

        Raises:
            ValueError: if they differ, as where files of the tokenizer are missing, if a file holds something else
                than the settings of a processor, or if the model is in the layout of the authors' code.
        """
        config = config_beside(pretrained_model_name_or_path, kwargs)
        with well_typed(f"The processor of {pretrained_model_name_or_path} has a setting that cannot be used"):
            processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if config.get("model_type") == MambaMiaConfig.model_type:
            processor.check_tokens(config, str(pretrained_model_name_or_path))
        return processor

    def check_tokens(self, config: dict[str, Any], name: str) -> None:
        """Checks that the tokenizer is that of a model.

        Args:
            config: content of the model's config.json.
            name: what to call the checkpoint.

        Raises:
            ValueError: if it is another one, or a part of it.
        """
        remedy = f"the files of the tokenizer in {name} are not those of its model, or some are missing"
        for token, field in ((self.image_token, "image_token_id"), (self.video_token, "video_token_id")):
            own, expected = self.tokenizer.get_vocab()[token], config.get(field, getattr(MambaMiaConfig, field))
            if own != expected:
                raise ValueError(f"The tokenizer's {token} is {own} and the model's {expected}: {remedy}.")
        num_tokens, expected = len(self.tokenizer), config.get("text_config", {}).get("vocab_size", 0)
        if 2 * num_tokens < expected:  # some rows of embeddings are of no token in most models
            raise ValueError(f"The tokenizer has {num_tokens} tokens and the model {expected}: {remedy}.")

    @property
    def model_input_names(self) -> list[str]:
        names = [*super().model_input_names, "num_kept_frames"]
        if self.frame_time_format is None:  # times are returned where they are known, and not needed
            names.remove("video_timestamps")
        return names

    def apply_chat_template(  # type: ignore[override]  # the other arguments by name
        self,
        conversation: Any,
        chat_template: str | None = None,
        num_frames: int | None = None,
        load_audio_from_video: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As any processor's, for conversations about videos and images.

        Args:
            conversation: one conversation or a list of them. An entry of type `"video"` may have `video_start` and
                `video_end`, seconds between which its frames are sampled.
            chat_template: as in Transformers.
            num_frames: the largest number of frames of each video, which servers send with every video: that of
                `max_frames`. Ask for exactly so many by `processor_kwargs={"num_frames": ...}`.
            load_audio_from_video: ignored: sound is not used.
            processor_kwargs: what the processor is called with.
            kwargs: as in Transformers. Options of the processor may stand here, too.

        Raises:
            ValueError, OSError: for media or settings that cannot be used. In a server they are `HTTPException`s, too.
        """
        options = {} if num_frames is None else {"max_frames": num_frames}
        options |= processor_kwargs or {}
        with errors_for_servers():
            for name in self._processor_options(chat_template, kwargs):
                options[name] = kwargs.pop(name)
            frame_budget(1, options.get("keep_frames"), options.get("keep_ratio"))
            return super().apply_chat_template(
                _with_parts(conversation), chat_template, processor_kwargs=options, **kwargs
            )

    def _processor_options(self, chat_template: str | None, options: Iterable[str]) -> list[str]:
        """Those of the options of `apply_chat_template` that are the processor's.

        Raises:
            ValueError: for one that nothing would look at; Transformers ignores it.
        """
        own = {*self.valid_processor_kwargs.__annotations__, *self.option_names("text", "images", "videos", "audio")}
        known = {*inspect.signature(ProcessorMixin.apply_chat_template).parameters, *_FLAGS_OF_TEMPLATES}
        known |= set(re.findall(r"\w+", f"{self.chat_template} {chat_template}"))
        for name in options:
            if name not in own | known:
                raise ValueError(f"Neither the processor nor its chat template has an {unknown_option(name, own)}")
        return [name for name in options if name in own - known]

    def option_names(self, *kinds: str) -> set[str]:
        """The options of a call that are about inputs of these kinds: `"text"`, `"images"`, `"videos"`, `"audio"`."""
        of_parts = {"images": self.image_processor.valid_kwargs, "videos": self.video_processor.valid_kwargs}
        return {
            name
            for kind in kinds
            for options in (self.valid_processor_kwargs.__annotations__.get(f"{kind}_kwargs"), of_parts.get(kind))
            for name in getattr(options, "__annotations__", {})
        }

    def prepare_inputs_layout(  # type: ignore[override]  # the base class declares no `self`
        self,
        images: Any = None,
        text: TextInput | list[TextInput] | None = None,
        videos: Any = None,
        audio: Any = None,
        **kwargs: Any,
    ) -> Any:
        if images is not None:
            images = make_flat_list_of_images(self._load_images(images)) if _has_any(images) else None
        if videos is not None:
            videos = self.video_processor.make_video_list(videos)
        return super().prepare_inputs_layout(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def _load_images(self, images: Any) -> Any:
        if isinstance(images, list | tuple):
            return [self._load_images(image) for image in images]
        try:
            source = image_source(images)
            return self.image_processor.fetch_images(source) if isinstance(source, str | Image.Image) else source
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{reprlib.repr(images)} cannot be read as an image ({reprlib.repr(str(error))}): check the path, and "
                "pass videos as videos."
            ) from error

    def validate_inputs(  # type: ignore[override]  # the base class declares no `self`
        self,
        images: Any = None,
        text: list[TextInput] | None = None,
        videos: Any = None,
        audio: Any = None,
        **kwargs: Any,
    ) -> None:
        if images is None and text is None and videos is None:
            raise ValueError("There is nothing to process: pass `text`, `images` or `videos`.")
        if text is None:
            return
        for sample in text:
            if not isinstance(sample, str):
                raise ValueError(f"`text` holds {sample!r}: pass a string or a list of strings.")
        asked = [sum(sample.count(token) for sample in text) for token in (self.video_token, self.image_token)]
        given = [0 if inputs is None else len(inputs) for inputs in (videos, images)]
        if asked != given:
            raise ValueError(
                f"The number of {self.video_token} and {self.image_token} tokens in the prompts should be the same as "
                f"the number of videos and images passed, but there are {asked[0]} and {asked[1]} tokens for "
                f"{given[0]} videos and {given[1]} images: write one token for each, or use a chat with an entry of "
                "type video or image for each."
            )

    def _process_images(self, images: Any, **kwargs: Any) -> Any:
        if kwargs.get("do_rescale", getattr(self.image_processor, "do_rescale", False)):
            warn_of_rescaled(images)
        return super()._process_images(images, **kwargs)

    def _process_videos(  # type: ignore[override]  # Transformers passes the options by name
        self, videos: Sequence[Any], keep_frames: int | None = None, keep_ratio: float | None = None, **kwargs: Any
    ) -> tuple[BatchFeature, list[str]]:
        memories = [video if is_video_memory(video) else None for video in videos]
        processed = self._process_frames(videos, memories, **{**kwargs, "return_metadata": True})
        for times in processed.get("video_timestamps", [None]):
            self.check_times(times)
        budget = self._budget(keep_frames, keep_ratio)
        has_budget = any(value is not None for value in budget)
        kept = []
        for num_frames, memory in zip(_numbers_of_frames(processed), memories, strict=True):
            is_selected = memory is not None and memory.is_selected
            kept.append(num_frames if is_selected else frame_budget(num_frames, *budget) if has_budget else 0)
        processed.update(BatchFeature({"num_kept_frames": kept}, tensor_type=kwargs.get("return_tensors")))
        replacements = [
            self.replace_video_token(cast(dict, processed), video_idx, keep_frames, keep_ratio, fps=kwargs.get("fps"))
            for video_idx in range(len(videos))
        ]
        return processed, replacements

    def _process_frames(
        self, videos: Sequence[Any], memories: list[VideoMemory | None], video_metadata: Any = None, **kwargs: Any
    ) -> BatchFeature:
        """What the video processor returns for videos that are no memories, and the memories."""
        if all(memory is None for memory in memories):
            return self.video_processor(videos, video_metadata=video_metadata, **kwargs)
        if any(kwargs.get(name) is not None for name in ("video_start", "video_end")):
            raise ValueError(
                "`video_start` and `video_end` cut videos, not memories of them: pass `memory.select(start=..., "
                "end=...)`."
            )
        others = [video for video, memory in zip(videos, memories, strict=True) if memory is None]
        if isinstance(video_metadata, list | tuple) and len(video_metadata) == len(videos):
            video_metadata = [about for about, memory in zip(video_metadata, memories, strict=True) if memory is None]
        processed = BatchFeature()
        if others:
            processed = self.video_processor(others, video_metadata=video_metadata, **kwargs)
        rest = list(processed.get("video_timestamps", ()))
        if len(rest) == len(others):  # the times of all videos are known
            times = [memory.timestamps if memory is not None else rest.pop(0) for memory in memories]
            padded = pad_sequence([torch.as_tensor(row, dtype=torch.float64) for row in times], batch_first=True)
            timestamps = BatchFeature({"video_timestamps": padded}, tensor_type=kwargs.get("return_tensors"))
            processed.update(timestamps)
        processed["video_memories"] = memories
        return processed

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        return self.image_token * self.tokens_per_frame

    def replace_video_token(
        self,
        video_inputs: dict,
        video_idx: int,
        keep_frames: int | None = None,
        keep_ratio: float | None = None,
        **kwargs: Any,
    ) -> str:
        memory = video_inputs["video_memories"][video_idx] if "video_memories" in video_inputs else None
        if memory is not None and memory.is_selected:
            keep_frames, keep_ratio = None, 1.0
        num_frames = _numbers_of_frames(video_inputs)[video_idx]
        duration = _durations(video_inputs)[video_idx]
        return self.video_replacement(num_frames, duration, keep_frames, keep_ratio, kwargs.get("fps"))

    def video_replacement(
        self,
        num_frames: int,
        duration: float | None,
        keep_frames: int | None = None,
        keep_ratio: float | None = None,
        fps: float | None = None,
    ) -> str:
        """What a text has in place of the token of a video: its placeholders, and then the time instruction if any.

        Args:
            num_frames: sampled frames.
            duration: of the video in seconds, which the time instruction needs.
            keep_frames, keep_ratio: the budget of this call, by default that of this processor.
            fps: the rate of sampling that was asked for, by default that of the video processor.

        Raises:
            ValueError: if the time instruction lacks the duration.
        """
        placeholders = self.video_token * self.num_video_tokens(num_frames, keep_frames, keep_ratio)
        return placeholders + (self.time_line(num_frames, duration, fps) if self.time_instruction else "")

    def time_line(self, num_frames: int, duration: float | None, fps: float | None = None) -> str:
        """The time instruction of a video.

        Args:
            num_frames, duration, fps: as of `video_replacement`.

        Raises:
            ValueError: if the duration is not known.
        """
        if not duration:
            raise ValueError(
                "time_instruction=True needs the duration of each video, and a video came as frames without times: "
                "pass `video_metadata` with `timestamps`, the seconds of each frame, or with `fps`."
            )
        fps = fps or self.video_processor.fps
        if not fps or abs(duration * fps - num_frames) >= 1:  # another limit than the rate has decided
            fps = num_frames / duration
        return _TIME_INSTRUCTION.format(duration=duration, num_frames=num_frames, fps=fps)

    def get_text_with_replacements(
        self,
        text: list[str],
        images_replacements: Sequence[str] = (),
        videos_replacements: Sequence[str] = (),
        audio_replacements: Sequence[str] = (),
    ) -> tuple[list[str], list[dict[str, Any]]]:
        """As any processor's; a time instruction is a line of its own behind the mark that closes its video."""
        ends = [replacement.rfind(self.video_token) + len(self.video_token) for replacement in videos_replacements]
        placeholders = [replacement[:end] for replacement, end in zip(videos_replacements, ends, strict=True)]
        instructions = iter([replacement[end:] for replacement, end in zip(videos_replacements, ends, strict=True)])
        replacements: Any = images_replacements, placeholders, audio_replacements
        text, all_places = super().get_text_with_replacements(text, *replacements)
        for number, places in enumerate(all_places):
            moved = 0
            for place in cast(list[dict[str, Any]], places):
                start, end = (edge + moved for edge in place["new_span"])
                place["new_span"] = start, end
                if place["type"] == "video" and (instruction := next(instructions)):
                    text[number], added = _with_line(text[number], end, instruction)
                    moved += added
        return text, all_places

    def num_video_tokens(
        self, num_frames: int, keep_frames: int | None = None, keep_ratio: float | None = None
    ) -> int:
        """Placeholders of a video of `num_frames` frames, with the budget of this call or else of this processor."""
        return frame_budget(num_frames, *self._budget(keep_frames, keep_ratio)) * self.placeholders_per_frame

    def check_times(self, times: Any) -> None:
        """Checks that the model can write the times of the frames of a video.

        Args:
            times: `(num_frames,)` in seconds; None where they are not known.

        Raises:
            ValueError: where the model writes times, if they are not known or do not fit the format.
        """
        if self.frame_time_format is None:
            return
        if times is None:
            raise ValueError(
                f"frame_time_format={self.frame_time_format!r} needs the time of each frame, and a video came as "
                "frames without times: pass `video_metadata` with `timestamps`, the seconds of each frame, or `fps`."
            )
        format_time(float(max(times)), self.frame_time_format)

    def _budget(self, keep_frames: int | None, keep_ratio: float | None) -> tuple[int | None, float | None]:
        """The budget of a call as (keep_frames, keep_ratio), by default this processor's."""
        if keep_frames is None and keep_ratio is None:
            return self.keep_frames, self.keep_ratio
        return keep_frames, keep_ratio

    def _get_num_multimodal_tokens(
        self,
        image_sizes: Sequence[Sequence[int]] | None = None,
        video_sizes: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> MultiModalData:
        """
        Computes the number of placeholders that inputs of the given sizes get.

        Args:
            image_sizes (`list[tuple[int, int]]`, *optional*): Height and width of each image.
            video_sizes (`list[tuple[int, int, int]]`, *optional*): Sampled frames, height and width of each video.
        """
        kwargs_class: Any = self.valid_processor_kwargs
        videos_kwargs = self._merge_kwargs(kwargs_class, **kwargs)["videos_kwargs"]
        budget = videos_kwargs.get("keep_frames"), videos_kwargs.get("keep_ratio")
        data = {}
        if image_sizes is not None:
            data["num_image_tokens"] = [self.tokens_per_frame] * len(image_sizes)
            data["num_image_patches"] = [1] * len(image_sizes)
        if video_sizes is not None:
            data["num_video_tokens"] = [self.num_video_tokens(num_frames, *budget) for num_frames, _, _ in video_sizes]
        return MultiModalData(**data)


def _numbers_of_frames(video_inputs: Mapping[str, Any]) -> list[int]:
    """How many frames each of the processed videos has."""
    return _of_each_video(video_inputs, [int(mask.sum()) for mask in video_inputs.get("frame_mask", ())], len)


def _durations(video_inputs: Mapping[str, Any]) -> list[float | None]:
    """How long each of the processed videos lasts, in seconds; None where it is not known."""
    others = [duration_of(about) for about in video_inputs.get("video_metadata", ())]
    return _of_each_video(video_inputs, others, lambda memory: memory.duration)


def _of_each_video(
    video_inputs: Mapping[str, Any], others: list[Any], of_memory: Callable[[VideoMemory], Any]
) -> list[Any]:
    """What is known of each video, from what is known of those that are no memories."""
    if "video_memories" not in video_inputs:
        return others
    rest = iter(others)
    return [next(rest) if memory is None else of_memory(memory) for memory in video_inputs["video_memories"]]


def _with_line(text: str, end: int, line: str) -> tuple[str, int]:
    """A text with a line after the video that ends at `end`, and how much longer the text is."""
    mark = _END_OF_VIDEO.match(text, end)
    assert mark is not None  # it matches nothing at all, too
    longer = f"{text[:end]}{mark[1]}\n{line}\n{text[mark.end() :]}"
    return longer, len(longer) - len(text)


def _with_parts(conversation: Any) -> Any:
    """A conversation, or a list of them, in which videos with `video_start` or `video_end` are parts of videos."""
    if isinstance(conversation, list | tuple):
        return [_with_parts(item) for item in conversation]
    if isinstance(conversation, dict) and isinstance(conversation.get("content"), list | tuple):
        return {**conversation, "content": [_as_part(entry) for entry in conversation["content"]]}
    return conversation


def _as_part(entry: Any) -> Any:
    if not isinstance(entry, dict) or entry.get("type") != "video":
        return entry
    source = next((entry[name] for name in ("video", "url", "path") if entry.get(name) is not None), None)
    if source is None or not {"video_start", "video_end"} & entry.keys():
        return entry
    return {"type": "video", "video": part_of(source, entry.get("video_start"), entry.get("video_end"))}


def unknown_option(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an option that is none, with the one that may be meant."""
    similar = difflib.get_close_matches(name, known, n=1)
    return f"option '{name}': " + (f"did you mean '{similar[0]}'?" if similar else "leave it out.")


def _has_any(images: Any) -> bool:
    """Whether there is an image in nested lists, which are empty where a batch has none."""
    return any(map(_has_any, images)) if isinstance(images, list | tuple) else True


def _token_id(tokenizer: PreTrainedTokenizerBase | None, token: str) -> int | None:
    if tokenizer is None:
        return None
    token_id = tokenizer.get_vocab().get(token)
    if token_id is None:
        raise ValueError(
            f"The tokenizer has no token {token}: use that of Qwen2.5 or later, or make the processor with "
            "`MambaMiaProcessor.from_vision_text_pretrained`, which adds it."
        )
    return token_id


__all__ = ["MambaMiaProcessor", "unknown_option"]
