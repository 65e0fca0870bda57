"""Runs the frozen vision tower over images and videos once, so that training need not run it every epoch.

    python -m mambamia_hf.training.features --model MODEL --data train.json --media_folder videos --output features

Training reads them with `--features features`. The features are float16 in safetensors shards; `index.json` maps the
paths that the records have to shards, and says what the features were made with. A second run adds what is missing,
after the first was stopped or for more data. A file that cannot be decoded is reported; training skips it, and the
next run tries it again.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser

from ..files import atomic_write
from .data import open_dataset
from .media import FIRST_TRIES, TIMES, MediaReader, Medium, VisionFeatures, times_name
from .records import parse_record, whole_path


@dataclass
class FeatureArguments:
    """What to run over what."""

    model: str = field(metadata={"help": "Folder or Hub name of the model whose vision tower to run."})
    data: list[str] = field(metadata={"help": "JSON or JSONL files, a YAML file of several data sets, or a dataset."})
    output: str = field(metadata={"help": "Folder for the features."})
    media_folder: str | None = field(default=None, metadata={"help": "Folder that relative paths start from."})
    num_frames: int | None = field(default=None, metadata={"help": "Largest number of frames per video."})
    fps: float | None = field(default=None, metadata={"help": "Largest number of frames per second."})
    seed: int = field(default=42, metadata={"help": "The training's seed; it decides what a YAML file draws."})
    shard_size: int = field(default=1024, metadata={"help": "Size in MB at which a shard is full."})
    num_workers: int = field(default=2, metadata={"help": "Processes that decode."})
    dtype: str = field(default="auto", metadata={"help": "Type of the vision tower's weights."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where to run it."})


class MediaFiles(Dataset):
    """Paths of files, each with what was read or, as a text, why it cannot be."""

    def __init__(self, files: list[tuple[str, str]], reader: MediaReader):
        self.files, self.reader = files, reader

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[str, Medium | str]:
        kind, path = self.files[index]
        try:
            return path, self.reader.read(kind, path)
        except Exception as error:  # decoders raise all kinds of errors for broken files
            return path, str(error)


class FeatureFolder:
    """Writes features. Whenever the program is stopped, all that the index names is there in full.

    Args:
        folder: the folder to write to or to add to; one process at a time writes to it.
        settings: what the features are made with, see [`MediaReader.settings`].

    Raises:
        ValueError: if the folder has features that were made with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.settings = folder, {**settings, TIMES: True}
        self.shards: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self.sizes: dict[str, int | None] = {}
        if (folder / "index.json").is_file():
            done = VisionFeatures(folder, settings)
            done.check_settings("image", "video")  # all that is in one folder is made alike
            self.shards, self.skipped, self.sizes = done.shards, done.skipped, done.sizes
            self.settings[TIMES] = done.has_times
        self._waiting: dict[str, torch.Tensor] = {}
        self._times: dict[str, torch.Tensor] = {}

    @property
    def waiting_bytes(self) -> int:
        """Size of the features that have no shard yet."""
        return sum(tensor.nbytes for tensor in self._waiting.values())

    def add(self, path: str, features: torch.Tensor, medium: Medium, size: int | None) -> None:
        """Takes the features of a file of `size` bytes, and the times of a video, for the next shard.

        Raises:
            ValueError: if they are not finite.
        """
        if not features.isfinite().all():
            raise ValueError(f"The features of '{path}' do not fit into float16; train on pixels with this tower.")
        self._waiting[path] = features.contiguous()
        if self.settings[TIMES] and medium.times is not None:
            end = torch.tensor([medium.duration], dtype=torch.float64)
            self._times[times_name(path)] = torch.cat([medium.times, end])
        self.sizes[path] = size
        self.skipped.pop(path, None)

    def write(self) -> None:
        """Writes the features that have no shard yet into one, then the index."""
        if self._waiting:
            name = f"features-{len(set(self.shards.values())):05d}.safetensors"
            with atomic_write(self.folder / name) as file:
                save_file(self._waiting | self._times, file)
            self.shards |= dict.fromkeys(self._waiting, name)
            self._waiting, self._times = {}, {}
        index = {name: getattr(self, name) for name in ("settings", "shards", "skipped", "sizes")}
        with atomic_write(self.folder / "index.json") as file:
            file.write_text(json.dumps(index, indent=1), encoding="utf-8")


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Makes a folder and keeps others from writing features to it.

    Raises:
        RuntimeError: if another process does just now.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise RuntimeError(
            f"Another process is writing features to '{folder}'; wait until it ends, or choose another output folder."
        ) from error


