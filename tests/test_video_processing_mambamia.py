import math
import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_tokenizer
from transformers import AutoVideoProcessor, SiglipImageProcessor
from transformers.video_utils import VideoMetadata
from video_files import draw_number, read_numbers, write_cut_video, write_video

from mambamia_hf import MambaMiaProcessor, MambaMiaVideoProcessor


SMALL = {"size": {"height": 48, "width": 64}}


@pytest.fixture
def processor():
    return MambaMiaVideoProcessor(**SMALL)


@pytest.fixture
def path(tmp_path):
    return str(write_video(tmp_path / "v.mp4", num_frames=60, fps=10))


def images(num_frames):
    return [Image.fromarray(draw_number(number)) for number in range(num_frames)]


def array(num_frames):
    return np.stack([draw_number(number) for number in range(num_frames)])


class TestSampling:
    def test_at_most_two_frames_a_second_by_default(self, processor, path):
        output = processor(path, return_tensors="pt", return_metadata=True)
        # Six seconds in twelve parts of half a second, of which the middles are taken: 0.25, 0.75, ...
        expected = [2, 7, 12, 17, 22, 27, 32, 37, 42, 47, 52, 57]
        assert read_numbers(output.pixel_values_videos[0] * 127.5 + 127.5) == expected
        assert output.video_metadata[0].frames_indices == expected
        assert output.video_metadata[0].timestamps == pytest.approx([number / 10 for number in expected])
        assert output.frame_mask.tolist() == [[True] * 12]

    def test_at_most_num_frames(self, path):
        output = MambaMiaVideoProcessor(num_frames=4, **SMALL)(path, return_tensors="pt")
        assert read_numbers(output.pixel_values_videos[0] * 127.5 + 127.5) == [7, 22, 37, 52]

    def test_exact_num_frames(self, processor, path):
        for num_frames in (1, 7, 60):
            output = processor(path, num_frames=num_frames, return_tensors="pt")
            assert output.pixel_values_videos.shape[:2] == (1, num_frames)
        assert read_numbers(output.pixel_values_videos[0] * 127.5 + 127.5) == list(range(60))

    def test_num_frames_of_a_call_is_not_bounded_by_the_default(self, path):
        output = MambaMiaVideoProcessor(num_frames=4, **SMALL)(path, num_frames=9, return_tensors="pt")
        assert output.pixel_values_videos.shape[1] == 9

    def test_fps_of_a_call_is_bounded_by_the_default_num_frames(self, processor, path):
        assert processor(path, fps=5, return_tensors="pt").pixel_values_videos.shape[1] == 30
        processor = MambaMiaVideoProcessor(num_frames=4, **SMALL)
        assert processor(path, fps=5, return_tensors="pt").pixel_values_videos.shape[1] == 4

    def test_fps_beyond_that_of_the_video_gives_every_frame_once(self, processor, path):
        assert processor(path, fps=25, return_tensors="pt").pixel_values_videos.shape[1] == 60

    def test_no_limits(self, path, tmp_path):
        MambaMiaVideoProcessor(num_frames=None, fps=None, **SMALL).save_pretrained(tmp_path)
        processor = MambaMiaVideoProcessor.from_pretrained(tmp_path)
        assert processor(path, return_tensors="pt").pixel_values_videos.shape[1] == 60

    def test_without_sampling(self, processor, path):
        assert processor(path, do_sample_frames=False, return_tensors="pt").pixel_values_videos.shape[1] == 60

    def test_a_clip_shorter_than_one_sample_gives_a_frame(self, processor, tmp_path):
        short = write_video(tmp_path / "short.mp4", num_frames=3)
        assert processor(short, return_tensors="pt").pixel_values_videos.shape[1] == 1

    def test_times_decide_at_a_variable_frame_rate(self, processor, tmp_path):
        # Ten frames within the first second, then a still of 8 seconds that only one frame covers.
        times = [number / 10 for number in range(10)] + [1.0, 9.0, 9.5]
        path = write_video(tmp_path / "v.mp4", num_frames=13, times=times, codec_options={"bf": "0"})
        output = processor(path, num_frames=5, return_tensors="pt", return_metadata=True)
        # The middles of five equal parts: 1, 3, 5, 7 and 9 seconds.
        metadata = output.video_metadata[0]
        assert metadata.duration == pytest.approx(10.0, abs=0.5)
        middles = (np.arange(5) + 0.5) * metadata.duration / 5
        on_display = [max(i for i, time in enumerate(times) if time <= middle) for middle in middles]
        assert read_numbers(output.pixel_values_videos[0] * 127.5 + 127.5) == on_display
        assert metadata.timestamps == pytest.approx([times[i] for i in on_display])
        assert on_display.count(10) == 4

    def test_files_and_arrays_are_sampled_alike(self, processor, path):
        metadata = VideoMetadata(total_num_frames=60, fps=10)
        for kwargs in ({}, {"num_frames": 30}, {"fps": 3}):
            from_file = processor(path, return_metadata=True, **kwargs).video_metadata[0].frames_indices
            from_array = processor(array(60), video_metadata=[metadata], return_metadata=True, **kwargs)
            assert from_array.video_metadata[0].frames_indices == from_file

    def test_key_frames(self, processor, path):
        # The middles of six seconds are 0.5, 1.5, ..., of which the frames 5, 15, ... are on display.
        output = processor(path, num_frames=6, seek_mode="keyframe", return_tensors="pt", return_metadata=True)
        metadata = output.video_metadata[0]
        assert read_numbers(output.pixel_values_videos[0] * 127.5 + 127.5) == [0, 10, 20, 30, 40, 50]
        assert metadata.frames_indices == [0, 10, 20, 30, 40, 50]
        assert metadata.timestamps == pytest.approx([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])

    def test_number_of_frames_is_kept_where_key_frames_are_rare(self, processor, path):
        with pytest.warns(UserWarning, match="6 of them stand for the 12 sampled frames"):
            output = processor(path, seek_mode="keyframe", return_tensors="pt", return_metadata=True)
        assert output.frame_mask.tolist() == [[True] * 12]
        numbers = read_numbers(output.pixel_values_videos[0] * 127.5 + 127.5)
        assert numbers == output.video_metadata[0].frames_indices == sorted(numbers)
        assert set(numbers) == {0, 10, 20, 30, 40, 50}

    def test_key_frames_through_a_chat(self, path):
        processor = MambaMiaProcessor(SiglipImageProcessor(), tiny_tokenizer(), MambaMiaVideoProcessor(**SMALL))
        chat = [{"role": "user", "content": [{"type": "video", "path": path}]}]
        kwargs = {"num_frames": 4, "seek_mode": "keyframe"}
        expected = processor.video_processor(path, return_tensors="pt", **kwargs)
        for processor_kwargs in ({**kwargs, "return_metadata": True}, {"videos_kwargs": kwargs}):
            inputs = processor.apply_chat_template(
                chat, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=processor_kwargs
            )
            assert torch.equal(inputs["pixel_values_videos"], expected.pixel_values_videos)
            if "return_metadata" in processor_kwargs:
                assert inputs["video_metadata"][0].timestamps == pytest.approx([1.0, 2.0, 4.0, 5.0])
        assert read_numbers(expected.pixel_values_videos[0] * 127.5 + 127.5) == [10, 20, 40, 50]

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"seek_mode": "nearest"}, "`seek_mode='nearest'` is no way to find frames"),
            ({"num_frames": 0}, "`num_frames=0` cannot be sampled from a video of 60 frames"),
            ({"num_frames": 61}, "`num_frames=61` cannot be sampled from a video of 60 frames"),
            ({"num_frames": 4, "fps": 1}, "mutually exclusive"),
            ({"fps": 0}, "ask for more than 0"),
        ],
    )
    def test_impossible(self, processor, path, kwargs, message):
        with pytest.raises(ValueError, match=message):
            processor(path, **kwargs)

    @pytest.mark.parametrize("setting", ["num_frames", "fps"])
    @pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "2", []])
    def test_impossible_defaults(self, path, setting, value):
        """Settings of a damaged file are no settings; they leave no frame out without a word."""
        with pytest.raises(ValueError, match=re.escape(f"`{setting}={value}`")):
            MambaMiaVideoProcessor(**{**SMALL, setting: value})(path)

    def test_frames_without_a_rate(self, processor):
        # Nothing is known about their times: all of them, up to the limit.
        assert processor(images(7), return_tensors="pt").pixel_values_videos.shape[1] == 7
        assert MambaMiaVideoProcessor(num_frames=3, **SMALL)(images(7)).pixel_values_videos.shape[1] == 3
        assert processor(images(7), num_frames=3).pixel_values_videos.shape[1] == 3
        with pytest.raises(ValueError, match="unknown frame rate"):
            processor(images(7), fps=1)

    def test_metadata_of_another_video(self, processor):
        with pytest.raises(ValueError, match="speaks of 60 frames but the video has 7"):
            processor(images(7), video_metadata=[VideoMetadata(total_num_frames=60, fps=10)])


