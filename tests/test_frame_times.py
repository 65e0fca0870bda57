"""The time of each kept frame stands before its tokens, however frames are kept and however the model is called."""

import math

import pytest
import torch
import transformers
from packaging import version
from tiny import tiny_tokenizer
from tiny_model import IMAGE_TOKEN, NUM_ANCHORS, VIDEO_TOKEN, random_videos, tiny_checkpoint, tiny_config, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from video_files import write_video

from mambamia_hf import MambaMiaConfig
from mambamia_hf.frame_times import check_times, format_time, time_characters, time_ids, time_token_ids, time_width
from mambamia_hf.prompt_tokens import take_tokens
from mambamia_hf.versions import CACHE_NAME


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
    for frame, tokens in zip(kept, features.pooler_output[0].unflatten(0, (len(kept), -1)), strict=True):
        seconds = int(row["video_timestamps"][0, frame])
        texts.append(f"{seconds // 60:02}:{seconds % 60:02}")
        parts += [embed(torch.tensor([DIGITS[character] for character in texts[-1]]))]
        parts += [tokens]
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
        tokens = batch["attention_mask"][row].bool()
        torch.testing.assert_close(output.logits[row, tokens], alone.logits[0])


def digits_read(model, call) -> list[list[str]]:
    """The times that the language model first reads during `call()`, as text, one list per prompt."""
    read: list[list[str]] = []

    def read_off(module, args, kwargs):
        if read:
            return
        table = model.get_input_embeddings().weight
        for row in kwargs["inputs_embeds"]:
            is_digit = (row[:, None] == table[list(DIGITS.values())]).all(dim=-1)
            places, numbers = is_digit.nonzero().unbind(dim=1)
            text = "".join(list(DIGITS)[number] for number in numbers)
            assert all(places[WIDTH - 1 :: WIDTH] - places[::WIDTH] == WIDTH - 1), (
                "the digits of a time stand together"
            )
            read.append([text[start : start + WIDTH] for start in range(0, len(text), WIDTH)])

    hook = model.model.language_model.register_forward_pre_hook(read_off, with_kwargs=True)
    call()
    hook.remove()
    return read


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60:02}:{int(seconds) % 60:02}"


@pytest.mark.parametrize("how", HOW, ids=str)
def test_generate_reads_the_times_of_the_kept_frames(model, batch, how):
    arguments = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    with torch.no_grad():
        keep_mask = model.get_video_features(
            **{name: batch[name] for name in ("pixel_values_videos", "frame_mask", "video_timestamps")}, **how
        ).keep_mask
    outputs = []
    read = digits_read(model, lambda: outputs.append(model.generate(**batch, **how, **arguments)))
    expected = [[clock(seconds) for seconds in TIMES[row, keep_mask[row]].tolist()] for row in range(2)]
    assert read == expected
    assert torch.equal(outputs[0].sequences[:, : batch["input_ids"].shape[1]], batch["input_ids"])
    longest = max(len(embeddings_by_hand(model, tiny_model(), row_alone(batch, row), **how)[0]) for row in range(2))
    assert outputs[0][CACHE_NAME].get_seq_length() == longest + 2
    for row in range(2):
        alone = model.generate(**row_alone(batch, row), **how, **arguments)
        assert torch.equal(alone.sequences[0, -3:], outputs[0].sequences[row, -3:])


@pytest.mark.parametrize("with_number", [True, False])
def test_a_prompt_that_was_sized_for_the_budget(model, batch, with_number):
    """As from a processor with a budget, or from an engine that sends no `num_kept_frames`."""
    ids = torch.tensor([prompt([5, 6], 4, [7, 8])])
    video = {name: tensor[:1] for name, tensor in batch.items() if name not in ("input_ids", "attention_mask")}
    number = {"num_kept_frames": torch.tensor([4])} if with_number else {}
    whole = model(batch["input_ids"][:1], **video, keep_frames=4)
    sized = model(ids, **video, **number)
    torch.testing.assert_close(sized.logits, take_tokens(whole.logits, whole.token_indices, 0))
    read = digits_read(model, lambda: model.generate(ids, **video, **number, max_new_tokens=1))
    assert read == [[clock(seconds) for seconds in TIMES[0, whole.keep_mask[0]].tolist()]]


def test_features_that_were_made_before(model, batch):
    with torch.no_grad():
        expected = model(**batch, keep_frames=4).logits
        frames = batch["pixel_values_videos"]
        patches = model.model.encode_frames(frames.flatten(0, 1)).last_hidden_state.unflatten(0, frames.shape[:2])
        rest = {name: tensor for name, tensor in batch.items() if name != "pixel_values_videos"}
        torch.testing.assert_close(model(**rest, patch_features_videos=patches, keep_frames=4).logits, expected)
        features = model.get_video_features(
            frames, frame_mask=batch["frame_mask"], video_timestamps=TIMES, keep_frames=4
        )
        assert [len(tokens) for tokens in features.pooler_output] == 2 * [4 * PER_FRAME]
        prompts = {name: batch[name] for name in ("input_ids", "attention_mask")}
        for times in ({}, {"video_timestamps": TIMES}):  # the features have them
            output = model(**prompts, mm_encoder_outputs={"video": features}, **times)
            torch.testing.assert_close(output.logits, expected)


