"""Trains the small model's vision tower to name what is in a still; the rest of the model stays untrained.

    PYTHONPATH=examples python -m needle.pretrain_vision --output_dir vision --max_steps 5000 --learning_rate 2e-3

The arguments are those of Transformers' `TrainingArguments`; a sample is eight frames of one video. Writes the whole
model and its processor. A second call continues from the last checkpoint in the folder.
"""

import io
import random
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import HfArgumentParser, SiglipImageProcessor, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from mambamia_hf import MambaMiaForConditionalGeneration

from .glyphs import COLOURS, DIGITS, SHAPES
from .small_model import build_model, build_processor
from .video import needle_frames


NOTHING = "nothing"
VALUES = [*SHAPES, *DIGITS, NOTHING]
COLOUR_NAMES = [*COLOURS, NOTHING]
FRAME_SIZES = (96, 128, 192, 256)
FRAMES_PER_VIDEO = 8


class LabelledFrames(Dataset):
    """Frames of videos, half of them without a needle, labelled with the value and the colour that they show.

    Frames of one video differ in little but the needle, so the tower soon looks for it. Videos come in several sizes
    and frames in several JPEG qualities, so that the tower does not depend on the sharpness of one.

    Args:
        num_videos: length of the dataset.
        image_processor: makes pixel values of the frames.
    """

    def __init__(self, num_videos: int, image_processor: SiglipImageProcessor):
        self.num_videos = num_videos
        self.image_processor = image_processor

    def __len__(self) -> int:
        return self.num_videos

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`pixel_values (frames, 3, height, width)` and `labels (frames, 2)`, indices in `VALUES`, `COLOUR_NAMES`."""
        rng = random.Random(index)
        side = rng.choice(FRAME_SIZES)
        images, labels = [], []
        for image, needle in needle_frames(index, FRAMES_PER_VIDEO, (side, side)):
            compressed = io.BytesIO()
            image.save(compressed, "JPEG", quality=rng.randint(15, 95))
            images.append(Image.open(compressed))
            value, colour = (NOTHING, NOTHING) if needle is None else (needle.value, needle.colour)
            labels.append([VALUES.index(value), COLOUR_NAMES.index(colour)])
        return {**self.image_processor(images, return_tensors="pt"), "labels": torch.tensor(labels)}


class NeedleClassifier(nn.Module):
    """The vision tower with linear classifiers of value and colour on the feature map that the compressor will read.

    Classifiers on the maximum of the map learn fast. Those on its mean make the map one that can be averaged, as the
    compressor does.
    """

    def __init__(self, model: MambaMiaForConditionalGeneration):
        super().__init__()
        self.encode_frames = model.model.encode_frames
        self.vision_tower = model.model.vision_tower
        self.num_labels = [len(VALUES), len(COLOUR_NAMES)]
        self.heads = nn.ModuleList(nn.Linear(model.config.vision_hidden_size, sum(self.num_labels)) for _ in range(2))

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`pixel_values (videos, frames, 3, height, width)` and `labels (videos, frames, 2)` to the loss."""
        pixel_values = pixel_values.flatten(0, 1).contiguous(memory_format=torch.channels_last)  # faster on a CPU
        features = self.encode_frames(pixel_values).last_hidden_state
        targets = labels.flatten(0, 1).T
        losses = [
            nn.functional.cross_entropy(logits, target)
            for head, pooled in zip(self.heads, (features.mean(dim=1), features.amax(dim=1)), strict=True)
            for logits, target in zip(head(pooled).split(self.num_labels, dim=1), targets, strict=True)
        ]
        return {"loss": sum(losses)}


def main(arguments: list[str] | None = None) -> None:
    (training,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(arguments)
    training.remove_unused_columns = False
    set_seed(training.seed)
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))  # another core makes the frames
    processor = build_processor()
    model = build_model(processor)
    frames = LabelledFrames(training.max_steps * training.train_batch_size, processor.image_processor)
    trainer = Trainer(NeedleClassifier(model), training, train_dataset=frames)
    folder = Path(training.output_dir)
    trainer.train(resume_from_checkpoint=folder.is_dir() and get_last_checkpoint(folder))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    trainer.save_state()


if __name__ == "__main__":
    main()