class TestInputs:
    def test_all_kinds_of_frames_give_the_same(self, processor):
        video = array(5)
        tensor = torch.from_numpy(video).permute(0, 3, 1, 2)
        expected = processor(video, return_tensors="pt").pixel_values_videos
        assert expected.shape == (1, 5, 3, 48, 64)
        assert read_numbers(expected[0] * 127.5 + 127.5) == [0, 1, 2, 3, 4]
        for videos in (images(5), list(video), tensor, list(tensor), [video], [images(5)], video[None], tensor[None]):
            assert torch.equal(processor(videos, return_tensors="pt").pixel_values_videos, expected)

    def test_kinds_of_images(self, processor):
        grey = [image.convert("L") for image in images(3)]
        palette = [image.convert("P") for image in images(3)]
        transparent = [image.convert("RGBA") for image in images(3)]
        expected = processor(images(3), return_tensors="pt").pixel_values_videos
        for frames in (grey, palette, transparent):
            assert torch.allclose(processor(frames, return_tensors="pt").pixel_values_videos, expected, atol=1e-2)

    def test_list_of_image_files_within_a_chat(self, processor, tmp_path):
        files = [str(tmp_path / f"{number}.png") for number in range(3)]
        for image, file in zip(images(3), files, strict=True):
            image.save(file)
        output = processor([[files]], return_tensors="pt")
        assert read_numbers(output.pixel_values_videos[0] * 127.5 + 127.5) == [0, 1, 2]

    def test_files_arrays_and_images_together(self, processor, path, tmp_path):
        other = write_video(tmp_path / "other.mp4", num_frames=15)
        output = processor([path, array(4), other, images(2)], return_tensors="pt", return_metadata=True)
        assert output.pixel_values_videos.shape == (4, 12, 3, 48, 64)
        assert output.frame_mask.dtype == torch.bool
        assert output.frame_mask.sum(1).tolist() == [12, 4, 3, 2]
        for video, mask in zip(output.pixel_values_videos, output.frame_mask, strict=True):
            assert (video[~mask] == 0).all()
            assert mask.tolist() == sorted(mask.tolist(), reverse=True)
        assert len(output.video_metadata) == 4

    def test_together_as_alone(self, processor, path, tmp_path):
        other = write_video(tmp_path / "other.mp4", num_frames=15)
        together = processor([path, other], return_tensors="pt")
        alone = processor(other, return_tensors="pt")
        assert torch.equal(together.pixel_values_videos[1, :3], alone.pixel_values_videos[0])

    def test_no_return_tensors_and_numpy(self, processor):
        assert isinstance(processor(array(5)).pixel_values_videos, torch.Tensor)
        output = processor(array(5), return_tensors="np")
        assert isinstance(output.pixel_values_videos, np.ndarray)
        assert output.frame_mask.dtype == bool

    @pytest.mark.parametrize("size", [{"height": 20, "width": 30}, {"shortest_edge": 24}])
    def test_resizing_a_file_equals_resizing_its_frames(self, path, size):
        processor = MambaMiaVideoProcessor(size=size, default_to_square=False)
        frames = processor(path, do_resize=False, do_rescale=False, do_normalize=False).pixel_values_videos[0]
        assert frames.shape == (12, 3, 48, 64)
        from_file = processor(path, return_tensors="pt").pixel_values_videos
        from_frames = processor(frames, return_tensors="pt").pixel_values_videos
        assert torch.equal(from_file, from_frames)

    def test_normalisation(self, processor):
        output = processor(np.full((2, 48, 64, 3), 255, dtype=np.uint8), return_tensors="pt")
        assert output.pixel_values_videos.unique().tolist() == [1.0]

    def test_crop(self, path):
        processor = MambaMiaVideoProcessor(size={"shortest_edge": 48}, do_center_crop=True, crop_size=32)
        assert processor(path, return_tensors="pt").pixel_values_videos.shape == (1, 12, 3, 32, 32)

    @pytest.mark.parametrize(
        ("videos", "message"),
        [
            (images(1)[0], "holds an image"),
            (array(1)[0], "holds an image"),
            ([], "empty list"),
            (np.zeros((0, 8, 8, 3), dtype=np.uint8), "has no frames"),
            (7, "holds 7"),
            ([None], "holds None"),
            ([np.zeros((8, 8, 3)), np.zeros((8, 9, 3))], "different shapes"),
        ],
    )
    def test_impossible(self, processor, videos, message):
        with pytest.raises(ValueError, match=message):
            processor(videos)

    def test_videos_of_different_sizes_need_resizing(self, processor):
        videos = [np.zeros((2, 8, 8, 3), dtype=np.uint8), np.zeros((2, 8, 9, 3), dtype=np.uint8)]
        with pytest.raises(ValueError, match="cannot form one batch"):
            processor(videos, do_resize=False)

    def test_one_metadata_a_video(self, processor):
        metadata = [VideoMetadata(total_num_frames=2, fps=1)]
        with pytest.raises(ValueError, match="2 videos but"):
            processor([array(2), array(2)], video_metadata=metadata)

    def test_cut_off_file(self, processor, tmp_path):
        options = {"movflags": "faststart"}
        path = write_cut_video(tmp_path / "v.mp4", 0.6, num_frames=200, container_options=options)
        with pytest.warns(UserWarning, match="is cut off"):
            output = processor(path, return_tensors="pt", return_metadata=True)
        numbers = read_numbers(output.pixel_values_videos[0] * 127.5 + 127.5)
        assert numbers == output.video_metadata[0].frames_indices