def test_an_image_beside_a_video_has_no_time(model, batch):
    ids = torch.tensor([[5] + NUM_ANCHORS * [IMAGE_TOKEN] + prompt([6], SHORT, [7])])
    images = random_videos(1, 1, seed=3)[0]
    output = model(
        ids,
        pixel_values=images,
        pixel_values_videos=batch["pixel_values_videos"][1:, :SHORT],
        video_timestamps=TIMES[1:, :SHORT],
    )
    assert len(output.image_hidden_states) == NUM_ANCHORS
    assert len(output.video_hidden_states) == output.keep_mask.sum() * PER_FRAME


@pytest.mark.parametrize(
    "times",
    [TIMES.float(), TIMES.tolist(), [TIMES[0].tolist(), TIMES[1, :SHORT].tolist()]],
    ids=["float32", "lists", "rows"],
)
def test_other_ways_to_give_times(model, batch, times):
    torch.testing.assert_close(
        model(**{**batch, "video_timestamps": times}).logits, model(**batch).logits, rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (None, "writes the times of frames and video_timestamps is missing; pass what the processor"),
        (TIMES.bfloat16(), "video_timestamps is torch.bfloat16, which may have lost seconds; pass float64"),
        (TIMES.long(), "video_timestamps is torch.int64"),
        (TIMES[:1], r"video_timestamps must be \(num_videos, num_frames\), \(2, 12\) here"),
        (TIMES[0].tolist(), "a list of at most 12 numbers for each of 2 videos, not"),
        (torch.cat([TIMES, TIMES], dim=1), "a list of at most 12 numbers"),
        ([TIMES[0].tolist(), [1.0]], "A frame has the time nan"),
        (TIMES - 100, "has the time -100"),
        (TIMES + 6000, r"A frame at 6000 s does not fit .*'h:mm:ss'"),
    ],
    ids="missing bfloat16 integers one_video one_row too_long too_short negative too_late".split(),
)
def test_times_that_the_model_refuses(model, batch, times, message):
    with pytest.raises(ValueError, match=message):
        model(**{**batch, "video_timestamps": times}, delta_threshold=0)
    with pytest.raises(ValueError, match=message):
        model.generate(**{**batch, "video_timestamps": times}, delta_threshold=0, max_new_tokens=1)


def test_a_model_without_times_ignores_them(untimed):
    ids = torch.tensor([[5] + LONG * NUM_ANCHORS * [VIDEO_TOKEN] + [6]])
    video = random_videos(1, LONG)
    expected = untimed(ids, pixel_values_videos=video).logits
    assert torch.equal(untimed(ids, pixel_values_videos=video, video_timestamps=TIMES[:1]).logits, expected)
    untimed.generate(ids, pixel_values_videos=video, video_timestamps=TIMES[:1], max_new_tokens=1)


def test_a_prompt_without_room_for_times(model, batch):
    ids = torch.tensor([[5] + LONG * NUM_ANCHORS * [VIDEO_TOKEN] + [6]])
    with pytest.raises(
        ValueError, match=f"has {LONG * NUM_ANCHORS} placeholders in the prompt; expected {LONG * PER_FRAME}"
    ):
        model(ids, pixel_values_videos=batch["pixel_values_videos"][:1], video_timestamps=TIMES[:1])


@pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.23"),
    reason="earlier versions hand no features to a prefill in chunks",
)
def test_prefill_in_chunks(model, batch):
    arguments = {"max_new_tokens": 6, "do_sample": False}
    chunks = model.generate(**batch, prefill_chunk_size=7, **arguments)
    assert torch.equal(chunks, model.generate(**batch, **arguments))


@pytest.mark.parametrize("how", [{}, {"keep_frames": 4}], ids=str)
def test_a_dialogue_goes_on_from_its_cache(model, batch, how):
    arguments = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(**row_alone(batch, 0), **how, **arguments)
    longer = torch.cat([first.sequences, torch.tensor([[9, 10, 11]])], dim=1)
    second = model.generate(longer, **{CACHE_NAME: first[CACHE_NAME]}, **arguments)
    media = {**row_alone(batch, 0), "input_ids": longer}
    assert torch.equal(second.sequences, model.generate(**media, **how, **arguments).sequences)

    with_video = model.generate(**row_alone(batch, 0), **how, **arguments)
    third = model.generate(**media, **{CACHE_NAME: with_video[CACHE_NAME]}, **how, **arguments)
    assert torch.equal(third.sequences, second.sequences)


