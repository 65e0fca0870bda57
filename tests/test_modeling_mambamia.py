"""The model: dropped frames are really dropped, and everything else is as in any model of Transformers."""

import copy
import re
import warnings

import accelerate
import pytest
import torch
import transformers
from packaging import version
from peft import LoraConfig, get_peft_model
from tiny_model import IMAGE_TOKEN, NUM_ANCHORS, VIDEO_TOKEN, VOCAB_SIZE, prompt, random_videos, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, StaticCache, Trainer, TrainingArguments
from transformers.generation.streamers import BaseStreamer

from mambamia_hf import BUNDLED_CHECKPOINT, MambaMiaForConditionalGeneration, MambaMiaModel
from mambamia_hf.modeling_mambamia import MambaMiaCausalLMOutputWithPast
from mambamia_hf.prompt_tokens import take_tokens
from mambamia_hf.versions import CACHE_NAME


LONG, SHORT = 12, 7  # frames of the two videos, which keep different numbers of them
PROMPT = prompt([5, 6], LONG, [7, 8])
QUESTION = torch.tensor([[9, 10, 11]])


@pytest.fixture(scope="module")
def model() -> MambaMiaForConditionalGeneration:
    return tiny_model()


@pytest.fixture(scope="module")
def video() -> Tensor:
    return random_videos(1, LONG, seed=0)


@pytest.fixture(scope="module")
def short_video() -> Tensor:
    return random_videos(1, SHORT, seed=1)


@pytest.fixture(scope="module")
def kept(model, video, short_video) -> tuple[int, int]:
    """How many frames of the two videos the threshold keeps."""
    counts = tuple(int(model.get_video_features(frames).keep_mask.sum()) for frames in (video, short_video))
    assert 1 < counts[1] < counts[0] < LONG / 2
    return counts


@pytest.fixture(scope="module")
def batch(video, short_video) -> dict[str, Tensor]:
    """Two left-padded prompts with a video each, as the processor gives them."""
    short_prompt = prompt([9], SHORT, [10, 11, 12])
    padding = PROMPT.shape[1] - short_prompt.shape[1]
    return {
        "input_ids": torch.cat([PROMPT, torch.nn.functional.pad(short_prompt, (padding, 0))]),
        "attention_mask": torch.tensor([[1] * PROMPT.shape[1], [0] * padding + [1] * short_prompt.shape[1]]),
        "pixel_values_videos": torch.cat([video, torch.nn.functional.pad(short_video, (0,) * 7 + (LONG - SHORT,))]),
        "frame_mask": torch.arange(LONG) < torch.tensor([[LONG], [SHORT]]),
    }


def row_alone(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One prompt of the batch without any padding."""
    tokens, frames = batch["attention_mask"][row].bool(), batch["frame_mask"][row]
    return {
        "input_ids": batch["input_ids"][row : row + 1, tokens],
        "attention_mask": batch["attention_mask"][row : row + 1, tokens],
        "pixel_values_videos": batch["pixel_values_videos"][row : row + 1, frames],
    }


def text_model(model: MambaMiaForConditionalGeneration) -> torch.nn.Module:
    """The bare language model with the weights that `model` has."""
    bare = AutoModelForCausalLM.from_config(copy.deepcopy(model.config.text_config)).eval()
    bare.base_model.load_state_dict(model.model.language_model.state_dict())
    bare.get_output_embeddings().load_state_dict(model.lm_head.state_dict())
    return bare


def kept_embeddings(model: MambaMiaForConditionalGeneration, row: dict[str, Tensor], **kwargs) -> Tensor:
    """`(1, length, hidden_size)`: a prompt as the language model has to see it, put together by hand."""
    features = model.get_video_features(row["pixel_values_videos"], **kwargs)
    (ids,) = row["input_ids"]
    is_video = (ids == VIDEO_TOKEN).nonzero().flatten()
    embed = model.get_input_embeddings()
    before, after = ids[: is_video[0]], ids[is_video[-1] + 1 :]
    return torch.cat([embed(before), features.pooler_output[0], embed(after)])[None].detach()


def kept_batch(model: MambaMiaForConditionalGeneration, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same for the prompts of a batch, left-padded."""
    rows = [kept_embeddings(model, row_alone(batch, row))[0] for row in range(len(batch["input_ids"]))]
    longest = max(map(len, rows))
    return {
        "inputs_embeds": torch.stack([torch.nn.functional.pad(row, (0, 0, longest - len(row), 0)) for row in rows]),
        "attention_mask": torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows]),
    }


def kept_logits(output: MambaMiaCausalLMOutputWithPast) -> Tensor:
    """The logits of the tokens that are left, left-padded."""
    return take_tokens(output.logits, output.token_indices, 0)


class Recorder(BaseStreamer):
    def __init__(self):
        self.values, self.ended = [], False

    def put(self, value: Tensor):
        self.values.append(value)

    def end(self):
        self.ended = True


# Which frames are kept, and what reaches the language model


def test_video_features(model, video, kept):
    features = model.get_video_features(video)
    assert features.last_hidden_state.shape == (1, LONG, NUM_ANCHORS, 40)
    assert features.frame_deltas.shape == features.keep_mask.shape == (1, LONG)
    assert features.keep_mask.sum() == kept[0]
    expected = model.model.project(features.last_hidden_state[0, features.keep_mask[0]]).flatten(0, 1)
    assert torch.equal(features.pooler_output[0], expected)
    whole = model.model.compressor(model.model.encode_frames(video[0]).last_hidden_state[None]).last_hidden_state
    torch.testing.assert_close(features.pooler_output[0], whole[features.keep_mask].flatten(0, 1))


def test_an_image_is_a_video_of_one_frame(model, video):
    images = video[0, :3]
    as_images, as_videos = model.get_image_features(images), model.get_video_features(images[:, None])
    torch.testing.assert_close(as_images.last_hidden_state, as_videos.last_hidden_state)
    torch.testing.assert_close(as_images.frame_deltas, as_videos.frame_deltas)
    assert as_images.keep_mask.all() and as_images.keep_mask.shape == (3, 1)
    assert [len(image) for image in as_images.pooler_output] == 3 * [NUM_ANCHORS]


