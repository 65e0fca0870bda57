import numpy as np
import pytest

from mambamia_hf.video_times import repaired_times


EVEN = np.arange(40) / 10


def change(**places):
    """Even times with others at some places, such as `at_5=7.0`."""
    times = EVEN.copy()
    for place, time in places.items():
        times[int(place.removeprefix("at_"))] = time
    return times


@pytest.mark.parametrize(
    ("times", "problem"),
    [
        (EVEN, None),
        (EVEN + 7.5, None),
        (np.full(40, np.nan), None),
        (change(at_0=np.nan, at_17=np.nan, at_39=np.nan), None),
        (EVEN[np.arange(40) ^ 1], None),  # two by two in the order of the file
        (
            change(at_15=1001.5, at_16=1001.6),
            "2 of its 40 frames, frame 15 first (1001.5 s), have times that do not fit",
        ),
        (change(at_15=-1000.0), "1 of its 40 frames, frame 15 first"),
        (change(at_39=5000.0), "they jump by 4996.2 s at frame 39, once in all"),
        (np.arange(40) // 2 / 5, "20 of its 40 frames, frame 1 first (0.0 s), have the time of the frame before"),
        (np.zeros(40), "39 of its 40 frames, frame 1 first"),
        (np.arange(40) % 10 / 10, "they start again at frame 10, 3 times in all"),
    ],
)
def test_times_become_even(times, problem):
    repaired, problems = repaired_times(times, frame_duration=0.1, may_jump=False)
    assert repaired == pytest.approx(EVEN)
    assert len(problems) == (problem is not None)
    if problem is not None:
        assert problem in problems[0]


def test_long_stills_are_believed_but_for_broadcasts():
    times = np.array([0.0, 0.1, 0.2, 60.2, 60.3])
    assert repaired_times(times, 0.1, may_jump=False) == (pytest.approx(times), [])
    repaired, problems = repaired_times(times, 0.1, may_jump=True)
    assert repaired == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert "jump by 60.0 s at frame 3" in problems[0]
