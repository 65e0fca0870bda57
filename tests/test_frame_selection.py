import math

import pytest
import torch

from mambamia_hf.frame_selection import frame_budget, frame_to_drop, select_frames


def test_frame_budget():
    assert frame_budget(10) == 10
    assert frame_budget(10, keep_frames=3) == 3 and frame_budget(10, keep_frames=30) == 10
    assert frame_budget(10, keep_ratio=0.25) == 2 and frame_budget(10, keep_ratio=1) == 10
    assert frame_budget(10, keep_ratio=0.01) == 1
    assert frame_budget(0) == frame_budget(0, keep_frames=3) == frame_budget(0, keep_ratio=0.5) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"keep_frames": 3, "keep_ratio": 0.5},
        {"keep_frames": 0},
        {"keep_frames": -1},
        {"keep_frames": 2.5},
        {"keep_frames": True},
        {"keep_frames": math.inf},
        {"keep_ratio": 0.0},
        {"keep_ratio": 1.5},
        {"keep_ratio": math.nan},
    ],
    ids=str,
)
def test_frame_budget_rejects(arguments):
    with pytest.raises(ValueError, match="|".join(arguments)):
        frame_budget(10, **arguments)


def test_select_by_threshold_is_algorithm_1():
    deltas = torch.tensor([[0.25, 0.25, 0.5, 0.125, 1.0, 0.375]])
    assert select_frames(deltas, threshold=0.5).tolist() == [[False, True, True, False, True, False]]
    assert select_frames(deltas, threshold=0).all()
    assert select_frames(deltas).all()


def test_select_keeps_the_largest_when_nothing_reaches_the_threshold():
    assert select_frames(torch.tensor([[0.1, 0.3, 0.2]]), threshold=9).tolist() == [[False, True, False]]


def test_select_by_budget_is_exact_for_any_deltas():
    generator = torch.Generator().manual_seed(0)
    for frames in range(1, 40):
        uniform = torch.rand(frames, generator=generator)
        for deltas in (uniform, uniform**20, uniform * (uniform > 0.8), torch.zeros(frames), torch.ones(frames)):
            for keep in range(1, frames + 1):
                assert select_frames(deltas[None], keep_frames=keep).sum() == keep


def test_select_by_budget_follows_the_deltas():
    deltas = torch.full((1, 100), 0.01)
    assert select_frames(deltas, keep_ratio=0.5).nonzero()[:, 1].diff().unique().tolist() == [2]
    deltas[0, 40:60] = 1.0
    kept = select_frames(deltas, keep_frames=20)
    assert kept[0, 40:60].sum() >= 19
    assert select_frames(deltas, keep_frames=500).all()


def test_select_leaves_padding_out():
    deltas = torch.rand(2, 8)
    mask = torch.arange(8) < torch.tensor([[8], [3]])
    for arguments in ({"threshold": 0.4}, {"keep_frames": 2}, {"keep_ratio": 0.5}, {}):
        kept = select_frames(deltas, frame_mask=mask, **arguments)
        assert not kept[1, 3:].any()
        assert torch.equal(kept[1, :3], select_frames(deltas[1:, :3], **arguments)[0])


@pytest.mark.parametrize(
    "arguments",
    [
        {"threshold": 0.5, "keep_frames": 3},
        {"keep_frames": 3, "keep_ratio": 0.5},
        {"keep_frames": 0},
        {"keep_ratio": 0.0},
        {"keep_ratio": 1.5},
        {"threshold": -1.0},
        {"threshold": math.nan},
    ],
)
def test_select_rejects(arguments):
    with pytest.raises(ValueError, match="|".join(arguments)):
        select_frames(torch.rand(1, 4), **arguments)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -0.1])
@pytest.mark.parametrize("arguments", [{"threshold": 0.5}, {"keep_frames": 2}, {}], ids=str)
def test_select_rejects_impossible_deltas(wrong, arguments):
    deltas = torch.tensor([[0.1, 0.2, 0.3], [0.1, wrong, 0.3]])
    with pytest.raises(ValueError, match=f"Video 1 .*{wrong}"):
        select_frames(deltas, **arguments)
    mask = torch.tensor([[True, True, True], [True, False, True]])  # padding may hold anything
    assert select_frames(deltas, frame_mask=mask, **arguments).any(dim=1).all()


def held_of_a_stream(deltas: list[float], budget: int) -> tuple[list[int], list[float]]:
    """The frames that a stream with a budget holds in the end, and the Δ that each carries."""
    frames: list[int] = []
    carried: list[float] = []
    for frame, delta in enumerate(deltas):
        frames.append(frame)
        carried.append(delta)
        if len(frames) > budget:
            gone = frame_to_drop(carried, frames)
            carried[gone : gone + 2] = [carried[gone] + carried[gone + 1]]
            del frames[gone]
    return frames, carried


@pytest.mark.parametrize("budget", [1, 2, 5, 16, 50])
@pytest.mark.parametrize("seed", range(5))
def test_a_stream_stays_evenly_spread_in_accumulated_delta(budget, seed):
    deltas = (torch.rand(400, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 4).tolist()
    for end in (budget, 60, 200, 400):
        frames, carried = held_of_a_stream(deltas[:end], budget)
        assert len(frames) == min(budget, end) and frames[-1] == end - 1
        assert sum(carried) == pytest.approx(sum(deltas[:end]))
        assert max(carried) <= max(2 * sum(deltas[:end]) / budget, *deltas[:end]) * (1 + 1e-9)


def test_a_frame_that_carries_much_is_held_on_to():
    deltas = [0.01] * 100
    deltas[30] = deltas[60] = 5.0
    frames, _ = held_of_a_stream(deltas, 8)
    assert {30, 60} <= set(frames)


def test_equal_deltas_are_thinned_evenly():
    frames, _ = held_of_a_stream([1.0] * 64, 8)
    steps = [after - before for before, after in zip([-1, *frames], frames, strict=False)]
    assert max(steps) <= 16 and sum(steps) == 64


def test_between_equals_the_frame_of_the_shortest_stretch_goes():
    assert frame_to_drop([1.0, 1.0, 1.0, 1.0], [0.0, 10.0, 11.0, 30.0]) == 0
    assert frame_to_drop([1.0, 1.0, 1.0, 1.0], [0.0, 20.0, 21.0, 22.0]) == 2