def test_only_kept_frames_reach_prefill_and_cache(model, video, kept):
    lengths = []
    hook = model.model.language_model.register_forward_hook(
        lambda module, args, kwargs, output: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    output = model.generate(
        PROMPT, pixel_values_videos=video, max_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    hook.remove()
    kept_length = 4 + kept[0] * NUM_ANCHORS
    assert lengths == [kept_length, 1, 1]
    assert output[CACHE_NAME].get_seq_length() == kept_length + 2
    assert output.sequences.shape[1] == PROMPT.shape[1] + 3
    assert torch.equal(output.sequences[:, : PROMPT.shape[1]], PROMPT)


def test_forward_gives_the_logits_of_what_was_kept(model, video):
    row = {"input_ids": PROMPT, "pixel_values_videos": video}
    output = model(**row)
    expected = text_model(model)(inputs_embeds=kept_embeddings(model, row))
    torch.testing.assert_close(kept_logits(output), expected.logits)
    assert output[CACHE_NAME].get_seq_length() == expected.logits.shape[1] < PROMPT.shape[1]
    kept = output.keep_mask[0].repeat_interleave(NUM_ANCHORS).nonzero().flatten() + 2
    assert output.token_indices.tolist() == [[0, 1, *kept.tolist(), LONG * NUM_ANCHORS + 2, LONG * NUM_ANCHORS + 3]]


def test_states_and_logits_are_as_long_as_the_prompt(model, batch):
    """What reads hidden states beside labels, as TRL does, need not know that frames were dropped."""
    output = model(**batch, output_hidden_states=True)
    states = model.model(**batch).last_hidden_state
    assert output.token_indices.shape[1] < batch["input_ids"].shape[1]
    inputs = kept_batch(model, batch)
    expected = text_model(model)(**inputs, output_hidden_states=True)
    for full, kept in zip((states, *output.hidden_states), (None, *expected.hidden_states), strict=True):
        kept = expected.hidden_states[-1] if kept is None else kept
        assert full.shape[:2] == batch["input_ids"].shape
        for row, indices in enumerate(output.token_indices):
            real = indices >= 0
            torch.testing.assert_close(full[row, indices[real]], kept[row, real], atol=1e-5, rtol=1e-4)
            # Each token that is left follows from the place before it.
            torch.testing.assert_close(full[row, indices[real][1:] - 1], kept[row, real][:-1], atol=1e-5, rtol=1e-4)
            silent = torch.ones(full.shape[1], dtype=torch.bool)
            silent[indices[real]] = silent[indices[real][1:] - 1] = False
            assert silent.any() and not full[row, silent].any()


def test_the_token_after_a_dropped_frame_has_its_scores(video):
    """A caption may follow its video at once."""
    model = tiny_model(compressor_config={"gpa_dropout": 0.0})
    ids = prompt([5, 6], LONG, [7, 8, 9])
    labels = torch.full_like(ids, -100)
    labels[:, -3:] = ids[:, -3:]
    threshold = model.config.delta_threshold
    embeds = kept_embeddings(model, {"input_ids": ids, "pixel_values_videos": video})
    output = model.train()(ids, pixel_values_videos=video, delta_threshold=threshold, labels=labels)
    assert not output.keep_mask[0, -1]
    kept_labels = torch.nn.functional.pad(labels[:, -3:], (embeds.shape[1] - 3, 0), value=-100)
    expected = text_model(model)(inputs_embeds=embeds, labels=kept_labels).loss
    torch.testing.assert_close(output.loss, expected)
    shifted = torch.nn.functional.cross_entropy(output.logits[0, :-1], labels[0, 1:])
    torch.testing.assert_close(shifted, expected)


def test_forward_of_a_batch_gives_what_each_prompt_gives_alone(model, batch, kept):
    output = model(**batch)
    assert output.keep_mask.sum(dim=1).tolist() == list(kept)
    assert (output.token_indices[1] == -1).sum() == (kept[0] - kept[1]) * NUM_ANCHORS
    for row in range(2):
        alone = model(**row_alone(batch, row)).logits[0]
        tokens = batch["attention_mask"][row].bool()
        torch.testing.assert_close(output.logits[row, tokens], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("padding", [(3, 0), (0, 2)])
def test_padding_leaves_with_the_dropped_frames(model, batch, padding):
    row = row_alone(batch, 1)
    padded = {name: torch.nn.functional.pad(row[name], padding) for name in ("input_ids", "attention_mask")}
    output = model(**{**row, **padded})
    tokens = padded["attention_mask"].bool()
    torch.testing.assert_close(output.logits[tokens], model(**row).logits[0])
    assert output.token_indices[0, 0] == padding[0]


@pytest.mark.parametrize("budget", [1, 5, LONG - 1])
def test_placeholders_for_fewer_frames_are_a_budget(model, video, budget):
    ids = prompt([5, 6], budget, [7, 8])
    output = model(ids, pixel_values_videos=video)
    assert output.keep_mask.sum() == budget and output.token_indices is None
    assert output.logits.shape[1] == ids.shape[1]
    row = {"input_ids": ids, "pixel_values_videos": video}
    expected = text_model(model)(inputs_embeds=kept_embeddings(model, row, keep_frames=budget)).logits
    torch.testing.assert_close(output.logits, expected)
    out = model.generate(ids, pixel_values_videos=video, max_new_tokens=2, do_sample=False)
    assert torch.equal(out[:, ids.shape[1]], expected[:, -1].argmax(-1))


def test_budget_and_threshold_in_one_batch(model, video, kept):
    budget = prompt([5, 6], 5, [7, 8])
    padding = PROMPT.shape[1] - budget.shape[1]
    batch = {
        "input_ids": torch.cat([PROMPT, torch.nn.functional.pad(budget, (padding, 0))]),
        "attention_mask": torch.tensor([[1] * PROMPT.shape[1], [0] * padding + [1] * budget.shape[1]]),
        "pixel_values_videos": torch.cat([video, video]),
    }
    assert model(**batch).keep_mask.sum(dim=1).tolist() == [kept[0], 5]
    out = model.generate(**batch, max_new_tokens=4, do_sample=False)[:, PROMPT.shape[1] :]
    for row, ids in enumerate((PROMPT, budget)):
        alone = model.generate(ids, pixel_values_videos=video, max_new_tokens=4, do_sample=False)
        assert torch.equal(out[row], alone[0, ids.shape[1] :])
    explicit = model.config.delta_threshold
    assert model(**batch, delta_threshold=explicit).keep_mask.sum(dim=1).tolist() == [kept[0], 5]
    with pytest.raises(ValueError, match="Every video has a budget .of 5 frames., so delta_threshold=0.5"):
        model(budget, pixel_values_videos=video, delta_threshold=0.5)


@pytest.mark.parametrize("placeholders", [NUM_ANCHORS * LONG - 1, NUM_ANCHORS * (LONG + 1), 1])
def test_any_other_number_of_placeholders_is_an_error(model, video, placeholders):
    ids = torch.tensor([[5, *[VIDEO_TOKEN] * placeholders, 6]])
    with pytest.raises(ValueError, match=f"12 frames has {placeholders} placeholders.*expected 48, 4 per frame"):
        model(ids, pixel_values_videos=video)
    with pytest.raises(ValueError, match="expected 48"):
        model.generate(ids, pixel_values_videos=video, max_new_tokens=2)


def test_videos_and_prompt_must_agree(model, video):
    with pytest.raises(ValueError, match="0 runs of video placeholders and there are 1 videos"):
        model(torch.tensor([[5, 6]]), pixel_values_videos=video)
    with pytest.raises(ValueError, match="2 runs of video placeholders and there are 1 videos"):
        model(prompt(LONG, [5], LONG), pixel_values_videos=video)
    with pytest.raises(ValueError, match="4 image placeholders and the images give 8 tokens"):
        model(prompt("image", [5]), pixel_values=video[0, :2])
    with pytest.raises(ValueError, match="pixel_values_videos must be .* not .12, 3, 32, 32.; images go"):
        model(PROMPT, pixel_values_videos=video[0])
    with pytest.raises(ValueError, match="pixel_values must be .* videos into pixel_values_videos"):
        model(prompt("image"), pixel_values=video)
    with pytest.raises(ValueError, match="frame_mask must be .*, .1, 12. here, not .1, 3."):
        model(PROMPT, pixel_values_videos=video, frame_mask=torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="Give input_ids or inputs_embeds, not"):
        model(pixel_values_videos=video)


def test_short_videos_keep_every_frame(model):
    video = random_videos(1, 4)
    assert model(prompt([5], 4, [6]), pixel_values_videos=video).keep_mask.all()


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ({"delta_threshold": 0}, LONG),
        ({"delta_threshold": 100}, 1),
        ({"delta_min_frames": LONG}, LONG),
        ({"delta_min_frames": LONG - 1}, None),
        ({"keep_frames": 7}, 7),
        ({"keep_ratio": 0.5}, LONG // 2),
        ({"num_kept_frames": torch.tensor([7])}, 7),
        ({"num_kept_frames": torch.tensor([0])}, None),
        ({"num_kept_frames": torch.tensor([7]), "keep_frames": 5}, 5),
        ({"keep_frames": LONG + 1}, LONG),
        ({"keep_ratio": 1.0}, LONG),
        ({"keep_ratio": 1.0, "delta_threshold": 100}, 1),
    ],
)
def test_settings_of_a_call(model, video, kept, arguments, count):
    features = model.get_video_features(video, **arguments)
    assert features.keep_mask.sum() == (kept[0] if count is None else count)
    assert len(features.pooler_output[0]) == features.keep_mask.sum() * NUM_ANCHORS


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ({"delta_threshold": 0}, LONG),
        ({"delta_min_frames": 20}, LONG),
        ({"delta_threshold": 9}, 1),
        ({"keep_frames": 7}, 7),
        ({"keep_frames": LONG}, LONG),
        ({"keep_ratio": 0.25}, 3),
        ({"num_kept_frames": torch.tensor([7])}, 7),
        ({"num_kept_frames": torch.tensor([LONG]), "delta_threshold": 9}, 1),
    ],
)
def test_settings_reach_forward_and_generate(model, video, arguments, count):
    inputs = {"input_ids": PROMPT, "pixel_values_videos": video, **arguments}
    assert model(**inputs).keep_mask.sum() == count
    output = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    assert output[CACHE_NAME].get_seq_length() == 5 + count * NUM_ANCHORS
    assert torch.equal(output.sequences[:, PROMPT.shape[1]], model(**inputs).logits[:, -1].argmax(-1))


