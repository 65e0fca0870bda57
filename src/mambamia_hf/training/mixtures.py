"""Mixtures of data sets: a YAML file as LLaVA-NeXT has it, with weights, media folders and data sets of the Hub.

    datasets:
      - json_path: LLaVA-Video-178K/0_30_s_nextqa/0_30_s_nextqa_{oe,mc}_qa_processed.json
        media_folder: LLaVA-Video-178K/0_30_s_nextqa
        sampling_strategy: "random:10%"
      - name: lmms-lab/LLaVA-Video-178K
        config: 0_30_s_academic_v0_1
        split: caption
        media_folder: LLaVA-Video-178K/0_30_s_academic_v0_1
        weight: 2

Paths are relative to the file. What is drawn at random depends on the seed and the name of the data alone: all
processes draw the same, and so does a run that goes on.
"""

import math
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch.utils.data import ConcatDataset, Dataset

from .records import in_folder, load_hub_dataset, load_records


@dataclass(frozen=True)
class MixtureEntry:
    """One data set of a mixture.

    Args:
        json_path: a JSON or JSONL file; `{a,b}` in it stands for several.
        name: a data set of the Hub, or a folder that `datasets` loads, in place of a file.
        config: which configuration of it.
        split: which split of it, by default `train`.
        sampling_strategy: `"all"`, or `"first:"`, `"end:"` or `"random:"` and how many records or which percentage.
        media_folder: the folder that the paths of the records start from.
        weight: how often an epoch has the records; of a fraction, as 0.3 and the last of 2.3, a random part of them.
    """

    json_path: str | None = None
    name: str | None = None
    config: str | None = None
    split: str | None = None
    sampling_strategy: str = "all"
    media_folder: str = ""
    weight: float = 1.0

    def __post_init__(self) -> None:
        texts = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "weight"}
        for name, value in texts.items():
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{name} is {value!r} and has to be a text; put it in quotation marks.")
        if (self.json_path is None) == (self.name is None):
            raise ValueError("it needs either json_path, for a file, or name, for a data set of the Hub.")
        if self.name is None and (self.config or self.split):
            raise ValueError("config and split are those of a data set of the Hub, and it has json_path, not name.")
        if (
            isinstance(self.weight, bool)
            or not isinstance(self.weight, int | float)
            or not 0 <= self.weight < math.inf
        ):
            raise ValueError(f"weight is {self.weight!r} and has to be a number from 0 on.")
        _parse_strategy(self.sampling_strategy)

    @property
    def title(self) -> str:
        """What to call it, from what the file says, so that it is the same wherever the file is."""
        return " ".join(part for part in (self.json_path, self.name, self.config, self.split) if part)

    def indices(self, num_records: int, seed: int) -> list[int]:
        """Which records an epoch has, each as often as it has it.

        Args:
            num_records: how many the data set has.
            seed: of what is drawn at random.

        Raises:
            ValueError: if there are none, and the weight is not 0.
        """
        # Of what numpy draws at random, only RandomState draws the same in every version.
        random = np.random.RandomState([seed % 2**32, zlib.crc32(self.title.encode())])
        kind, count, percentage = _parse_strategy(self.sampling_strategy)
        number = math.ceil(percentage * num_records / 100) if count is None else min(count, num_records)
        chosen = np.arange(num_records)
        if kind == "first":
            chosen = chosen[:number]
        elif kind == "end":
            chosen = chosen[num_records - number :]
        elif kind == "random":
            chosen = np.sort(random.permutation(num_records)[:number])
        whole, rest = divmod(self.weight, 1)
        more = random.permutation(len(chosen))[: round(rest * len(chosen))]
        indices = [*np.tile(chosen, int(whole)).tolist(), *chosen[np.sort(more)].tolist()]
        if not indices and self.weight:
            raise ValueError(
                f"nothing is left of its {num_records} records by sampling_strategy {self.sampling_strategy!r} and "
                f"weight {self.weight:g}; take more, or leave the entry out."
            )
        return indices


def _parse_strategy(strategy: str) -> tuple[str, int | None, Fraction]:
    """How records are chosen, and how many or, if that is None, which percentage.

    Raises:
        ValueError: for any other text.
    """
    if strategy == "all":
        return "all", None, Fraction(100)
    match = re.fullmatch(r"(first|end|random):\s*(?:(\d+)|(\d+(?:\.\d+)?)\s*%)", strategy)
    if match is None:
        raise ValueError(
            f'sampling_strategy is {strategy!r} and has to be "all", or "first:", "end:" or "random:" and a number '
            f'of records or a percentage, such as "random:10%".'
        )
    kind, count, percentage = match.groups()
    if count is not None:
        return kind, int(count), Fraction(0)
    if Fraction(percentage) > 100:
        raise ValueError(f"sampling_strategy is {strategy!r}, more than 100 %; give a weight to repeat records.")
    return kind, None, Fraction(percentage)


