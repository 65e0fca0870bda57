"""What one visitor of the page has open: a video or a memory, and a conversation. No visitor sees another's."""

import os
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ..auto import MambaMiaForConditionalGeneration, MambaMiaProcessor
from ..chat import VideoChat
from ..inputs import MEMORY_SUFFIX, check_video, is_memory, is_url
from ..video_decoding import VideoReader
from ..video_memory import VideoMemory
from ..video_sampling import open_video
from ..video_sources import VideoLimits, as_local_file
from .render import clock, jpeg_address, shrink, thumbnail_frames


# Which frames the language model reads, by what the page calls it.
BUDGETS: dict[str, dict[str, Any]] = {
    "as the model says": {},
    "all": {"delta_threshold": 0.0},
    "half": {"keep_ratio": 0.5},
    "a quarter": {"keep_ratio": 0.25},
    "a tenth": {"keep_ratio": 0.1},
}
MAX_EVIDENCE = 3
_SAME_DURATION = 0.5  # seconds by which a video may differ from that of its memory


@dataclass
class Host:
    """What all visitors share: one model, and the files that are served, each to who knows its secret address.

    Args:
        model, processor: of one checkpoint.
        opens_paths: whether the page lets visitors name files of this machine, and addresses that it can reach.
        limits: what a video may cost.
    """

    model: MambaMiaForConditionalGeneration
    processor: MambaMiaProcessor
    opens_paths: bool
    limits: VideoLimits = VideoLimits()
    files: dict[str, Callable[[], str]] = field(default_factory=dict)

    def publish(self, path: Callable[[], str]) -> str:
        """The address, relative to the page, of a file whose path is asked for at each request."""
        key = secrets.token_urlsafe(16)
        self.files[key] = path
        return f"media/{key}"

    def withdraw(self, address: str) -> None:
        del self.files[address.rpartition("/")[2]]


class Film:
    """A video that can be watched until `close()`, which removes what was uploaded or downloaded of it.

    Args:
        host: who serves it.
        source: an uploaded file, which is moved; or a path or URL.
        is_upload: which of these.

    Attributes:
        name: what to call it.
        path: of a local file, or of a folder of frames.
        address: where the browser finds it; None for a folder of frames.

    Raises:
        OSError, ValueError: if there is nothing at the path, or the download fails.
    """

    def __init__(self, host: Host, source: str, is_upload: bool):
        self.name = Path(unquote(urlsplit(source).path) if is_url(source) else source).name or "video"
        self.address: str | None = None
        with ExitStack() as resources:
            if is_upload:
                self.path = self._take(source, resources)
            elif is_url(source):
                with as_local_file(source, host.limits) as (path, _):
                    self.path = self._take(path, resources)
            else:
                check_video(source)
                self.path = source
            if not os.path.isdir(self.path):
                self.address = host.publish(lambda: self.path)
                resources.callback(host.withdraw, self.address)
            self._resources = resources.pop_all()

    def _take(self, path: str, resources: ExitStack) -> str:
        """Moves a file to a folder of its own, under the video's name."""
        folder = resources.enter_context(tempfile.TemporaryDirectory())
        return shutil.move(path, os.path.join(folder, self.name))

    def close(self) -> None:
        self._resources.close()

    @contextmanager
    def kept_if_usable(self) -> Iterator[None]:
        """Closes the film after an error, whose sentence then has its name in place of a path that tells nothing."""
        try:
            yield
        except BaseException as error:
            self.close()
            if isinstance(error, OSError | ValueError):
                raise ValueError(str(error).replace(self.path, self.name)) from error
            raise

    def thumbnails(self, memory: VideoMemory, processor: MambaMiaProcessor) -> dict[int, str]:
        """Pictures of the frames that the timeline shows, by their numbers; those that can be decoded."""
        wanted = thumbnail_frames(len(memory), deltas_of(memory))
        with closing(open_video(self.path, processor.video_processor, None, None)) as reader:
            indices = reader.metadata.frames_shown_at([memory.timestamps[frame] for frame in wanted])
            batch = reader.frames_at(indices, shrink)
        found = dict(zip(batch.indices, batch.data, strict=True))
        return {
            frame: jpeg_address(found[index])
            for frame, index in zip(wanted, map(int, indices), strict=True)
            if index in found
        }


def deltas_of(memory: VideoMemory) -> list[float] | None:
    """Δ of each frame of a memory, if it has any."""
    return None if memory.frame_deltas is None else memory.frame_deltas.tolist()


