"""Dropping frames from a prompt, and dialogues that go on from a cache without them."""

import copy

import pytest
import torch
from tiny_model import IMAGE_TOKEN, NUM_ANCHORS, VIDEO_TOKEN, prompt, random_videos, tiny_model
from torch import Tensor
from transformers import DynamicCache

from mambamia_hf import MambaMiaForConditionalGeneration
from mambamia_hf.prompt_tokens import (
    DroppedTokens,
    kept_indices,
    placeholder_counts,
    put_back_states,
    resolve_budgets,
    staying_tokens,
    take_tokens,
    tokens_to_keep,
)
from mambamia_hf.versions import CACHE_NAME


FRAMES = 8
FIRST = prompt([5, 6], FRAMES, [7, 8, 9])
QUESTION = torch.tensor([[21, 22, 23, 24]])
# Random weights might come up with placeholders.
GREEDY = {"do_sample": False, "suppress_tokens": [IMAGE_TOKEN, VIDEO_TOKEN]}
ANSWER = {"max_new_tokens": 6, **GREEDY}


# Pure functions


def places(*rows: str) -> Tensor:
    """`v` is a video token, `.` another one."""
    return torch.tensor([[letter == "v" for letter in row] for row in rows])


def test_videos_have_the_runs_of_placeholders():
    assert placeholder_counts(places(".vv.v", "vvv.."), [2, 1, 3]) == [2, 1, 3]
    assert placeholder_counts(places(".vvvv."), [3, 1], [1, 1]) == [3, 1]
    assert placeholder_counts(places(".vvvv."), [4, 4], [2, 2]) == [2, 2]
    with pytest.raises(ValueError, match="2 runs of video placeholders and there are 1 videos"):
        placeholder_counts(places("vv.v"), [2])


def test_states_go_back_to_their_places():
    indices = torch.tensor([[-1, -1, 2, 3, 6], [0, 1, 4, 5, 7]])  # the first row begins with two tokens of padding
    assert staying_tokens(indices, 8).int().tolist() == [[0, 0, 1, 1, 0, 0, 1, 0], [1, 1, 0, 0, 1, 1, 0, 1]]
    states = torch.arange(1.0, 11).view(2, 5, 1).requires_grad_()
    full = put_back_states(states, indices, 8)
    assert full[..., 0].tolist() == [[0, 0, 3, 4, 0, 4, 5, 0], [6, 7, 0, 7, 8, 9, 9, 10]]
    torch.testing.assert_close(take_tokens(full, indices, 0)[indices >= 0], states[indices >= 0])
    full.sum().backward()
    assert states.grad[..., 0].tolist() == [[0, 0, 1, 2, 1], [1, 2, 1, 2, 1]]


@pytest.mark.parametrize(
    ("row", "num_frames", "given", "expected"),
    [
        (".vvvvvv.", [3], [0], [0]),
        (".vvvvvv.", [3], [2], [2]),
        (".vvvv.", [3], [2], [2]),
        (".vvvv.", [3], [0], [2]),
        (".vvvv.vv", [3, 1], [0, 0], [2, 0]),
        ("vvvvvv", [2, 4], [1, 2], [1, 2]),
    ],
)
def test_budgets(row, num_frames, given, expected):
    assert resolve_budgets(places(row), num_frames, 2, given) == expected


@pytest.mark.parametrize(("row", "given"), [("vvv", [0]), ("vvvvvvvv", [0]), ("vv", [2]), ("vvvv", [1])])
def test_placeholders_for_neither_all_frames_nor_the_budget(row, given):
    with pytest.raises(
        ValueError, match=f"3 frames has {len(row)} placeholders in the prompt; expected 6, 2 per frame"
    ):
        resolve_budgets(places(row), [3], 2, given)


def test_places_of_dropped_frames_leave_a_prompt_for_all_frames():
    keep_mask = torch.tensor([[True, False, True], [False, True, False]])
    frame_mask = torch.tensor([[True, True, True], [True, True, False]])
    prompt_for_all = places(".vvvvvv.", "vvvv....")
    keep = tokens_to_keep(prompt_for_all, keep_mask, frame_mask, 2)
    assert keep.tolist() == [
        [True, True, True, False, False, True, True, True],
        [False, False, True, True, True, True, True, True],
    ]
    assert tokens_to_keep(places(".vvvv.", "..vv.."), keep_mask, frame_mask, 2).all()


