"""`transformers serve` in a process of its own, asked by the official OpenAI client."""

import base64
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from program import COMMAND, environment, wait_for_server
from transformers.utils.import_utils import is_serve_available
from video_files import write_video

from mambamia_hf import BUNDLED_CHECKPOINT, MambaMiaForConditionalGeneration, MambaMiaProcessor


openai = pytest.importorskip("openai")
if not is_serve_available():
    pytest.skip("the server's libraries are not installed", allow_module_level=True)
pytestmark = pytest.mark.slow

DEMO = Path(BUNDLED_CHECKPOINT).parent / "demo" / "needle.mp4"
# `transformers` where `mambamia_hf` cannot be imported.
STRANGER = "import sys; sys.modules['mambamia_hf'] = None; from transformers.cli.transformers import main; main()"
# Tokens of a prompt with one video beside those of its frames, and of each frame: its time and its anchor.
PROMPT, FRAME = 25, 6
# Tokens that the copy of the checkpoint with its code reads.
CONTEXT = 600


class Server:
    """A running server, and questions to it about one video, image or nothing."""

    def __init__(self, command: list[str], model: str, port: int, log: Path):
        self.model, self.log = model, log
        variables = {"OMP_NUM_THREADS": "1", "HF_HOME": str(log.parent / "hf_home")}
        with log.open("w") as file:
            self.process = subprocess.Popen(command, env=environment(**variables), stdout=file, stderr=file)
        self.address = f"http://localhost:{port}"
        self.client = openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0)

    def create(self, *content, messages=(), stream=False, **chat_template_kwargs):
        entries = [entry if isinstance(entry, dict) else {"type": "text", "text": entry} for entry in content]
        return self.client.chat.completions.create(
            model=self.model,
            messages=[*messages, {"role": "user", "content": entries}],
            max_tokens=6,
            temperature=0,
            stream=stream,
            extra_body={"chat_template_kwargs": chat_template_kwargs} if chat_template_kwargs else None,
        )

    def ask(self, *content, **kwargs) -> tuple[str, int]:
        """The answer and the number of tokens of the prompt."""
        completion = self.create(*content, **kwargs)
        return completion.choices[0].message.content, completion.usage.prompt_tokens

    def refuses(self, *content, **kwargs) -> str:
        """The sentence with which a request is refused, after which the server still answers."""
        with pytest.raises(openai.BadRequestError) as refusal:
            self.create(*content, **kwargs)
        assert self.ask(video(DEMO), "What shape appears?", keep_frames=4)[0] == "star"
        return refusal.value.response.json()["detail"]


def video(address) -> dict:
    return {"type": "video_url", "video_url": {"url": str(address)}}


def image(address) -> dict:
    return {"type": "image_url", "image_url": {"url": str(address)}}


def data(kind: str, path: Path) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module", params=["bundled", "with its code"])
def server(request, tmp_path_factory):
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    place = ["--host", "localhost", "--port", str(port)]
    if request.param == "bundled":
        model, command = BUNDLED_CHECKPOINT, [*COMMAND, "serve", *place, "--", "--device", "cpu"]
    else:
        model = str(folder / "checkpoint")
        copy = MambaMiaForConditionalGeneration.from_pretrained(BUNDLED_CHECKPOINT)
        copy.config.text_config.max_position_embeddings = CONTEXT
        copy.save_pretrained(model)
        MambaMiaProcessor.from_pretrained(BUNDLED_CHECKPOINT).save_pretrained(model)
        options = ["--trust-remote-code", "--device", "cpu", *place]
        command = [sys.executable, "-c", STRANGER, "serve", model, *options]
    server = Server(command, model, port, folder / "log.txt")
    try:
        wait_for_server(server.process, server.address, server.log)
        yield server
    finally:
        server.process.terminate()
        server.process.wait()


