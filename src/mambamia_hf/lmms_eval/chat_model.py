"""Checkpoints of MambaMia as a chat model of lmms-eval."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby, islice
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from loguru import logger
from tqdm.auto import tqdm

from .. import BUNDLED_CHECKPOINT
from ..chat import MAX_NEW_TOKENS
from ..frame_selection import frame_budget
from ..inference import load_checkpoint
from ..video_memory import VideoMemory
from ..video_sources import VideoPart, content_of, local_path, part_of


# What `generate` takes of the `generation_kwargs` of a task.
_GENERATION = ("max_new_tokens", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty")
_SAMPLING = ("temperature", "top_p", "top_k")


class MambaMia(lmms):
    """Answers the questions of tasks about videos, images and text. The arguments are those of `--model_args`.

    A video is looked at once for questions that follow each other, and each batch is answered when lmms-eval asks for
    its first answer: what is in its response cache by then stays there, whatever happens next.

    Args:
        pretrained: folder or Hub id of a checkpoint; the bundled one by default.
        device, dtype: see [`encode_video`]. Of several processes, each has the device that accelerate gives it.
        batch_size: questions that are answered at once.
        attn_implementation: "sdpa", "eager" or "flash_attention_2"; by default as Transformers decides.
        max_num_frames, fps: at most so many frames are sampled from a video, and at most so many per second; by
            default as the video processor samples.
        seek_mode: "exact" or "keyframe".
        keep_frames, keep_ratio: an exact number or share of the frames to keep.
        delta_threshold: δ of the selection, however short the video; 0 keeps every frame. Without it and a budget, the
            checkpoint's own setting holds.

    Raises:
        ValueError: for a checkpoint or a setting that cannot be used.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = BUNDLED_CHECKPOINT,
        device: str | None = None,
        batch_size: int | str = 1,
        dtype: str | None = None,
        attn_implementation: str | None = None,
        max_num_frames: int | None = None,
        fps: float | None = None,
        seek_mode: str | None = None,
        keep_frames: int | None = None,
        keep_ratio: float | None = None,
        delta_threshold: float | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size} is no number of questions; give one from 1 on.")
        self.batch_size = int(batch_size)
        frame_budget(1, keep_frames, keep_ratio)  # raises for an impossible budget
        if delta_threshold is not None and (keep_frames is not None or keep_ratio is not None):
            raise ValueError("delta_threshold does not go with a budget; leave it out, or keep_frames and keep_ratio.")
        self.budget = {"keep_frames": keep_frames, "keep_ratio": keep_ratio}
        self.selection: dict[str, Any] = {}
        if delta_threshold is not None:
            self.selection = {"delta_threshold": delta_threshold, "delta_min_frames": 0}

        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1:
            device = str(self.accelerator.device)
        self.model, self.processor = load_checkpoint(pretrained, device, dtype)
        self.device = self.model.device
        if attn_implementation is not None:
            self.model.set_attn_implementation(attn_implementation)
        sampling = {"num_frames": max_num_frames, "fps": fps, "seek_mode": seek_mode}
        for name, value in sampling.items():
            if value is not None:
                setattr(self.processor.video_processor, name, value)
        self._remember = lru_cache(maxsize=self.batch_size)(self._encode)

    def generate_until(self, requests: Sequence[Instance]) -> Iterable[GenerationResult]:
        """The answers in the order of the requests, batch by batch as they are asked for."""
        answers = self._answers(requests)
        # lmms-eval takes the answer to a single request by its index.
        return list(answers) if len(requests) == 1 else answers

    def _answers(self, requests: Sequence[Instance]) -> Generator[GenerationResult]:
        with tqdm(total=len(requests), desc="Answering", disable=self.rank != 0) as bar:
            for settings, group in groupby(requests, key=lambda request: request.args[2]):
                options = self._generation_options(settings)
                while batch := list(islice(group, self.batch_size)):
                    conversations = [self._conversation(request) for request in batch]
                    with _named(*batch):
                        answers = self._generate(conversations, options)
                    for text, num_tokens in answers:
                        bar.update()
                        counts = TokenCounts(output_tokens=num_tokens)
                        yield GenerationResult(_before(text, settings.get("until")), counts)

    def loglikelihood(self, requests: Sequence[Instance]) -> Any:
        raise NotImplementedError(
            "This model writes answers and does not score given ones: choose tasks of output_type generate_until."
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> Any:
        raise NotImplementedError(
            "This model does not take tasks of output_type generate_until_multi_round: choose tasks of output_type "
            "generate_until, whose messages may have several turns."
        )

    def _conversation(self, request: Instance) -> list[dict[str, Any]]:
        """The messages of a question, as `apply_chat_template` takes them."""
        _, to_messages, _, doc_id, task, split = request.args
        messages = ChatMessages(messages=to_messages(self.task_dict[task][split][doc_id])).to_hf_messages()
        with _named(request):
            return [{**turn, "content": [self._medium(entry) for entry in turn["content"]]} for turn in messages]

    def _medium(self, entry: dict[str, Any]) -> dict[str, Any]:
        """An entry of a message, with the memory of a video in place of its file."""
        if entry["type"] == "audio":
            raise ValueError("it has sound, and this model takes videos, images and text.")
        if entry["type"] != "video":
            return entry
        source = part_of(content_of(entry["video"]), entry.get("video_start"), entry.get("video_end"))
        part = source if isinstance(source, VideoPart) else VideoPart(source)
        if isinstance(part.source, str):
            return {"type": "video", "video": self._remember(local_path(part.source), part.start, part.end)}
        return {"type": "video", "video": source}

    def _encode(self, video: str, start: float, end: float | None) -> VideoMemory:
        with torch.inference_mode():
            return self.model.encode_video(video, self.processor, start=start, end=end)

    def _generate(self, conversations: list[Any], options: dict[str, Any]) -> list[tuple[str, int]]:
        """The answers, and how many tokens each has."""
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"padding": True, "padding_side": "left", "return_tensors": "pt", **self.budget},
        ).to(self.device)
        with torch.inference_mode():
            output = self.model.generate(**inputs, **options, **self.selection)
        tokens = output[:, inputs["input_ids"].shape[1] :]
        counts = (tokens != self.processor.tokenizer.pad_token_id).sum(dim=1)
        return list(zip(self.processor.batch_decode(tokens, skip_special_tokens=True), counts.tolist(), strict=True))

    def _generation_options(self, settings: dict[str, Any]) -> dict[str, Any]:
        """What `generate` gets of a task's `generation_kwargs`: greedy unless they ask for a temperature above 0."""
        unused = sorted(settings.keys() - {"until", "do_sample", *_GENERATION})
        if unused:
            logger.warning(f"Not used of generation_kwargs: {', '.join(unused)}.")
        temperature, do_sample = settings.get("temperature"), settings.get("do_sample")
        is_sampled = bool(do_sample) if temperature is None else temperature > 0 and do_sample is not False
        names = _GENERATION if is_sampled else set(_GENERATION) - set(_SAMPLING)
        options = {name: settings[name] for name in names if settings.get(name) is not None}
        limit = self.model.generation_config.max_new_tokens or MAX_NEW_TOKENS
        return {"max_new_tokens": limit, **options, "do_sample": is_sampled}


@contextmanager
def _named(*requests: Instance) -> Iterator[None]:
    """Makes errors over media and prompts name the questions."""
    try:
        yield
    except (ValueError, OSError) as error:
        questions = ", ".join(f"{doc_id} of {task}" for *_, doc_id, task, _ in (request.args for request in requests))
        raise ValueError(f"Question {questions}: {error}") from error


def _before(text: str, ends: str | Iterable[str] | None) -> str:
    """A text up to the first of some others."""
    for end in [ends] if isinstance(ends, str) else ends or ():
        text = text.split(end, 1)[0] if end else text
    return text


__all__ = ["MambaMia"]
