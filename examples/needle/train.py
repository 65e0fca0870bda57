"""Trains the bundled model from nothing on the needle benchmark: retrieval, ordering and counting.

    python examples/needle/train.py --output_dir runs/needle

Videos are H.264 files that the script makes; training is `examples/train.py` on features of the frozen vision tower.
As nothing is downloaded, the vision tower has to learn, too:

    data        stills and videos are written
    vision      the vision tower alone learns to name what is in a still; from here on it is frozen
    features    of the data are written
    image       compressor and language model learn on stills
    align       the compressor alone learns on videos
    video       compressor and language model learn on videos
    long_video  the same, prepared for longer videos than these

What `output_dir` already holds of an earlier run is not done again.
"""

import io
import json
import random
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import HfArgumentParser, Qwen2Tokenizer, SiglipImageProcessor, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from mambamia_hf import MambaMiaConfig, MambaMiaForConditionalGeneration, MambaMiaProcessor, MambaMiaVideoProcessor
from mambamia_hf.needle import (
    CHOICE_QUESTIONS,
    COLOURS,
    DIGITS,
    QUESTIONS,
    SHAPES,
    TASKS,
    NeedleVideo,
    multiple_choice,
    needle_frames,
    needle_image,
    needle_multiple_choice,
    needle_questions,
    questions,
    write_needle_video,
)
from mambamia_hf.tokenization_mambamia import SPECIAL_TOKENS


IMAGE_SIZE = 96
STILL_SIZES = (96, 128, 192, 256)
STILLS_PER_VIDEO = 8
NUM_FRAMES = (16, 32, 64, 128)
QUESTIONS_PER_VIDEO = 3
RECORDS = Path("records", "train.jsonl")  # alone in its folder, which `datasets` takes for a dataset then
NOTHING = "nothing"


def build_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer with Qwen2's special tokens, small because it has a few hundred words to know."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [
        wording.format(medium=medium, kind=kind, value=value)
        for wordings in [*QUESTIONS.values(), *CHOICE_QUESTIONS.values()]
        for wording in wordings
        for medium in ("video", "image")
        for kind in ("shape", "digit")
        for value in SHAPES
    ]
    texts += [*SHAPES, *DIGITS, *COLOURS, "system\n", "user\n", "assistant\n", "You are a helpful assistant."]
    texts += [f" Options: {'; '.join(SHAPES)}."] + [f" {value}" for value in SHAPES + DIGITS]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=448,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|endoftext|>", *SPECIAL_TOKENS],
            show_progress=False,
        ),
    )
    return Qwen2Tokenizer(
        tokenizer_object=tokenizer,
        unk_token=None,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        padding_side="left",
    )


def build_processor() -> MambaMiaProcessor:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return MambaMiaProcessor(
        tokenizer=build_tokenizer(),
        image_processor=SiglipImageProcessor(size=size),
        video_processor=MambaMiaVideoProcessor(size=size),
        num_frame_tokens=1,
    )


def build_model(processor: MambaMiaProcessor) -> MambaMiaForConditionalGeneration:
    """About 2.1 million parameters; the 9 patches of a frame become one anchor."""
    tokenizer = processor.tokenizer
    config = MambaMiaConfig(
        vision_config={
            "model_type": "resnet",
            "image_size": IMAGE_SIZE,
            "patch_size": 4,  # of the stem
            "embedding_size": 32,
            "hidden_sizes": [32, 64, 128, 128],
            "depths": [1, 2, 2, 1],
            "layer_type": "basic",
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
            "patches_per_anchor": 9,
            "initializer_range": 0.05,
        },
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_feature_layer=-1,
        vision_batch_size=64,
        delta_threshold=None,
        frame_dropout=0.8,  # without, Δ ends now and then with its least on the needles
    )
    model = MambaMiaForConditionalGeneration(config)
    model.generation_config.max_new_tokens = 8  # an answer is one to three words
    return model


