"""Pushing to the Hub: the card that a model arrives with, and what it promises, tried from there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conversations import arguments
from fake_hub import FakeHub, serving_hub
from huggingface_hub import ModelCard
from tiny_model import tiny_model, tiny_processor
from transformers import Qwen2Config, Qwen2ForCausalLM
from video_files import write_video

from mambamia_hf.training.run_card import _hub_datasets


STRANGER = 'import sys\nsys.modules["mambamia_hf"] = None\n'

START = """
from mambamia_hf import MambaMiaForConditionalGeneration, MambaMiaProcessor
small = {"hidden_size": 40, "num_hidden_layers": 1, "head_dim": 16, "state_size": 8}
model = MambaMiaForConditionalGeneration.from_vision_text_pretrained("somebody/vision", "somebody/text", **small)
model.config.frame_dropout = 0.5
model.save_pretrained("start")
processor = MambaMiaProcessor.from_vision_text_pretrained("somebody/vision", "somebody/text", model.config)
processor.save_pretrained("start")
"""

PIPELINE = f"""{STRANGER}
from transformers import pipeline
answerer = pipeline(model="somebody/tiny", trust_remote_code=True)
content = [{{"type": "video", "path": "video.mp4"}}, {{"type": "text", "text": "What appears?"}}]
output = answerer(text=[{{"role": "user", "content": content}}], max_new_tokens=3, return_full_text=False)
print(answerer.task, type(output[0]["generated_text"]).__name__)
"""

BY_HAND = """
from mambamia_hf import MambaMiaForConditionalGeneration, MambaMiaProcessor
from transformers import Trainer, TrainingArguments
model, processor = MambaMiaForConditionalGeneration.from_pretrained("run"), MambaMiaProcessor.from_pretrained("run")
processor.push_to_hub("somebody/processor_first")
model.push_to_hub("somebody/processor_first")
model.push_to_hub("somebody/model_alone", tags=["mine"])
model.push_to_hub("somebody/tiny")
processor.push_to_hub("somebody/tiny")
assert "mine" not in MambaMiaForConditionalGeneration.from_pretrained("run").model_tags
stock = TrainingArguments("stock", hub_model_id="somebody/stock", use_cpu=True, report_to="none")
Trainer(model, stock, processing_class=processor).push_to_hub()
"""


def run_python(hub: FakeHub, folder: Path, *words: object) -> str:
    """What Python prints in a process whose Hub is `hub`, and whose working directory is `folder`."""
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_secret", "HF_HOME": str(folder / "home")}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, *map(str, words)]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-6000:]
    return result.stdout


def train(hub: FakeHub, folder: Path, data: Path, model: str, output: str, **settings) -> str:
    given = {"stage": "video", "model": model, "output_dir": output, "max_steps": 2, "num_frames": 3, "use_cpu": True}
    given |= {"data": data / "data.json", "media_folder": data, "report_to": "none", "disable_tqdm": True, **settings}
    return run_python(hub, folder, "-m", "mambamia_hf.training", *arguments(**given))


def snippet(card: ModelCard) -> str:
    """The code of the section about use."""
    (code,) = re.findall(r"## Use\n\n```python\n(.*?)```", card.text, re.S)
    return code


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pushed")
    write_video(folder / "video.mp4", num_frames=20)
    return folder


@pytest.fixture(scope="module")
def hub(folder, training_folder):
    """A Hub with a vision tower and a language model, and what was trained from them in `folder`."""
    processor = tiny_processor()
    tiny_model().model.vision_tower.save_pretrained(folder / "vision")
    processor.image_processor.save_pretrained(folder / "vision")
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=len(processor.tokenizer), num_key_value_heads=2, **settings)
    Qwen2ForCausalLM(config).save_pretrained(folder / "text")
    processor.tokenizer.save_pretrained(folder / "text")
    with serving_hub() as hub:
        for name in ("vision", "text"):
            files = {file.name: file.read_bytes() for file in (folder / name).iterdir()}
            hub.repositories[f"somebody/{name}"] = files
            (folder / name).rename(folder / f"pushed_{name}")
        run_python(hub, folder, "-c", START)
        (folder / "start" / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# A start\n")
        more = {"push_to_hub": True, "hub_model_id": "somebody/tiny", "eval_data": training_folder / "data.json"}
        more |= {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no", "length_scale": 2.0}
        train(hub, folder, training_folder, "start", "run", **more)
        yield hub


def test_datasets_of_the_hub(tmp_path):
    """Those that are named, in a mixture, too; neither files nor folders."""
    (tmp_path / "local" / "set").mkdir(parents=True)
    mixture = {"datasets": [{"name": "owner/videos", "config": "a"}, {"name": "local/set"}, {"json_path": "a.json"}]}
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump(mixture))
    given = [str(tmp_path / "mixture.yaml"), "a.jsonl", "owner/videos", "owner/images", str(tmp_path / "local")]
    assert _hub_datasets(given) == ["owner/videos", "owner/images"]


@pytest.mark.slow
class TestCards:
    def test_of_a_run(self, hub, folder):
        assert "model.safetensors" in hub.repositories["somebody/tiny"] and not hub.refused
        card = hub.card("somebody/tiny")
        data = card.data
        assert (data.library_name, data.pipeline_tag, data.license) == (
            "transformers",
            "image-text-to-text",
            "apache-2.0",
        )
        assert data.base_model == ["somebody/vision", "somebody/text"]
        assert {"mambamia", "video-text-to-text"} <= set(data.tags) and len(set(data.tags)) == len(data.tags)
        assert data.model_name == "tiny"
        values = {result.metric_name: result.metric_value for result in data.eval_results}
        assert values.keys() == {"answers with every token right", "right tokens", "loss per token"}
        assert {result.dataset_name for result in data.eval_results} == {
            "data.json (11 samples, 1 more could not be read)"
        }
        facts = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card.text, re.M))
        assert facts["stage"] == "video: compressor, temporal layers, language model learned"
        assert (facts["frames per video, at most"], facts["length scale"], facts["frame dropout"]) == (
            "3",
            "2.0",
            "0.5",
        )
        assert facts["language model"] == "qwen2, 2 layers, 32 wide"
        assert float(facts["loss per token"]) == values["loss per token"] > 0
        assert "Validation Loss" in card.text and str(folder) not in card.text

    def test_the_snippet_runs_where_the_package_is_not_installed(self, hub, folder):
        code = snippet(hub.card("somebody/tiny"))
        assert 'checkpoint = "somebody/tiny"' in code and "trust_remote_code=True" in code
        run_python(hub, folder, "-c", STRANGER + code)

    def test_a_pipeline_finds_its_task(self, hub, folder):
        assert run_python(hub, folder, "-c", PIPELINE).split()[-2:] == ["image-text-to-text", "str"]

    def test_pushed_by_hand(self, hub, folder):
        """A model and a processor, and Transformers' own trainer."""
        before = hub.card("somebody/tiny").text
        run_python(hub, folder, "-c", BY_HAND)
        assert not hub.refused
        for name in ("processor_first", "model_alone", "stock"):
            data = hub.card(f"somebody/{name}").data
            assert data.library_name == "transformers" and {"mambamia", "video-text-to-text"} <= set(data.tags)
        for name in ("processor_first", "model_alone"):
            card = hub.card(f"somebody/{name}")
            assert card.data.pipeline_tag == "image-text-to-text" and "More Information Needed" not in card.text
            assert f'checkpoint = "somebody/{name}"' in snippet(card)
        assert "mine" in hub.card("somebody/model_alone").data.tags
        assert "| language model | qwen2, 2 layers, 32 wide |" in hub.card("somebody/model_alone").text
        run_python(hub, folder, "-c", STRANGER + snippet(hub.card("somebody/processor_first")))
        assert hub.card("somebody/tiny").text == before

    def test_of_a_stage_that_follows(self, hub, folder, training_folder):
        """From a folder, it hands on where that came from; from the Hub, it is that."""
        train(hub, folder, training_folder, "run", "next", save_strategy="no", max_steps=1)
        data = ModelCard.load(folder / "next" / "README.md").data
        assert (data.license, data.base_model) == ("apache-2.0", ["somebody/vision", "somebody/text"])
        assert not data.eval_results
        train(hub, folder, training_folder, "somebody/tiny", "after", save_strategy="no", max_steps=1, lora_rank=2)
        card = ModelCard.load(folder / "after" / "README.md")
        assert (card.data.license, card.data.base_model) == ("apache-2.0", ["somebody/tiny"])
        assert card.data.library_name == "peft" and "lora" in card.data.tags and not hub.problems(str(card))
        run_python(hub, folder, "-c", snippet(card))
