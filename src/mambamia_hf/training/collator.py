"""Records to batches in which the assistant's turns are learned and nothing else.

Datasets hand out records as they are. Whatever takes time or may fail, such as reading the media, happens in the
collator, which runs in the workers of the data loader.
"""

import itertools
import json
import logging
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..processing_mambamia import MambaMiaProcessor
from .evaluation import EvaluationRecord, EvaluationSet, scored_places
from .media import FIRST_TRIES, MediaReader, Medium, VisionFeatures
from .records import media_path, parse_record, sample_id


logger = logging.getLogger(__name__)

# How many gaps the positions of a sample have.
_GAPS = 10


@dataclass
class _Sample:
    """A record that can be learned from; `input_ids` and `labels` are `(length,)`."""

    input_ids: Tensor
    labels: Tensor
    media: list[Medium]


class ConversationCollator:
    """Makes batches of records.

    A record that cannot be used, as when its video cannot be decoded, is left out of the batch and reported. When none
    is left, the batch is one token that is not learned, so that all processes take equally many steps.

    Records of an `EvaluationSet` are read whole and without gaps, and each has its row: one that cannot be used has
    one token and no label.

    Args:
        processor: that of the model. Its chat template has to mark the assistant's turns with `{% generation %}`.
        media: the source of images and videos; by default a [`MediaReader`] with the processor's settings.
        max_length: the largest number of tokens per sample, no limit by default. Text after the last image or video
            is cut off, the media never are.
        report: a JSONL file; every sample that is `"skipped"`, `"cut"` or `"not evaluated"` adds a line `{"sample",
            "checksum", "event", "reason"}`.
        length_scale: prepares the language model for longer videos, up to `length_scale` times: random gaps between
            the positions of a video's tokens stretch a sample, while most neighbours in time stay neighbours (as in
            PoSE: Zhu et al., ICLR 2024). 1 leaves no gaps.

    Raises:
        ValueError: if the template does not mark the assistant's turns. A batch raises it if the images and videos of
            a sample alone exceed `max_length`, if one of them has no features, or if the first 20 records to learn
            from are all unusable.
    """

    def __init__(
        self,
        processor: MambaMiaProcessor,
        media: MediaReader | VisionFeatures | None = None,
        max_length: int | None = None,
        report: str | os.PathLike[str] | None = None,
        length_scale: float = 1.0,
    ):
        if not re.search(r"\{%-?\s*generation\b", str(processor.chat_template)):
            raise ValueError(
                "The processor's chat template does not say which tokens the assistant's are: put its turns between "
                "{% generation %} and {% endgeneration %}."
            )
        self.processor = processor
        self.media = MediaReader(processor) if media is None else media
        self.max_length = max_length
        self.report = report
        if report is not None and Path(report).is_file() and not Path(report).read_bytes().endswith(b"\n"):
            with open(report, "a", encoding="utf-8") as file:
                file.write("\n")  # ends the line within which a run was killed
        self.length_scale = length_scale
        added_tokens = processor.tokenizer.added_tokens_decoder.values()
        self._special_tokens = [token.content for token in added_tokens if token.special]
        # Every worker of every epoch has a copy of the collator; they count together.
        self._used, self._skipped = torch.zeros(2, 1, dtype=torch.long).share_memory_()

    def __call__(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Makes a batch.

        Args:
            records: conversations in LLaVA's format.

        Returns:
            `input_ids`, `attention_mask` and `labels` of shape `(batch_size, longest)`, padded at the end;
            `position_ids` of the same shape if `length_scale` is above 1. Of the media what there is, in order:
            `pixel_values (num_images, channels, height, width)` or `patch_features (num_images, num_patches,
            vision_size)`; `pixel_values_videos (num_videos, num_frames, channels, height, width)` or
            `patch_features_videos (num_videos, num_frames, num_patches, vision_size)`, with `frame_mask (num_videos,
            num_frames)` and, where the model writes the times of frames, `video_timestamps`, a list of numbers for
            each video, which nothing casts to the model's type. Of an `EvaluationSet` also `logits_to_keep
            (batch_size, num_places)`: the scores of a whole prompt would not be read.
        """
        evaluated = isinstance(records[0], EvaluationRecord)
        padding = self.processor.tokenizer.pad_token_id or 0  # any token will do, the attention mask hides it
        nothing = _Sample(torch.tensor([padding]), torch.tensor([-100]), [])
        found = [self._sample(record) for record in records]
        samples = [sample or nothing for sample in found if sample or evaluated] or [nothing]
        ids = [sample.input_ids for sample in samples]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=padding),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence([sample.labels for sample in samples], batch_first=True, padding_value=-100),
        }
        if evaluated:
            batch["logits_to_keep"] = scored_places(batch["labels"])
        elif self.length_scale > 1:
            # The gaps depend on which samples come together, so they are the same after resuming.
            names = "\n".join(map(sample_id, records))
            generator = torch.Generator().manual_seed(zlib.crc32(names.encode()))
            positions = [self._positions_with_gaps(row, generator) for row in ids]
            batch["position_ids"] = pad_sequence(positions, batch_first=True)
        return batch | self._batch_media([medium for sample in samples for medium in sample.media])

    def _batch_media(self, media: list[Medium]) -> dict[str, Any]:
        """The arguments of the model that hold images and videos."""
        precomputed = isinstance(self.media, VisionFeatures)
        images = [medium.tensor for medium in media if medium.kind == "image"]
        videos = [medium.tensor for medium in media if medium.kind == "video"]
        batch: dict[str, Any] = {}
        if images:
            batch["patch_features" if precomputed else "pixel_values"] = torch.stack(images)
        if videos:
            padded = pad_sequence(videos, batch_first=True)
            batch["patch_features_videos" if precomputed else "pixel_values_videos"] = padded
            lengths = torch.tensor([len(video) for video in videos])
            batch["frame_mask"] = torch.arange(padded.shape[1]) < lengths[:, None]
            if self.processor.frame_time_format is not None:
                batch["video_timestamps"] = [medium.times.tolist() for medium in media if medium.times is not None]
        return batch

    def _positions_with_gaps(self, input_ids: Tensor, generator: torch.Generator) -> Tensor:
        """Positions `(length,)` with a few random gaps among the tokens of videos; most neighbours stay neighbours."""
        length = len(input_ids)
        is_video = input_ids == self.processor.video_token_id
        scale = 1 + (self.length_scale - 1) * torch.rand((), generator=generator)
        shares = torch.rand(_GAPS, generator=generator).sort().values.diff(prepend=torch.zeros(1))
        places = torch.randint(length, (_GAPS,), generator=generator)
        gaps = torch.zeros(length).index_add(0, places, (scale - 1) * length * shares)
        return (torch.arange(length) + (gaps * is_video).cumsum(0)).long()

    def _sample(self, record: dict[str, Any]) -> _Sample | None:
        """A record as it enters a batch; None where it is unusable."""
        try:
            messages, sources = parse_record(record)
        except ValueError as error:
            self._skip(record, str(error))
            return None
        if isinstance(self.media, VisionFeatures):
            self._require_features(self.media, record, sources)
        try:
            media = [self.media.read(kind, source) for kind, source in sources]
            for medium in media:
                if medium.kind == "video":
                    self.processor.check_times(medium.times)
            input_ids, labels = self._tokenize(messages, media)
        except Exception as error:  # decoders raise all kinds of errors for broken files
            self._skip(record, str(error))
            return None
        length, evaluated = len(input_ids), isinstance(record, EvaluationRecord)
        if self.max_length is not None and length > self.max_length and not evaluated:
            placeholders = [place for place, token in enumerate(input_ids) if token in self._placeholders]
            if placeholders and placeholders[-1] >= self.max_length:
                raise ValueError(
                    f"The images and videos of sample {sample_id(record)!r} reach up to its token "
                    f"{placeholders[-1] + 1} and max_length={self.max_length}; raise max_length or lower num_frames."
                )
            input_ids, labels = input_ids[: self.max_length], labels[: self.max_length]
            self._note(record, "cut", f"the first max_length={self.max_length} of its {length} tokens are left")
        if all(label == -100 for label in labels):
            self._skip(record, f"none of its first {len(labels)} tokens, of {length}, is the assistant's.")
            return None
        self._used += not evaluated
        return _Sample(torch.tensor(input_ids), torch.tensor(labels), media)

    def require_features(self, records: Iterable[dict[str, Any]]) -> None:
        """Checks before training that all images and videos have features, where these replace pixels.

        Args:
            records: all that will be trained on.

        Raises:
            ValueError: if one of them has none.
        """
        if not isinstance(self.media, VisionFeatures):
            return
        for record in records:
            try:
                _, sources = parse_record(record)
            except ValueError:
                continue  # reported when it is met
            self._require_features(self.media, record, sources)

    def require_readable(self, records: EvaluationSet) -> None:
        """Checks before training that evaluation will find something, rather than after hours.

        Args:
            records: what will be evaluated on.

        Raises:
            ValueError: if none of the first 20 records can be used.
        """
        first = min(len(records), FIRST_TRIES)
        if all(self._sample(record) is None for record in itertools.islice(records, first)):
            raise ValueError(
                f"None of the first {first} evaluation samples can be used; samples_*.jsonl in the output folder say "
                f"why. Check the paths and the media folder."
            )

    def _require_features(
        self, features: VisionFeatures, record: dict[str, Any], sources: list[tuple[str, Any]]
    ) -> None:
        for kind, source in sources:
            features.check_settings(kind)
            if source not in features:
                raise ValueError(
                    f"There are no features of {media_path(source)!r} of sample {sample_id(record)!r} in "
                    f"'{features.folder}'; run `python -m mambamia_hf.training.features` on this data, it adds what "
                    f"is missing."
                )

    @property
    def _placeholders(self) -> tuple[int | None, int | None]:
        return self.processor.image_token_id, self.processor.video_token_id

    def _tokenize(self, messages: list[dict[str, Any]], media: list[Medium]) -> tuple[list[int], list[int]]:
        """Token ids, with as many placeholders as the media give tokens, and labels."""
        processor, tokenizer = self.processor, self.processor.tokenizer
        texts = [item["text"] for message in messages for item in message["content"] if item["type"] == "text"]
        for token in self._special_tokens:
            if any(token in text for text in texts):
                raise ValueError(f"its text has the special token {token} in it; spell it differently.")
        encoded = tokenizer.apply_chat_template(
            self._with_time_lines(messages, media) if processor.time_instruction else messages,
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
            processor.tokens_per_frame if medium.kind == "image" else processor.num_video_tokens(len(medium.tensor))
            for medium in media
        ]
        num_placeholders = sum(token in self._placeholders for token, _ in tokens)
        if num_placeholders != len(media):
            raise ValueError(f"its chat template writes {num_placeholders} placeholders for {len(media)} media.")
        input_ids: list[int] = []
        labels: list[int] = []
        for token, learned in tokens:
            count = lengths.pop(0) if token in self._placeholders else 1
            input_ids += count * [token]
            labels += count * [token if learned else -100]
        return input_ids, labels

    def _with_time_lines(self, messages: list[dict[str, Any]], media: list[Medium]) -> list[dict[str, Any]]:
        """The messages with the time instruction after each video, where the processor puts it."""
        probe: list[Any] = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "?"}]}]
        # Some templates break the line after each video.
        before = "" if "\n?" in self.processor.apply_chat_template(probe) else "\n"
        videos = iter([medium for medium in media if medium.kind == "video"])
        longer = []
        for message in messages:
            content: list[dict[str, Any]] = []
            for item in message["content"]:
                content.append(item)
                if item["type"] == "video":
                    video = next(videos)
                    line = self.processor.time_line(len(video.tensor), video.duration)
                    content.append({"type": "text", "text": f"{before}{line}\n"})
            longer.append({**message, "content": content})
        return longer

    def _skip(self, record: dict[str, Any], reason: str) -> None:
        if isinstance(record, EvaluationRecord):
            self._note(record, "not evaluated", reason)
            return
        self._note(record, "skipped", reason)
        self._skipped += 1
        if not self._used and self._skipped >= FIRST_TRIES:
            raise ValueError(
                f"None of the first {int(self._skipped)} samples can be used; the last is {sample_id(record)!r}: "
                f"{reason} Check the paths, the media folder and max_length."
            )

    def _note(self, record: dict[str, Any], event: str, reason: str) -> None:
        logger.warning("Sample %r was %s: %s", sample_id(record), event, reason)
        if self.report is not None:
            checksum = zlib.crc32(repr(sorted(record.items())).encode())  # ids may repeat
            line = json.dumps({"sample": sample_id(record), "checksum": checksum, "event": event, "reason": reason})
            with open(self.report, "a", encoding="utf-8") as file:  # one short write, so that workers share the file
                file.write(line + "\n")


def reported_samples(folder: Path) -> dict[str, set[tuple[str, int]]]:
    """Reads the reports `samples_*.jsonl` of all processes.

    Args:
        folder: where they are.

    Returns:
        Ids and checksums of the samples that were `"skipped"`, `"cut"` and `"not evaluated"`.
    """
    samples: dict[str, set[tuple[str, int]]] = {"skipped": set(), "cut": set(), "not evaluated": set()}
    for file in folder.glob("samples_*.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                note = json.loads(line)
            except json.JSONDecodeError:
                continue  # a run was killed while it wrote
            samples[note["event"]].add((note["sample"], note["checksum"]))
    return samples


__all__ = ["ConversationCollator", "reported_samples"]
