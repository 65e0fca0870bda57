"""Runs the frozen vision tower over images and videos once, so that training need not run it every epoch.

    python examples/precompute_features.py --model MODEL --data train.json --media_folder videos --output features

Training reads them with `--features features`. The features are float16 in safetensors shards, found by the paths that
the records have; `index.json` says which shard has which, and what they were made with. Run again, it does what is
missing: after it was stopped, or for more data. A file that cannot be decoded is reported, training skips it, and the
next run tries it again.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser

import mambamia_hf  # noqa: F401 - registers the Auto classes
from mambamia_hf.training_data import (
    FIRST_TRIES,
    MediaReader,
    VisionFeatures,
    load_records,
    media_path,
    parse_record,
)


@dataclass
class FeatureArguments:
    """What to run over what."""

    model: str = field(metadata={"help": "Folder or Hub name of the model whose vision tower to run."})
    data: list[str] = field(metadata={"help": "JSON or JSONL files of records."})
    output: str = field(metadata={"help": "Folder for the features."})
    media_folder: str | None = field(default=None, metadata={"help": "What relative paths are relative to."})
    num_frames: int | None = field(default=None, metadata={"help": "Frames of a video at most."})
    fps: float | None = field(default=None, metadata={"help": "Frames of a second at most."})
    shard_size: int = field(default=1024, metadata={"help": "Size of a shard in MB at which the next one begins."})
    num_workers: int = field(default=2, metadata={"help": "Processes that decode."})
    dtype: str = field(default="auto", metadata={"help": "Type of the vision tower's weights."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where to run it."})


class MediaFiles(Dataset):
    """Pixels of files, or why they cannot be read."""

    def __init__(self, files: list[tuple[str, str]], reader: MediaReader):
        self.files, self.reader = files, reader

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor | str]:
        kind, path = self.files[index]
        try:
            return path, self.reader.read(kind, path)
        except Exception as error:  # there is no end to the kinds of errors that decoders raise for broken files
            return path, str(error)


class FeatureFolder:
    """Writes features; what the index names is there in full, whenever the program is stopped."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.settings = folder, settings
        self.shards, self.skipped, self.sizes = {}, {}, {}
        self.waiting: dict[str, torch.Tensor] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "index.json").is_file():
            done = VisionFeatures(folder, settings)
            self.shards, self.skipped, self.sizes = done.shards, done.skipped, done.sizes

    @property
    def waiting_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.waiting.values())

    def write(self):
        """Makes a shard of the features that wait for it."""
        if self.waiting:
            name = f"features-{len(set(self.shards.values())):05d}.safetensors"
            save_file(self.waiting, self.folder / "unfinished")
            os.replace(self.folder / "unfinished", self.folder / name)
            self.shards |= dict.fromkeys(self.waiting, name)
            self.waiting = {}
        index = {name: getattr(self, name) for name in ("settings", "shards", "skipped", "sizes")}
        (self.folder / "unfinished").write_text(json.dumps(index, indent=1), encoding="utf-8")
        os.replace(self.folder / "unfinished", self.folder / "index.json")


def media_files(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Kind and path of every image and video of the records, each once."""
    files = {}
    for record in records:
        try:
            _, media = parse_record(record)
        except ValueError as error:
            print(f"{error} It is left out.")
            continue
        files |= {media_path(source): kind for kind, source in media}
    return [(kind, path) for path, kind in files.items()]


def file_size(reader: MediaReader, path: str) -> int | None:
    """Bytes of a file; None of an address, and where there is none."""
    location = reader.locate(path)
    return os.path.getsize(location) if os.path.isfile(location) else None


@torch.inference_mode()
def main(arguments: list[str] | None = None):
    (options,) = HfArgumentParser(FeatureArguments).parse_args_into_dataclasses(arguments)
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=options.dtype)
    reader = MediaReader(
        AutoProcessor.from_pretrained(options.model), options.media_folder, options.num_frames, options.fps
    )
    folder = FeatureFolder(Path(options.output), reader.settings(model))
    model.base_model.vision_tower.to(options.device)

    files = media_files(load_records(options.data))
    for path in (path for _, path in files if path in folder.shards):
        size = file_size(reader, path)
        if size not in (None, folder.sizes[path]):
            raise ValueError(
                f"'{path}' has {size} bytes and the file that the features in '{options.output}' were made from had "
                f"{folder.sizes[path]}; choose another output folder."
            )
    missing = [(kind, path) for kind, path in files if path not in folder.shards]
    loader = DataLoader(
        MediaFiles(missing, reader), batch_size=None, num_workers=options.num_workers, prefetch_factor=None
    )
    bar = tqdm(loader, desc="Features", unit="file", initial=len(files) - len(missing), total=len(files))
    failed = 0
    for tried, (path, pixels) in enumerate(bar, start=1):
        if isinstance(pixels, str):
            bar.write(f"{path} is skipped: {pixels}")
            folder.skipped[path] = pixels
            failed += 1
            if failed == tried == FIRST_TRIES:
                raise ValueError(
                    f"None of the first {tried} files can be read; the last is '{path}': {pixels} Check the paths and "
                    "the media folder."
                )
            continue
        features = model.base_model.encode_frames(pixels.reshape(-1, *pixels.shape[-3:])).last_hidden_state
        features = features.reshape(*pixels.shape[:-3], *features.shape[1:]).to("cpu", torch.float16)
        if not features.isfinite().all():
            raise ValueError(f"The features of '{path}' do not fit into float16; train on pixels with this tower.")
        folder.waiting[path] = features.contiguous()
        folder.sizes[path] = file_size(reader, path)
        folder.skipped.pop(path, None)
        if folder.waiting_bytes >= options.shard_size * 1e6:
            folder.write()
    folder.write()
    print(f"{len(folder.shards)} files have features in '{folder.folder}', {len(folder.skipped)} were skipped.")


if __name__ == "__main__":
    main()
