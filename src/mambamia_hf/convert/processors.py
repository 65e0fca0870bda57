"""Tokenizer, image and video processor and chat template of a converted checkpoint."""

from pathlib import Path
from typing import Any

from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    LlavaImageProcessor,
    PreTrainedTokenizerBase,
    SiglipImageProcessor,
)
from transformers.image_utils import PILImageResampling

from ..checkpoint_files import explained
from ..configuration_mambamia import MambaMiaConfig
from ..processing_mambamia import MambaMiaProcessor
from ..video_processing_mambamia import MambaMiaVideoProcessor
from .configurations import Settings, parts


_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")
# What the video processor does in the way of the image processor.
_SHARED_SETTINGS = "size crop_size do_center_crop default_to_square resample image_mean image_std".split()

# The dialogues of the released code: media without marks around them, a line break after each.
_CONTENT = """\
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content -%}
        {%- for item in content -%}
            {%- if item['type'] == 'video' -%}
                {{- '<|video_pad|>\\n' -}}
            {%- elif item['type'] == 'image' -%}
                {{- '<|image_pad|>\\n' -}}
            {%- elif item['type'] == 'text' -%}
                {{- item['text'] -}}
            {%- else -%}
                {{- raise_exception("Content of type " + item['type'] + " in a message: use text, image or video.") -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
"""
_QWEN_DIALOGUE = """\
{%- for message in messages -%}
    {%- if loop.first and message['role'] != 'system' -%}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
    {%- endif -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}
            {{- render(message['content']) + '<|im_end|>' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- render(message['content']) + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
_VICUNA_DIALOGUE = """\
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {{- render(message['content']) + ' ' -}}
    {%- elif loop.first -%}
        {{- 'A chat between a curious user and an artificial intelligence assistant. ' -}}
        {{- "The assistant gives helpful, detailed, and polite answers to the user's questions. " -}}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- 'USER: ' + render(message['content']) + ' ' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- 'ASSISTANT: ' -}}
        {%- generation -%}
            {{- render(message['content']) + '</s>' -}}
        {%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'ASSISTANT:' -}}
{%- endif -%}
"""


def load_tokenizer(src: Path, config: MambaMiaConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint, or None where it has none.

    Raises:
        ValueError: if its files cannot be read.
    """
    if not any((src / name).is_file() for name in _TOKENIZER_FILES):
        return None
    with explained(f"The tokenizer of {src} cannot be read"):
        return AutoTokenizer.from_pretrained(src, config=config.text_config, trust_remote_code=False)


def add_placeholders(tokenizer: PreTrainedTokenizerBase, config: MambaMiaConfig) -> None:
    """Adds the placeholders of images and videos to a tokenizer that lacks them, and sets their ids in `config`."""
    tokenizer.add_tokens(["<|image_pad|>", "<|video_pad|>"], special_tokens=True)
    vocabulary = tokenizer.get_vocab()
    config.image_token_id, config.video_token_id = vocabulary["<|image_pad|>"], vocabulary["<|video_pad|>"]


def make_processor(
    src: Path, source: Settings, config: MambaMiaConfig, tokenizer: PreTrainedTokenizerBase
) -> MambaMiaProcessor:
    """The processor of a converted checkpoint: pixels and frames as the released code has them.

    Pixels are made as by the tower's own image processor; with `image_aspect_ratio="pad"` pictures are made square by
    stripes of the mean colour before. Frames are those at the start of equal parts of the video. The sentence about
    its duration follows, which the released code adds unless `add_time_instruction` is false.

    Args:
        src: folder of the original checkpoint.
        source: its config.json.
        config: our configuration of it.
        tokenizer: its tokenizer, with the placeholders.

    Raises:
        ValueError: if a preprocessor_config.json cannot be read.
    """
    with explained(f"The image processor of {src} cannot be read"):
        image_processor = _image_processor(src, source["mm_vision_tower"], config)
        shared: Any = {name: getattr(image_processor, name, None) for name in _SHARED_SETTINGS}
        shared["do_pad"] = source.get("image_aspect_ratio") == "pad"
        if shared["do_pad"]:
            image_processor = LlavaImageProcessor(**shared)
        shared["sample_at"] = "start"
        video_processor = MambaMiaVideoProcessor(**shared)
    is_qwen = "<|im_start|>" in tokenizer.get_vocab()
    return MambaMiaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        video_processor=video_processor,
        chat_template=_CONTENT + (_QWEN_DIALOGUE if is_qwen else _VICUNA_DIALOGUE),
        tokens_per_frame=config.tokens_per_frame(),
        time_instruction=source.get("add_time_instruction", True),
    )


def _image_processor(src: Path, tower: str, config: MambaMiaConfig) -> Any:
    """The tower's own image processor where its file is there, else what the released code's towers use."""
    folders = [path for path in (src / tower, Path(tower), src) if (path / "preprocessor_config.json").is_file()]
    if folders:
        return AutoImageProcessor.from_pretrained(folders[0], trust_remote_code=False)
    vision_config, _, _ = parts(config)
    size = vision_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    if vision_config.model_type == "clip_vision_model":
        return CLIPImageProcessor(
            size={"shortest_edge": height}, crop_size={"height": height, "width": width}, do_center_crop=True
        )
    resample = PILImageResampling.BILINEAR if "siglip2" in Path(tower).name else PILImageResampling.BICUBIC
    return SiglipImageProcessor(size={"height": height, "width": width}, resample=resample)
