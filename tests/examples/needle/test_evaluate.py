from argparse import Namespace

from needle.evaluate import is_right

from mambamia_hf import BUNDLED_CHECKPOINT


def test_answers_about_fresh_videos():
    arguments = Namespace(
        model=BUNDLED_CHECKPOINT,
        num_frames=32,
        duration=16.0,
        fps=2.0,
        size=(128, 128),
        background=None,
        keep_ratios=[1.0, 0.5],
    )
    answers = [is_right(arguments, "retrieval", seed) for seed in range(8)]
    assert all(answer.keys() == {1.0, 0.5} for answer in answers)
    assert sum(answer[1.0] for answer in answers) >= 6
    assert sum(answer[0.5] for answer in answers) >= 6