class NamedStills(Dataset):
    """Stills, a few of each video, half of them without a needle, with the numbers of the value and the colour shown.

    As those of a video differ in little else, the needle is soon what the tower looks for. Videos come in several
    sizes, stills in several JPEG qualities, so that the tower does not depend on the sharpness of one.
    """

    names, colours = [*SHAPES, *DIGITS, NOTHING], [*COLOURS, NOTHING]

    def __init__(self, num_videos: int, image_processor: SiglipImageProcessor):
        self.num_videos = num_videos
        self.image_processor = image_processor

    def __len__(self) -> int:
        return self.num_videos

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = random.Random(index)
        side = rng.choice(STILL_SIZES)
        images, labels = [], []
        for image, needle in needle_frames(index, STILLS_PER_VIDEO, (side, side)):
            compressed = io.BytesIO()
            image.save(compressed, "JPEG", quality=rng.randint(15, 95))
            images.append(Image.open(compressed))
            value, colour = (NOTHING, NOTHING) if needle is None else (needle.value, needle.colour)
            labels.append([self.names.index(value), self.colours.index(colour)])
        return {**self.image_processor(images, return_tensors="pt"), "labels": torch.tensor(labels)}


class NeedleNamer(nn.Module):
    """The vision tower with linear heads on the feature map that the compressor will read.

    Heads on the maximum of the map learn fast; those on its mean make it one that can be averaged, as the compressor
    does.
    """

    def __init__(self, model: MambaMiaForConditionalGeneration):
        super().__init__()
        self.encode_frames = model.model.encode_frames
        self.vision_tower = model.model.vision_tower
        self.num_labels = [len(NamedStills.names), len(NamedStills.colours)]
        self.heads = nn.ModuleList(nn.Linear(model.config.vision_hidden_size, sum(self.num_labels)) for _ in range(2))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """`pixel_values (videos, stills, 3, height, width)` and `labels (videos, stills, 2)` to the loss."""
        features = self.encode_frames(pixel_values.flatten(0, 1)).last_hidden_state
        targets = labels.flatten(0, 1).T
        losses = [
            nn.functional.cross_entropy(logits, target)
            for head, pooled in zip(self.heads, (features.mean(dim=1), features.amax(dim=1)), strict=True)
            for logits, target in zip(head(pooled).split(self.num_labels, dim=1), targets, strict=True)
        ]
        return {"loss": sum(losses)}


def still(folder: Path, seed: int) -> list[dict[str, Any]]:
    """A JPEG still and a question about it, as a record of LLaVA's format."""
    image, needle = needle_image(seed)
    image.save(folder / f"{seed}.jpg", quality=90)
    rng = random.Random(seed)
    question = needle_multiple_choice(needle, "image", seed)
    asked = (question.prompt, question.answer) if rng.random() < 0.5 else rng.choice(needle_questions(needle, "image"))
    return [record("image", f"{seed}.jpg", 1, *asked)]


def video(folder: Path, seed: int) -> list[dict[str, Any]]:
    """An H.264 file and questions about it, as records: 16 to 128 frames, half a second to ten seconds apart."""
    rng = random.Random(seed)
    num_frames = rng.choice(NUM_FRAMES)
    made = write_spaced_video(folder, seed, rng, num_frames, "train")
    records = []
    for variant in range(QUESTIONS_PER_VIDEO):
        question = multiple_choice(made, QUESTIONS_PER_VIDEO * seed + variant)
        asked = (question.prompt, question.answer)
        if made.task == "retrieval" and rng.random() < 0.3:
            asked = rng.choice(questions(made))
        records.append(record("video", f"{seed}.mp4", num_frames, *asked))
    return records


def write_spaced_video(folder: Path, seed: int, rng: random.Random, num_frames: int, split: str) -> NeedleVideo:
    """`<seed>.mp4` of so many frames, half a second to ten seconds apart, each of them sampled."""
    seconds = 0.5 * 20 ** rng.random()
    return write_needle_video(
        folder / f"{seed}.mp4",
        seed,
        task=TASKS[seed % len(TASKS)],
        split=split,
        duration=num_frames * seconds,
        fps=1 / seconds,
        num_frames=num_frames,
    )


