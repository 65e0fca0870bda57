"""Teaches the small model to read whole hours: the compressor and the language model; the vision tower stays as it is.

    PYTHONPATH=examples python -m torch.distributed.run --nproc_per_node 2 -m needle.train_times \
        --model long_video --features features/long_videos --output times

`needle.training_data` writes `long_videos`, and `mambamia_hf.training.features` their features. In a step every
process reads one long video or a few shorter ones, with stills in between, once for all questions about it: a question
sees the video and itself. Beside the answers, the anchors of every frame have to tell how many needles have appeared
so far. What is written is the average of the weights of the last few hundred steps. A second call goes on where the
first stopped. For a model of this size, two processes are faster than two threads.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import DynamicCache, get_cosine_schedule_with_warmup

from mambamia_hf import MambaMiaForConditionalGeneration, MambaMiaProcessor
from mambamia_hf.files import atomic_write
from mambamia_hf.frame_times import time_ids
from mambamia_hf.training.media import MediaReader, VisionFeatures
from mambamia_hf.versions import CACHE_NAME

from .evaluate import load
from .looks import Look, Looks
from .plan import MAX_COUNT
from .seen_videos import STILLS_PER_SEED, SeenStill, SeenVideo, see_stills, seen_videos
from .training_data import FIRST_LONG_VIDEO


FRAMES_PER_STEP = 128  # per process, at least
FEWEST_FRAMES, MOST_FRAMES = 32, 384  # of a video at first, and after GROWTH of the training, at most
GROWTH = 0.4
AVERAGED_STEPS = 300
WARMUP_STEPS = 50
LOGGING_STEPS = 100
STATE = "training_state.pt"


def rank() -> int:
    """The number of this process in its group; 0 without one."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Gives every process of the group the mean of all gradients, which are 0 where a process has none."""
    if not distributed.is_initialized():
        return
    gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
    mean = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(mean)
    mean /= distributed.get_world_size()
    for parameter, part in zip(parameters, mean.split([one.numel() for one in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def most_frames(progress: float) -> int:
    """How many frames a video has at most, when this share of the training is done: ever more."""
    return round(FEWEST_FRAMES * (MOST_FRAMES / FEWEST_FRAMES) ** min(progress / GROWTH, 1.0))


class Reading(NamedTuple):
    """What a model makes of a look.

    Args:
        anchors: of all frames, `(num_frames, anchors_per_frame, output_size)`.
        logits: given the tokens before, of the tokens of all answers, one after the other, `(num_tokens, vocab_size)`.
        tokens: these tokens, `(num_tokens,)`.
        number: of the question that each belongs to, `(num_tokens,)`.
    """

    anchors: Tensor
    logits: Tensor
    tokens: Tensor
    number: Tensor


class Reader:
    """A model behind its vision tower, and the conversation around a video or a still.

    Args:
        model: in evaluation mode.
        processor: the model's.
    """

    def __init__(self, model: MambaMiaForConditionalGeneration, processor: MambaMiaProcessor):
        self.model = model
        self.processor = processor

    def read(self, look: Look) -> Reading:
        """What the model makes of a look and says to all questions about it."""
        config, embed = self.model.config, self.model.get_input_embeddings()
        anchors, deltas = self.model.model.compress(look.features[None])
        kept = look.kept(deltas[0].detach())
        medium, frames = "image", self.model.model.project(anchors[0, kept])
        if look.times is not None:
            times = [look.times[frame] for frame in kept]
            digits = torch.tensor(time_ids(times, config.frame_time_format, config.time_token_ids))
            medium, frames = "video", torch.cat([embed(digits), frames], dim=1)
        prompts = [self._prompt(medium, asked.question) for asked in look.asked]
        video = torch.cat([embed(torch.tensor(prompts[0][0])), frames.flatten(0, 1)])
        cache = DynamicCache()
        language_model = self.model.model.language_model
        language_model(inputs_embeds=video[None], use_cache=True, **{CACHE_NAME: cache})

        end = [self.processor.tokenizer.eos_token_id]
        answers = [self._ids(asked.answer) + end for asked in look.asked]
        rows = [after + answer for (_, after), answer in zip(prompts, answers, strict=True)]
        number = torch.tensor([which for which, row in enumerate(rows) for _ in row])
        positions = torch.cat([len(video) + torch.arange(len(row)) for row in rows])
        is_seen = (number[:, None] == number) & (positions[:, None] >= positions)
        states = language_model(
            inputs_embeds=embed(torch.tensor([token for row in rows for token in row]))[None],
            attention_mask=torch.cat([is_seen.new_ones(len(number), len(video)), is_seen], dim=1)[None, None],
            position_ids=positions[None],
            **{CACHE_NAME: cache},
        ).last_hidden_state[0]
        # A state predicts the token after it; an answer is at the end of its row.
        ends = torch.tensor([len(row) for row in rows]).cumsum(0).tolist()
        places = [
            end - back - 1 for end, answer in zip(ends, answers, strict=True) for back in range(len(answer), 0, -1)
        ]
        tokens = torch.tensor([token for answer in answers for token in answer])
        return Reading(anchors[0], self.model.lm_head(states[places]), tokens, number[places])

    def _prompt(self, medium: str, question: str) -> tuple[list[int], list[int]]:
        """The tokens before a "video" or an "image" and after it."""
        content = [{"type": medium}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        before, after = prompt.split(getattr(self.processor, f"{medium}_token"))
        return self._ids(before), self._ids(after)

    def _ids(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]


class Training:
    """The steps of a training, whose state is kept in a folder; each process of a group has one.

    Args:
        model, processor: what learns.
        videos, stills: to learn from.
        folder: for the model and the state of training. A state that is there is gone on from.
        max_steps: over which the learning rate falls to 0.
        learning_rate: the highest one.
    """

    def __init__(
        self,
        model: MambaMiaForConditionalGeneration,
        processor: MambaMiaProcessor,
        videos: Sequence[SeenVideo],
        stills: Sequence[SeenStill],
        folder: Path,
        max_steps: int,
        learning_rate: float,
    ):
        self.model, self.processor = model, processor
        self.reader = Reader(model, processor)
        self.looks = Looks(videos, stills)
        self.folder = folder
        self.max_steps = max_steps
        model.requires_grad_(True)
        model.model.vision_tower.requires_grad_(False)
        # Reads off the anchors how many needles have appeared so far; it is not part of the model.
        self.counter = nn.Linear(model.config.compressor_config.output_size, MAX_COUNT + 1)
        learning = [*model.parameters(), *self.counter.parameters()]
        self.parameters = [parameter for parameter in learning if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, WARMUP_STEPS, max_steps)
        self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / AVERAGED_STEPS))
        self.step = 0
        if (folder / STATE).exists():
            self._restore()

    def run(self, save_steps: int) -> None:
        """All steps that are left; prints now and then the share of right answers of each kind."""
        right, all_asked = Counter(), Counter()
        while self.step < self.max_steps:
            answered = self.take_step()
            if rank() > 0:
                continue
            for kind, is_right in answered:
                all_asked[kind] += 1
                right[kind] += is_right
            if self.step % LOGGING_STEPS == 0:
                shares = {kind: round(right[kind] / count, 3) for kind, count in sorted(all_asked.items())}
                print(json.dumps({"step": self.step} | shares), flush=True)
                right, all_asked = Counter(), Counter()
            if self.step % save_steps == 0 or self.step == self.max_steps:
                self.save()

    def take_step(self) -> list[tuple[str, bool]]:
        """Returns the kind of each question, and whether the answer was right."""
        num_frames, losses, answered = 0, [], []
        most = most_frames(self.step / self.max_steps)
        # Processes wait for each other after each step: all read about as many frames.
        rng, sizes = Random(f"step {self.step}, process {rank()}"), Random(f"step {self.step}")
        while num_frames < FRAMES_PER_STEP:
            look = self.looks.draw(rng, sizes, most)
            loss, answers = self._loss(look)
            losses.append(loss)
            answered += answers
            num_frames += len(look.features)
        torch.stack(losses).mean().backward()
        average_gradients(self.parameters)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.averaged.update_parameters(self.model)
        self.step += 1
        return answered

    def _loss(self, look: Look) -> tuple[Tensor, list[tuple[str, bool]]]:
        """The loss of a look, and the kind of each question with whether the answer was right.

        The loss of a video is that of its answers and of a count: how many needles have appeared up to each frame. An
        answer alone says little about what went wrong on the way to it.
        """
        reading = self.reader.read(look)
        loss = nn.functional.cross_entropy(reading.logits, reading.tokens)
        wrong = set(reading.number[reading.logits.argmax(dim=-1) != reading.tokens].tolist())
        answered = [(asked.kind, which not in wrong) for which, asked in enumerate(look.asked)]
        if look.times is not None:
            counts, num_appeared = self.counter(reading.anchors.mean(dim=1)), look.num_appeared
            loss = loss + nn.functional.cross_entropy(counts, num_appeared)
            answered.append(("appeared", bool(counts[-1].argmax() == num_appeared[-1])))
        return loss, answered

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.averaged.module.save_pretrained(self.folder)
        self.processor.save_pretrained(self.folder)
        state = {name: part.state_dict() for name, part in self._parts().items()}
        with atomic_write(self.folder / STATE) as unfinished:
            torch.save({"step": self.step, **state}, unfinished)

    def _restore(self) -> None:
        state = torch.load(self.folder / STATE)
        self.step = state["step"]
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict:
        return {
            "model": self.model,
            "averaged": self.averaged,
            "counter": self.counter,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
        }


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="checkpoint to start from")
    parser.add_argument("--features", type=Path, required=True, help="folder with its features of long videos")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--num_stills", type=int, default=800)
    parser.add_argument("--max_steps", type=int, default=5500)
    parser.add_argument("--learning_rate", type=float, default=4e-4)
    parser.add_argument("--save_steps", type=int, default=250)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if "RANK" in os.environ:  # as `torch.distributed.run` sets it
        distributed.init_process_group("gloo")
    torch.manual_seed(0)  # all processes start with the same weights
    model, processor = load(options.model)
    videos = seen_videos(VisionFeatures(options.features, MediaReader(processor).settings(model)))
    seeds = range(FIRST_LONG_VIDEO, FIRST_LONG_VIDEO + options.num_stills // STILLS_PER_SEED)
    stills = [still for seed in seeds for still in see_stills(model, processor, seed)]
    training = Training(model, processor, videos, stills, options.output, options.max_steps, options.learning_rate)
    training.run(options.save_steps)
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
