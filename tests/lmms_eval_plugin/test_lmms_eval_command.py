"""`python -m lmms_eval` as docs/lmms_eval.md starts it, and on a task of all kinds of messages."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pages import code_with
from PIL import Image
from program import environment
from video_files import write_video

from mambamia_hf import BUNDLED_CHECKPOINT
from mambamia_hf.inference import load_checkpoint


if importlib.util.find_spec("lmms_eval") is None:
    pytest.skip("lmms-eval is not installed", allow_module_level=True)
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "lmms_eval.md"
DEMO = Path(BUNDLED_CHECKPOINT).parent / "demo" / "needle.mp4"

# A task of files in the working directory, whose messages stand in its records.
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {name}.jsonl
test_split: test
output_type: generate_until
doc_to_messages: !function messages.doc_to_messages
doc_to_text: name
doc_to_target: name
generation_kwargs:
  {settings}
process_results: !function messages.process_results
metric_list:
  - metric: accuracy
    aggregation: mean
    higher_is_better: true
"""
MESSAGES = """
import json

from PIL import Image

def doc_to_messages(doc):
    messages = json.loads(doc["messages"])
    for turn in messages:
        for part in turn["content"]:
            if part["type"] == "image":
                part["url"] = Image.open(part["url"])
    return messages

def process_results(doc, results):
    return {"accuracy": 0.0}
"""

SHAPE = {"type": "text", "text": "What shape appears in the video?"}
COLOUR = {"type": "text", "text": "What colour is the shape?"}
NEEDLE = {"type": "video", "url": "needle.mp4"}
NUMBERS = {"type": "video", "url": "numbers.mp4"}
RED = {"type": "image", "url": "red.png"}


def user(*content):
    return {"role": "user", "content": list(content)}


CONVERSATIONS = {
    "a video": [user(NEEDLE, SHAPE)],
    "the same video": [user(NEEDLE, COLOUR)],
    "another video": [user(NUMBERS, SHAPE)],
    "a part": [user({**NEEDLE, "start_time": 2.0, "end_time": 9.0}, SHAPE)],
    "a part as a dictionary": [
        user({"type": "video", "url": {"type": "video", "path": "needle.mp4", "video_start": 2.0, "video_end": 9.0}})
    ],
    "two videos": [user(NEEDLE, NUMBERS, SHAPE)],
    "an image": [user(RED, {"type": "text", "text": "What colour is the image?"})],
    "an image and a video": [user(RED, NEEDLE, SHAPE)],
    "several turns": [
        user(NEEDLE, SHAPE),
        {"role": "assistant", "content": [{"type": "text", "text": "star"}]},
        user(COLOUR),
    ],
    "a system turn": [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, user(NEEDLE, SHAPE)],
    "text": [user({"type": "text", "text": "What is a star?"})],
}