@pytest.mark.parametrize(("budget", "count"), [({"keep_frames": 5}, 5), ({"keep_ratio": 0.75}, 9)])
def test_budget_in_the_config(video, budget, count):
    model = tiny_model(delta_threshold=None, **budget)
    assert model(PROMPT, pixel_values_videos=video).keep_mask.sum() == count
    assert model(PROMPT, pixel_values_videos=video, delta_threshold=0).keep_mask.all()
    assert model.train()(PROMPT, pixel_values_videos=video).keep_mask.all()


def test_no_threshold_keeps_every_frame(video):
    model = tiny_model(delta_threshold=None)
    assert model(PROMPT, pixel_values_videos=video).keep_mask.all()


def test_without_temporal_layers(video):
    model = tiny_model(delta_threshold=None, compressor_config={"num_temporal_layers": 0})
    output = model(PROMPT, pixel_values_videos=video)
    assert output.frame_deltas is None and output.keep_mask.all()
    with pytest.raises(ValueError, match="'keep_frames': 5.*num_temporal_layers is 0"):
        model(prompt([5], 5, [6]), pixel_values_videos=video)


def test_several_videos_and_images_in_a_prompt(model, video, short_video):
    images = random_videos(1, 2, seed=3)[0]
    videos = torch.cat([short_video, video[:, :SHORT]])
    ids = prompt([5], "image", [6], SHORT, [7], SHORT, [8], "image", [9])
    output = model(ids, pixel_values=images, pixel_values_videos=videos)

    image_tokens = model.get_image_features(images).pooler_output
    video_tokens = model.get_video_features(videos).pooler_output
    assert len(video_tokens[0]) != SHORT * NUM_ANCHORS
    text = iter(model.get_input_embeddings()(torch.tensor([5, 6, 7, 8, 9])).split(1))
    parts = [image_tokens[0], video_tokens[0], video_tokens[1], image_tokens[1]]
    embeds = torch.cat([next(text), *[piece for part in parts for piece in (part, next(text))]])[None]
    torch.testing.assert_close(kept_logits(output), text_model(model)(inputs_embeds=embeds).logits)
    torch.testing.assert_close(output.image_hidden_states, torch.cat(image_tokens))
    torch.testing.assert_close(output.video_hidden_states, torch.cat(video_tokens))

    arguments = {"pixel_values": images, "pixel_values_videos": videos, "max_new_tokens": 4, "do_sample": False}
    expected = text_model(model).generate(inputs_embeds=embeds, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(ids, **arguments)[:, ids.shape[1] :], expected)
    beams = model.generate(ids, num_beams=2, **arguments)[:, ids.shape[1] :]
    expected = text_model(model).generate(inputs_embeds=embeds, max_new_tokens=4, do_sample=False, num_beams=2)
    assert torch.equal(beams, expected)