@pytest.fixture(scope="module")
def red_square(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("image") / "red square.png"
    picture = Image.new("RGB", (96, 96), "black")
    picture.paste((255, 0, 0), (30, 30, 66, 66))
    picture.save(path)
    return path


def test_video_by_path_and_address(server):
    for address in (DEMO, DEMO.as_uri(), data("video/mp4", DEMO)):
        assert server.ask(video(address), "What shape appears?") == ("star", PROMPT + 32 * FRAME)


def test_images_by_path_and_address(server, red_square):
    for address in (red_square, red_square.as_uri(), data("image/png", red_square)):
        assert server.ask(image(address), "What colour is the shape?")[0] == "red"
    assert server.ask(image(red_square), video(DEMO), "What shape appears in the video?")[1] > PROMPT + 32 * FRAME


def test_text_alone(server):
    assert server.ask("What shape appears?")[1] < PROMPT


def test_streaming(server):
    chunks = list(server.create(video(DEMO), "What shape appears?", stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "star"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_two_turns(server):
    first = {"role": "user", "content": [video(DEMO), {"type": "text", "text": "What shape appears?"}]}
    turns = [first, {"role": "assistant", "content": "star"}]
    answer, tokens = server.ask("What colour is the shape?", messages=turns)
    assert answer == server.ask(video(DEMO), "What colour is the shape?")[0]
    assert tokens > PROMPT + 32 * FRAME


def test_budgets(server):
    for options, frames in (
        ({"keep_frames": 4}, 4),
        ({"num_frames": 32, "keep_ratio": 0.5}, 16),
        ({"num_frames": None}, 64),  # the processor's own sampling
        ({"num_frames": None, "keep_ratio": 0.5}, 32),
        ({"num_frames": 8}, 8),
        ({"video_start": 0, "video_end": 5, "num_frames": None}, 10),
    ):
        assert server.ask(video(DEMO), "What shape appears?", **options)[1] == PROMPT + FRAME * frames, options


def test_short_video_keeps_all_its_frames(server, tmp_path):
    short = write_video(tmp_path / "short.mp4", num_frames=20)
    assert server.ask(video(short), "What shape appears?")[1] == PROMPT + 20 * FRAME


def test_bad_media_are_refused(server, tmp_path, red_square):
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    assert "cannot be read as a video" in server.refuses(video(text), "What?")
    assert "There is no video file" in server.refuses(video(tmp_path / "none.mp4"), "What?")
    assert "is an image where a video is meant" in server.refuses(video(red_square), "What?")
    assert "cannot be read as an image" in server.refuses(image(DEMO), "What?")
    assert "is no base64" in server.refuses(video("data:video/mp4;base64,@@@"), "What?")
    assert "tokens in the prompts" in server.refuses("<|video_pad|>")
    assert "cannot be read as a video" in server.refuses(video(text), "What?", stream=True)


def test_bad_budgets_are_refused(server):
    for options, fragment in (
        ({"keep_frame": 4}, "did you mean 'keep_frames'?"),
        ({"budget": 4}, "'budget'"),
        ({"keep_frames": "many"}, "keep_frames must be a whole number of at least 1, not many"),
        ({"keep_frames": 0}, "at least 1, not 0"),
        ({"keep_ratio": 2}, "keep_ratio must lie above 0"),
        ({"keep_frames": 4, "keep_ratio": 0.5}, "not both"),
        ({"video_start": 1000}, "The video ends after"),
    ):
        assert fragment in server.refuses(video(DEMO), "What shape appears?", **options)


def test_videos_beyond_the_context_are_refused(server):
    if server.model == BUNDLED_CHECKPOINT:
        pytest.skip("its context takes more videos than a request can hold")
    videos = [video(DEMO), video(DEMO)]
    message = server.refuses(*videos, "What shape appears?", num_frames=None)
    assert f"the language model reads at most {CONTEXT}: keep fewer frames" in message
    assert server.ask(*videos, "What shape appears?", num_frames=None, keep_ratio=0.25)[1] < CONTEXT
