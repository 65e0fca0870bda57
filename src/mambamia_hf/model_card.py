"""The model card, `README.md`: what the Hub and its readers are told about a checkpoint."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .configuration_mambamia import MambaMiaConfig


# The Hub's own task for these models is in the tags: Transformers' pipelines do not know it.
PIPELINE_TAG = "image-text-to-text"
TAGS = ("mambamia", "video-text-to-text", "video", "state-space-model")

_ABOUT = (
    "Answers questions about images and videos of up to hours: [MambaMia](https://arxiv.org/abs/2506.13564), whose "
    "compressor of state-space layers turns each frame into a few tokens and chooses the frames that the language "
    "model reads."
)

# What Transformers writes where a repository has no card.
_BLANK = "This is the model card of a 🤗 transformers model that has been pushed on the Hub."

_USE = """## Use

```python
{imports}
checkpoint = "{name}"
processor = AutoProcessor.from_pretrained(checkpoint{trust})
{model}
content = [{{"type": "video", "path": "video.mp4"}}, {{"type": "text", "text": "What appears in the video?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
output = model.generate(**inputs, max_new_tokens=64)
print(processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
```
"""


def usage(name: str, has_code: bool, base_model: str | None = None) -> str:
    """A section that says how to ask a model about a video.

    Args:
        name: of the repository, or the folder.
        has_code: whether the checkpoint has the code with it; else the package is needed.
        base_model: where the checkpoint is an adapter, the name of the model that it is for.
    """
    auto = "AutoModelForImageTextToText"
    imports = f"from transformers import {auto}, AutoProcessor\n"
    trust = ", trust_remote_code=True" if has_code else ""
    model = f"model = {auto}.from_pretrained(checkpoint{trust})"
    if not has_code:
        imports = f"import mambamia_hf  # makes the model known to Transformers\n{imports}"
    if base_model is not None:
        imports = imports.replace("from transformers", "from peft import PeftModel\nfrom transformers")
        model = f'model = PeftModel.from_pretrained({auto}.from_pretrained("{base_model}"), checkpoint)'
    return _USE.format(imports=imports, name=name, trust=trust, model=model)


def description(config: MambaMiaConfig) -> str:
    """A section with what the configuration says of a model."""
    vision, text, compressor = config.vision_config, config.text_config, config.compressor_config
    layers = f"{compressor.num_hidden_layers} + {compressor.num_temporal_layers} layers of {compressor.mixer_type}"
    facts = {
        "vision tower": f"{vision.model_type}, frames of {vision.image_size} × {vision.image_size} pixels",
        "compressor": f"{layers}, {compressor.hidden_size} wide",
        "language model": f"{text.model_type}, {text.num_hidden_layers} layers, {text.hidden_size} wide",
        "frames that it reads": _selection(config),
        "times of frames": config.frame_time_format or "not written",
    }
    return f"## Model\n\n{table(facts)}"


def _selection(config: MambaMiaConfig) -> str:
    if config.keep_frames is not None:
        return f"{config.keep_frames}, by Δ"
    if config.keep_ratio is not None:
        return f"{config.keep_ratio:.0%}, by Δ"
    if config.delta_threshold is None:
        return "all"
    return f"by Δ, threshold {config.delta_threshold}; all of a video of at most {config.delta_min_frames}"


def table(facts: dict[str, Any]) -> str:
    """Names and values as a table of Markdown."""
    return "".join(["| | |\n| --- | --- |\n", *(f"| {name} | {value} |\n" for name, value in facts.items())])


def write_card(file: Path, name: str, data: ModelCardData, sections: list[str]) -> None:
    """Writes a card: its metadata, what the model is, and sections of Markdown."""
    title = name.rpartition("/")[2]
    text = "\n".join([f"# {title}\n\n{_ABOUT}\n", *sections])
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(file)


def fill_card(folder: str | os.PathLike[str], name: str, config: MambaMiaConfig | None = None) -> None:
    """Adds to the card in a folder that is about to be pushed what it lacks; a text of its own stays.

    Args:
        folder: of the checkpoint, or of a part of it.
        name: of the repository.
        config: that of the model, where there is one.
    """
    file = Path(folder) / "README.md"
    if not file.is_file():
        return
    card = ModelCard.load(file)
    card.data.library_name = card.data.library_name or "transformers"
    card.data.pipeline_tag = card.data.pipeline_tag or PIPELINE_TAG
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *TAGS]))
    if _BLANK not in card.text:
        card.save(file)
        return
    sections = [usage(name, has_code=any(Path(folder).glob("*.py")))]
    write_card(file, name, card.data, sections if config is None else [*sections, description(config)])


__all__ = ["PIPELINE_TAG", "TAGS", "description", "fill_card", "table", "usage", "write_card"]
