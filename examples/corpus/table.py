"""Makes a Parquet data set of memories: a row per kept frame, with its time, its Δ and its tokens.

    PYTHONPATH=examples python -m corpus.table memories --output table --keep-ratio 0.25

The folder is one that `corpus.encode` wrote. No video is looked at again, so tables of other selections cost little. A
table is written whole or not at all; a memory that is damaged, or was made by another model, ends it with an error.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from mambamia_hf.cli.console import quieten_libraries, say
from mambamia_hf.cli.main import MODEL, SELECTION, add_options
from mambamia_hf.cli.opening import checkpoint_of
from mambamia_hf.files import atomic_folder
from mambamia_hf.inputs import MEMORY_SUFFIX

from .workers import add_workers, worker_settings


class FramesOf:
    """An actor of Ray: it holds the encoder, and gives a row for each kept frame of the memory that a row names."""

    def __init__(self, checkpoint: str, dtype: str | None, selection: dict[str, Any]) -> None:
        quieten_libraries()
        from mambamia_hf import MambaMiaEncoder
        from mambamia_hf.inference import load_checkpoint

        self.encoder, self.processor = load_checkpoint(checkpoint, dtype=dtype, kind=MambaMiaEncoder)
        self.selection = selection

    def __call__(self, batch: dict[str, Any]) -> Any:
        import pyarrow as pa
        import torch

        from mambamia_hf import VideoMemory

        memory = VideoMemory.load(batch["memory"][0], self.encoder, self.processor)
        with torch.no_grad():
            features = self.encoder.get_video_features(video_memories=[memory], **self.selection)
        kept = features.keep_mask[0].nonzero().squeeze(1).tolist()
        tokens = features.pooler_output[0].float().cpu().unflatten(0, (len(kept), -1))
        per_token = pa.FixedSizeListArray.from_arrays(pa.array(tokens.flatten().numpy()), tokens.shape[2])
        rows = memory.frames()
        return pa.table(
            {
                "video": pa.array([batch["name"][0]] * len(kept), pa.string()),
                "frame": pa.array(kept, pa.int32()),
                "time": pa.array([rows[frame]["time"] for frame in kept], pa.float64()),
                "delta": pa.array([rows[frame]["delta"] for frame in kept], pa.float32()),
                "tokens": pa.FixedSizeListArray.from_arrays(per_token, tokens.shape[1]),
            }
        )


def run(arguments: argparse.Namespace) -> None:
    """Writes the table.

    Raises:
        ValueError: if there are no memories.
        ray.exceptions.RayTaskError: if one cannot be used; its last line says why, and there is no table then.
    """
    memories = Path(arguments.memories).absolute()
    files = sorted(path for path in memories.rglob(f"*{MEMORY_SUFFIX}") if not path.parent.name.startswith("."))
    if not files:
        raise ValueError(f"there is no memory in '{memories}'; name a folder that corpus.encode wrote.")
    rows = [
        {"name": str(path.relative_to(memories)).removesuffix(MEMORY_SUFFIX), "memory": str(path)} for path in files
    ]
    names = ("keep_frames", "keep_ratio", "delta_threshold")
    settings = {
        "checkpoint": checkpoint_of(arguments),
        "dtype": arguments.dtype,
        "selection": {name: getattr(arguments, name) for name in names},
    }
    with atomic_folder(arguments.output) as folder:
        pool = worker_settings(arguments.workers, len(rows))
        import ray

        frames = ray.data.from_items(rows).map_batches(FramesOf, batch_size=1, fn_constructor_kwargs=settings, **pool)
        frames.write_parquet(str(folder), ray_remote_args={"num_cpus": 0})  # workers may have all cores


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m corpus.table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("memories", metavar="MEMORIES", help="a folder that corpus.encode wrote")
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="a new folder for the table")
    add_options(parser, {"": {name: settings for name, settings in MODEL.items() if name != "--device"}, **SELECTION})
    add_workers(parser)
    try:
        run(parser.parse_args())
    except (OSError, ValueError) as error:
        say(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
