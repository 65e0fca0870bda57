"""The encoder alone: what a serving engine runs itself, from a checkpoint of the whole model."""

import torch
from tiny_model import random_videos, tiny_model

from mambamia_hf import MambaMiaEncoder


def test_loads_from_the_checkpoint_of_a_whole_model(tmp_path):
    model = tiny_model(end_of_frame=True)
    model.save_pretrained(tmp_path)
    encoder, report = MambaMiaEncoder.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert not any("language_model" in name for name, _ in encoder.named_parameters())
    videos = random_videos(2, 6)
    frame_mask = torch.arange(6) < torch.tensor([[6], [3]])
    for how in ({}, {"keep_frames": 2}, {"keep_ratio": 0.5}, {"delta_threshold": 0.3, "delta_min_frames": 0}):
        expected = model.get_video_features(videos, frame_mask=frame_mask, **how)
        features = encoder.get_video_features(videos, frame_mask=frame_mask, **how)
        assert features.keys() == expected.keys()
        assert torch.equal(features.keep_mask, expected.keep_mask)
        for tokens, theirs in zip(features.pooler_output, expected.pooler_output, strict=True):
            assert torch.equal(tokens, theirs)


def test_what_it_saves_loads_again(tmp_path):
    encoder = MambaMiaEncoder(tiny_model().config).eval()
    encoder.save_pretrained(tmp_path)
    loaded, report = MambaMiaEncoder.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    images = random_videos(1, 2)[0]
    assert torch.equal(
        loaded.get_image_features(images).last_hidden_state, encoder.get_image_features(images).last_hidden_state
    )