def test_a_video_after_cached_turns(model, batch):
    arguments = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(torch.tensor([[5, 6, 7]]), **arguments)
    ids = torch.cat([first.sequences, torch.tensor([prompt([8], LONG, [9])])], dim=1)
    video = {"pixel_values_videos": batch["pixel_values_videos"][:1], "video_timestamps": TIMES[:1]}
    expected = model.generate(ids, **video, **arguments)
    assert torch.equal(model.generate(ids, **video, **{CACHE_NAME: first[CACHE_NAME]}, **arguments)[0], expected[0])


def test_embeddings_in_place_of_tokens(model, batch):
    embeds = model.get_input_embeddings()(batch["input_ids"])
    rest = {name: tensor for name, tensor in batch.items() if name != "input_ids"}
    torch.testing.assert_close(model(inputs_embeds=embeds, **rest).logits, model(**batch).logits)


@pytest.mark.parametrize(
    "settings", [{}, {"frame_dropout": 0.8}, {"keep_ratio": 0.5, "delta_threshold": None}], ids=str
)
def test_training(batch, settings):
    model = tiny_model(frame_time_format="mm:ss", time_token_ids=DIGITS, **settings).train()
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == VIDEO_TOKEN, -100)
    labels[:, -2:] = 8
    outputs = []
    torch.manual_seed(0)
    read = digits_read(model, lambda: outputs.append(model(**batch, labels=labels)))
    keep_mask = outputs[0].keep_mask
    assert read == [[clock(seconds) for seconds in TIMES[row, keep_mask[row]].tolist()] for row in range(2)]
    assert keep_mask.all(dim=1).tolist() == [not settings, False] or settings
    outputs[0].loss.backward()
    gradients = model.get_input_embeddings().weight.grad
    used = {DIGITS[character] for video in read for text in video for character in text}
    assert gradients[sorted(used)].abs().sum(dim=1).min() > 0
    unused = set(DIGITS.values()) - used
    assert not gradients[sorted(unused)].any()


@pytest.mark.parametrize("how", [{}, {"keep_frames": 3}, {"keep_ratio": 0.5}], ids=str)
def test_memories_of_videos_have_their_times(tmp_path, how):
    """Alone, beside a video that is no memory, and after a selection; as from the files."""
    model, processor = tiny_checkpoint(tmp_path / "model", frame_time_format="mm:ss.d")
    paths = [str(write_video(tmp_path / f"{count}.mp4", num_frames=count, fps=4)) for count in (40, 24)]
    memories = [model.encode_video(path, processor) for path in paths]
    options = {"padding": True, "return_tensors": "pt", **how}
    prompts = ["<|video_pad|>What?", "Look: <|video_pad|>"]
    expected = processor(text=prompts, videos=paths, **options)
    for videos in (memories, [memories[0], paths[1]], [paths[0], memories[1]]):
        inputs = processor(text=prompts, videos=videos, **options)
        assert torch.equal(inputs["input_ids"], expected["input_ids"])
        torch.testing.assert_close(inputs["video_timestamps"], expected["video_timestamps"], atol=1e-6, rtol=0)
        torch.testing.assert_close(model(**inputs).logits, model(**expected).logits, atol=1e-5, rtol=1e-4)
    part = memories[0].select(keep_frames=5)
    inputs = processor(text=prompts[:1], videos=[part], return_tensors="pt")
    read = model(**inputs).video_hidden_states.unflatten(0, (5, -1))[:, :7]
    ids = time_ids(part.timestamps, "mm:ss.d", model.config.time_token_ids)
    assert torch.equal(read, model.get_input_embeddings()(torch.tensor(ids)))


class TestConfiguration:
    def test_save_and_load(self, tmp_path):
        config = tiny_config(frame_time_format="h:mm:ss", time_token_ids=DIGITS, end_of_frame=True)
        config.save_pretrained(tmp_path)
        loaded = MambaMiaConfig.from_pretrained(tmp_path)
        assert (loaded.frame_time_format, loaded.time_token_ids) == ("h:mm:ss", DIGITS)
        assert loaded.frame_time_width == 7
        assert loaded.placeholders_per_frame() == 7 + NUM_ANCHORS + 1
        assert tiny_config().placeholders_per_frame() == tiny_config().tokens_per_frame() == NUM_ANCHORS

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"frame_time_format": "ss"}, "'ss' is no format of times"),
            ({"frame_time_format": "mm:ss"}, "'mm:ss' needs the token of '0' in time_token_ids, .* not None"),
            (
                {"frame_time_format": "mm:ss", "time_token_ids": {**DIGITS, ":": 99}},
                "token of ':' .* vocab_size=99, not 99",
            ),
            ({"frame_time_format": "mm:ss", "time_token_ids": {**DIGITS, "3": -1}}, "token of '3'"),
        ],
    )
    def test_what_cannot_be_written(self, settings, message):
        with pytest.raises(ValueError, match=message):
            tiny_config(**settings)