def test_videos_without_a_token_between_them(model, short_video):
    videos = torch.cat([short_video, short_video.flip(1)])
    joined = model(prompt([5], SHORT, SHORT, [6]), pixel_values_videos=videos)
    tokens = model.get_video_features(videos).pooler_output
    embed = model.get_input_embeddings()
    embeds = torch.cat([embed(torch.tensor([5])), *tokens, embed(torch.tensor([6]))])[None]
    torch.testing.assert_close(kept_logits(joined), text_model(model)(inputs_embeds=embeds).logits)


def test_an_image_prompt(model, video):
    ids = prompt([5], "image", [6])
    out = model.generate(ids, pixel_values=video[0, :1], delta_threshold=0.3, max_new_tokens=3, do_sample=False)
    as_video = model.generate(
        torch.where(ids == IMAGE_TOKEN, VIDEO_TOKEN, ids),
        pixel_values_videos=video[:, :1],
        max_new_tokens=3,
        do_sample=False,
    )
    assert torch.equal(out[:, ids.shape[1] :], as_video[:, ids.shape[1] :])


# Generation


NO_PLACEHOLDERS = {"suppress_tokens": [IMAGE_TOKEN, VIDEO_TOKEN]}  # which random weights might come up with
GENERATION = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "beams returned": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 2.0},
    "samples": {"do_sample": True, "temperature": 2.0, "num_return_sequences": 3},
    "beam sampling": {"do_sample": True, "num_beams": 2, "temperature": 2.0},
    "no cache": {"do_sample": False, "use_cache": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "end of sequence": {"do_sample": False, "eos_token_id": list(range(20, 50)), "max_new_tokens": 12},
}


@pytest.mark.parametrize("mode", GENERATION)
def test_generation_is_that_of_the_kept_tokens(model, batch, mode):
    arguments = {"max_new_tokens": 6, **NO_PLACEHOLDERS, **GENERATION[mode]}
    reference = {key: value for key, value in arguments.items() if key != "use_cache"}
    bare = text_model(model)
    torch.manual_seed(0)
    out = model.generate(**batch, **arguments)
    torch.manual_seed(0)
    expected = bare.generate(**kept_batch(model, batch), **reference)
    returned = arguments.get("num_return_sequences", 1)
    assert torch.equal(out[:, : PROMPT.shape[1]], batch["input_ids"].repeat_interleave(returned, dim=0))
    assert torch.equal(out[:, PROMPT.shape[1] :], expected)
    if arguments["do_sample"]:
        torch.manual_seed(1)
        assert not torch.equal(model.generate(**batch, **arguments), out)
        return
    for row in range(2):
        alone = row_alone(batch, row)
        new = model.generate(**alone, **arguments)[:, alone["input_ids"].shape[1] :]
        assert torch.equal(out[returned * row : returned * (row + 1), PROMPT.shape[1] :][:, : new.shape[1]], new)


@pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.23"),
    reason="earlier versions hand no features to a prefill in chunks",
)
def test_prefill_in_chunks(model, batch):
    arguments = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(
        model.generate(**batch, prefill_chunk_size=7, **arguments), model.generate(**batch, **arguments)
    )


def test_static_cache_is_used(model, video):
    output = model.generate(
        PROMPT,
        pixel_values_videos=video,
        max_new_tokens=2,
        cache_implementation="static",
        return_dict_in_generate=True,
    )
    assert isinstance(output[CACHE_NAME], StaticCache)
    cache = DynamicCache(config=model.config.text_config)
    model.generate(PROMPT, pixel_values_videos=video, max_new_tokens=2, past_key_values=cache)
    assert cache.get_seq_length() == output[CACHE_NAME].get_seq_length()


@pytest.mark.parametrize("mode", ["sampling", "samples", "beam sampling"])
def test_sampling_alone(model, batch, mode):
    bare = text_model(model)
    for row in range(2):
        alone = row_alone(batch, row)
        torch.manual_seed(0)
        out = model.generate(**alone, max_new_tokens=6, **GENERATION[mode])
        torch.manual_seed(0)
        embeds = kept_embeddings(model, alone)
        expected = bare.generate(inputs_embeds=embeds, max_new_tokens=6, **GENERATION[mode])
        assert torch.equal(out[:, alone["input_ids"].shape[1] :], expected)


def test_streamer(model, video):
    arguments = {"pixel_values_videos": video, "max_new_tokens": 4, "do_sample": False}
    streamer = Recorder()
    out = model.generate(PROMPT, streamer=streamer, **arguments)
    assert torch.equal(streamer.values[0], PROMPT) and streamer.ended
    assert torch.cat([value.flatten() for value in streamer.values]).tolist() == out[0].tolist()


def test_return_dict_in_generate(model, batch, kept):
    output = model.generate(
        **batch,
        max_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        output_hidden_states=True,
    )
    assert torch.equal(output.sequences, model.generate(**batch, max_new_tokens=3, do_sample=False))
    assert output.hidden_states[0][0].shape == (2, 4 + kept[0] * NUM_ANCHORS, 32)
    assert torch.equal(torch.stack(output.scores, dim=1).argmax(-1), output.sequences[:, PROMPT.shape[1] :])


@pytest.mark.parametrize("where", ["argument", "generation_config", "model's generation_config"])
def test_length_limits_count_the_prompt_as_given(video, where):
    model = tiny_model()
    limits = {"max_length": PROMPT.shape[1] + 5, "min_length": PROMPT.shape[1] + 3}
    settings = {"do_sample": False}
    first = model.generate(PROMPT, pixel_values_videos=video, max_new_tokens=1, do_sample=False)[0, -1]
    if where == "argument":
        settings = {**settings, **limits, "eos_token_id": int(first)}
    elif where == "generation_config":
        settings = {"generation_config": GenerationConfig(**settings, **limits, eos_token_id=int(first))}
    else:
        settings["eos_token_id"] = int(first)
        model.generation_config.max_length = limits["max_length"]
        model.generation_config.min_length = limits["min_length"]
    out = model.generate(PROMPT, pixel_values_videos=video, **settings)
    assert limits["min_length"] <= out.shape[1] <= limits["max_length"]
    assert int(first) not in out[0, PROMPT.shape[1] : limits["min_length"]]
    with pytest.raises(ValueError, match="max_length"):
        model.generate(PROMPT, pixel_values_videos=video, max_length=PROMPT.shape[1])


