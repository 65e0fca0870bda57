"""What `--data` names: files of records, a mixture of data sets, or one dataset of `datasets`."""

import os
from collections.abc import Sequence
from typing import Any

from .mixtures import load_mixture
from .records import each_file, load_hub_dataset, load_records


def open_dataset(
    data: Sequence[str | os.PathLike[str]],
    streaming: bool = False,
    media_folder: str | os.PathLike[str] | None = None,
    seed: int = 42,
    split: str = "train",
) -> Any:
    """Opens JSON and JSONL files, a mixture of data sets, or a dataset that `datasets` finds by name or in a folder.

    Args:
        data: the files, a YAML file for [`load_mixture`], or the name or folder of one dataset.
        streaming: whether to read them as a stream. A stream begins anew when it ends: `Trainer` does not know its
            length, and could not find its place again after resuming in a later pass.
        media_folder: the folder that the media folders of a mixture are relative to, by default that of its file.
        seed: of what a mixture draws at random.
        split: of one dataset; a mixture names those of its own.

    Returns:
        A list of records for files without `streaming`, a [`Mixture`], else a dataset of `datasets`, whose images and
        videos are left for the collator to decode.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if `data` is none of them.
    """
    names = [os.fspath(name) for name in data]
    if all(name.endswith((".json", ".jsonl")) for name in names):
        return _stream_files(names) if streaming else load_records(names)
    if len(names) != 1:
        raise ValueError(
            f"The data are {', '.join(names)}; give .json and .jsonl files, one .yaml file that lists several data "
            f"sets, or one dataset."
        )
    if not names[0].endswith((".yaml", ".yml")):
        dataset = load_hub_dataset(names[0], split=split, streaming=streaming)
        return dataset.repeat(None) if streaming else dataset
    if streaming:
        raise ValueError(f"The mixture '{names[0]}' cannot be read as a stream; leave --streaming out.")
    return load_mixture(names[0], media_folder, seed)


def _stream_files(files: list[str]) -> Any:
    import datasets

    names = [str(file) for file in each_file(files)]
    return datasets.load_dataset("json", data_files=names, split="train", streaming=True).repeat(None)


__all__ = ["open_dataset"]
