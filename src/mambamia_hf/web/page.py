"""The page: what is on it, and what happens when something is clicked."""

import html
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import gradio as gr

from ..cli.arguments import seconds, whole_number
from ..inputs import check_part
from .render import (
    answer_markdown,
    clock,
    evidence_markdown,
    notice,
    plain_markdown,
    player,
    saved_link,
    timeline,
)
from .session import BUDGETS, Host, Session, deltas_of


Messages = list[dict[str, Any]]
Changes = dict[Any, Any]  # of each component that changes, what it shows now

WELCOME = "Upload a video, or open a saved memory. It is encoded once; after that, questions take moments."
ASK_FIRST = "### Ask about the video\nTimes in the answers are links that take the player there."

_PROGRESS = gr.Progress()

# The model works for one visitor at a time; the others queue.
_MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}


class Page:
    """The page of a model.

    Args:
        host: the model.
        model_name: what to call it.
        example: path of a video to try.
        questions: to ask about it.

    Attributes:
        blocks: to be mounted on a server.
    """

    def __init__(self, host: Host, model_name: str, example: str | None = None, questions: tuple[str, ...] = ()):
        self.host, self.example = host, example
        with gr.Blocks(title="MambaMia", analytics_enabled=False) as self.blocks:
            self.session = gr.State(None, delete_callback=lambda session: session and session.close())
            gr.HTML(
                '<header class="mm-head"><h1>MambaMia</h1><p>Questions about videos of up to hours, answered by '
                f"{html.escape(model_name)}</p></header>"
            )
            with gr.Row():
                with gr.Column(scale=6, min_width=320):
                    self._place_sources()
                    self._place_screen()
                with gr.Column(scale=5, min_width=320, elem_id="mm-side"):
                    self._place_conversation(questions)
            self._connect_sources()
            self._connect_conversation()

    def _place_sources(self) -> None:
        with gr.Accordion("Open a video", elem_id="mm-open") as self.sources:
            with gr.Tabs():
                with gr.Tab("Upload"):
                    self.upload = gr.File(label="A video, or a saved memory", height=130, elem_id="mm-upload")
                if self.host.opens_paths:
                    with gr.Tab("Path"):
                        self.path = gr.Textbox(
                            "",
                            label="A video, a folder of its frames or a saved memory on this machine, or a URL",
                            placeholder="/videos/trip.mp4",
                            submit_btn="Open",
                            elem_id="mm-path",
                        )
            with gr.Accordion("Which frames are looked at", open=False), gr.Row():
                self.num_frames = gr.Textbox("", label="Number", placeholder="as set", min_width=80)
                self.start = gr.Textbox("", label="From", placeholder="0:00", min_width=80)
                self.end = gr.Textbox("", label="To", placeholder="the end", min_width=80)
            if self.example is not None:
                self.try_example = gr.Button("Try the example video", elem_id="mm-example")

    def _place_screen(self) -> None:
        self.status = gr.HTML(notice(WELCOME), elem_id="mm-status")
        self.screen = gr.HTML(elem_id="mm-player")
        self.its_video = gr.File(label="Its video, to watch it", height=110, visible=False, elem_id="mm-its-video")
        self.timeline = gr.HTML(elem_id="mm-timeline")

    def _place_conversation(self, questions: tuple[str, ...]) -> None:
        self.chat = gr.Chatbot(
            label="Conversation",
            height=540,
            placeholder=ASK_FIRST,
            latex_delimiters=[],
            buttons=["copy_all"],
            examples=[{"text": question} for question in questions] or None,
            elem_id="mm-chat",
        )
        self.chat_status = gr.HTML(elem_id="mm-chat-status")
        self.question = gr.Textbox(
            "",
            label="Question",
            show_label=False,
            placeholder="Ask about the video",
            submit_btn=True,
            elem_id="mm-question",
        )
        self.again = gr.Button("New conversation", size="sm", elem_id="mm-again")
        self.budget = gr.Radio(
            list(BUDGETS),
            value=next(iter(BUDGETS)),
            label="Frames that the language model reads",
            visible=False,
            elem_id="mm-budget",
        )
        self.save = gr.HTML(elem_id="mm-save")

    def _connect_sources(self) -> None:
        changed = [
            *(self.session, self.sources, self.upload, self.its_video, self.status, self.screen),
            *(self.timeline, self.budget, self.save, self.chat, self.chat_status),
        ]
        sampling = [self.budget, self.num_frames, self.start, self.end]
        shown: dict[str, Any] = {**_MODEL, "outputs": changed, "show_progress_on": self.status}
        self.upload.upload(self._open, [self.session, self.upload, gr.State(True), *sampling], **shown)
        self.its_video.upload(self._add_film, [self.session, self.its_video], **shown)
        if self.host.opens_paths:
            self.path.submit(self._open, [self.session, self.path, gr.State(False), *sampling], **shown)
        if self.example is not None:
            example = [gr.State(self.example), gr.State(False)]
            self.try_example.click(self._open, [self.session, *example, *sampling], **shown)
        self.budget.input(self._choose, [self.session, self.budget], **shown)

    def _connect_conversation(self) -> None:
        answered = [self.session, self.question, self.chat, self.chat_status]
        asked: dict[str, Any] = {**_MODEL, "outputs": answered, "show_progress": "hidden"}
        answering = [
            self.question.submit(self._ask, [self.session, self.question, self.chat], **asked),
            self.chat.example_select(self._ask_example, [self.session, self.chat], **asked),
        ]
        ready = {"submit_btn": True, "stop_btn": False}
        self.question.stop(
            lambda: gr.Textbox(**ready),
            outputs=self.question,
            cancels=answering,
            queue=False,
            api_visibility="private",
        )
        for forget in (self.again.click, self.chat.clear):
            forget(self._begin_again, self.session, [self.session, self.chat, self.chat_status], **_MODEL)

    def _open(
        self,
        session: Session | None,
        source: str,
        is_upload: bool,
        budget: str,
        num_frames: str,
        start: str,
        end: str,
        progress: gr.Progress = _PROGRESS,  # Gradio puts that of the event in its place
    ) -> Changes:
        session = session or Session(self.host)

        def tell(done: int, total: int) -> None:
            progress((done, total), desc="Looking at the frames", unit="frames")

        def open_it() -> list[str]:
            return session.open(source.strip(), is_upload, budget, _sampling(num_frames, start, end), tell)

        return self._change(session, open_it)

    def _add_film(self, session: Session | None, path: str) -> Changes:
        session = session or Session(self.host)
        return self._change(session, lambda: session.add_film(path))

    def _choose(self, session: Session | None, budget: str) -> Changes:
        session = session or Session(self.host)
        return self._change(session, lambda: session.choose(budget))

    def _change(self, session: Session, action: Callable[[], list[str] | None]) -> Changes:
        """Do something that opens or changes what is shown; an error leaves it as it is."""
        changes: Changes = {self.session: session, self.upload: None, self.its_video: None}
        try:
            said = action() or []
        except (OSError, ValueError) as error:
            return {**changes, self.status: notice(str(error), is_error=True)}
        return {**changes, **self._shown(session), self.status: notice(_sentences(session, said))}

    def _shown(self, session: Session) -> Changes:
        """What the page shows of a session."""
        memory, film, chat = session.memory, session.film, session.chat
        if memory is None or chat is None or session.memory_address is None:
            return {}
        kept = chat.kept_frames
        return {
            self.sources: gr.Accordion(open=False),
            self.screen: player(film.address if film is not None else None, session.name),
            self.its_video: gr.File(None, visible=film is None),
            self.timeline: timeline(memory.timestamps, deltas_of(memory), kept, session.thumbnails),
            self.budget: gr.Radio(visible=memory.frame_deltas is not None),
            self.save: saved_link(session.memory_address, session.name),
            self.chat: [],
            self.chat_status: "",
        }

    def _ask(self, session: Session | None, question: str, messages: Messages) -> Iterator[Changes]:
        """Stream the answer to a question into the conversation."""
        if not question.strip():
            return
        session = session or Session(self.host)
        before, duration = list(messages), session.duration
        asked = [*before, {"role": "user", "content": plain_markdown(question)}]
        yield {
            self.question: gr.Textbox("", submit_btn=False, stop_btn=True),
            self.chat: [*asked, {"role": "assistant", "content": "…"}],
            self.chat_status: "",
        }
        answer, end = "", {self.session: session, self.question: gr.Textbox(submit_btn=True, stop_btn=False)}
        try:
            with closing(session.stream(question)) as pieces:
                for piece in pieces:
                    answer += piece
                    reply = answer_markdown(answer, duration)
                    yield {self.chat: [*asked, {"role": "assistant", "content": reply}]}
        except (OSError, ValueError) as error:
            back = gr.Textbox(question, submit_btn=True, stop_btn=False)
            yield {**end, self.question: back, self.chat: before, self.chat_status: notice(str(error), is_error=True)}
            return
        reply = answer_markdown(answer, duration) or "*(no answer)*"
        reply += f"\n\n{evidence_markdown(session.evidence())}"
        yield {**end, self.chat: [*asked, {"role": "assistant", "content": reply.rstrip()}]}

    def _ask_example(self, session: Session | None, messages: Messages, chosen: gr.SelectData) -> Iterator[Changes]:
        yield from self._ask(session, chosen.value["text"], messages)

    def _begin_again(self, session: Session | None) -> Changes:
        session = session or Session(self.host)
        session.begin_again()
        return {self.session: session, self.chat: [], self.chat_status: ""}


def _sampling(num_frames: str, start: str, end: str) -> dict[str, Any]:
    """The options of `encode_video` from what was typed.

    Raises:
        ValueError: for what is no number, no time, or no part of a video.
    """
    which: dict[str, Any] = {}
    fields = (("num_frames", "Number", num_frames, whole_number), ("start", "From", start, seconds))
    for option, label, typed, read in (*fields, ("end", "To", end, seconds)):
        if typed.strip():
            try:
                which[option] = read(typed.strip())
            except ArgumentTypeError as error:
                raise ValueError(f"'{label}' {error}.") from error
    check_part(which.get("start", 0.0), which.get("end"))
    return which


def _sentences(session: Session, said: list[str]) -> str:
    """What is open, and what there is to say of it."""
    memory = session.memory
    if memory is None:
        return WELCOME
    lasts = "" if memory.duration is None else f" ({clock(memory.duration)})"
    return " ".join([f"Open: {session.name}{lasts}, {len(memory)} frames.", *said])