def test_inputs_embeds(model, batch):
    embeds = model.get_input_embeddings()(batch["input_ids"])
    inputs = {key: value for key, value in batch.items() if key != "input_ids"}
    torch.testing.assert_close(model(inputs_embeds=embeds, **inputs).logits, model(**batch).logits)
    expected = model.generate(**batch, max_new_tokens=4, do_sample=False)
    new = model.generate(inputs_embeds=embeds, **inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(new, expected[:, PROMPT.shape[1] :])
    both = model.generate(batch["input_ids"], inputs_embeds=embeds, **inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(both, expected)
    limited = model.generate(inputs_embeds=embeds, **inputs, max_length=PROMPT.shape[1] + 4, do_sample=False)
    assert torch.equal(limited, new)


def test_position_ids(model, batch):
    positions = 3 * (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    output = model(**batch, position_ids=positions)
    kept = output.token_indices
    expected = text_model(model)(
        **kept_batch(model, batch), position_ids=positions.gather(1, kept.clamp(min=0)).masked_fill(kept < 0, 0)
    )
    torch.testing.assert_close(kept_logits(output)[kept >= 0], expected.logits[kept >= 0])
    assert not torch.allclose(output.logits[0], model(**batch).logits[0])


def test_a_video_after_cached_turns(model, video):
    first = prompt([20, 21, 22, 23])
    whole = model(torch.cat([first, PROMPT], dim=1), pixel_values_videos=video)
    for mask in (None, torch.ones(1, 4 + PROMPT.shape[1], dtype=torch.long)):
        cache = DynamicCache(config=model.config.text_config)
        model(first, past_key_values=cache)
        second = model(PROMPT, pixel_values_videos=video, past_key_values=cache, attention_mask=mask)
        torch.testing.assert_close(second.logits, whole.logits[:, 4:])
        assert cache.get_seq_length() == whole.token_indices.shape[1]


@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params"])
def test_the_cache_by_any_of_its_names(model, video, name):
    """Transformers before and after 5.24, and Mamba language models, call it differently."""
    cache = DynamicCache(config=model.config.text_config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = model(PROMPT, pixel_values_videos=video, use_cache=True, **{name: cache})
        second = model(QUESTION, **{name: cache})
    assert first[CACHE_NAME] is cache
    whole = model(torch.cat([PROMPT, QUESTION], dim=1), pixel_values_videos=video)
    torch.testing.assert_close(second.logits, whole.logits[:, -QUESTION.shape[1] :])
    with pytest.raises(ValueError, match="cache is given as"):
        model(PROMPT, cache=cache, past_key_values=cache)


def test_end_of_frame_vector(video):
    model = tiny_model(end_of_frame=True)
    ids = torch.tensor([[5, 6, *[VIDEO_TOKEN] * LONG * (NUM_ANCHORS + 1), 7, 8]])
    features = model.get_video_features(video)
    tokens = features.pooler_output[0].unflatten(0, (-1, NUM_ANCHORS + 1))
    assert len(tokens) == features.keep_mask.sum()
    assert (tokens[:, -1] == model.model.end_of_frame).all()
    output = model(ids, pixel_values_videos=video)
    assert not output.keep_mask.all()
    expected = text_model(model)(
        inputs_embeds=kept_embeddings(model, {"input_ids": ids, "pixel_values_videos": video})
    )
    torch.testing.assert_close(kept_logits(output), expected.logits)


def test_placeholders_beyond_the_vocabulary(model, video):
    beyond = tiny_model(image_token_id=VOCAB_SIZE, video_token_id=VOCAB_SIZE + 1)
    ids = torch.where(PROMPT == VIDEO_TOKEN, VOCAB_SIZE + 1, PROMPT)
    expected = model(PROMPT, pixel_values_videos=video).logits
    assert torch.equal(beyond(ids, pixel_values_videos=video).logits, expected)
    out = beyond.generate(ids, pixel_values_videos=video, max_new_tokens=3, do_sample=False)
    assert torch.equal(out[:, -3:], model.generate(PROMPT, pixel_values_videos=video, max_new_tokens=3)[:, -3:])
    embeds = model.get_input_embeddings()(torch.tensor([[5, 6]]))
    assert torch.equal(beyond(inputs_embeds=embeds).logits, model(inputs_embeds=embeds).logits)


@pytest.mark.parametrize("training", [False, True])
def test_placeholders_without_media_are_an_error(video, training):
    model = tiny_model().train(training)
    for ids, modality in ((PROMPT, "video"), (prompt("image", [5]), "image")):
        with pytest.raises(ValueError, match=f"{modality} placeholders and there are no {modality}s"):
            model(ids, labels=ids)
        with pytest.raises(ValueError, match=f"{modality} placeholders and there are no {modality}s"):
            model.generate(ids, max_new_tokens=2)
    with pytest.raises(ValueError, match="video placeholders and there are no videos"):
        model(PROMPT, video_features=video)  # no such argument


def test_text_alone_is_the_bare_text_model(model):
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    bare = text_model(model)
    torch.testing.assert_close(model(ids).logits, bare(ids).logits, atol=0, rtol=0)
    arguments = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, delta_threshold=0.2, **arguments), bare.generate(ids, **arguments))


@pytest.mark.parametrize(
    "text_config",
    [
        {"model_type": "llama"},
        {"model_type": "gpt_neox"},
        {"model_type": "mamba2", "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1},
    ],
    ids=lambda text_config: text_config["model_type"],
)
def test_other_language_models(text_config, batch, tmp_path):
    model = tiny_model(text_config=text_config)
    bare = text_model(model)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    torch.testing.assert_close(model(ids).logits, bare(ids).logits, atol=0, rtol=0)
    for arguments in ({}, {"num_beams": 2}, {"use_cache": False}):
        arguments = {"max_new_tokens": 4, "do_sample": False, **NO_PLACEHOLDERS, **arguments}
        assert torch.equal(model.generate(ids, **arguments), bare.generate(ids, **arguments))
        for row in range(2):
            alone = row_alone(batch, row)
            out = model.generate(**alone, **arguments)[:, alone["input_ids"].shape[1] :]
            if text_config["model_type"] != "mamba2":  # whose `generate` takes no embeddings
                embeds = kept_embeddings(model, alone)
                assert torch.equal(out, bare.generate(inputs_embeds=embeds, **{**arguments, "use_cache": True}))
            assert torch.equal(model.generate(**batch, **arguments)[row, PROMPT.shape[1] :], out[0])
    loss = model.train()(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    assert torch.isfinite(loss)
    model.eval().save_pretrained(tmp_path)
    loaded = MambaMiaForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, atol=0, rtol=0)


# Vision tower


@pytest.mark.parametrize("size", [1, 5, LONG, 100])
def test_vision_batch_size_changes_memory_only(model, video, size):
    frames = []
    hook = model.model.vision_tower.register_forward_pre_hook(lambda module, args: frames.append(len(args[0])))
    features = model.get_video_features(video, vision_batch_size=size)
    hook.remove()
    assert sum(frames) == LONG and max(frames) == min(size, LONG)
    torch.testing.assert_close(features.last_hidden_state, model.get_video_features(video).last_hidden_state)


def test_vision_batch_size_of_the_config_and_of_a_call(video):
    model = tiny_model(vision_batch_size=5)
    frames = []
    model.model.vision_tower.register_forward_pre_hook(lambda module, args: frames.append(len(args[0])))
    model(PROMPT, pixel_values_videos=video)
    model.generate(PROMPT, pixel_values_videos=video, max_new_tokens=2, vision_batch_size=6)
    model.generate(prompt("image"), pixel_values=video[0, :1], max_new_tokens=2, vision_batch_size=6)
    assert frames == [5, 5, 2, 6, 6, 1]
    with pytest.raises(ValueError, match="vision_batch_size must be at least 1, not 0"):
        model.get_video_features(video, vision_batch_size=0)


def test_padding_frames_skip_the_vision_tower(model, batch):
    frames = []
    hook = model.model.vision_tower.register_forward_pre_hook(lambda module, args: frames.append(len(args[0])))
    model.get_video_features(batch["pixel_values_videos"], frame_mask=batch["frame_mask"])
    hook.remove()
    assert sum(frames) == LONG + SHORT


def test_vision_feature_layer(model, video):
    tower = model.model.vision_tower
    for layer in (-1, -2, 0):
        hidden_states = tower(video[0], output_hidden_states=True).hidden_states[layer]
        expected = model.model.compressor(hidden_states[None]).anchors
        features = model.get_video_features(video, vision_feature_layer=layer)
        torch.testing.assert_close(features.last_hidden_state, expected)
        assert features.hidden_states is None
    with pytest.raises(ValueError, match="vision_feature_layer=3 .* vision tower of 2 layers; set it to -3 to 2"):
        model.get_video_features(video, vision_feature_layer=3)
    recorded = model.get_video_features(video, vision_batch_size=5, output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in recorded.hidden_states] == 3 * [(LONG, 16, 24)]
    torch.testing.assert_close(recorded.hidden_states[0], tower(video[0], output_hidden_states=True).hidden_states[0])


# Features in place of pixels


def features_of(model: MambaMiaForConditionalGeneration, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch with the vision tower's features in place of its pixels."""
    features = {key: value for key, value in batch.items() if not key.startswith("pixel_values")}
    for pixels, name in (("pixel_values_videos", "patch_features_videos"), ("pixel_values", "patch_features")):
        if pixels in batch:
            frames = batch[pixels].reshape(-1, *batch[pixels].shape[-3:])
            encoded = model.model.encode_frames(frames).last_hidden_state.detach()
            features[name] = encoded.unflatten(0, batch[pixels].shape[:-3])
    return features


def test_features_give_what_pixels_give(model, batch, kept):
    features = features_of(model, batch)
    assert features["patch_features_videos"].shape == (2, LONG, 16, 24)
    output, expected = model(**features), model(**batch)
    assert output.keep_mask.sum(dim=1).tolist() == list(kept)
    torch.testing.assert_close(output.logits, expected.logits)
    generated = model.generate(**features, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, model.generate(**batch, max_new_tokens=4, do_sample=False))
    # What stands in the padding is of no concern.
    features["patch_features_videos"][1, SHORT:] = float("nan")
    torch.testing.assert_close(model(**features).logits, expected.logits)


def test_features_of_a_budget(model, video):
    ids = prompt([5, 6], 5, [7, 8])
    inputs = features_of(model, {"input_ids": ids, "pixel_values_videos": video})
    output = model(**inputs)
    assert output.keep_mask.sum() == 5
    torch.testing.assert_close(output.logits, model(ids, pixel_values_videos=video).logits)


def test_image_features_give_what_pixels_give(model, video):
    ids = prompt([5], "image", [6], "image", LONG, [7])
    batch = {"input_ids": ids, "pixel_values": video[0, :2], "pixel_values_videos": video}
    features = features_of(model, batch)
    assert features["patch_features"].shape == (2, 16, 24)
    torch.testing.assert_close(model(**features).logits, model(**batch).logits)
    for arguments in ({}, {"num_beams": 2}):
        arguments = {"max_new_tokens": 3, "do_sample": False, **NO_PLACEHOLDERS, **arguments}
        assert torch.equal(model.generate(**features, **arguments), model.generate(**batch, **arguments))
    alone = {"input_ids": prompt("image", [6]), "patch_features": features["patch_features"][:1]}
    expected = model.generate(alone["input_ids"], pixel_values=video[0, :1], max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(**alone, max_new_tokens=3, do_sample=False), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_are_cast_to_the_type_of_the_model(model, video, dtype):
    inputs = features_of(model, {"input_ids": PROMPT, "pixel_values_videos": video})
    inputs["delta_threshold"] = 0
    logits = model(**{**inputs, "patch_features_videos": inputs["patch_features_videos"].to(dtype)}).logits
    assert logits.dtype == torch.float32
    expected = model(**inputs).logits
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


def test_the_compressor_learns_from_features(batch):
    model = tiny_model(compressor_config={"gpa_dropout": 0.0}).train()
    gradients = []
    for inputs in (batch, features_of(model, batch)):
        model.zero_grad()
        model(**inputs, labels=batch["input_ids"]).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.model.compressor.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_features_and_pixels_exclude_each_other(model, video):
    inputs = features_of(model, {"input_ids": PROMPT, "pixel_values_videos": video})
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="exactly one of pixel_values_videos and patch_features_videos"):
            call(**inputs, pixel_values_videos=video)
    images = model.model.encode_frames(video[0, :1]).last_hidden_state
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="exactly one of pixel_values and patch_features"):
            call(prompt("image"), pixel_values=video[0, :1], patch_features=images)
    with pytest.raises(ValueError, match="not none"):
        model.get_video_features()
    with pytest.raises(ValueError, match=r"patch_features_videos must be .num_videos, num_frames, num_patches"):
        model.get_video_features(patch_features_videos=images)
    with pytest.raises(ValueError, match="features are 7 wide and input_size is 24"):
        model.get_video_features(patch_features_videos=torch.zeros(1, 2, 16, 7))


@pytest.mark.parametrize("name", ["pixel_values", "pixel_values_videos"])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 32), (1, 2, 3, 1, 32, 32)])
def test_shapes_of_pixels_are_checked(model, name, shape):
    with pytest.raises(ValueError, match=f"^{name} must be .*, not {re.escape(str(shape))};"):
        model(PROMPT, **{name: torch.zeros(shape)})


