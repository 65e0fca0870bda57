"""`mambamia watch`: one question about a video that is still coming, again and again."""

import json
import sys
from argparse import Namespace
from functools import partial
from typing import TYPE_CHECKING

from .. import BUNDLED_CHECKPOINT
from .console import say
from .opening import check_output_path, checkpoint_of, say_loading


if TYPE_CHECKING:
    from ..live_video import LiveVideo, SampledFrame
    from ..video_stream import VideoStream


def run(arguments: Namespace) -> None:
    """Watch until the source ends, stalls, or somebody presses Ctrl-C; then save what was seen."""
    checkpoint = checkpoint_of(arguments)
    if arguments.save is not None:
        check_output_path(arguments.save, "memory")
    say_loading()
    from ..inference import find_device, load_model, load_processor
    from ..live_video import LiveVideo

    device, processor = find_device(arguments.device), load_processor(checkpoint)
    frames = processor.video_processor
    video = LiveVideo(
        arguments.source,
        fps=arguments.fps or frames.fps or 1.0,
        transform=partial(frames.resize, size=frames.size, resample=frames.resample) if frames.do_resize else None,
        timeout=arguments.timeout,
    )
    model = load_model(checkpoint, device, arguments.dtype)
    stream = model.stream(processor, keep_frames=arguments.keep_frames, name=video.name.strip("'"))
    watch = _Watch(arguments, stream, video)
    try:
        with video:
            watch.follow()
        say(f"{video.ending}; that was {clock(watch.time)}.")
    finally:
        if arguments.save is not None and len(stream):
            stream.memory.save(arguments.save)
            say(f"saved the memory of {clock(watch.time)} in {arguments.save}")


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, with as many hours as there are."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"


class _Watch:
    """Pushes what comes, and answers at each interval of the video's time.

    Attributes:
        time: of the newest frame, in seconds.
    """

    def __init__(self, arguments: Namespace, stream: "VideoStream", video: "LiveVideo"):
        self.question, self.every = arguments.question, arguments.every
        self.max_new_tokens, self.as_json = arguments.max_new_tokens, arguments.json
        self.source, self.checkpoint = video.name.strip("'"), arguments.model or BUNDLED_CHECKPOINT
        self.stream, self.video = stream, video
        self.time = 0.0
        self.num_missed = 0
        self.clock_start = 0.0
        self.is_answered = True

    def follow(self) -> None:
        """Watch to the end, at which there is a last answer."""
        due = self.every
        try:
            for frames in self.video.batches():
                self._tell_notes()
                coming: list[SampledFrame] = []
                for time, picture in frames:
                    if time >= due:
                        self._push(coming)
                        coming = []
                        self._answer(due)
                        due += ((time - due) // self.every + 1) * self.every  # what the model is too slow for is left
                    coming.append((time, picture))
                self._push(coming)
        except ValueError:  # of a stall, say, before which frames have come
            self._answer(self.time)
            raise
        self._tell_notes()
        if not len(self.stream):
            raise ValueError(f"{self.video.name} has no frames; check that a video player plays it.")
        self._answer(self.time)

    def _push(self, frames: "list[SampledFrame]") -> None:
        if frames:
            self.stream.push([picture for _, picture in frames], [time for time, _ in frames])
            self.time, self.is_answered = frames[-1][0], False

    def _answer(self, time: float) -> None:
        """Prints the answer for the video up to a time, unless nothing has come since the last one."""
        if self.is_answered:
            return
        self.is_answered = True
        if self.stream.clock_start != self.clock_start:
            self.clock_start = self.stream.clock_start
            say(
                f"the model's times end: from here on it is asked about what came since {clock(self.clock_start)}, "
                "and times in its answers count from there."
            )
        answer = self.stream.ask(self.question, self.max_new_tokens)
        if not self.as_json:
            print(f"{clock(time)}  {answer}", flush=True)
            return
        found = {
            "time": time,
            "question": self.question,
            "answer": answer,
            "source": self.source,
            "model": self.checkpoint,
            "clock_start": self.clock_start,
            "num_frames": len(self.stream),
            "kept_frames": self.stream.kept_frames,
            "kept_times": self.stream.memory.timestamps,
        }
        is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
        print(json.dumps(found, ensure_ascii=not is_unicode), flush=True)

    def _tell_notes(self) -> None:
        while not self.video.notes.empty():
            say(f"warning: of {self.video.name}, {self.video.notes.get()}")
        if self.video.num_missed > self.num_missed == 0:
            say(f"warning: {self.video.name} sends more frames than the model can take; some are left out.")
        self.num_missed = self.video.num_missed