def start(folder: Path, command: str, **variables: str) -> subprocess.Popen:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", "-e", "-c", command],
        cwd=folder,
        env=environment(HF_HOME=str(folder / "cache"), PATH=path, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(folder: Path, command: str, **variables: str) -> str:
    process = start(folder, command, **variables)
    log, _ = process.communicate()
    assert process.returncode == 0, log
    return log


def write_task(folder: Path, name: str, conversations: dict, settings: str = "max_new_tokens: 6") -> None:
    tasks = folder / "tasks"
    tasks.mkdir(exist_ok=True)
    (tasks / "messages.py").write_text(MESSAGES)
    (tasks / f"{name}.yaml").write_text(TASK.format(name=name, settings=settings))
    rows = [{"name": name, "messages": json.dumps(messages)} for name, messages in conversations.items()]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def samples(folder: Path, task: str) -> list[dict]:
    (file,) = folder.glob(f"**/*_samples_{task}.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(rows, key=lambda row: row["doc_id"])


def answers(folder: Path, task: str) -> list[str]:
    return [row["filtered_resps"] for row in samples(folder, task)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "needle.mp4").write_bytes(DEMO.read_bytes())
    write_video(folder / "numbers.mp4", num_frames=20)
    Image.new("RGB", (96, 96), "red").save(folder / "red.png")
    write_task(folder, "mixed", CONVERSATIONS)
    settings = 'until: ["r", "o"]\n  max_new_tokens: 5\n  temperature: 0\n  do_sample: true\n  image_aspect_ratio: pad'
    write_task(folder, "short", {"a video": CONVERSATIONS["a video"]}, settings)
    return folder


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint(BUNDLED_CHECKPOINT, device="cpu", dtype="float32")


def generated(checkpoint, folder: Path, messages: list, max_new_tokens: int, **options) -> str:
    """What Transformers answers to messages of lmms-eval."""
    model, processor = checkpoint

    def entry(part: dict) -> dict:
        if part["type"] == "text":
            return part
        if part["type"] == "image":
            return {"type": "image", "image": Image.open(folder / part["url"])}
        about = part["url"] if isinstance(part["url"], dict) else {"path": part["url"]}
        about = {"video_start": part.get("start_time"), "video_end": part.get("end_time"), **about}
        times = {name: about[name] for name in ("video_start", "video_end") if about[name] is not None}
        return {"type": "video", "video": str(folder / about["path"]), **times}

    inputs = processor.apply_chat_template(
        [{**turn, "content": [entry(part) for part in turn["content"]]} for turn in messages],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=options,
    )
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("program", "batch_size"), [("python", 1), ("python", 4), ("torchrun --nproc_per_node 2", 2)], ids=str
)
def test_messages_of_all_kinds(folder, checkpoint, monkeypatch, program, batch_size):
    output = folder / f"mixed-{batch_size}"
    log = run(
        folder,
        f"{program} -m lmms_eval --model mambamia --device cpu --include_path tasks --tasks mixed,short --log_samples "
        "--model_args dtype=float32,max_num_frames=16,keep_ratio=0.5,attn_implementation=eager "
        f"--batch_size {batch_size} --output_path {output}",
        LMMS_EVAL_PLUGINS="mambamia_hf.lmms_eval",
        ACCELERATE_USE_CPU="true",
    )
    monkeypatch.setattr(checkpoint[1].video_processor, "num_frames", 16)
    expected = [generated(checkpoint, folder, messages, 6, keep_ratio=0.5) for messages in CONVERSATIONS.values()]
    assert len(set(expected)) > 4, expected
    assert answers(output, "mixed") == [answer.strip() for answer in expected]
    assert samples(output, "mixed")[0]["token_counts"][0]["output_tokens"] > 1

    # Cut before the first of the ends, without sampling, and with a word on what is not used.
    (answer,) = answers(output, "short")
    assert answer == re.split("[ro]", expected[0])[0] != expected[0]
    assert "Not used of generation_kwargs: image_aspect_ratio." in log


def test_the_needle_task(folder, checkpoint):
    run(folder, code_with(PAGE, "bash", "--num_frames 32"))
    records = [json.loads(line) for line in (folder / "needles" / "records" / "train.jsonl").read_text().splitlines()]
    given = answers(folder / "results", "mambamia_needle")
    assert len(given) == len(records) == 30
    right = [answer in record["answers"] for answer, record in zip(given, records, strict=True)]
    results = [json.loads(path.read_text())["results"] for path in (folder / "results").glob("**/*_results.json")]
    (scores,) = [scores["mambamia_needle"] for scores in results if "mambamia_needle" in scores]
    assert scores["accuracy,none"] == pytest.approx(sum(right) / 30)
    assert sum(right) >= 27
    for record, answer in list(zip(records, given, strict=True))[:5]:
        question = {"type": "text", "text": record["conversations"][0]["value"].removeprefix("<video>\n")}
        messages = [user({"type": "video", "url": f"needles/{record['video']}"}, question)]
        assert generated(checkpoint, folder, messages, 8) == answer


def test_a_run_that_was_killed_goes_on(folder):
    """The second run has the answers of the first, and ends at a video that is none."""
    (folder / "text.mp4").write_text("no video")
    good = {str(number): [user({**NEEDLE, "end_time": 4.0 + number}, SHAPE)] for number in range(30)}
    write_task(folder, "broken", {**good, "bad": [user({"type": "video", "url": "text.mp4"}, SHAPE)]})
    command = "python -m lmms_eval --model mambamia --device cpu --include_path tasks --tasks broken --use_cache kept"
    process = start(folder, f"exec {command}", LMMS_CACHE_RUN_ID="broken")
    kept = folder / "kept" / "runs" / "broken" / "rank_0.audit.jsonl"
    while not kept.exists() or kept.read_text().count("\n") < 3:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.kill()
    process.communicate()
    num_answers = kept.read_text().count("\n")
    assert num_answers < len(good)

    log = run(folder, command, LMMS_CACHE_RUN_ID="broken")
    assert f"{num_answers}/31 cache hits" in log
    assert kept.read_text().count("\n") == len(good)
    assert "Error during evaluation: Question 30 of broken: " in log and "text.mp4" in log


def test_videomme_on_needle_videos(folder):
    """lmms-eval's own task, on questions in the format of its data."""
    run(folder, code_with(PAGE, "bash", "needle.videomme"))
    questions = [json.loads(line) for line in (folder / "lmms-eval/Video-MME/test.jsonl").read_text().splitlines()]
    rows = samples(folder / "results", "videomme")
    assert [row["target"] for row in rows] == [question["answer"] for question in questions]
    assert len(rows) == 27
    words = 0
    for question, row in zip(questions, rows, strict=True):
        # The official prompt holds the question and its options; the official parser looks for a letter.
        assert question["question"] in row["input"] and "\n".join(question["options"]) in row["input"]
        scored = row["videomme_perception_score"]
        assert scored["task_category"] == question["task_type"] and scored["duration"] == question["duration"]
        assert scored["score"] == float(scored["pred_answer"] == question["answer"])
        option = question["options"]["ABCD".index(question["answer"])]
        words += option == f"{question['answer']}. {row['filtered_resps']}."
    assert words >= 9  # it answers in words

    from lmms_eval.tasks.videomme.utils import videomme_aggregate_results, videomme_process_results

    perfect = [videomme_process_results(question, [f"{question['answer']}."]) for question in questions]
    assert videomme_aggregate_results([scores["videomme_perception_score"] for scores in perfect]) == 100