def record(kind: str, path: str, num_frames: int, question: str, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<{kind}>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": path, kind: path, "length": num_frames, "conversations": turns}


def write_data(folder: Path, make: Callable[[Path, int], list[dict[str, Any]]], count: int):
    """Writes `folder`, its files and their records, with all cores."""
    if (folder / RECORDS).is_file():
        return
    (folder / RECORDS).parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        made = tqdm(pool.map(partial(make, folder), range(count), chunksize=16), desc=folder.name, total=count)
        records = [json.dumps(one) + "\n" for of_file in made for one in of_file]
    (folder / "unfinished").write_text("".join(records))
    (folder / "unfinished").rename(folder / RECORDS)


@dataclass
class NeedleArguments:
    """How much to make and how long to train."""

    output_dir: str = field(
        metadata={"help": "Folder for data, features and models; what it holds is not done again."}
    )
    vision_steps: int = 5000
    num_stills: int = 8000
    num_videos: int = 12000
    seed: int = 2025


# What is trained in order, by the folder of its model: arguments of examples/train.py. In the last part videos seem
# longer to compressor and language model than they are, so that both can read longer ones.
BY_LENGTH = "--data videos --per_device_train_batch_size 12 --train_sampling_strategy group_by_length"
STAGES = {
    "image": "--stage image --data stills --per_device_train_batch_size 48 --max_steps 300 --learning_rate 1e-3",
    "align": f"--stage align {BY_LENGTH} --max_steps 300 --learning_rate 1e-3",
    "video": f"--stage video {BY_LENGTH} --max_steps 6000 --learning_rate 1e-3",
    "long_video": f"--stage video {BY_LENGTH} --max_steps 1200 --learning_rate 5e-4 --video_stretch 8",
}
# How all of it is trained, the vision tower and the runs of examples/ablation.py included.
OPTIMIZER = {"lr_scheduler_type": "cosine", "weight_decay": 0.05, "adam_beta2": 0.98, "report_to": "none"}
TRAINING = (
    "--warmup_steps 0.05 --logging_steps 25 --save_steps 250 --save_total_limit 1 --dataloader_num_workers 1 "
    "--resume_from_checkpoint true "
) + " ".join(f"--{name} {value}" for name, value in OPTIMIZER.items())


def train_vision_tower(folder: Path, steps: int, seed: int):
    """The tower of a model that has not learned anything else yet; saves the whole model and its processor."""
    set_seed(seed)
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))  # another core makes the stills
    processor = build_processor()
    model = build_model(processor)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=64 // STILLS_PER_VIDEO,
        learning_rate=2e-3,
        warmup_steps=0.1,
        logging_steps=25,
        save_steps=200,
        save_total_limit=1,
        remove_unused_columns=False,
        dataloader_num_workers=1,
        seed=seed,
        **OPTIMIZER,
    )
    stills = NamedStills(steps * arguments.per_device_train_batch_size, processor.image_processor)
    trainer = Trainer(NeedleNamer(model), arguments, train_dataset=stills)
    trainer.train(resume_from_checkpoint=folder.is_dir() and get_last_checkpoint(folder))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def run(script: str, *arguments: str | Path):
    subprocess.run([sys.executable, Path(__file__).parents[1] / script, *arguments], check=True)


def main():
    (arguments,) = HfArgumentParser(NeedleArguments).parse_args_into_dataclasses()
    output = Path(arguments.output_dir)
    write_data(output / "stills", still, arguments.num_stills)
    write_data(output / "videos", video, arguments.num_videos)
    model = output / "vision"
    if not (model / "config.json").is_file():
        train_vision_tower(model, arguments.vision_steps, arguments.seed)
    features, num_frames = output / "features", ["--num_frames", str(max(NUM_FRAMES))]
    for folder in (output / "stills", output / "videos"):
        media = ["--data", folder / RECORDS, "--media_folder", folder]
        run("precompute_features.py", "--model", model, *media, "--output", features, *num_frames)
    data = {kind: (output / kind / RECORDS).parent for kind in ("stills", "videos")}
    for name, stage in STAGES.items():
        start, model = model, output / name
        if not (model / "config.json").is_file():
            settings = [data.get(word, word) for word in f"{stage} {TRAINING} --seed {arguments.seed}".split()]
            files = ["--model", start, "--features", features, "--output_dir", model]
            run("train.py", *files, *num_frames, *settings)


if __name__ == "__main__":
    main()