# Training


def test_training_keeps_every_frame_by_default(video):
    model = tiny_model(compressor_config={"gpa_dropout": 0.0}).train()
    output = model(PROMPT, pixel_values_videos=video, labels=PROMPT)
    assert output.keep_mask.all() and output.logits.shape[1] == PROMPT.shape[1]


def test_labels_follow_dropped_positions(batch, kept):
    model = tiny_model(compressor_config={"gpa_dropout": 0.0})
    inputs = kept_batch(model, batch)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, :2], labels[0, -2:] = torch.tensor([5, 6]), torch.tensor([30, 31])
    labels[1, -3:] = torch.tensor([32, 33, 34])
    indices = model(**batch).token_indices
    dropped = next(place for place in range(30, 40) if not (indices == place).any())
    labels[:, dropped] = 40  # inside both videos
    expected = torch.full_like(inputs["attention_mask"], -100)
    expected[0, :2], expected[:, -3:] = labels[0, :2], labels[:, -3:]
    output = model.train()(**batch, labels=labels, delta_threshold=model.config.delta_threshold)
    assert output.keep_mask.sum(dim=1).tolist() == list(kept)
    torch.testing.assert_close(output.loss, text_model(model)(**inputs, labels=expected).loss)


def test_frames_are_dropped_at_random_in_training(batch):
    model = tiny_model(frame_dropout=1.0, delta_threshold=None)
    assert torch.equal(model.eval()(**batch).keep_mask, batch["frame_mask"])
    model.train()
    counts = set()
    for seed in range(8):
        torch.manual_seed(seed)
        output = model(**batch, labels=batch["input_ids"])
        output.loss.backward()
        assert not (output.keep_mask & ~batch["frame_mask"]).any() and output.keep_mask.any(dim=1).all()
        tokens = output.keep_mask.sum() * model.config.tokens_per_frame()
        assert len(output.video_hidden_states) == tokens
        counts.add(int(tokens))
    assert len(counts) > 3


