"""The needle benchmark: videos in which glyphs show up for a short time, and questions whose answers are known.

    pictures, glyphs        how a picture is stored, and what is drawn onto it
    textures, backgrounds   the pictures behind the needles
    plan, video             what a seed decides, and the H.264 file made of it
    questions               what is asked about a video
    generate, evaluate      commands: write a data set, score a checkpoint on fresh videos

`run.sh` trains the bundled model from nothing. It uses `small_model`, `training_data`, `pretrain_vision` and
`train_times`, which learns from `looks` at `seen_videos` and `spliced_videos`.

The commands are modules of this package: `PYTHONPATH=examples python -m needle.generate --help`.
"""
