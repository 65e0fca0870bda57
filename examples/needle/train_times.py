"""Teaches the small model's language model times over an hour; vision tower and compressor stay as they are.

    PYTHONPATH=examples python -m needle.train_times --model long_video --memories memories --output times

The model looks at every video once and remembers it; the memories are kept in a folder. In a step the language model
reads one long video or a few shorter ones, with stills in between, once for all questions about it: a question sees
the video and itself. What is written is the average of the weights of the last few hundred steps. A second call goes
on where the first stopped.
"""

import argparse
import json
import os
import random
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import DynamicCache, get_cosine_schedule_with_warmup

from mambamia_hf import MambaMiaForConditionalGeneration, MambaMiaProcessor
from mambamia_hf.files import atomic_write
from mambamia_hf.frame_times import time_ids
from mambamia_hf.versions import CACHE_NAME

from .evaluate import load, worker_pool
from .looks import Look, Looks
from .remembered_videos import (
    FIRST_SEED,
    STILLS_PER_SEED,
    RememberedStill,
    RememberedVideo,
    remember,
    remember_stills,
)


FRAMES_PER_STEP = 192  # at least
FEWEST_FRAMES, MOST_FRAMES = 32, 384  # kept of a video at first, and after GROWTH of the training
GROWTH = 0.5
AVERAGED_STEPS = 300
WARMUP_STEPS = 50
LOGGING_STEPS = 100
STATE = "training_state.pt"


def most_frames(progress: float) -> int:
    """How many frames of a video are kept at most, when this share of the training is done: ever more."""
    return round(FEWEST_FRAMES * (MOST_FRAMES / FEWEST_FRAMES) ** min(progress / GROWTH, 1.0))


class Reader:
    """A model's language model, and the conversation around a video or a still.

    Args:
        model: in evaluation mode.
        processor: the model's.
    """

    def __init__(self, model: MambaMiaForConditionalGeneration, processor: MambaMiaProcessor):
        self.model = model
        self.processor = processor

    def answers(self, look: Look) -> tuple[Tensor, Tensor, Tensor]:
        """What the language model says to all questions of a look, given the tokens before.

        Returns:
            The logits `(num_tokens, vocab_size)` of the tokens of all answers, one after the other, these tokens
            `(num_tokens,)`, and the number of the question that each belongs to `(num_tokens,)`.
        """
        config, embed = self.model.config, self.model.get_input_embeddings()
        medium, frames = "image", look.tokens
        if look.times is not None:
            digits = torch.tensor(time_ids(look.times, config.frame_time_format, config.time_token_ids))
            medium, frames = "video", torch.cat([embed(digits), look.tokens], dim=1)
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
        return self.model.lm_head(states[places]), tokens, number[places]

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
    """The steps of a training, whose state is kept in a folder.

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
        videos: Sequence[RememberedVideo],
        stills: Sequence[RememberedStill],
        folder: Path,
        max_steps: int,
        learning_rate: float,
    ):
        self.model, self.processor = model, processor
        self.reader = Reader(model, processor)
        self.folder = folder
        self.max_steps = max_steps
        model.requires_grad_(False)
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, WARMUP_STEPS, max_steps)
        self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / AVERAGED_STEPS))
        self.step = 0
        if (folder / STATE).exists():
            self._restore()
        self.looks = Looks(videos, stills, random.Random(f"after {self.step} steps"))

    def run(self, save_steps: int) -> None:
        """All steps that are left; prints now and then the share of right answers of each kind."""
        right, all_asked = Counter(), Counter()
        while self.step < self.max_steps:
            for kind, is_right in self.take_step():
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
        while num_frames < FRAMES_PER_STEP:
            look = self.looks.draw(most)
            logits, tokens, number = self.reader.answers(look)
            losses.append(nn.functional.cross_entropy(logits, tokens))
            wrong = set(number[logits.argmax(dim=-1) != tokens].tolist())
            answered += [(asked.kind, which not in wrong) for which, asked in enumerate(look.asked)]
            num_frames += len(look.tokens)
        torch.stack(losses).mean().backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.averaged.update_parameters(self.model)
        self.step += 1
        return answered

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
            "optimizer": self.optimizer,
            "schedule": self.schedule,
        }


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="checkpoint to start from")
    parser.add_argument("--memories", type=Path, required=True, help="folder for what it remembers of videos")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--num_videos", type=int, default=1000)
    parser.add_argument("--num_stills", type=int, default=2000)
    parser.add_argument("--max_steps", type=int, default=4000)
    parser.add_argument("--learning_rate", type=float, default=8e-4)
    parser.add_argument("--save_steps", type=int, default=250)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that look at videos")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    options.memories.mkdir(parents=True, exist_ok=True)
    seeds = range(FIRST_SEED, FIRST_SEED + options.num_videos)
    with worker_pool(options.workers) as pool:
        jobs = pool.map(partial(remember, options.model, options.memories), seeds)
        list(tqdm(jobs, total=len(seeds), unit="video"))
    model, processor = load(options.model)
    videos = [RememberedVideo.load(model, options.memories, seed) for seed in seeds]
    seeds = range(FIRST_SEED, FIRST_SEED + options.num_stills // STILLS_PER_SEED)
    stills = [still for seed in seeds for still in remember_stills(model, processor, seed)]
    training = Training(model, processor, videos, stills, options.output, options.max_steps, options.learning_rate)
    training.run(options.save_steps)


if __name__ == "__main__":
    main()
