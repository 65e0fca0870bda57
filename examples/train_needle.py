"""Trains the bundled checkpoint from nothing: a needle somewhere in a video, and the question what appeared.

    python examples/train_needle.py --output_dir runs/needle

Everything takes the path that a user's own model takes: H.264 files, MambaMia's processor and model, and the
stock `Trainer`. Nothing is downloaded, so there is a stage before those of the paper:

    vision       the vision tower alone learns to name the needle in a still; it is frozen from here on
    image        compressor and language model learn to answer questions about stills
    short_video  the same on videos of 16 frames
    video        the same on videos of 64 frames

What `output_dir` already holds of an earlier run is not done again. The data is drawn from `mambamia_hf.needle`;
training takes seeds from 1,000,000 on and evaluation those below.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.utils.data import Dataset
from transformers import HfArgumentParser, Qwen2Tokenizer, SiglipImageProcessor, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from mambamia_hf import (
    MambaMiaConfig,
    MambaMiaForConditionalGeneration,
    MambaMiaProcessor,
    MambaMiaVideoProcessor,
)
from mambamia_hf.needle import (
    COLOURS,
    DIGITS,
    QUESTIONS,
    SHAPES,
    needle_image,
    needle_questions,
    questions,
    write_needle_video,
)


FIRST_TRAINING_SEED = 1_000_000
IMAGE_SIZE = 96


@dataclass
class NeedleArguments:
    """How long to train; everything else is `TrainingArguments`."""

    vision_steps: int = 1600
    image_steps: int = 600
    short_video_steps: int = 300
    video_steps: int = 250


def build_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer with Qwen2's special tokens, small because it has a few hundred words to know."""
    special_tokens = (
        "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>"
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [
        wording.format(medium=medium, kind=kind)
        for wordings in QUESTIONS.values()
        for wording in wordings
        for medium in ("video", "image")
        for kind in ("shape", "digit")
    ]
    texts += [*SHAPES, *DIGITS, *COLOURS, "system\n", "user\n", "assistant\n", "You are a helpful assistant."]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=400,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=special_tokens.split(),
            show_progress=False,
        ),
    )
    return Qwen2Tokenizer(
        tokenizer_object=tokenizer,
        unk_token=None,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=special_tokens.split()[1:],
        padding_side="left",
    )


def build_processor() -> MambaMiaProcessor:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return MambaMiaProcessor(
        tokenizer=build_tokenizer(),
        image_processor=SiglipImageProcessor(size=size),
        video_processor=MambaMiaVideoProcessor(size=size),
        num_frame_tokens=3,
    )


def build_model(processor: MambaMiaProcessor) -> MambaMiaForConditionalGeneration:
    """About 1.5 million parameters; 36 patches a frame, 3 anchors of 2 rows of patches each."""
    tokenizer = processor.tokenizer
    config = MambaMiaConfig(
        vision_config={
            "model_type": "convnext",
            "image_size": IMAGE_SIZE,
            "patch_size": 4,
            "hidden_sizes": [32, 64, 128],
            "depths": [1, 2, 2],
            "num_stages": 3,
            "layer_scale_init_value": 1.0,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
        },
        compressor_config={
            "hidden_size": 128,
            "num_hidden_layers": 1,
            "head_dim": 32,
            "state_size": 32,
            "patches_per_anchor": 12,
            "initializer_range": 0.05,
        },
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_feature_layer=-1,
        vision_batch_size=64,
        delta_threshold=None,
    )
    model = MambaMiaForConditionalGeneration(config)
    model.generation_config.max_new_tokens = 4  # an answer is one word
    return model