def test_what_delta_costs(batch):
    model, labels = tiny_model(compressor_config={"gpa_dropout": 0.0}).train(), batch["input_ids"]
    free = model(**batch, labels=labels)
    model.config.delta_loss_coef = 0.5
    loss = model(**batch, labels=labels).loss
    torch.testing.assert_close(loss, free.loss + 0.5 * free.frame_deltas[batch["frame_mask"]].mean())
    four_times = 4 * labels[:, 1:].numel()
    torch.testing.assert_close(model(**batch, labels=labels, num_items_in_batch=four_times).loss, loss / 4)


def test_every_part_learns(video):
    model = tiny_model().train()
    model(PROMPT, pixel_values_videos=video, labels=PROMPT).loss.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without and all("vision_tower.encoder.layers.1." in name or "post_layernorm" in name for name in without)


def test_gradient_checkpointing_gives_equal_gradients(batch):
    gradients, losses = [], []
    for checkpointing in (False, True):
        model = tiny_model(compressor_config={"gpa_dropout": 0.0}).train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()  # the newer name comes with Transformers 5.24
            blocks = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
            assert {type(block).__name__ for block in blocks} >= {"MambaMiaSpatialBlock", "MambaMiaTemporalBlock"}
        output = model(**batch, labels=batch["input_ids"], delta_threshold=0.3)
        output.loss.backward()
        losses.append(output.loss)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_text_alone_gives_the_compressor_a_gradient_of_zero():
    """Processes that train together need one from each, whatever their batches hold."""
    model = tiny_model().train()
    ids = torch.tensor([[5, 6, 7, 8]])
    output = model(ids, labels=ids)
    output.loss.backward()
    assert all((parameter.grad == 0).all() for parameter in model.model.compressor.parameters())
    torch.testing.assert_close(output.logits, text_model(model)(ids).logits, atol=0, rtol=0)


def test_nothing_to_learn_is_a_loss_of_zero():
    model = tiny_model().train()
    ids = torch.tensor([[5, 6, 7, 8]])
    for items in (None, 0, torch.tensor(0)):
        loss = model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=items).loss
        loss.backward()
        assert loss == 0
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_trainer_takes_a_step(batch, tmp_path):
    model = tiny_model()
    rows = [{key: value[row] for key, value in batch.items()} for row in range(2)]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    before = copy.deepcopy(model.state_dict())
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, report_to="none", use_cpu=True
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[1] for name in moved} >= {"vision_tower", "compressor", "language_model"}


