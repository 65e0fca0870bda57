"""A model of about 75K parameters whose outputs differ clearly from frame to frame."""

from pathlib import Path

import torch
from tiny import tiny_tokenizer
from transformers import SiglipImageProcessor

from mambamia_hf import (
    MambaMiaConfig,
    MambaMiaForConditionalGeneration,
    MambaMiaProcessor,
    MambaMiaVideoProcessor,
)


IMAGE_TOKEN, VIDEO_TOKEN, VOCAB_SIZE = 3, 4, 99
IMAGE_SIZE, NUM_ANCHORS = 32, 4

VISION_CONFIG = {
    "model_type": "siglip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": 8,
    "vision_use_head": False,
    "initializer_range": 0.2,
}
TEXT_CONFIG = {
    "model_type": "qwen2",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": None,
}
COMPRESSOR_CONFIG = {
    "hidden_size": 40,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "state_size": 8,
    "chunk_size": 16,
    "patches_per_anchor": 4,
    "time_step_min": 0.05,
    "time_step_max": 0.05,
    "initializer_range": 0.2,
}


def tiny_config(vision_config: dict = (), text_config: dict = (), compressor_config: dict = (), **kwargs):
    """A config that keeps every frame of videos of up to 4 frames; arguments add to its settings."""
    settings = {"image_token_id": IMAGE_TOKEN, "video_token_id": VIDEO_TOKEN, "delta_threshold": 0.3}
    return MambaMiaConfig(
        vision_config={**VISION_CONFIG, **dict(vision_config)},
        text_config={**TEXT_CONFIG, **dict(text_config)},
        compressor_config={**COMPRESSOR_CONFIG, **dict(compressor_config)},
        **{**settings, "delta_min_frames": 4, **kwargs},
    )


def tiny_model(**kwargs) -> MambaMiaForConditionalGeneration:
    """A model of `tiny_config(**kwargs)` with weights that are the same each time."""
    torch.manual_seed(0)
    return MambaMiaForConditionalGeneration(tiny_config(**kwargs)).eval()


def random_videos(num_videos: int, num_frames: int, seed: int = 0) -> torch.Tensor:
    """`(num_videos, num_frames, 3, 32, 32)`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_videos, num_frames, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


def prompt(*parts: int | list[int]) -> torch.Tensor:
    """`(1, length)`: a list is text tokens, a number n the placeholders of a video of n frames, "image" an image's."""
    ids = []
    for part in parts:
        if part == "image":
            ids += NUM_ANCHORS * [IMAGE_TOKEN]
        else:
            ids += part if isinstance(part, list) else part * NUM_ANCHORS * [VIDEO_TOKEN]
    return torch.tensor([ids])


def tiny_processor() -> MambaMiaProcessor:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return MambaMiaProcessor(
        image_processor=SiglipImageProcessor(size=size),
        tokenizer=tiny_tokenizer(),
        video_processor=MambaMiaVideoProcessor(size=size),
        num_frame_tokens=NUM_ANCHORS,
    )


def tiny_checkpoint(folder: Path) -> tuple[MambaMiaForConditionalGeneration, MambaMiaProcessor]:
    """Writes a model and a processor that fit each other, as one writes any, and returns both."""
    processor = tiny_processor()
    model = tiny_model(
        text_config={"vocab_size": len(processor.tokenizer), "pad_token_id": processor.tokenizer.pad_token_id},
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        delta_min_frames=2,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def ask(model, processor, video: Path, question: str, processor_kwargs: dict | None = None, **generate_kwargs) -> str:
    """What a model answers about a video file, asked as from Python."""
    content = [{"type": "video", "path": str(video)}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=processor_kwargs or {},
    )
    output = model.generate(**inputs, do_sample=False, **generate_kwargs)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
