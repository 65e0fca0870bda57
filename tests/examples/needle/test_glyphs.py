from dataclasses import replace
from itertools import combinations

import numpy as np
from needle.glyphs import COLOURS, DIGITS, SHAPES
from needle.plan import Needle, NeedleVideo
from needle_pixels import render


def still(value, colour="white", size=0.3):
    """The pixels of a glyph in the middle of a 96 x 96 frame, and of that frame without it."""
    kind = "shape" if value in SHAPES else "digit"
    needle = Needle(kind, value, colour, start=0.0, duration=1.0, x=0.5, y=0.5, size=size, halo=False)
    video = NeedleVideo(seed=0, total_num_frames=1, fps=1.0, size=(96, 96), needles=[needle])
    return render(video)[0], render(replace(video, needles=[]))[0]


def test_a_glyph_shows_its_colour():
    for value in SHAPES + DIGITS:
        for name, colour in COLOURS.items():
            with_glyph, without = still(value, name)
            glyph = with_glyph[(with_glyph != without).any(axis=-1)]
            assert (np.abs(glyph - colour).max(axis=-1) < 6).mean() > 0.3, (value, name)


def test_glyphs_differ_from_each_other():
    drawn = {value: still(value)[0] for value in SHAPES + DIGITS}
    for one, other in combinations(drawn, 2):
        assert (np.abs(drawn[one] - drawn[other]).max(axis=-1) > 100).sum() > 40, (one, other)
