"""Conversations about images and videos as training batches.

A record is one conversation in LLaVA's format, from a JSON or JSONL file or a `datasets` dataset:

    {"id": "7", "video": "7.mp4", "conversations": [
        {"from": "human", "value": "<video>\\nWhat appears?"}, {"from": "gpt", "value": "A star."}]}

Datasets hand out records as they are. Whatever takes time or may fail, reading the media first of all, is done by the
collator, which runs in the workers of the data loader.
"""

import copy
import functools
import hashlib
import io
import json
import logging
import os
import re
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.image_utils import load_image

from .modeling_mambamia import MambaMiaForConditionalGeneration
from .processing_mambamia import MambaMiaProcessor


logger = logging.getLogger(__name__)

_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}

# When the first so many records or files are all unusable, something is wrong with the settings, not with the media.
FIRST_TRIES = 20

# In how many places the positions of a sample leave gaps.
_GAPS = 10

# What decides how a file becomes pixels.
_PIXEL_SETTINGS = (
    "do_sample_frames num_frames fps do_convert_rgb do_resize size resample do_center_crop crop_size do_rescale "
    "rescale_factor do_normalize image_mean image_std"
).split()


def load_records(files: Iterable[str | os.PathLike]) -> list[dict[str, Any]]:
    """The records of JSON files, which hold a list each, and of JSONL files, which hold one a line; in order.

    Raises:
        ValueError: if a file holds something else.
    """
    records = []
    for file in map(Path, files):
        text = file.read_text(encoding="utf-8")
        try:
            if file.suffix == ".jsonl":
                loaded = [json.loads(line) for line in text.split("\n") if line.strip()]
            else:
                loaded = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not JSON ({error}); name it .jsonl if it has one record a line.") from error
        if not isinstance(loaded, list) or not all(isinstance(record, dict) for record in loaded):
            raise ValueError(f"{file} holds no list of records; write one object a sample into a list, or one a line.")
        records += loaded
    return records


def open_dataset(data: Sequence[str | os.PathLike], streaming: bool = False) -> Any:
    """Records from JSON and JSONL files, or from one dataset that `datasets` knows or has in a folder.

    Returns:
        A list of records, or with `streaming`, and for anything but files, a dataset of `datasets` that leaves images
        and videos to be decoded by the collator. A stream begins anew whenever it ends: `Trainer` does not know how
        long it is, and would not find its place again after resuming in a later pass.

    Raises:
        ValueError: if `data` is neither.
    """
    are_files = all(str(name).endswith((".json", ".jsonl")) for name in data)
    if are_files and not streaming:
        return load_records(data)
    import datasets

    if are_files:
        dataset = datasets.load_dataset("json", data_files=[str(file) for file in data], split="train", streaming=True)
        return dataset.repeat(None)
    if len(data) != 1:
        raise ValueError(f"The data are {', '.join(map(str, data))}; give .json and .jsonl files, or one dataset.")
    dataset = datasets.load_dataset(str(data[0]), split="train", streaming=streaming)
    for name, feature in (dataset.features or {}).items():
        undecoded = _undecoded(feature)
        if undecoded != feature:
            dataset = dataset.cast_column(name, undecoded)
    return dataset.repeat(None) if streaming else dataset


def _undecoded(feature: Any) -> Any:
    """The same feature of a dataset, with the content of files in place of what is in them."""
    if isinstance(feature, list):
        return [_undecoded(item) for item in feature]
    feature = copy.copy(feature)
    if hasattr(feature, "decode"):
        feature.decode = False
    if hasattr(feature, "feature"):
        feature.feature = _undecoded(feature.feature)
    return feature


