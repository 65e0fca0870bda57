"""The time of each kept frame stands before its tokens, however frames are kept and however the model is called."""

import math

import pytest
import torch
from tiny import tiny_tokenizer
from tiny_model import NUM_ANCHORS, VIDEO_TOKEN, random_videos, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mambamia_hf.frame_times import check_times, format_time, time_characters, time_ids, time_token_ids, time_width


FORMATS = ("mm:ss", "h:mm:ss", "mm:ss.d")
DIGITS = {character: 20 + number for number, character in enumerate("0123456789:.")}


class TestFormats:
    @pytest.mark.parametrize(
        ("time_format", "seconds", "expected"),
        [
            ("mm:ss", 0, "00:00"),
            ("mm:ss", 59.96, "00:59"),
            ("mm:ss", 59.998, "00:59"),
            ("mm:ss", 59.9995, "01:00"),
            ("mm:ss", 5999.9, "99:59"),
            ("mm:ss.d", 59.96, "00:59.9"),
            ("mm:ss.d", 0.3 - 1e-12, "00:00.3"),
            ("mm:ss.d", 3599.04, "59:59.0"),
            ("h:mm:ss", 3600, "1:00:00"),
            ("h:mm:ss", 35999.5, "9:59:59"),
            ("h:mm:ss", 754.2, "0:12:34"),
        ],
    )
    def test_a_clock(self, time_format, seconds, expected):
        assert format_time(seconds, time_format) == expected

    @pytest.mark.parametrize("time_format", FORMATS)
    def test_never_later_than_the_frame_and_always_as_wide(self, time_format):
        for number in range(5999):
            seconds = number * 1.000123
            text = format_time(seconds, time_format)
            *hours, minutes, rest = text.split(":")
            named = 60 * int(minutes) + float(rest) + 3600 * sum(map(int, hours))
            step = 0.1 if time_format == "mm:ss.d" else 1
            assert seconds - step < named <= seconds + 1e-3
            assert len(text) == time_width(time_format) == len(time_format)
            assert set(text) <= set(time_characters(time_format))

    @pytest.mark.parametrize("frames_per_second", [24, 25, 30, 30000 / 1001])
    def test_rounding_of_containers_costs_no_step(self, frames_per_second):
        for number in range(0, 3000, 7):
            exact = number / frames_per_second
            if exact == int(exact):
                assert format_time(round(exact, 3), "mm:ss") == format_time(exact, "mm:ss")

    @pytest.mark.parametrize(
        ("time_format", "seconds", "message"),
        [
            ("mm:ss", 6000.0, "A frame at 6000 s does not fit .*'mm:ss'.*use a model .*'h:mm:ss'"),
            ("mm:ss.d", 7200.0, "'mm:ss.d', which ends at 6000 s; use a model .*'h:mm:ss'"),
            ("h:mm:ss", 36000.0, "'h:mm:ss', which ends at 36000 s; none is longer"),
            ("mm:ss", -0.5, "has the time -0.5; times are seconds from the start"),
            ("mm:ss", math.nan, "has the time nan"),
            ("mm:ss", math.inf, "has the time inf"),
            ("ss", 1.0, "'ss' is no format of times; choose from .*'mm:ss'"),
        ],
    )
    def test_times_that_cannot_be_written(self, time_format, seconds, message):
        with pytest.raises(ValueError, match=message):
            format_time(seconds, time_format)

    def test_tokens(self):
        assert time_ids([0, 61.25], "mm:ss.d", DIGITS) == [
            [20, 20, 30, 20, 20, 31, 20],
            [20, 21, 30, 20, 21, 31, 22],
        ]

    def test_tokens_of_a_tokenizer(self):
        tokenizer = tiny_tokenizer()
        token_ids = time_token_ids(tokenizer, "mm:ss.d")
        (ids,) = time_ids([754.5], "mm:ss.d", token_ids)
        assert tokenizer.decode(ids) == "12:34.5"
        assert "." not in time_token_ids(tokenizer, "mm:ss")

    @pytest.mark.parametrize("missing", ["7", ":"])
    def test_a_tokenizer_without_such_tokens(self, missing):
        vocabulary = {character: number for number, character in enumerate("?" + "0123456789:".replace(missing, ""))}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
        backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
        with pytest.raises(ValueError, match=f"no token of its own for '{missing}'; use None, or"):
            time_token_ids(tokenizer, "mm:ss")

    @pytest.mark.parametrize("times", [[0, 1], [0, 2, 1], [-1, 0, 1], [0, math.nan, 1], [0, 1, math.inf]])
    def test_times_of_a_video(self, times):
        check_times([0, 0, 3.5], 3)
        with pytest.raises(ValueError, match="time"):
            check_times(times, 3)


