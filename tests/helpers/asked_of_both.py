"""The same questions for vLLM and for Transformers, and what has to be the same about the answers."""

import math
from pathlib import Path
from typing import NamedTuple

from PIL import Image


MAX_NEW_TOKENS = 6


class Answer(NamedTuple):
    ids: list[int]
    text: str
    prompt_tokens: int
    logprob: float  # of the first token


def video(path: Path) -> dict:
    return {"type": "video", "path": str(path)}


def image(path: Path) -> dict:
    return {"type": "image", "path": str(path)}


def conversation(parts) -> list[dict]:
    """A question of texts, videos and images, as Transformers takes it."""

    def entry(part) -> dict:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        return {"type": "image", "image": Image.open(part["path"])} if part["type"] == "image" else part

    return [{"role": "user", "content": [entry(part) for part in parts]}]


def for_servers(parts) -> list[dict]:
    """The same as servers take it."""

    def entry(part) -> dict:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        kind = f"{part['type']}_url"
        return {"type": kind, kind: {"url": Path(part["path"]).as_uri()}}

    return [{"role": "user", "content": [entry(part) for part in parts]}]


class Transformers:
    """A checkpoint in Transformers, and the options that its server would have."""

    def __init__(self, model, processor, **server):
        self.model, self.processor, self.server = model.eval(), processor, server

    def ask(self, parts, **options) -> Answer:
        inputs = self.processor.apply_chat_template(
            conversation(parts),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={**self.server, **options},
        )
        return self.generate(inputs)

    def generate(self, inputs) -> Answer:
        length = inputs["input_ids"].shape[1]
        output = self.model.generate(
            **inputs,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        tokens = output.sequences[0, length:]
        logprob = output.scores[0][0].float().log_softmax(-1)[tokens[0]]
        text = self.processor.decode(tokens, skip_special_tokens=True)
        return Answer(tokens.tolist(), text, length, float(logprob))


class Vllm:
    """A checkpoint in vLLM."""

    def __init__(self, llm, sampling):
        self.llm, self.sampling, self.options = llm, sampling, {"use_tqdm": False}

    def ask(self, parts, **options) -> Answer:
        return self._answer(self.chat([for_servers(parts)], mm_processor_kwargs=options or None)[0])

    def chat(self, conversations, **kwargs):
        return self.llm.chat(conversations, self.sampling, **self.options, **kwargs)

    def generate(self, prompts, **kwargs) -> list[Answer]:
        return [self._answer(output) for output in self.llm.generate(prompts, self.sampling, **self.options, **kwargs)]

    @staticmethod
    def _answer(output) -> Answer:
        (completion,) = output.outputs
        logprob = completion.logprobs[0][completion.token_ids[0]].logprob
        return Answer(list(completion.token_ids), completion.text, len(output.prompt_token_ids), logprob)


def check_same(answer: Answer, expected: Answer) -> None:
    assert answer.ids == expected.ids and answer.prompt_tokens == expected.prompt_tokens, (answer, expected)
    if "\N{REPLACEMENT CHARACTER}" not in expected.text:  # which vLLM leaves out at the end
        assert answer.text == expected.text
    assert math.isclose(answer.logprob, expected.logprob, abs_tol=2e-3), (answer, expected)