class TestUse:
    def test_arguments_are_left_alone(self, processor):
        videos, metadata = images(7), VideoMetadata(total_num_frames=7, fps=1)
        processor(videos, num_frames=2, video_metadata=[metadata])
        assert len(videos) == 7
        assert metadata.frames_indices is None
        assert (processor.num_frames, processor.do_sample_frames) == (384, True)

    def test_progress(self, processor, path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "300")  # room for a long path
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            processor(path)
            assert capsys.readouterr().err == ""
            processor(path, progress=True)
        assert "12/12" in capsys.readouterr().err

    def test_sound_is_ignored(self, processor, path):
        expected = processor(path, return_tensors="pt").pixel_values_videos
        output = processor(path, load_audio_from_video=True, return_tensors="pt")
        assert set(output) == {"pixel_values_videos", "frame_mask", "video_timestamps"}
        assert torch.equal(output.pixel_values_videos, expected)

    def test_save_and_load(self, tmp_path):
        processor = MambaMiaVideoProcessor(num_frames=16, fps=1.5, seek_mode="keyframe", **SMALL)
        processor.save_pretrained(tmp_path)
        loaded = AutoVideoProcessor.from_pretrained(tmp_path)
        assert type(loaded) is MambaMiaVideoProcessor
        assert loaded.to_dict() == processor.to_dict()
        assert (loaded.num_frames, loaded.fps, loaded.seek_mode) == (16, 1.5, "keyframe")

    def test_fetch_videos(self, processor, path):
        frames, metadata = processor.fetch_videos(path, processor.sample_frames)
        assert frames.shape == (12, 3, 48, 64) and metadata.total_num_frames == 60
        frames, metadata = processor.fetch_videos([path, path])
        assert [video.shape[0] for video in frames] == [60, 60] and len(metadata) == 2
        frames, metadata = processor.fetch_videos(path, lambda metadata: np.array([12, 38]), seek_mode="keyframe")
        assert read_numbers(frames) == metadata.frames_indices == [10, 40]