class Session:
    """A visitor's video, memory and conversation; empty at first.

    Args:
        host: the model and the files that are served.

    Attributes:
        film: the video to watch, if there is one.
        memory: of the video that is asked about.
        memory_address: where the browser finds the saved memory.
        thumbnails: see [`Film.thumbnails`].
        chat: the conversation.
    """

    def __init__(self, host: Host):
        self.host = host
        self.film: Film | None = None
        self.memory: VideoMemory | None = None
        self.memory_address: str | None = None
        self.thumbnails: dict[int, str] = {}
        self.chat: VideoChat | None = None
        self._folder = tempfile.TemporaryDirectory()

    @property
    def name(self) -> str:
        """What to call the video."""
        return Path(self.memory.name).name if self.memory is not None else ""

    @property
    def duration(self) -> float:
        """Of the video in seconds, as far as known; 0 without a video."""
        if self.memory is None:
            return 0.0
        return max(self.memory.duration or 0.0, *self.memory.timestamps)

    def evidence(self) -> list[dict[str, Any]]:
        """The frames that the last question and its answer attended to most; see [`VideoChat.evidence`]."""
        if self.chat is None or not self.chat.messages:
            return []
        try:
            return self.chat.evidence(MAX_EVIDENCE)
        except ValueError:  # the model has nothing to tell frames by
            return []

    def open(
        self,
        source: str,
        is_upload: bool,
        budget: str,
        sampling: dict[str, Any],
        progress: Callable[[int, int], None],
    ) -> list[str]:
        """Open a video, which is encoded, or a saved memory in place of what was open; after an error that still is.

        Args:
            source: an uploaded file, which is moved or removed; or a path or URL.
            is_upload: which of these.
            budget: one of `BUDGETS`.
            sampling: which frames of a video, as `encode_video` takes it.
            progress: called with how many frames are encoded, and of how many.

        Returns:
            What there is to say of the file, a sentence each.

        Raises:
            OSError, ValueError: if the video or the memory cannot be used.
        """
        if is_memory(source):
            self._open_memory(source, is_upload, budget)
            return []
        film = Film(self.host, source, is_upload)
        with film.kept_if_usable(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            model, processor = self.host.model, self.host.processor
            memory = model.encode_video(film.path, processor, progress=progress, **sampling)
            thumbnails, chat = film.thumbnails(memory, processor), self._chat(memory, budget)
        self._show(memory, chat, film, thumbnails)
        return [str(warning.message).replace(film.path, film.name) for warning in caught]

    def _open_memory(self, path: str, is_upload: bool, budget: str) -> None:
        try:
            memory = VideoMemory.load(path, self.host.model, self.host.processor)
        except (OSError, ValueError) as error:
            raise ValueError(str(error).replace(path, Path(path).name)) from error
        finally:
            if is_upload:
                os.unlink(path)
        self._show(memory, self._chat(memory, budget), None, {})

    def add_film(self, source: str) -> None:
        """Add the uploaded video of an open memory, to watch it.

        Raises:
            OSError, ValueError: if no memory is open, or the file is not the video that it was made of.
        """
        if self.memory is None:
            raise ValueError("there is no memory open; choose one first, then its video.")
        film = Film(self.host, source, is_upload=True)
        with film.kept_if_usable():
            with VideoReader(film.path) as reader:
                duration = float(reader.metadata.duration or 0)
            if self.memory.duration is not None and abs(duration - self.memory.duration) > _SAME_DURATION:
                raise ValueError(
                    f"the memory is of a video of {clock(self.memory.duration)}, and {film.name} lasts "
                    f"{clock(duration)}; choose the video that it was made of."
                )
            thumbnails = film.thumbnails(self.memory, self.host.processor)
        self._close_film()
        self.film, self.thumbnails = film, thumbnails

    def choose(self, budget: str) -> None:
        """Begin a new conversation in which the language model reads other frames; they are not encoded again."""
        if self.memory is not None:
            self.chat = self._chat(self.memory, budget)

    def begin_again(self) -> None:
        """Forget the conversation, not the video."""
        if self.chat is not None:
            self.chat = self.chat.fork()

    def stream(self, question: str) -> Generator[str, None, None]:
        """The answer to a question, in pieces as the model writes it.

        Raises:
            ValueError: with the first piece, if nothing is open, or the question cannot be asked.
        """
        if self.chat is None:
            raise ValueError("there is no video yet; open one first, then ask about it.")
        yield from self.chat.stream(question)

    def close(self) -> None:
        """Remove every file of the visitor's, and forget the rest."""
        self._close_film()
        self._close_memory()
        self._folder.cleanup()

    def _chat(self, memory: VideoMemory, budget: str) -> VideoChat:
        return VideoChat(self.host.model, self.host.processor, memory, **BUDGETS[budget])

    def _show(self, memory: VideoMemory, chat: VideoChat, film: Film | None, thumbnails: dict[int, str]) -> None:
        self._close_film()
        self._close_memory()
        self.memory, self.chat, self.film, self.thumbnails = memory, chat, film, thumbnails
        self.memory_address = self.host.publish(self._saved_memory)

    def _saved_memory(self) -> str:
        assert self.memory is not None
        path = os.path.join(self._folder.name, f"{self.name}{MEMORY_SUFFIX}")
        self.memory.save(path)
        return path

    def _close_film(self) -> None:
        if self.film is not None:
            self.film.close()
        self.film, self.thumbnails = None, {}

    def _close_memory(self) -> None:
        if self.memory_address is not None:
            self.host.withdraw(self.memory_address)
        self.memory = self.memory_address = self.chat = None