class MixturePart(Dataset):
    """Records of one data set, their relative paths put into a folder.

    Args:
        records: the records.
        folder: the folder.
    """

    def __init__(self, records: Sequence[dict[str, Any]], folder: str):
        self.records, self.folder = records, folder

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        media = {kind: self._located(record[kind]) for kind in ("image", "video") if record.get(kind) is not None}
        return {**record, **media}

    def _located(self, source: Any) -> Any:
        """A source, or a list of them, with its path in the folder."""
        if isinstance(source, list | tuple):
            return [self._located(item) for item in source]
        if isinstance(source, dict) and source.get("bytes") is None and source.get("path") is not None:
            return {**source, "path": in_folder(self.folder, source["path"])}
        return in_folder(self.folder, source) if isinstance(source, str) else source


class Mixture(ConcatDataset):
    """The records of all data sets of a mixture, one data set after the other."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))


def load_mixture(
    file: str | os.PathLike[str], media_folder: str | os.PathLike[str] | None = None, seed: int = 42
) -> Mixture:
    """Loads the data sets that a YAML file names.

    Args:
        file: the YAML file, see this module.
        media_folder: the folder that the file's media folders are relative to, by default the one that it is in.
        seed: of what is drawn at random.

    Returns:
        The records. Where `media_folder` is given, their paths are relative to it, else they are absolute.

    Raises:
        ValueError: if the file is no such file, a data set cannot be loaded, or nothing is left of one.
        FileNotFoundError: if the file or one of its JSON files is not there.
    """
    file = Path(os.path.abspath(file))
    media_root = str(file.parent) if media_folder is None else ""
    parts = []
    for number, settings in enumerate(listed_entries(file), start=1):
        try:
            entry = _entry(settings)
            if entry.weight:
                parts.append(
                    MixturePart(_chosen_records(entry, file, seed), in_folder(media_root, entry.media_folder))
                )
        except FileNotFoundError as error:
            raise FileNotFoundError(f"Entry {number} of '{file}' cannot be used: {error}") from error
        except ValueError as error:
            raise ValueError(f"Entry {number} of '{file}' cannot be used: {error}") from error
    if not parts:
        raise ValueError(f"All weights in '{file}' are 0; give one of its data sets a weight above 0.")
    return Mixture(parts)


def listed_entries(file: Path) -> list[Any]:
    """What a YAML file lists under `datasets`.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is no such file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"There is no data file at '{file}'; check the path.")
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"'{file}' is not YAML: {' '.join(str(error).split())}.") from error
    keys = list(map(str, content)) if isinstance(content, dict) else []
    if keys != ["datasets"] or not isinstance(content["datasets"], list) or not content["datasets"]:
        raise ValueError(
            f"'{file}' has {', '.join(keys) or 'no keys'} and is no mixture of data sets; write `datasets:`, the list "
            f"of them, and nothing else."
        )
    return content["datasets"]


def _entry(settings: Any) -> MixtureEntry:
    known = [field.name for field in fields(MixtureEntry)]
    if not isinstance(settings, dict):
        raise ValueError(f"it is {settings!r} and has to have some of the keys {', '.join(known)}.")
    if unknown := [str(name) for name in settings if name not in known]:
        raise ValueError(f"it has {', '.join(unknown)}, and the keys are {', '.join(known)}.")
    return MixtureEntry(**{name: value for name, value in settings.items() if value is not None})


def _chosen_records(entry: MixtureEntry, file: Path, seed: int) -> Sequence[dict[str, Any]]:
    """The records of a data set that an epoch has; paths are relative to a mixture's file."""
    if entry.json_path is not None:
        records = load_records([file.parent / entry.json_path])
        return [records[index] for index in entry.indices(len(records), seed)]
    local = file.parent / str(entry.name)
    dataset = load_hub_dataset(str(local if local.is_dir() else entry.name), entry.config, entry.split or "train")
    return dataset.select(entry.indices(len(dataset), seed))


class _Loader(yaml.SafeLoader):
    """YAML in which no key is given twice, of which PyYAML would take the last: a dash may be missing between them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if key.value != "<<"]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise yaml.constructor.ConstructorError(
                problem=f"{repeated[0]} is there twice; begin each entry with a dash", problem_mark=node.start_mark
            )
        return super().construct_mapping(node, deep)


__all__ = ["Mixture", "MixtureEntry", "MixturePart", "listed_entries", "load_mixture"]
