"""A conversation about a video: what the language model has read of it is kept, so a question costs its own tokens."""

import os
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from .auto import MambaMiaForConditionalGeneration, MambaMiaProcessor
from .inputs import is_memory
from .modeling_encoder import MambaMiaFeaturesOutput
from .shared_prefix import attention_implementation, can_share_prefix, generate_from_prefix
from .versions import CACHE_NAME
from .video_memory import VideoMemory, is_video_memory


MAX_NEW_TOKENS = 256
_QUESTIONS_AT_ONCE = 32  # the mask between them grows with the square
_ATTENTION_CHUNK = 16  # tokens whose attention is held at once


@dataclass
class _VideoPrefix:
    """What all conversations about a video begin with: the tokens up to the video's last one, and their cache."""

    memory: VideoMemory
    features: MambaMiaFeaturesOutput
    lock: Any = field(default_factory=Lock)  # held while the cache is filled
    ids: list[int] = field(default_factory=list)
    cache: Cache | None = None  # None before the first question, and where no cache can be gone on from


class VideoChat:
    """A conversation about a video, by greedy decoding.

    The answers are those of `generate` for the whole conversation, as `apply_chat_template` writes it; but the video
    goes through the language model once, and a turn costs its own tokens. The whole conversation is tokenised for each
    question, and what differs from the tokens in the cache is computed again. A language model of state-space layers
    has a state that cannot be cut back: it reads the whole conversation for each question.

    ```python
    >>> chat = VideoChat(model, processor, "video.mp4")
    >>> chat.ask("What shape appears in the video?")
    'star'
    >>> for piece in chat.stream("What colour is it?"):
    ...     print(piece, end="", flush=True)
    purple
    ```

    Args:
        model: a MambaMia model.
        processor: its processor.
        video: a memory of this model; or the path of a saved one; or path or URL of a video, or a folder of frames,
            which is encoded first.
        keep_frames, keep_ratio: an exact number or share of the frames to read.
        delta_threshold: δ of the selection, however short the video; 0 keeps every frame. Without it and a budget, the
            settings of processor and model hold.
        max_new_tokens: where answers stop; by default the checkpoint's own limit, or 256.

    Attributes:
        messages: the conversation so far, as `apply_chat_template` takes it.

    Raises:
        ValueError, OSError: for a video, a memory or a setting that cannot be used.
    """

    def __init__(
        self,
        model: MambaMiaForConditionalGeneration,
        processor: MambaMiaProcessor,
        video: VideoMemory | str | os.PathLike[str],
        keep_frames: int | None = None,
        keep_ratio: float | None = None,
        delta_threshold: float | None = None,
        max_new_tokens: int | None = None,
    ):
        self.model, self.processor = model, processor
        self.max_new_tokens = max_new_tokens or model.generation_config.max_new_tokens or MAX_NEW_TOKENS
        memory: Any = video if is_video_memory(video) else _open(model, processor, video)
        features = select_features(model, processor, memory, keep_frames, keep_ratio, delta_threshold)
        self._prefix = _VideoPrefix(memory, features)
        self._begin()

    def _begin(self) -> None:
        """Begins a conversation about the video."""
        self.messages: list[dict[str, Any]] = []
        self._cache: Cache | None = None  # of `_cached`, the tokens of the conversation so far
        self._cached: list[int] = []
        self._lock, self._is_answering = Lock(), False

    @property
    def memory(self) -> VideoMemory:
        """What the model remembers of every frame of the video."""
        return self._prefix.memory

    @property
    def kept_frames(self) -> list[int]:
        """Numbers, among the frames of the memory, of those whose tokens the language model reads."""
        keep_mask = self._prefix.features.keep_mask
        assert keep_mask is not None
        return keep_mask[0].nonzero().flatten().tolist()

    @property
    def video_tokens(self) -> int:
        """How many tokens of the video the language model reads."""
        return len(self._prefix.features.pooler_output[0])

    def fork(self, max_new_tokens: int | None = None) -> "VideoChat":
        """A new conversation about the same video, which shares what the language model has read of it.

        Args:
            max_new_tokens: where its answers stop; by default as here.
        """
        other = VideoChat.__new__(VideoChat)
        other.model, other.processor = self.model, self.processor
        other.max_new_tokens = max_new_tokens or self.max_new_tokens
        other._prefix = self._prefix
        other._begin()
        return other

    def with_selection(
        self, keep_frames: int | None = None, keep_ratio: float | None = None, delta_threshold: float | None = None
    ) -> "VideoChat":
        """This conversation about other frames of the video; its past answers stay as they are.

        Args:
            keep_frames, keep_ratio, delta_threshold: see [`VideoChat`].

        Raises:
            ValueError: for a selection that is impossible.
        """
        selection = (keep_frames, keep_ratio, delta_threshold)
        other = VideoChat(self.model, self.processor, self.memory, *selection, max_new_tokens=self.max_new_tokens)
        other.messages = self.messages
        return other

    def ask(self, question: str) -> str:
        """Go on with the conversation; see [`VideoChat.stream`], whose pieces together are the answer."""
        with closing(self.stream(question)) as pieces:
            return "".join(pieces)

    def stream(self, question: str) -> Generator[str]:
        """Go on with the conversation, and give the answer in pieces, as the model writes it.

        Whoever stops before the end (by Ctrl-C, or by closing the generator) has the conversation go on from the part
        that was given. A question without any answer leaves no trace.

        Args:
            question: what to ask.

        Raises:
            ValueError: with the first piece, if the question is empty or holds the placeholder of a video, the
                conversation would not fit into the language model, or this chat is still answering.
        """
        is_mine = False
        try:
            with self._lock:
                if self._is_answering:
                    raise ValueError("this chat is still answering; wait for the answer, close it, or ask a fork().")
                # Ctrl-C comes between calls: what assignments alone do is done or not, here and below.
                self._is_answering = is_mine = True
            yield from self._answer(question)
        finally:
            if is_mine:
                self._is_answering = False

    def ask_many(self, questions: Sequence[str]) -> list[str]:
        """Answers to questions that know nothing of each other, nor of this conversation; many at once.

        Each is what `fork().ask(question)` gives. Where the language model attends to all tokens by PyTorch's `sdpa`,
        questions are read and answered together, while what it has read of the video is there once for all of them.

        Args:
            questions: what to ask.

        Raises:
            ValueError: as [`VideoChat.stream`], before any is answered.
        """
        prompts = [self._prompt([_user_turn(question, is_first=True)]) for question in questions]
        prefix = self._video_cache(prompts[0]) if prompts else None
        if prefix is None or not can_share_prefix(self.model.model.language_model, prefix):
            return [self.fork().ask(question) for question in questions]
        answers: list[str] = []
        for first in range(0, len(prompts), _QUESTIONS_AT_ONCE):
            group = prompts[first : first + _QUESTIONS_AT_ONCE]
            tokens = generate_from_prefix(self.model, deepcopy(prefix), group, self.max_new_tokens)
            answers += map(self._text, tokens)
        return answers

    def evidence(self, count: int = 3) -> list[dict[str, Any]]:
        """The frames that the last question and its answer attended to most.

        What is counted is the attention of the tokens of question and answer to those of each frame, as the mean over
        layers and heads; all frames together have 1. Attention tells where the model looked, not why it answered. A
        language model that keeps no cache of the video, or whose windows do not reach it, has none to tell of: there,
        Δ of the kept frames decides, which is the same for every question.

        Args:
            count: how many frames at most.

        Returns:
            A row for each, the most important first: "frame", "time" in seconds, "delta" and "attention", both None
            where there is none.

        Raises:
            ValueError: before the first answer, or where the model has neither.
        """
        if not self.messages:
            raise ValueError("there is no answer yet; ask a question first.")
        frames, attention = self.kept_frames, self._attention_to_frames()
        rows = self.memory.frames()
        shares = [None] * len(frames) if attention is None else attention.tolist()
        found = [{**rows[frame], "attention": share} for frame, share in zip(frames, shares, strict=True)]
        by = "delta" if attention is None else "attention"
        if found[0][by] is None:
            raise ValueError("this model has no Δ, and its language model no attention, to tell frames by.")
        return sorted(found, key=lambda row: row[by], reverse=True)[:count]

    def _answer(self, question: str) -> Generator[str]:
        messages = [*self.messages, _user_turn(question, is_first=not self.messages)]
        prompt = self._prompt(messages)
        tokens: list[int] = []
        written, whole = "", None
        try:
            with closing(self._generate(prompt)) as new_tokens:
                for token in new_tokens:
                    tokens.append(token)
                    text = self._text(tokens)
                    # No part of a character, and nothing that later tokens change.
                    if len(text) > len(written) and text.startswith(written) and not text.endswith("\ufffd"):
                        piece, written = text[len(written) :], text
                        yield piece
            whole = self._text(tokens)
        finally:
            text = written if whole is None else whole
            if text or whole is not None:
                self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
        if text != written:
            yield text[len(written) :]

    def _text(self, tokens: list[int]) -> str:
        return self.processor.decode(tokens, skip_special_tokens=True).strip()

    def _prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """The tokens of a conversation that the model is to go on with; see [`VideoChat._tokens`].

        Raises:
            ValueError: if they leave no room for an answer.
        """
        prompt = self._tokens(messages)
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        if limit is not None and len(prompt) + self.max_new_tokens > limit:
            raise ValueError(
                f"the conversation has {len(prompt)} tokens with this question, and with an answer of up to "
                f"{self.max_new_tokens} it would not fit into the {limit} of the language model; begin a new one, "
                "keep fewer frames, or allow shorter answers."
            )
        return prompt

    def _tokens(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """The conversation as the processor makes it, with a placeholder for each token of the kept frames."""
        processor, tokenizer = self.processor, self.processor.tokenizer
        text = processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
        for placeholder, what, expected in (
            (processor.video_token, "a video", 1),
            (processor.image_token, "an image", 0),
        ):
            if text.count(placeholder) != expected:
                raise ValueError(f"the question holds {placeholder}, which stands for {what}; leave it out.")
        frames, duration = len(self.memory), self.memory.duration
        video = processor.video_replacement(frames, duration, keep_frames=len(self.kept_frames))
        (text,), _ = processor.get_text_with_replacements([text], videos_replacements=[video])
        starts = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        return tokenizer(text, add_special_tokens=not starts)["input_ids"]

    def _cache_for(self, prompt: list[int]) -> Cache | None:
        """A cache of the tokens that a prompt begins with, all but one at most; None where it is read as a whole."""
        prefix = self._video_cache(prompt)
        if prefix is None:
            return None
        # Whatever goes wrong from here on, the next question finds no half-filled cache.
        cache, cached = self._cache, self._cached
        self._cache, self._cached = None, []
        common = _common_length(cached, prompt[:-1])
        surplus = len(cached) - common
        # A sliding window has lost what came before it.
        if cache is None or common < len(self._prefix.ids) or (surplus and any(cache.is_sliding)):
            return deepcopy(prefix)
        if surplus:
            cache.crop(-surplus)
        return cache

    def _video_cache(self, prompt: list[int]) -> Cache | None:
        """The cache of the prompt up to the video's last token, which stays as it is."""
        prefix = self._prefix
        end = len(prompt) - prompt[::-1].index(self.model.config.video_token_id)
        with prefix.lock:
            if prefix.ids != prompt[:end]:
                prefix.ids, prefix.cache = prompt[:end], self._read(prompt[:end])
            return prefix.cache

    @torch.no_grad()
    def _read(self, prompt: list[int]) -> Cache | None:
        cache = DynamicCache(config=self.model.config.text_config)
        if any(cache.is_linear):
            return None
        ids = torch.tensor([prompt], device=self.model.device)
        self.model(ids, cache=cache, use_cache=True, logits_to_keep=1, mm_encoder_outputs=self._media)
        return cache if cache.is_croppable else None

    @property
    def _media(self) -> dict[str, MambaMiaFeaturesOutput]:
        return {"video": self._prefix.features}

    def _generate(self, prompt: list[int]) -> Generator[int]:
        """The tokens of the answer as they come; they stop when the generator is closed."""
        cache = self._cache_for(prompt)
        arguments: dict[str, Any] = {CACHE_NAME: cache} if cache is not None else {"mm_encoder_outputs": self._media}
        tokens: SimpleQueue[int | None] = SimpleQueue()
        is_wanted = True

        def stops(input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
            return torch.full((len(input_ids),), not is_wanted, device=input_ids.device)

        generation: Future | None = None
        with ThreadPoolExecutor(1) as executor:
            try:
                generation = executor.submit(
                    self.model.generate,
                    torch.tensor([prompt], device=self.model.device),
                    max_new_tokens=self.max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                    use_cache=True,
                    streamer=_TokenQueue(tokens),
                    stopping_criteria=[stops],
                    **arguments,
                )
                generation.add_done_callback(lambda _: tokens.put(None))
                while (token := tokens.get()) is not None:
                    yield token
            finally:
                is_wanted = False  # also of a thread that was just starting
                if generation is not None:
                    sequence = generation.result()[0].tolist()  # waits, and raises what `generate` has raised
                    if cache is not None and cache.get_seq_length() == len(sequence) - 1:
                        self._cache, self._cached = cache, sequence[:-1]

    @torch.no_grad()
    def _attention_to_frames(self) -> Tensor | None:
        """`(num_kept_frames,)`: the share of each in the attention that the last turn pays to the video."""
        tokens = self._tokens(self.messages, add_generation_prompt=False)
        prefix = self._video_cache(tokens)
        if prefix is None:
            return None
        start = len(self._prefix.ids)
        if len(self.messages) > 2:
            start = _common_length(tokens, self._tokens(self.messages[:-2], add_generation_prompt=False))
        cache, device = deepcopy(prefix), self.model.device
        if before := tokens[len(self._prefix.ids) : start]:
            self.model(torch.tensor([before], device=device), cache=cache, use_cache=True, logits_to_keep=1)
        attention = torch.zeros(len(self._prefix.ids), device=device)
        with attention_implementation(self.model.model.language_model, "eager"):
            for first in range(start, len(tokens), _ATTENTION_CHUNK):
                part = torch.tensor([tokens[first : first + _ATTENTION_CHUNK]], device=device)
                output = self.model(part, cache=cache, use_cache=True, logits_to_keep=1, output_attentions=True)
                for layer in output.attentions:
                    # A sliding window has the last keys only.
                    weights = nn.functional.pad(layer.float(), (first + part.shape[1] - layer.shape[-1], 0))
                    attention += weights.sum(dim=(0, 1, 2))[: len(attention)].to(device)
        places = torch.tensor(self._prefix.ids, device=device) == self.model.config.video_token_id
        frames = attention[places].view(len(self.kept_frames), -1).sum(dim=1)
        return frames / frames.sum() if frames.any() else None  # None where windows slide past the whole video


class _TokenQueue(BaseStreamer):
    """Puts the tokens that `generate` writes into a queue."""

    def __init__(self, queue: "SimpleQueue[int | None]"):
        self.queue, self.is_prompt = queue, True

    def put(self, value: Tensor) -> None:
        if not self.is_prompt:
            self.queue.put(int(value))
        self.is_prompt = False

    def end(self) -> None:
        """The queue ends when `generate` returns or raises."""


@torch.no_grad()
def select_features(
    model: MambaMiaForConditionalGeneration,
    processor: MambaMiaProcessor,
    memory: VideoMemory,
    keep_frames: int | None = None,
    keep_ratio: float | None = None,
    delta_threshold: float | None = None,
) -> MambaMiaFeaturesOutput:
    """The frames of a memory that the language model is to read; the arguments are those of [`VideoChat`]."""
    if sum(option is not None for option in (keep_frames, keep_ratio, delta_threshold)) > 1:
        raise ValueError(
            f"Give one of keep_frames, keep_ratio and delta_threshold (got {keep_frames}, {keep_ratio} and "
            f"{delta_threshold})."
        )
    selection: dict[str, Any] = {"keep_frames": keep_frames, "keep_ratio": keep_ratio}
    if delta_threshold is not None:
        selection = {"delta_threshold": delta_threshold, "delta_min_frames": 0}
    elif keep_frames is None and keep_ratio is None:
        selection = {"keep_frames": processor.keep_frames, "keep_ratio": processor.keep_ratio}
    features: Any = model.get_video_features(
        video_memories=[memory], video_timestamps=[memory.timestamps], return_dict=True, **selection
    )
    return features


def _open(model: MambaMiaForConditionalGeneration, processor: MambaMiaProcessor, path: Any) -> VideoMemory:
    """The memory in a file, or of a video."""
    if is_memory(path):
        return VideoMemory.load(path, model, processor)
    return model.encode_video(path, processor)


def _user_turn(question: str, is_first: bool) -> dict[str, Any]:
    if not question.strip():
        raise ValueError("the question is empty; ask something.")
    content = [{"type": "text", "text": question}]
    return {"role": "user", "content": [{"type": "video"}, *content] if is_first else content}


def _common_length(first: list[int], second: list[int]) -> int:
    """How many tokens two lists have in common at their beginning."""
    pairs = zip(first, second, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


__all__ = ["VideoChat", "select_features"]
