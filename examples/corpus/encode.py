"""Writes a memory of each video of a corpus, on all that Ray has: the cores of this machine, or a cluster.

    PYTHONPATH=examples python -m corpus.encode VIDEOS --output memories

VIDEOS is a folder, or a text file with a path or an address per line. Memories are those of `mambamia encode`, named
as their videos in the corpus. Call it again after an interruption, or when there are more videos: what is there is not
done twice. A video that fails does not stop the others. At the end `report.jsonl` in the folder of the memories tells
what became of each video, and the exit status is 2 if one failed.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mambamia_hf.cli.console import quieten_libraries, say
from mambamia_hf.cli.encode import sampling_of
from mambamia_hf.cli.main import ENCODE, SAMPLING, add_options
from mambamia_hf.cli.opening import checkpoint_of
from mambamia_hf.files import atomic_write
from mambamia_hf.inputs import MEMORY_SUFFIX, check_part, check_video
from mambamia_hf.messages import without_secrets

from .videos import find_videos
from .workers import add_workers, worker_settings


REPORT = "report.jsonl"
Row = dict[str, Any]


class Encode:
    """An actor of Ray: it holds the encoder, and writes the memory of the video that a row names."""

    def __init__(self, checkpoint: str, dtype: str | None, sampling: dict[str, Any]) -> None:
        quieten_libraries()
        from mambamia_hf import MambaMiaEncoder
        from mambamia_hf.inference import load_checkpoint
        from mambamia_hf.memory_writer import MemoryWriter

        self.writer = MemoryWriter(*load_checkpoint(checkpoint, dtype=dtype, kind=MambaMiaEncoder), **sampling)

    def __call__(self, row: Row) -> Row:
        start = time.perf_counter()
        target = Path(row["memory"])
        try:
            check_video(row["video"])
            target.parent.mkdir(parents=True, exist_ok=True)
            outcome, error = self.writer.write(row["video"], target), ""
        except (OSError, ValueError) as reason:
            outcome, error = "failed", str(reason)
        return {**row, "outcome": outcome, "error": error, "seconds": time.perf_counter() - start}


def encode(rows: list[Row], workers: int | None, **settings: Any) -> Iterator[Row]:
    """The rows as they are done, in any order. Those of which a worker died twice, or met what nobody expected, are
    missing.

    Args:
        rows: with "video" and "memory", where to write it.
        workers: see `worker_settings`.
        settings: arguments of [`Encode`].
    """
    pool = worker_settings(workers, len(rows))
    import ray

    ray.data.DataContext.get_current().max_errored_blocks = -1
    videos = ray.data.from_items(rows, override_num_blocks=len(rows))
    done = videos.map(
        Encode, fn_constructor_kwargs=settings, ray_remote_args_fn=lambda: {"max_task_retries": 1}, **pool
    )
    yield from done.iter_rows()


def run(arguments: argparse.Namespace) -> int:
    """Encodes the corpus, prints the paths of the memories, and writes the report.

    Returns:
        The exit code: 0, or 2 if a video could not be encoded.
    """
    check_part(arguments.start, arguments.end)
    checkpoint = checkpoint_of(arguments)
    output = Path(arguments.output).absolute()
    rows = [
        {"name": name, "video": video, "memory": str(output / f"{name}{MEMORY_SUFFIX}")}
        for name, video in find_videos(Path(arguments.videos)).items()
    ]
    output.mkdir(parents=True, exist_ok=True)
    settings = {"checkpoint": checkpoint, "dtype": arguments.dtype, "sampling": sampling_of(arguments)}
    done: dict[str, Row] = {}
    for row in encode(rows, arguments.workers, **settings):
        done[row["name"]] = row
        if row["outcome"] == "failed":
            say(f"error: {row['error']}")
        else:
            print(row["memory"], flush=True)
    lost = "a worker died of it twice, or met what nobody expected; see what Ray logged"
    results = [done.get(row["name"], {**row, "outcome": "failed", "error": lost, "seconds": None}) for row in rows]
    with atomic_write(output / REPORT) as partial, partial.open("w", encoding="utf-8") as file:
        for row in results:
            file.write(json.dumps({**row, "video": without_secrets(row["video"])}, ensure_ascii=False) + "\n")
    failed = sum(row["outcome"] == "failed" for row in results)
    say(f"{len(results) - failed} of {len(results)} videos have a memory; see {output / REPORT}")
    return 2 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m corpus.encode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("videos", metavar="VIDEOS", help="a folder, or a text file with a path or address per line")
    options = {name: settings for name, settings in ENCODE[""].items() if name not in ("videos", "--device")}
    add_options(parser, {"": options, **SAMPLING})
    add_workers(parser)
    try:
        return run(parser.parse_args())
    except (OSError, ValueError) as error:
        say(f"error: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