def test_rows_are_padded_on_the_left():
    keep = torch.tensor([[True, False, True, True], [False, False, True, True]])
    indices = kept_indices(keep, torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0]]))
    assert indices.tolist() == [[0, 2, 3], [-1, -1, 2]]
    assert take_tokens(torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]]), indices, -100).tolist() == [
        [5, 7, 8],
        [-100, -100, 3],
    ]


# Dialogues


SELECTIONS = {
    "every frame": ({}, {"delta_threshold": 0.0}),
    "threshold of the call": ({}, {"delta_threshold": 0.3, "delta_min_frames": 0}),
    "threshold of the configuration": ({}, {}),
    "budget of the configuration": ({"delta_threshold": None, "keep_ratio": 0.5}, {}),
    "budget of the call": ({}, {"keep_frames": 3}),
}


@pytest.fixture(scope="module", params=SELECTIONS)
def dialogue(request) -> dict:
    """A model, a first turn with its cache, and the second turn as answered from scratch."""
    config, how = SELECTIONS[request.param]
    model, video = tiny_model(**config), random_videos(1, FRAMES)
    first = {"input_ids": FIRST, "attention_mask": torch.ones_like(FIRST), "pixel_values_videos": video}
    answered = model.generate(**first, **how, max_new_tokens=4, **GREEDY, return_dict_in_generate=True)
    second = torch.cat([answered.sequences, QUESTION], dim=1)
    fresh = model.generate(second, attention_mask=torch.ones_like(second), pixel_values_videos=video, **how, **ANSWER)
    return {
        "model": model,
        "video": video,
        "how": how,
        "sequences": answered.sequences,
        "cache": answered[CACHE_NAME],
        "second": second,
        "fresh": fresh,
    }


def cache_of(dialogue: dict) -> dict:
    return {CACHE_NAME: copy.deepcopy(dialogue["cache"])}


@pytest.mark.parametrize("with_mask", [True, False])
def test_the_whole_dialogue_goes_on_from_its_cache(dialogue, with_mask):
    second, lengths = dialogue["second"], []
    mask = {"attention_mask": torch.ones_like(second)} if with_mask else {}
    hook = dialogue["model"].model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    out = dialogue["model"].generate(second, **mask, **cache_of(dialogue), **ANSWER)
    hook.remove()
    assert torch.equal(out, dialogue["fresh"])
    assert lengths[0] == QUESTION.shape[1] + 1, "only what the cache lacks is computed"


def test_the_whole_dialogue_with_its_video(dialogue):
    second = dialogue["second"]
    out = dialogue["model"].generate(
        second,
        attention_mask=torch.ones_like(second),
        pixel_values_videos=dialogue["video"],
        **cache_of(dialogue),
        **dialogue["how"],
        **ANSWER,
    )
    assert torch.equal(out, dialogue["fresh"])


@pytest.mark.parametrize("covers", ["cached tokens", "the whole dialogue"])
def test_new_tokens_alone(dialogue, covers):
    new = dialogue["second"][:, dialogue["sequences"].shape[1] - 1 :]  # the cache lacks the last token of the answer
    length = dialogue["second"].shape[1]
    if covers == "cached tokens":
        length = dialogue["cache"].get_seq_length() + new.shape[1]
    mask = torch.ones(1, length, dtype=torch.long)
    out = dialogue["model"].generate(new, attention_mask=mask, **cache_of(dialogue), **ANSWER)
    assert torch.equal(out[:, new.shape[1] :], dialogue["fresh"][:, dialogue["second"].shape[1] :])


def test_a_prefix_is_computed_once_for_many_questions(dialogue):
    model, how = dialogue["model"], dialogue["how"]
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        model(FIRST, pixel_values_videos=dialogue["video"], use_cache=True, **{CACHE_NAME: cache}, **how)
    for question in (QUESTION, QUESTION.flip(1), QUESTION[:, :1]):
        ids = torch.cat([FIRST, question], dim=1)
        expected = model.generate(ids, pixel_values_videos=dialogue["video"], **how, **ANSWER)
        assert torch.equal(model.generate(ids, **{CACHE_NAME: copy.deepcopy(cache)}, **ANSWER), expected)