def conversation(medium: dict[str, Any], question: str, answer: str) -> list[dict[str, Any]]:
    """One question about one image or video, and the answer to learn."""
    return [
        {"role": "user", "content": [medium, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


class NeedleImages(Dataset):
    """Stills, made when they are asked for; none comes twice."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        seed = FIRST_TRAINING_SEED + index
        image, needle = needle_image(seed)
        question, answer = random.Random(seed).choice(needle_questions(needle, "image"))
        return conversation({"type": "image", "image": image}, question, answer)


class NamedNeedles(Dataset):
    """The same stills, each with the numbers of what it shows and of its colour."""

    def __init__(self, length: int, image_processor: SiglipImageProcessor):
        self.length = length
        self.image_processor = image_processor

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image, needle = needle_image(FIRST_TRAINING_SEED + index)
        labels = torch.tensor([[*SHAPES, *DIGITS].index(needle.value), [*COLOURS].index(needle.colour)])
        return {**self.image_processor(image, return_tensors="pt"), "labels": labels}


class NeedleNamer(nn.Module):
    """The vision tower with linear heads on the feature map that the compressor will read.

    Heads on the maximum of the map learn fast; those on its mean make it one that can be averaged, as the compressor
    does.
    """

    def __init__(self, model: MambaMiaForConditionalGeneration):
        super().__init__()
        self.encode_frames = model.model.encode_frames
        self.vision_tower = model.model.vision_tower
        names = len(SHAPES + DIGITS) + len(COLOURS)
        self.heads = nn.ModuleList(nn.Linear(model.config.vision_hidden_size, names) for _ in range(2))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """`pixel_values (batch, 1, 3, height, width)` and `labels (batch, 2)` to the loss."""
        features = self.encode_frames(pixel_values.squeeze(1)).last_hidden_state
        losses = []
        for head, pooled in zip(self.heads, (features.mean(dim=1), features.amax(dim=1)), strict=True):
            names, colours = head(pooled).split([len(SHAPES + DIGITS), len(COLOURS)], dim=1)
            losses.append(nn.functional.cross_entropy(names, labels[:, 0]))
            losses.append(nn.functional.cross_entropy(colours, labels[:, 1]))
        return {"loss": sum(losses)}


class NeedleVideos(Dataset):
    """H.264 files, written when they are asked for; none comes twice."""

    def __init__(self, length: int, num_frames: int, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.length, self.num_frames, self.folder = length, num_frames, folder

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        seed = FIRST_TRAINING_SEED + index
        video = write_needle_video(self.folder / f"{seed}.mp4", seed, duration=self.num_frames / 2)
        question, answer = random.Random(seed).choice(questions(video))
        return conversation({"type": "video", "path": str(video.path)}, question, answer)


@dataclass
class Collator:
    """Conversations to a batch in which only the assistant's tokens are learned."""

    processor: MambaMiaProcessor

    def __call__(self, conversations: list[list[dict[str, Any]]]) -> dict[str, torch.Tensor]:
        batch = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True},
        )
        learned = torch.as_tensor(batch.pop("assistant_masks")).bool()
        batch["labels"] = batch["input_ids"].masked_fill(~learned, -100)
        return batch


def main():
    needle, arguments = HfArgumentParser((NeedleArguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(arguments.seed)
    processor = build_processor()
    model = build_model(processor)
    output = Path(arguments.output_dir)

    def train(name: str, learner: nn.Module, dataset: Callable[[], Dataset], collator: Callable | None, **kwargs):
        if (output / name / "config.json").is_file():
            model.load_state_dict(MambaMiaForConditionalGeneration.from_pretrained(output / name).state_dict())
            return
        stage = TrainingArguments(
            output_dir=str(output / name),
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            weight_decay=0.05,
            logging_steps=25,
            save_steps=100,
            save_total_limit=1,
            remove_unused_columns=False,
            dataloader_num_workers=1,
            report_to="none",
            seed=arguments.seed,
            **kwargs,
        )
        trainer = Trainer(model=learner, args=stage, train_dataset=dataset(), data_collator=collator)
        trainer.train(resume_from_checkpoint=(output / name).is_dir() and get_last_checkpoint(output / name))
        model.save_pretrained(output / name)
        processor.save_pretrained(output / name)

    train(
        "vision",
        NeedleNamer(model),
        lambda: NamedNeedles(64 * needle.vision_steps, processor.image_processor),
        None,
        max_steps=needle.vision_steps,
        per_device_train_batch_size=64,
        learning_rate=2e-3,
    )
    model.model.vision_tower.requires_grad_(False)
    train(
        "image",
        model,
        lambda: NeedleImages(64 * needle.image_steps),
        Collator(processor),
        max_steps=needle.image_steps,
        per_device_train_batch_size=64,
        learning_rate=1e-3,
    )
    train(
        "short_video",
        model,
        lambda: NeedleVideos(8 * needle.short_video_steps, 16, output / "videos_16"),
        Collator(processor),
        max_steps=needle.short_video_steps,
        per_device_train_batch_size=8,
        learning_rate=5e-4,
    )
    train(
        "video",
        model,
        lambda: NeedleVideos(4 * needle.video_steps, 64, output / "videos_64"),
        Collator(processor),
        max_steps=needle.video_steps,
        per_device_train_batch_size=4,
        learning_rate=3e-4,
    )


if __name__ == "__main__":
    main()