def parse_record(record: dict[str, Any]) -> tuple[list[dict[str, Any]], list[tuple[str, Any]]]:
    """A record as a chat, and its media in the order in which the chat has them.

    `image` and `video` hold one source each or a list of them, and every source has its placeholder `<image>` or
    `<video>` in the text. Where there are videos and no images, `<image>` stands for a video, too.

    Returns:
        Messages as chat templates take them, and pairs of `"image"` or `"video"` and the source.

    Raises:
        ValueError: if it is no conversation, or its placeholders are not those of its media; naming the sample.
    """
    name = f"Sample {sample_id(record)!r}"
    turns = record.get("conversations")
    if not turns:
        raise ValueError(
            f"{name} has no `conversations` but {', '.join(map(repr, record))}; a record is in LLaVA's format, and "
            f"`remove_unused_columns` has to be False in the TrainingArguments."
        )
    sources = {kind: _as_list(record.get(kind)) for kind in ("image", "video")}
    image_kind = "image" if sources["image"] or not sources["video"] else "video"
    messages, media = [], []
    for turn in turns:
        role, text = (_ROLES.get(turn.get("from")), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if role is None or not isinstance(text, str):
            raise ValueError(f"{name} has the turn {turn!r}; `from` is one of {', '.join(_ROLES)}, `value` a text.")
        content = []
        for part in re.split(r"\s*(<image>|<video>)\s*", text):
            if part in ("<image>", "<video>"):
                kind = "video" if part == "<video>" else image_kind
                content.append({"type": kind})
                media.append(kind)
            elif part:
                content.append({"type": "text", "text": part})
        messages.append({"role": role, "content": content})
    for kind, given in sources.items():
        if media.count(kind) != len(given):
            raise ValueError(
                f"{name} has {media.count(kind)} placeholders <{kind}> in its text and {len(given)} of `{kind}`; "
                f"write one placeholder for each."
            )
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"{name} ends with a turn of the {messages[-1]['role']}; the last turn is the assistant's.")
    remaining = {kind: iter(given) for kind, given in sources.items()}
    return messages, [(kind, next(remaining[kind])) for kind in media]


def sample_id(record: dict[str, Any]) -> str:
    """What to call a record: its id, or else the path of its first image or video."""
    if record.get("id") is not None:
        return str(record["id"])
    sources = [*_as_list(record.get("image")), *_as_list(record.get("video"))]
    return media_path(sources[0]) or "without id" if sources else "without id"


def media_path(source: Any) -> str | None:
    """The path or address of an image or a video as the record has it; None where there is only the content."""
    if isinstance(source, dict):  # as `datasets` gives files that it does not decode
        source = source.get("path")
    return os.fspath(source) if isinstance(source, str | os.PathLike) else None


def _as_list(sources: Any) -> list[Any]:
    if sources is None:
        return []
    return list(sources) if isinstance(sources, list | tuple) else [sources]


