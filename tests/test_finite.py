"""NaN and infinite numbers, wherever they come from, end in one sentence that says where the first one is."""

import pytest
import torch
from tiny_model import prompt, random_videos, tiny_model, tiny_processor
from video_files import write_video

from mambamia_hf.finite import check_finite, is_finite


IDS = prompt([5, 6], 4, [7])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_the_first_number_is_named(dtype, number):
    tensor = torch.zeros(2, 3, 4, dtype=dtype)
    assert is_finite(tensor)
    check_finite("it", tensor, "do something")
    tensor[1, 2, 0] = tensor[1, 2, 3] = number
    with pytest.raises(ValueError, match=rf"^it\[1, 2, 0\] is {number}; do something\.$"):
        check_finite("it", tensor, "do something")


def test_no_numbers_are_finite():
    assert is_finite(torch.zeros(0)) and is_finite(torch.ones(2, dtype=torch.long))
    assert is_finite(torch.zeros(2, device="meta"))
    assert is_finite(torch.tensor([65504.0, -65504.0], dtype=torch.float16))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_pixels(number):
    model, videos = tiny_model(), random_videos(1, 4)
    videos[0, 2, 1, 3, 3] = number
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"pixel_values_videos\[0, 2, 1, 3, 3\] is (nan|inf)"):
            call(input_ids=IDS, pixel_values_videos=videos)
    with pytest.raises(ValueError, match=r"pixel_values\[2, 1, 3, 3\] is"):
        model.get_image_features(videos[0])
    features = model.model.encode_frames(random_videos(1, 4)[0]).last_hidden_state[None]
    features[0, 1, 5, 2] = number
    with pytest.raises(ValueError, match=r"patch_features_videos\[0, 1, 5, 2\] is"):
        model.generate(input_ids=IDS, patch_features_videos=features, num_kept_frames=torch.tensor([2]))


@pytest.mark.parametrize(
    "name",
    [
        "model.vision_tower.encoder.layers.0.mlp.fc1.weight",
        "model.compressor.layers.0.mixer.in_proj.weight",
        "model.compressor.anchor",
        "model.compressor.temporal_layers.0.mixer.forward_ssm.dt_bias",
        "model.language_model.layers.0.mlp.up_proj.weight",
        "lm_head.weight",
    ],
)
@pytest.mark.parametrize("search", [{}, {"num_beams": 2}, {"do_sample": True}])
def test_weights(name, search):
    model = tiny_model()
    model.state_dict()[name].view(-1)[3] = float("nan")
    with pytest.raises(ValueError, match=rf"{name.removeprefix('model.')}\[.*3\] is nan"):
        model.generate(input_ids=IDS, pixel_values_videos=random_videos(1, 4), max_new_tokens=2, **search)


def test_numbers_that_do_not_fit_their_type():
    model = tiny_model()
    with torch.no_grad():
        model.model.compressor.output_proj.weight.mul_(1e38)
    with pytest.raises(ValueError, match="too large for torch.float32"):
        model.get_video_features(random_videos(1, 4))


def test_excluded_tokens_are_no_fault():
    model = tiny_model()
    bad = [[token] for token in range(50)]
    model.generate(input_ids=IDS, pixel_values_videos=random_videos(1, 4), max_new_tokens=2, bad_words_ids=bad)


def test_division_by_zero_in_the_processor(tmp_path):
    video = write_video(tmp_path / "v.mp4")
    with pytest.raises(ValueError, match="image_std=.* holds a 0"):
        tiny_processor().video_processor(str(video), image_std=[0.5, 0.0, 0.5])


class TestPixelsThatAreDividedAlready:
    def test_video(self):
        processor = tiny_processor().video_processor
        frames = torch.rand(3, 3, 32, 32)
        with pytest.warns(UserWarning, match="do_rescale=False"):
            processor(frames)
        with pytest.warns(UserWarning, match="do_rescale=False"):
            processor(frames.numpy())

    @pytest.mark.filterwarnings("error::UserWarning")
    def test_no_false_alarm(self):
        processor = tiny_processor()
        processor.video_processor(torch.rand(3, 3, 32, 32), do_rescale=False)
        processor.video_processor(255 * torch.rand(3, 3, 32, 32))
        processor.video_processor(torch.zeros(3, 3, 32, 32))
        processor.video_processor(torch.ones(3, 3, 32, 32, dtype=torch.uint8))
        images = [torch.rand(3, 32, 32)]
        processor(text="<|image_pad|>", images=images, images_kwargs={"do_rescale": False})

    def test_image(self):
        with pytest.warns(UserWarning, match="do_rescale=False"):
            tiny_processor()(text="<|image_pad|>", images=[torch.rand(3, 32, 32)])
