"""vLLM's server as docs/vllm.md starts it, asked by the official OpenAI client."""

import base64
import importlib.util
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from asked_of_both import MAX_NEW_TOKENS, Answer, Transformers, check_same, for_servers, image, video
from pages import code_with
from PIL import Image
from program import environment, wait_for_server
from video_files import write_video

from mambamia_hf import BUNDLED_CHECKPOINT, MambaMiaForConditionalGeneration, MambaMiaProcessor


openai = pytest.importorskip("openai")
if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)
pytestmark = pytest.mark.slow

DEMO = Path(BUNDLED_CHECKPOINT).parent / "demo" / "needle.mp4"
PAGE = Path(__file__).parents[2] / "docs" / "vllm.md"
SHAPE = "What shape appears in the video?"
# Tokens that the server reads.
CONTEXT = 1000


def documented_command() -> list[str]:
    """The words of the command of docs/vllm.md that starts a server."""
    (command,) = re.findall(r"^(python -m vllm\.entrypoints.*?[^\\])$", PAGE.read_text(), re.M | re.S)
    return shlex.split(command.replace("\\\n", " "))


class Server:
    def __init__(self, folder: Path):
        with socket.socket() as listener:
            listener.bind(("localhost", 0))
            port = listener.getsockname()[1]
        values = {"path/to/checkpoint": BUNDLED_CHECKPOINT, "8000": str(port), "/videos": str(folder)}
        words = [values.get(word, word) for word in documented_command()]
        assert set(values.values()) < set(words)
        size = ["--dtype", "float32", "--max-model-len", str(CONTEXT), "--max-num-batched-tokens", "64"]
        limits = ["--enforce-eager", "--limit-mm-per-prompt", json.dumps({"image": 2, "video": 4})]
        on_cpu = ["--gpu-memory-utilization", "0.2", "--distributed-executor-backend", "uni"]
        variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}
        self.log = folder / "log.txt"
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *words[1:], *size, *limits, *on_cpu],
                env=environment(**variables, OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1")),
                stdout=file,
                stderr=file,
            )
        self.address = f"http://localhost:{port}"
        self.client = openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0)

    def create(self, messages, stream: bool = False, **options):
        return self.client.chat.completions.create(
            model=BUNDLED_CHECKPOINT,
            messages=messages,
            max_tokens=MAX_NEW_TOKENS,
            temperature=0,
            logprobs=not stream,
            stream=stream,
            extra_body={"return_token_ids": True, "mm_processor_kwargs": options or None},
        )

    def ask(self, parts, **options) -> Answer:
        completion = self.create(for_servers(parts), **options)
        (choice,) = completion.choices
        logprob = choice.logprobs.content[0].logprob
        return Answer(choice.token_ids, choice.message.content, completion.usage.prompt_tokens, logprob)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    (folder / "video.mp4").write_bytes(DEMO.read_bytes())
    write_video(folder / "short.mp4", num_frames=20)
    (folder / "text.mp4").write_text("no video")
    Image.new("RGB", (96, 96), "red").save(folder / "red.png")
    return folder


@pytest.fixture(scope="module")
def server(folder):
    server = Server(folder)
    try:
        wait_for_server(server.process, server.address, server.log)
        yield server
    finally:
        server.process.terminate()
        server.process.wait()


@pytest.fixture(scope="module")
def transformers():
    model = MambaMiaForConditionalGeneration.from_pretrained(BUNDLED_CHECKPOINT)
    return Transformers(model, MambaMiaProcessor.from_pretrained(BUNDLED_CHECKPOINT))


@pytest.mark.parametrize("options", [{}, {"keep_frames": 16}, {"keep_ratio": 1.0}, {"max_frames": 10}], ids=str)
def test_videos(server, transformers, folder, options):
    asked = [video(folder / "video.mp4"), SHAPE]
    budget = {} if {"keep_frames", "keep_ratio"} & options.keys() else {"keep_ratio": 0.5}
    check_same(server.ask(asked, **options), transformers.ask(asked, **budget, **options))


def test_images_and_videos(server, transformers, folder):
    asked = [image(folder / "red.png"), video(folder / "short.mp4"), video(folder / "video.mp4"), "What is shown?"]
    check_same(server.ask(asked), transformers.ask(asked, keep_ratio=0.5))


def test_base64_and_streaming(server, transformers, folder):
    expected = transformers.ask([video(folder / "video.mp4"), SHAPE], keep_ratio=0.5)
    data = f"data:video/mp4;base64,{base64.b64encode(DEMO.read_bytes()).decode()}"
    messages = for_servers([video(folder / "video.mp4"), SHAPE])
    messages[0]["content"][0]["video_url"]["url"] = data
    chunks = list(server.create(messages, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text == "star"


def test_documented_client(server, transformers, folder, capsys):
    code = code_with(PAGE, "python", "from openai")
    for word, value in {
        "http://localhost:8000": server.address,
        "/videos": str(folder),
        "path/to/checkpoint": BUNDLED_CHECKPOINT,
    }.items():
        assert word in code
        code = code.replace(word, value)
    exec(code, {})
    assert capsys.readouterr().out == "star\n"


@pytest.mark.parametrize(
    ("file", "options", "sentence"),
    [
        ("text.mp4", {}, "cannot be read as a video"),
        ("video.mp4", {"keep_frame": 4}, "did you mean 'keep_frames'"),
        ("video.mp4", {"budget": 4}, "The processor has no option 'budget'"),
        ("video.mp4", {"keep_frames": 0}, "keep_frames must be a whole number of at least 1, not 0"),
        ("video.mp4", {"keep_ratio": 2}, "keep_ratio must lie above 0"),
        ("video.mp4", {"keep_frames": 4, "keep_ratio": 0.5}, "not both"),
        ("video.mp4", {"video_start": 1000}, "The video ends after"),
    ],
    ids=str,
)
def test_bad_input_is_refused(server, folder, file, options, sentence):
    with pytest.raises(openai.BadRequestError) as refusal:
        server.ask([video(folder / file), SHAPE], **options)
    assert sentence in refusal.value.response.json()["error"]["message"]
    assert server.ask([video(folder / "video.mp4"), SHAPE]).text == "star"


def test_videos_beyond_the_context_are_refused(server, folder):
    asked = [*[video(folder / "video.mp4")] * 4, SHAPE]
    with pytest.raises(openai.BadRequestError) as refusal:
        server.ask(asked, keep_ratio=1.0)
    message = refusal.value.response.json()["error"]["message"]
    assert f"the model reads at most {CONTEXT} (max_model_len): keep fewer frames" in message
    assert server.ask(asked).prompt_tokens < CONTEXT