class MediaReader:
    """Reads images and videos as pixels, as the processor does.

    Args:
        processor: of the model.
        media_folder: what relative paths are relative to.
        num_frames, fps: the largest number of frames of a video and of a second; the video processor's by default.
    """

    def __init__(
        self,
        processor: MambaMiaProcessor,
        media_folder: str | os.PathLike | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
    ):
        self.image_processor = processor.image_processor
        self.video_processor = copy.copy(processor.video_processor)
        self.video_processor.num_frames = self.video_processor.num_frames if num_frames is None else num_frames
        self.video_processor.fps = self.video_processor.fps if fps is None else fps
        self.media_folder = media_folder

    def locate(self, path: str) -> str:
        """Where a path of a record leads, from here; an address is as it is."""
        is_address = path.startswith(("http://", "https://"))
        return path if is_address or self.media_folder is None else os.path.join(self.media_folder, path)

    def read(self, kind: str, source: Any) -> Tensor:
        """`(channels, height, width)` of an `"image"` or `(num_frames, channels, height, width)` of a `"video"`."""
        path = media_path(source)
        content = source.get("bytes") if isinstance(source, dict) else source
        if content is None or path is not None and not isinstance(source, dict):
            content = self.locate(path)
        if kind == "image":
            image = Image.open(io.BytesIO(content)) if isinstance(content, bytes) else content
            return self.image_processor(load_image(image), return_tensors="pt")["pixel_values"][0]
        with tempfile.TemporaryDirectory() as folder:
            if isinstance(content, bytes):
                Path(folder, "video").write_bytes(content)
                content = os.path.join(folder, "video")
            return self.video_processor(content, return_tensors="pt")["pixel_values_videos"][0]

    def settings(self, model: MambaMiaForConditionalGeneration) -> dict[str, Any]:
        """All that the vision features of a file depend on, beside the file: when they may stand in for its pixels."""
        digest = hashlib.sha256()
        for name, tensor in sorted(model.model.vision_tower.state_dict().items()):
            digest.update(name.encode())  # in bfloat16, so that it does not matter which type it was loaded in
            digest.update(tensor.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
        settings = {
            "vision_tower": f"{model.config.vision_config.model_type} {digest.hexdigest()[:16]}",
            "vision_feature_layer": model.config.vision_layer(model.config.vision_feature_layer),
        }
        for kind, processor in (("image", self.image_processor), ("video", self.video_processor)):
            given = processor.to_dict()
            settings |= {f"{kind} {name}": given.get(name) for name in _PIXEL_SETTINGS}
        return json.loads(json.dumps(settings))


@functools.cache
def _open_shard(path: Path) -> safe_open:
    """Stays open, once in a process: what takes time is to read which tensors it has."""
    return safe_open(path, framework="pt")


class VisionFeatures:
    """The vision features of images and videos that `examples/precompute_features.py` wrote to a folder.

    Reading one maps it into memory: nothing else of its shard is read.

    Args:
        folder: with the shards and `index.json`.
        settings: what the features have to have been made with, see [`MediaReader.settings`].

    Raises:
        ValueError: if there is no index in the folder, or the features were made with other settings.
    """

    def __init__(self, folder: str | os.PathLike, settings: dict[str, Any]):
        self.folder = Path(folder)
        index = self.folder / "index.json"
        if not index.is_file():
            raise ValueError(f"There are no features in '{folder}': it has no index.json; precompute them first.")
        index = json.loads(index.read_text(encoding="utf-8"))
        for name in settings:
            if settings[name] != index["settings"].get(name):
                raise ValueError(
                    f"The features in '{folder}' were made with {name} {index['settings'].get(name)!r} and it is "
                    f"{settings[name]!r} now; precompute them again, or use the settings that they were made with."
                )
        self.shards: dict[str, str] = index["shards"]
        self.skipped: dict[str, str] = index["skipped"]
        self.sizes: dict[str, int | None] = index["sizes"]

    def __contains__(self, source: Any) -> bool:
        return media_path(source) in self.shards or media_path(source) in self.skipped

    def read(self, kind: str, source: Any) -> Tensor:
        """`(num_patches, vision_size)` of an image or `(num_frames, num_patches, vision_size)` of a video, in float16.

        Raises:
            ValueError: if the file could not be decoded when the features were made.
        """
        path = media_path(source)
        if path in self.skipped:
            raise ValueError(self.skipped[path])
        return _open_shard(self.folder / self.shards[path]).get_tensor(path)


@dataclass
class ConversationCollator:
    """Records to a batch in which the assistant's turns are learned and nothing else.

    A record that cannot be used, as when its video cannot be decoded, is left out of the batch and reported. When none
    is left, the batch is one token that is not learned, so that all processes take equally many steps.

    Args:
        processor: of the model. Its chat template has to mark the assistant's turns with `{% generation %}`.
        media: where images and videos come from, a [`MediaReader`] or [`VisionFeatures`]; by default the former, with
            the processor's settings.
        max_length: the largest number of tokens of a sample; text behind the last image or video is cut off, the media
            never are. No limit by default.
        report: a JSONL file to which `{"sample", "checksum", "event", "reason"}` is added for every sample that was
            `"skipped"` or `"cut"`.
        position_stretch: the positions of a video's tokens get a few random gaps, which make a sample up to so many
            times longer. That prepares the language model for videos so many times longer, while neighbours in time
            mostly stay neighbours (as in PoSE: Zhu et al., ICLR 2024). 1 leaves none.

    Raises:
        ValueError: if the template does not mark the assistant's turns; later, if the images and videos of a sample
            alone are longer than `max_length`, if there are no features of one of them, or if none of the first 20
            records can be used.
    """

    processor: MambaMiaProcessor
    media: MediaReader | VisionFeatures | None = None
    max_length: int | None = None
    report: str | os.PathLike | None = None
    position_stretch: float = 1.0

    def __post_init__(self):
        if not re.search(r"\{%-?\s*generation\b", self.processor.chat_template):
            raise ValueError(
                "The processor's chat template does not say which tokens the assistant's are: put its turns between "
                "{% generation %} and {% endgeneration %}."
            )
        self.media = MediaReader(self.processor) if self.media is None else self.media
        # Of all workers of all epochs together, as each of these has a copy of the collator.
        self._used, self._skipped = torch.zeros(2, 1, dtype=torch.long).share_memory_()

    def __call__(self, records: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """
        Returns:
            `input_ids`, `attention_mask` and `labels` of shape `(batch_size, longest)`, padded at the end, and of the
            media what there is, in order: `pixel_values (num_images, channels, height, width)` or `image_features
            (num_images, num_patches, vision_size)`; `pixel_values_videos (num_videos, num_frames, channels, height,
            width)` or `video_features (num_videos, num_frames, num_patches, vision_size)`, with `frame_mask
            (num_videos, num_frames)`.
        """
        # What is random depends on which samples come together, so it is the same after resuming.
        names = "\n".join(map(sample_id, records))
        self._generator = torch.Generator().manual_seed(zlib.crc32(names.encode()))
        samples = [sample for record in records if (sample := self._sample(record)) is not None]
        padding = self.processor.tokenizer.pad_token_id or 0  # whatever it is, the attention mask hides it
        if not samples:
            samples = [{"input_ids": torch.tensor([padding]), "labels": torch.tensor([-100]), "media": []}]
        ids = [sample["input_ids"] for sample in samples]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=padding),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence([sample["labels"] for sample in samples], batch_first=True, padding_value=-100),
        }
        has_features = isinstance(self.media, VisionFeatures)
        media = [medium for sample in samples for medium in sample["media"]]
        images = [tensor for kind, tensor in media if kind == "image"]
        videos = [tensor for kind, tensor in media if kind == "video"]
        if images:
            batch["image_features" if has_features else "pixel_values"] = torch.stack(images)
        if videos:
            padded = pad_sequence(videos, batch_first=True)
            batch["video_features" if has_features else "pixel_values_videos"] = padded
            lengths = torch.tensor([len(video) for video in videos])
            batch["frame_mask"] = torch.arange(padded.shape[1]) < lengths[:, None]
        if self.position_stretch > 1:
            batch["position_ids"] = pad_sequence([self._positions_with_gaps(row) for row in ids], batch_first=True)
        return batch

    def _positions_with_gaps(self, input_ids: Tensor) -> Tensor:
        """Positions `(length,)` with a few random gaps among the tokens of videos; most neighbours stay neighbours."""
        is_video = input_ids == self.processor.video_token_id
        stretch = 1 + (self.position_stretch - 1) * torch.rand((), generator=self._generator)
        shares = torch.rand(_GAPS, generator=self._generator).sort().values.diff(prepend=torch.zeros(1))
        places = torch.randint(len(input_ids), (_GAPS,), generator=self._generator)
        gaps = torch.zeros(len(input_ids)).index_add(0, places, (stretch - 1) * len(input_ids) * shares)
        return (torch.arange(len(input_ids)) + (gaps * is_video).cumsum(0)).long()

    def _sample(self, record: dict[str, Any]) -> dict[str, Any] | None:
        """`input_ids` and `labels` of shape `(length,)` and the `media` of a record; None where it is unusable."""
        try:
            messages, sources = parse_record(record)
        except ValueError as error:
            return self._skip(record, str(error))
        if isinstance(self.media, VisionFeatures):
            self._require_features(record, sources)
        try:
            media = [(kind, self.media.read(kind, source)) for kind, source in sources]
            input_ids, labels = self._tokenize(messages, media)
        except Exception as error:  # there is no end to the kinds of errors that decoders raise for broken files
            return self._skip(record, str(error))
        placeholders = [place for place, token in enumerate(input_ids) if token in self._placeholders]
        length = len(input_ids)
        if self.max_length is not None and length > self.max_length:
            if placeholders and placeholders[-1] >= self.max_length:
                raise ValueError(
                    f"The images and videos of sample {sample_id(record)!r} reach up to its token "
                    f"{placeholders[-1] + 1} and max_length={self.max_length}; raise max_length or lower num_frames."
                )
            input_ids, labels = input_ids[: self.max_length], labels[: self.max_length]
            self._note(record, "cut", f"of {length} tokens the first max_length={self.max_length} are left")
        if all(label == -100 for label in labels):
            return self._skip(record, f"none of its first {len(labels)} tokens, of {length}, is the assistant's.")
        self._used += 1
        return {"input_ids": torch.tensor(input_ids), "labels": torch.tensor(labels), "media": media}

    def require_features(self, records: Iterable[dict[str, Any]]) -> None:
        """Check before training that there are features of all images and videos.

        Raises:
            ValueError: if there are none of one of them.
        """
        for record in records:
            try:
                _, sources = parse_record(record)
            except ValueError:
                continue  # reported when it is met
            self._require_features(record, sources)

    def _require_features(self, record: dict[str, Any], sources: list[tuple[str, Any]]) -> None:
        for _, source in sources:
            if source not in self.media:
                raise ValueError(
                    f"There are no features of {media_path(source)!r} of sample {sample_id(record)!r} in "
                    f"'{self.media.folder}'; run precompute_features.py on this data, it adds what is missing."
                )

    @property
    def _placeholders(self) -> tuple[int, int]:
        return self.processor.image_token_id, self.processor.video_token_id

    def _tokenize(self, messages: list[dict], media: list[tuple[str, Tensor]]) -> tuple[list[int], list[int]]:
        """Token ids, with as many placeholders as the media give tokens, and labels."""
        processor, tokenizer = self.processor, self.processor.tokenizer
        encoded = tokenizer.apply_chat_template(
            messages,
            chat_template=processor.chat_template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        tokens = list(zip(encoded["input_ids"], encoded["assistant_masks"], strict=True))
        beginning = tokenizer("")["input_ids"]  # such as Llama's <s>, which the processor puts in front, too
        if encoded["input_ids"][: len(beginning)] != beginning:
            tokens = [(token, 0) for token in beginning] + tokens
        lengths = [
            processor.num_frame_tokens if kind == "image" else processor.num_video_tokens(len(tensor))
            for kind, tensor in media
        ]
        if sum(token in self._placeholders for token, _ in tokens) != len(lengths):
            raise ValueError(f"its text has {processor.image_token} or {processor.video_token} in it.")
        input_ids, labels = [], []
        for token, learned in tokens:
            count = lengths.pop(0) if token in self._placeholders else 1
            input_ids += count * [token]
            labels += count * [token if learned else -100]
        return input_ids, labels

    def _skip(self, record: dict[str, Any], reason: str) -> None:
        self._note(record, "skipped", reason)
        self._skipped += 1
        if not self._used and self._skipped >= FIRST_TRIES:
            raise ValueError(
                f"None of the first {int(self._skipped)} samples can be used; the last is {sample_id(record)!r}: "
                f"{reason} Check the paths, the media folder and max_length."
            )

    def _note(self, record: dict[str, Any], event: str, reason: str):
        logger.warning("Sample %r was %s: %s", sample_id(record), event, reason)
        if self.report is not None:
            checksum = zlib.crc32(repr(sorted(record.items())).encode())  # ids may repeat
            line = json.dumps({"sample": sample_id(record), "checksum": checksum, "event": event, "reason": reason})
            with open(self.report, "a", encoding="utf-8") as file:  # one short write, so that workers share the file
                file.write(line + "\n")


__all__ = ["ConversationCollator", "MediaReader", "VisionFeatures", "load_records", "open_dataset", "parse_record"]
