"""`mambamia demo`: a small video with something hidden in it, what the bundled model says it is, and the picture."""

import json
import shutil
import sys
from argparse import Namespace
from pathlib import Path

from .. import BUNDLED_CHECKPOINT
from ..files import atomic_write
from .console import quieten_libraries, say


VIDEO = Path(__file__).parents[1] / "demo" / "needle.mp4"
KEEP_RATIO = 0.5


def run(arguments: Namespace) -> None:
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    video, plot = folder / VIDEO.name, folder / "timeline.png"
    with atomic_write(video) as partial:
        shutil.copyfile(VIDEO, partial)
    needle = json.loads(VIDEO.with_suffix(".json").read_text(encoding="utf-8"))
    if sys.stderr.isatty():
        say("loading ...")
    quieten_libraries()
    from ..inference import encode_video
    from .timeline import draw_timeline

    encoded = encode_video(BUNDLED_CHECKPOINT, video, keep_ratio=KEEP_RATIO)
    answer = encoded.ask(needle["question"])
    frames, (rows, columns) = len(answer.timestamps), encoded.model.config.patch_grid()
    patches, anchors = frames * rows * columns, frames * encoded.processor.tokens_per_frame
    print(f"question  {answer.question}")
    print(f"answer    {answer.answer}")
    print(f"truth     {needle['answer']} (of {', '.join(needle['options'])})")
    print(
        f"tokens    {frames} frames -> {patches:,} patches -> {anchors:,} anchors -> {answer.video_tokens:,} video "
        f"tokens ({len(answer.kept_frames)} frames kept)"
    )
    print(f"seconds   {', '.join(f'{stage} {seconds:.2f}' for stage, seconds in answer.seconds.items())}")
    print(f"video     {video}", flush=True)
    draw_timeline(plot, encoded, [(answer.question, answer.answer)])
    print(f"plot      {plot}", flush=True)