LONG, SHORT = 12, 7
WIDTH, PER_FRAME = 5, 5 + NUM_ANCHORS
TIMES = torch.tensor(
    [[5.3 * number for number in range(LONG)], [*(60.0 + 2.5 * number**2 for number in range(SHORT)), *5 * [0.0]]],
    dtype=torch.float64,
)


@pytest.fixture(scope="module")
def model():
    return tiny_model(frame_time_format="mm:ss", time_token_ids=DIGITS)


@pytest.fixture(scope="module")
def untimed(model):
    """The same weights without times."""
    return tiny_model()


def prompt(*parts: list[int] | int) -> list[int]:
    return [
        token for part in parts for token in (part if isinstance(part, list) else part * PER_FRAME * [VIDEO_TOKEN])
    ]


@pytest.fixture(scope="module")
def batch():
    """Two left-padded prompts with a video each."""
    long, short = prompt([5, 6], LONG, [7, 8]), prompt([9], SHORT, [10, 11, 12])
    padding = len(long) - len(short)
    videos = torch.cat([random_videos(1, LONG, seed=0), random_videos(1, LONG, seed=1)])
    return {
        "input_ids": torch.tensor([long, padding * [0] + short]),
        "attention_mask": torch.tensor([len(long) * [1], padding * [0] + len(short) * [1]]),
        "pixel_values_videos": videos,
        "frame_mask": torch.arange(LONG) < torch.tensor([[LONG], [SHORT]]),
        "video_timestamps": TIMES,
    }


def row_alone(batch, row):
    tokens, frames = batch["attention_mask"][row].bool(), batch["frame_mask"][row]
    return {
        "input_ids": batch["input_ids"][row : row + 1, tokens],
        "pixel_values_videos": batch["pixel_values_videos"][row : row + 1, frames],
        "video_timestamps": batch["video_timestamps"][row : row + 1, frames],
    }


def embeddings_by_hand(model, untimed, row, **how):
    """`(length, hidden_size)`: what the language model has to read, and the digits as text."""
    features = untimed.get_video_features(row["pixel_values_videos"], **how)
    kept = features.keep_mask[0].nonzero().flatten().tolist()
    (ids,) = row["input_ids"].tolist()
    start, end = ids.index(VIDEO_TOKEN), len(ids) - ids[::-1].index(VIDEO_TOKEN)
    embed, texts = model.get_input_embeddings(), []
    parts = [embed(torch.tensor(ids[:start]))]
    for frame in kept:
        seconds = int(row["video_timestamps"][0, frame])
        texts.append(f"{seconds // 60:02}:{seconds % 60:02}")
        parts += [embed(torch.tensor([DIGITS[character] for character in texts[-1]]))]
        parts += [features.last_hidden_state[0, frame]]
    return torch.cat([*parts, embed(torch.tensor(ids[end:]))]).detach(), texts


HOW = [{}, {"keep_frames": 4}, {"keep_ratio": 0.5}, {"delta_threshold": 0}, {"delta_threshold": 0.6}]


@pytest.mark.parametrize("how", HOW, ids=str)
def test_forward_of_a_batch(model, untimed, batch, how):
    embedded = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: embedded.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    output = model(**batch, **how)
    hook.remove()
    for row in range(2):
        expected, texts = embeddings_by_hand(model, untimed, row_alone(batch, row), **how)
        assert len(texts) == output.keep_mask[row].sum()
        torch.testing.assert_close(embedded[0][row, -len(expected) :], expected)
        alone = model(**row_alone(batch, row), **how)
        torch.testing.assert_close(output.logits[row, -len(expected) :], alone.logits[0])