def media_files(records: Iterable[dict[str, Any]]) -> list[tuple[str, str]]:
    """Kind and path of every image and video of the records, each once."""
    files: dict[str, str] = {}
    for record in records:
        try:
            _, media = parse_record(record)
        except ValueError as error:
            print(f"{error} It is left out.")
            continue
        files |= {whole_path(source): kind for kind, source in media}
    return [(kind, path) for path, kind in files.items()]


def file_size(reader: MediaReader, path: str) -> int | None:
    """Bytes of a file; None for an address and for a file that is not there."""
    location = reader.locate(path)
    return os.path.getsize(location) if os.path.isfile(location) else None


def missing_files(folder: FeatureFolder, files: list[tuple[str, str]], reader: MediaReader) -> list[tuple[str, str]]:
    """The files without features.

    Raises:
        ValueError: if a file has another size than when its features were made.
    """
    for path in (path for _, path in files if path in folder.shards):
        size = file_size(reader, path)
        if size not in (None, folder.sizes[path]):
            raise ValueError(
                f"'{path}' has {size} bytes and the file that the features in '{folder.folder}' were made from had "
                f"{folder.sizes[path]}; choose another output folder."
            )
    return [(kind, path) for kind, path in files if path not in folder.shards]


def encode(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Features `(..., num_patches, vision_size)` in float16 of pixels `(..., channels, height, width)`."""
    features = model.base_model.encode_frames(pixels.reshape(-1, *pixels.shape[-3:])).last_hidden_state
    return features.reshape(*pixels.shape[:-3], *features.shape[1:]).to("cpu", torch.float16)


@torch.inference_mode()
def precompute(options: FeatureArguments) -> FeatureFolder:
    """Writes the features of all files of the data; this process is the only writer of the folder."""
    model: Any = AutoModelForImageTextToText.from_pretrained(options.model, dtype=options.dtype)
    processor = AutoProcessor.from_pretrained(options.model)
    reader = MediaReader(processor, options.media_folder, options.num_frames, options.fps)
    folder = FeatureFolder(Path(options.output), reader.settings(model))
    model.base_model.vision_tower.to(options.device)

    files = media_files(open_dataset(options.data, media_folder=options.media_folder, seed=options.seed))
    missing = missing_files(folder, files, reader)
    loader: DataLoader = DataLoader(MediaFiles(missing, reader), batch_size=None, num_workers=options.num_workers)
    bar = tqdm(loader, desc="Features", unit="file", initial=len(files) - len(missing), total=len(files))
    failed = 0
    for tried, (path, medium) in enumerate(bar, start=1):
        if isinstance(medium, str):
            bar.write(f"{path} is skipped: {medium}")
            folder.skipped[path] = medium
            failed += 1
            if failed == tried == FIRST_TRIES:
                raise ValueError(
                    f"None of the first {tried} files can be read; the last is '{path}': {medium} Check the paths and "
                    f"the media folder."
                )
            continue
        folder.add(path, encode(model, medium.tensor), medium, file_size(reader, path))
        if folder.waiting_bytes >= options.shard_size * 1e6:
            folder.write()
    folder.write()
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = HfArgumentParser(
        FeatureArguments,  # type: ignore[arg-type]  # its type of a class is that of an instance
        prog="python -m mambamia_hf.training.features",
    )
    (options,) = parser.parse_args_into_dataclasses(arguments)
    with only_writer(Path(options.output)):
        folder = precompute(options)
    print(f"{len(folder.shards)} files have features in '{folder.folder}', {len(folder.skipped)} were skipped.")


if __name__ == "__main__":
    main()