def test_a_third_turn(dialogue):
    model, cache = dialogue["model"], cache_of(dialogue)
    second = model.generate(dialogue["second"], **cache, **ANSWER)
    third = torch.cat([second, QUESTION.flip(1)], dim=1)
    expected = model.generate(third, pixel_values_videos=dialogue["video"], **dialogue["how"], **ANSWER)
    assert torch.equal(model.generate(third, **cache, **ANSWER), expected)


def test_forward_goes_on(dialogue):
    model, second = dialogue["model"], dialogue["second"]
    with torch.no_grad():
        whole = model(second, pixel_values_videos=dialogue["video"], **dialogue["how"]).logits
        new = second[:, dialogue["sequences"].shape[1] - 1 :]
        for mask in (None, torch.ones_like(second)):
            logits = model(new, attention_mask=mask, **cache_of(dialogue)).logits
            torch.testing.assert_close(logits, whole[:, -new.shape[1] :], atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def model() -> MambaMiaForConditionalGeneration:
    return tiny_model()


@pytest.fixture
def first_turn(model) -> dict:
    """A cache that lacks frames, and its prompt."""
    cache = DynamicCache(config=model.config.text_config)
    model(FIRST, pixel_values_videos=random_videos(1, FRAMES), use_cache=True, keep_frames=3, **{CACHE_NAME: cache})
    assert DroppedTokens.of(cache).num_dropped == (FRAMES - 3) * NUM_ANCHORS
    return {CACHE_NAME: cache}


def test_another_selection_than_the_cached_one_is_refused(model, first_turn):
    second = torch.cat([FIRST, QUESTION], dim=1)
    with pytest.raises(ValueError, match="cache holds other frames"):
        model.generate(second, pixel_values_videos=random_videos(1, FRAMES), keep_frames=5, **first_turn, **ANSWER)


def test_what_is_no_continuation_is_refused(model, first_turn):
    with pytest.raises(ValueError, match="pass the whole dialogue"):
        model.generate(QUESTION, **first_turn, **ANSWER)
    with pytest.raises(ValueError, match="pass the whole dialogue"):
        model.generate(torch.cat([FIRST, QUESTION], dim=1).repeat(2, 1), **first_turn, **ANSWER)
    with pytest.raises(ValueError, match="attention mask must cover"):
        model(QUESTION, attention_mask=torch.ones(1, 30, dtype=torch.long), **first_turn)


def test_a_batch_goes_on(model):
    """Rows that lose different numbers of frames."""
    videos = random_videos(2, FRAMES)
    how = {"num_kept_frames": torch.tensor([3, 5])}
    first = {"input_ids": FIRST.repeat(2, 1), "attention_mask": torch.ones_like(FIRST.repeat(2, 1))}
    answered = model.generate(
        **first, **how, pixel_values_videos=videos, max_new_tokens=4, **GREEDY, return_dict_in_generate=True
    )
    second = torch.cat([answered.sequences, QUESTION.repeat(2, 1)], dim=1)
    mask = torch.ones_like(second)
    expected = model.generate(second, pixel_values_videos=videos, attention_mask=mask, **how, **ANSWER)
    assert torch.equal(model.generate(second, **{CACHE_NAME: answered[CACHE_NAME]}, **ANSWER), expected)


def test_a_second_video_goes_on_from_the_first(model):
    videos = random_videos(2, FRAMES)
    cache = DynamicCache(config=model.config.text_config)
    for_both = {"keep_frames": 3, **ANSWER}
    first = model.generate(FIRST, pixel_values_videos=videos[:1], **for_both, **{CACHE_NAME: cache})
    second = torch.cat([first, FIRST], dim=1)
    expected = model.generate(second, pixel_values_videos=videos, **for_both)
    new = second[:, first.shape[1] - 1 :]
    out = model.generate(
        new,
        attention_mask=torch.ones_like(second),
        pixel_values_videos=videos[1:],
        **for_both,
        **{CACHE_NAME: cache},
    )
    assert torch.equal(out[:, new.shape[1] :], expected[:, second.shape[1] :])
    third = torch.cat([expected, QUESTION], dim=1)
    expected = model.generate(third, pixel_values_videos=videos, **for_both)
    assert torch.equal(model.generate(third, **{CACHE_NAME: cache}, **ANSWER), expected)
