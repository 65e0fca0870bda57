"""Conversations in LLaVA's format, from JSON and JSONL files or a dataset of `datasets`.

A record is one conversation:

    {"id": "7", "video": "7.mp4", "conversations": [
        {"from": "human", "value": "<video>\\nWhat appears?"}, {"from": "gpt", "value": "A star."}]}
"""

import copy
import itertools
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..video_sources import is_address


_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")


def load_records(files: Iterable[str | os.PathLike[str]]) -> list[dict[str, Any]]:
    """Reads JSON files, which hold a list of records each, and JSONL files, which hold one record per line.

    Args:
        files: paths; names that end in `.jsonl` are JSONL files. `{a,b}` in a name stands for both, as in a shell.

    Returns:
        All records, in order.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if a file holds anything else.
    """
    records: list[dict[str, Any]] = []
    for file in each_file(files):
        if not file.is_file():
            raise FileNotFoundError(f"There is no data file at '{file}'; check the path.")
        try:
            text = file.read_text(encoding="utf-8")
            if file.suffix == ".jsonl":
                loaded = [json.loads(line) for line in text.split("\n") if line.strip()]
            else:
                loaded = json.loads(text)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is not JSON ({error}); name it .jsonl if it has one record per line.") from error
        if not isinstance(loaded, list) or not all(isinstance(record, dict) for record in loaded):
            raise ValueError(f"{file} holds no list of records; write a list of objects, or one object per line.")
        records += loaded
    return records


def each_file(files: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The files that names with `{a,b}` in them stand for, if there is no file of that very name."""
    each: list[Path] = []
    for file in files:
        if os.path.exists(file):
            each.append(Path(file))
            continue
        parts = re.split(r"\{([^{}]*)\}", os.fspath(file))
        choices = [part.split(",") if place % 2 else [part] for place, part in enumerate(parts)]
        each += [Path("".join(choice)) for choice in itertools.product(*choices)]
    return each


def load_hub_dataset(name: str, config: str | None = None, split: str = "train", streaming: bool = False) -> Any:
    """Loads a dataset of the Hub, or one that `datasets` finds in a folder.

    Args:
        name: its name or folder.
        config: which configuration of it.
        split: which split.
        streaming: whether to read it as a stream.

    Returns:
        A dataset whose images and videos stay encoded.

    Raises:
        ValueError: if there is no such dataset, configuration or split, or several and none of them is named.
    """
    import datasets

    try:
        dataset = datasets.load_dataset(name, config, split=split, streaming=streaming)
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())
        raise ValueError(
            f"The dataset '{name}' cannot be loaded ({reason}); where it has several, `config` and `split` in a YAML "
            f"file for --data say which."
        ) from error
    for column, feature in (dataset.features or {}).items():
        undecoded = _undecoded(feature)
        if undecoded != feature:
            dataset = dataset.cast_column(column, undecoded)
    return dataset


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

    `image` and `video` hold one source or a list of them; a video file in `image`, as VISTA has it, is a video. Media
    stand where their placeholders `<image>` and `<video>` do. In a record with videos and no images, `<image>` stands
    for a video, too. If there is no placeholder at all, media of one kind go before the first turn of the user. Turns
    of the assistant before that one are left out, as LLaVA does.

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
    if isinstance(turns, dict):  # as `datasets` gives a `Sequence` of turns
        turns = [dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)]
    sources = _sources(record, name)
    kinds = {"<image>": "image" if sources["image"] or not sources["video"] else "video", "<video>": "video"}
    messages = [_parse_turn(turn, kinds, name) for turn in turns]
    users = [place for place, message in enumerate(messages) if message["role"] == "user"]
    before = messages[: users[0]] if users else messages
    messages = [message for message in before if message["role"] == "system"] + messages[len(before) :]
    if not messages or messages[-1]["role"] != "assistant":
        end = f"ends with a turn of the {messages[-1]['role']}" if messages else "has no turn of the user"
        raise ValueError(f"{name} {end}; the last turn is the assistant's answer to the user.")
    media = _kinds_in(messages)
    if not media and any(sources.values()):
        media = _put_in_front(messages, sources, name)
    for kind, given in sources.items():
        if media.count(kind) != len(given):
            raise ValueError(
                f"{name} has {media.count(kind)} placeholders <{kind}> in its text and {len(given)} of `{kind}`; "
                f"write one placeholder for each, or none at all."
            )
    remaining = {kind: iter(given) for kind, given in sources.items()}
    return messages, [(kind, next(remaining[kind])) for kind in media]


def _sources(record: dict[str, Any], name: str) -> dict[str, list[Any]]:
    """The images and the videos of a record."""
    images, videos = _as_list(record.get("image")), _as_list(record.get("video"))
    misplaced = [source for source in images if _is_video_file(source)]
    if misplaced and (videos or len(misplaced) < len(images)):
        raise ValueError(
            f"{name} has the video {media_path(misplaced[0])!r} in `image` and other media beside it; put videos into "
            f"`video`."
        )
    return {"image": [], "video": misplaced} if misplaced else {"image": images, "video": videos}


def _is_video_file(source: Any) -> bool:
    return (media_path(source) or "").lower().endswith(_VIDEO_SUFFIXES)


def _kinds_in(messages: list[dict[str, Any]]) -> list[str]:
    """`"image"` or `"video"` for every medium of a chat, in order."""
    return [item["type"] for message in messages for item in message["content"] if item["type"] != "text"]


def _put_in_front(messages: list[dict[str, Any]], sources: dict[str, list[Any]], name: str) -> list[str]:
    """Puts media of one kind before the first turn of the user, and gives the kind of each."""
    if all(sources.values()):
        raise ValueError(
            f"{name} has `image` and `video` and no placeholder in its text; write <image> and <video> where they go."
        )
    kinds = [kind for kind, given in sources.items() for _ in given]
    first = next(message for message in messages if message["role"] == "user")
    first["content"] = [*({"type": kind} for kind in kinds), *first["content"]]
    return kinds


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


def in_folder(folder: str | os.PathLike[str], path: str) -> str:
    """A path in a folder; absolute paths and addresses stay as they are."""
    return path if is_address(path) else os.path.join(folder, path)


def whole_path(source: Any) -> str:
    """As [`media_path`], for features, which are those of whole files.

    Raises:
        ValueError: for a part of a video, and for what is no file of its own.
    """
    path = media_path(source)
    if path is None or (isinstance(source, dict) and source.get("bytes") is not None):
        raise ValueError(
            f"Features are those of files, and the content of {path or 'an image or video'!r} is in the data itself; "
            f"train on pixels."
        )
    if isinstance(source, dict) and any(source.get(name) is not None for name in ("video_start", "video_end")):
        raise ValueError(f"Features are those of whole files, and '{path}' has cut times; train on pixels.")
    return path


def _as_list(sources: Any) -> list[Any]:
    if sources is None:
        return []
    return list(sources) if isinstance(sources, list | tuple) else [sources]


__all__ = [
    "each_file",
    "in_folder",
    "load_hub_dataset",
    "load_records",
    "media_path",
    "parse_record",
    "sample_id",
    "whole_path",
]