@pytest.mark.parametrize("budget", [None, 2])
def test_trainer_evaluates_and_predicts_with_logits_alone(batch, budget, tmp_path):
    model = tiny_model(delta_threshold=None).eval()
    if budget is not None:
        batch = {**batch, "num_kept_frames": torch.tensor([budget, budget])}
    rows = [{key: value[row] for key, value in batch.items()} for row in range(2)]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    arguments = TrainingArguments(tmp_path, per_device_eval_batch_size=1, report_to="none", use_cpu=True)
    trainer = Trainer(
        model=model,
        args=arguments,
        eval_dataset=rows,
        compute_metrics=lambda result: {"right": (result.predictions.argmax(-1) == result.label_ids).mean()},
    )
    expected = torch.cat([model(**{key: value[None] for key, value in row.items()}).logits for row in rows])
    predicted = trainer.predict(rows)
    torch.testing.assert_close(torch.tensor(predicted.predictions), expected)  # an array: no features beside it
    assert predicted.label_ids.shape == expected.shape[:2]
    right = (expected.argmax(-1) == batch["input_ids"]).float().mean()
    assert trainer.evaluate()["eval_right"] == pytest.approx(right.item())


def test_lora_attaches_trains_and_merges(batch):
    model = tiny_model()
    plain = model(**batch).logits
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "in_proj", "out_proj"], lora_dropout=0.0)
    tuned = get_peft_model(model, config).train()
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        tuned(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
    tuned.eval()
    logits = tuned(**batch, delta_threshold=0).logits
    out = tuned.generate(**batch, max_new_tokens=3, do_sample=False)
    merged = tuned.merge_and_unload()
    assert type(merged) is MambaMiaForConditionalGeneration
    torch.testing.assert_close(merged(**batch, delta_threshold=0).logits, logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(merged.generate(**batch, max_new_tokens=3, do_sample=False), out)
    assert plain.shape != logits.shape or not torch.allclose(plain, logits)


# As any model of Transformers


def test_outputs_as_tuple(model, batch):
    for part in (model, model.model):
        output = part(**batch, output_hidden_states=True)
        as_tuple = part(**batch, output_hidden_states=True, return_dict=False)
        assert isinstance(as_tuple, tuple) and len(as_tuple) == len(output)
        for value, expected in zip(as_tuple, output.to_tuple(), strict=True):
            if isinstance(expected, Tensor):
                assert torch.equal(value, expected)
    features = model.get_video_features(batch["pixel_values_videos"], return_dict=False)
    assert isinstance(features, tuple)


def test_logits_to_keep(model, video):
    logits = model(PROMPT, pixel_values_videos=video).logits
    for keep, positions in ((2, slice(-2, None)), (torch.tensor([0, 5]), [0, 5])):
        kept = model(PROMPT, pixel_values_videos=video, logits_to_keep=keep).logits
        torch.testing.assert_close(kept, logits[:, positions])


def test_save_and_load(model, batch, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    logits = model(**batch).logits
    for kwargs in ({}, {"device_map": "auto"}, {"device_map": "cpu"}):
        loaded, info = MambaMiaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True, **kwargs)
        assert not any(info.values())
        torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
        torch.testing.assert_close(loaded(**batch).logits, logits)
    base = MambaMiaModel.from_pretrained(tmp_path)
    assert torch.equal(base(**batch).last_hidden_state, model.model(**batch).last_hidden_state)


@pytest.mark.parametrize("on_disk", [["vision_tower", "compressor"], ["language_model"]])
@pytest.mark.parametrize("is_tied", [False, True])
def test_offloaded_to_disk(batch, on_disk, is_tied, tmp_path):
    if is_tied and "language_model" in on_disk and version.parse(accelerate.__version__) < version.parse("1.15"):
        pytest.skip("before accelerate 1.15, no model runs whose tied head is on the disk")
    model = tiny_model(tie_word_embeddings=is_tied)
    model.save_pretrained(tmp_path / "model")
    parts = ["vision_tower", "compressor", "language_model"]
    device_map = {f"model.{part}": "disk" if part in on_disk else "cpu" for part in parts}
    device_map["lm_head"] = device_map["model.language_model"]
    loaded = MambaMiaForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert getattr(loaded.model, on_disk[0]).device.type == "meta"
    out = loaded.generate(**batch, max_new_tokens=3, do_sample=False)
    assert torch.equal(out, model.generate(**batch, max_new_tokens=3, do_sample=False))


def test_bfloat16(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = MambaMiaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    settings = {"delta_threshold": 0, "logits_to_keep": 1}
    logits = loaded(**batch, **settings).logits
    assert logits.dtype == torch.bfloat16
    expected = model(**batch, **settings).logits
    assert (logits.float() - expected).abs().max() < 0.1 * expected.abs().max()
    assert loaded.generate(**batch, max_new_tokens=2).shape == (2, PROMPT.shape[1] + 2)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_attention_implementations(model, batch, implementation, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = MambaMiaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=implementation)
    assert loaded.model.language_model.config._attn_implementation == implementation
    if implementation == "flex_attention":  # compiles; that it loads is what matters here
        return
    expected = model(**batch)
    tokens = batch["attention_mask"].bool()
    torch.testing.assert_close(loaded(**batch).logits[tokens], expected.logits[tokens], atol=1e-5, rtol=1e-4)
    for other in ("eager", "sdpa"):
        loaded.set_attn_implementation(other)
        assert loaded.model.vision_tower.config._attn_implementation == other
        torch.testing.assert_close(loaded(**batch).logits[tokens], expected.logits[tokens], atol=1e-5, rtol=1e-4)


def test_attention_implementations_beside_a_tower_without_attention():
    model = MambaMiaForConditionalGeneration.from_pretrained(BUNDLED_CHECKPOINT, attn_implementation="sdpa")
    for implementation in ("sdpa", "eager", "sdpa"):
        if model.config.text_config._attn_implementation != implementation:
            model.set_attn_implementation(implementation)
        assert model.model.language_model.config._attn_implementation == implementation
        assert model.model.vision_tower.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="ResNet"):  # asked for by name
        model.set_attn_implementation({"vision_config": "sdpa"})


@pytest.mark.parametrize(
    "settings", [{"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}], ids=["config", "text"]
)
def test_tied_embeddings(batch, tmp_path, settings):
    model = tiny_model(**settings)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = MambaMiaForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)


def test_resized_embeddings(batch):
    model = tiny_model()
    logits = model(**batch).logits
    model.resize_token_embeddings(VOCAB_SIZE + 5)
    assert model.config.text_config.vocab_size == VOCAB_SIZE + 5
    torch.testing.assert_close(model(**batch).logits[..., :VOCAB_SIZE], logits)


def test_split_points_cover_every_part(model):
    assert {"MambaMiaSpatialBlock", "MambaMiaTemporalBlock", "Qwen2DecoderLayer", "SiglipEncoderLayer"} <= set(
        model._no_split_modules
    )
