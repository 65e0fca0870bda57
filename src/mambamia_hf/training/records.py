"""Conversations in LLaVA's format, from JSON and JSONL files or a dataset of `datasets`.

A record is one conversation:

    {"id": "7", "video": "7.mp4", "conversations": [
        {"from": "human", "value": "<video>\\nWhat appears?"}, {"from": "gpt", "value": "A star."}]}
"""

import copy
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def load_records(files: Iterable[str | os.PathLike[str]]) -> list[dict[str, Any]]:
    """Reads JSON files, which hold a list of records each, and JSONL files, which hold one record per line.

    Args:
        files: paths; names that end in `.jsonl` are JSONL files.

    Returns:
        All records, in order.

    Raises:
        ValueError: if a file holds anything else.
    """
    records: list[dict[str, Any]] = []
    for file in map(Path, files):
        text = file.read_text(encoding="utf-8")
        try:
            if file.suffix == ".jsonl":
                loaded = [json.loads(line) for line in text.split("\n") if line.strip()]
            else:
                loaded = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not JSON ({error}); name it .jsonl if it has one record per line.") from error
        if not isinstance(loaded, list) or not all(isinstance(record, dict) for record in loaded):
            raise ValueError(f"{file} holds no list of records; write a list of objects, or one object per line.")
        records += loaded
    return records


def open_dataset(data: Sequence[str | os.PathLike[str]], streaming: bool = False) -> Any:
    """Opens JSON and JSONL files, or one dataset that `datasets` finds by name or in a folder.

    Args:
        data: the files, or the name or folder of one dataset.
        streaming: whether to read them as a stream. A stream begins anew when it ends: `Trainer` does not know its
            length, and could not find its place again after resuming in a later pass.

    Returns:
        A list of records for files without `streaming`, else a dataset of `datasets`, whose images and videos are left
        for the collator to decode.

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
    """A feature of a dataset whose files stay encoded."""
    if isinstance(feature, list):
        return [_undecoded(item) for item in feature]
    feature = copy.copy(feature)
    if hasattr(feature, "decode"):
        feature.decode = False
    if hasattr(feature, "feature"):
        feature.feature = _undecoded(feature.feature)
    return feature


def parse_record(record: dict[str, Any]) -> tuple[list[dict[str, Any]], list[tuple[str, Any]]]:
    """Turns a record into a chat and its media, in the order in which the chat has them.

    `image` and `video` hold one source or a list of them. Every source has its placeholder `<image>` or `<video>` in
    the text. In a record with videos and no images, `<image>` stands for a video, too.

    Args:
        record: one conversation in LLaVA's format.

    Returns:
        Messages as chat templates take them, and pairs of `"image"` or `"video"` and the source.

    Raises:
        ValueError: if the record is no conversation, or its placeholders do not match its media.
    """
    name = f"Sample {sample_id(record)!r}"
    turns = record.get("conversations")
    if not turns:
        raise ValueError(
            f"{name} has no `conversations` but {', '.join(map(repr, record))}; write records in LLaVA's format, and "
            f"set `remove_unused_columns=False` in the TrainingArguments."
        )
    sources = {kind: _as_list(record.get(kind)) for kind in ("image", "video")}
    kinds = {"<image>": "image" if sources["image"] or not sources["video"] else "video", "<video>": "video"}
    messages = [_parse_turn(turn, kinds, name) for turn in turns]
    media = [item["type"] for message in messages for item in message["content"] if item["type"] != "text"]
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


def _parse_turn(turn: Any, kinds: dict[str, str], name: str) -> dict[str, Any]:
    """A turn as a message of a chat; `kinds` says which medium a placeholder stands for."""
    role, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
    if role not in _ROLES or not isinstance(text, str):
        raise ValueError(f"{name} has the turn {turn!r}; `from` is one of {', '.join(_ROLES)}, `value` a text.")
    parts = re.split(r"\s*(<image>|<video>)\s*", text)
    content = [{"type": kinds[part]} if part in kinds else {"type": "text", "text": part} for part in parts if part]
    return {"role": _ROLES[role], "content": content}


def sample_id(record: dict[str, Any]) -> str:
    """What to call a record: its id, or else the path of its first image or video."""
    if record.get("id") is not None:
        return str(record["id"])
    sources = [*_as_list(record.get("image")), *_as_list(record.get("video"))]
    return media_path(sources[0]) or "without id" if sources else "without id"


def media_path(source: Any) -> str | None:
    """The path or address of an image or a video as its record has it; None where there is only the content."""
    if isinstance(source, dict):  # as `datasets` gives files that it does not decode
        source = source.get("path")
    return os.fspath(source) if isinstance(source, str | os.PathLike) else None


def whole_path(source: Any) -> str | None:
    """As [`media_path`], for features, which are those of whole files.

    Raises:
        ValueError: for a part of a video.
    """
    path = media_path(source)
    if isinstance(source, dict) and any(source.get(name) is not None for name in ("video_start", "video_end")):
        raise ValueError(f"Features are those of whole files, and '{path}' has cut times; train on pixels.")
    return path


def _as_list(sources: Any) -> list[Any]:
    if sources is None:
        return []
    return list(sources) if isinstance(sources, list | tuple) else [sources]


__all__ = ["load_records", "media_path", "open_dataset", "parse_record", "sample_id", "whole_path"]
