import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_tokenizer
from transformers import AutoProcessor, AutoVideoProcessor, ProcessorMixin, SiglipImageProcessor
from transformers.video_utils import VideoMetadata
from video_files import draw_number, read_numbers, write_video

from mambamia_hf import MambaMiaProcessor, MambaMiaVideoProcessor
from mambamia_hf.video_decoding import TimedVideoMetadata


ANCHORS = 3
SIZE = {"height": 24, "width": 32}
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def make_processor(**kwargs):
    return MambaMiaProcessor(
        image_processor=SiglipImageProcessor(size=SIZE),
        tokenizer=tiny_tokenizer(),
        video_processor=MambaMiaVideoProcessor(size=SIZE),
        tokens_per_frame=ANCHORS,
        **kwargs,
    )


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture
def path(tmp_path):
    return str(write_video(tmp_path / "v.mp4", num_frames=40, fps=10))


@pytest.fixture
def image():
    return Image.fromarray(draw_number(7))


def frames(num_frames):
    return np.stack([draw_number(number) for number in range(num_frames)])


def video_tokens(processor, inputs):
    return (inputs["input_ids"] == processor.video_token_id).sum(-1).tolist()


def user(*content):
    return {"role": "user", "content": list(content)}


def text(words):
    return {"type": "text", "text": words}


class TestTemplate:
    def render(self, processor, *messages, **kwargs):
        return processor.apply_chat_template(list(messages), **kwargs)

    def test_dialogue(self, processor):
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": [text("Hello"), text(" you.")]},
            {"role": "user", "content": "Bye."},
        ]
        assert self.render(processor, *messages, add_generation_prompt=True) == (
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\nHello.<|im_end|>\n"
            "<|im_start|>assistant\nHello you.<|im_end|>\n"
            "<|im_start|>user\nBye.<|im_end|>\n"
            "<|im_start|>assistant\n"
        )

    def test_system_message_is_added_where_there_is_none(self, processor):
        expected = SYSTEM + "<|im_start|>user\nHello.<|im_end|>\n"
        assert self.render(processor, {"role": "user", "content": "Hello."}) == expected

    def test_videos_images_and_text_in_any_order(self, processor):
        content = [text("A"), {"type": "image"}, {"type": "video"}, text("B"), {"type": "video"}, {"type": "image"}]
        video, image = "<|vision_start|><|video_pad|><|vision_end|>", "<|vision_start|><|image_pad|><|vision_end|>"
        expected = f"{SYSTEM}<|im_start|>user\nA{image}{video}B{video}{image}<|im_end|>\n"
        assert self.render(processor, user(*content)) == expected

    def test_unknown_content(self, processor):
        with pytest.raises(Exception, match="type audio in a message: use text, image or video"):
            self.render(processor, user({"type": "audio"}))

    def test_message_without_content(self, processor):
        expected = SYSTEM + "<|im_start|>assistant\n<|im_end|>\n"
        assert self.render(processor, {"role": "assistant", "tool_calls": []}) == expected
        assert self.render(processor, {"role": "assistant", "content": None}) == expected

    def test_continued_message(self, processor):
        messages = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": [text("It is")]}]
        assert self.render(processor, *messages, continue_final_message=True).endswith("assistant\nIt is")


class TestPlaceholders:
    def test_as_many_as_frames_times_anchors(self, processor, path):
        inputs = processor(text="<|video_pad|>What is shown?", videos=path, return_tensors="pt")
        assert inputs["pixel_values_videos"].shape == (1, 8, 3, 24, 32)
        assert inputs["frame_mask"].tolist() == [[True] * 8]
        assert video_tokens(processor, inputs) == [8 * ANCHORS]
        words = processor.batch_decode(inputs["input_ids"], skip_special_tokens=True)
        assert words == ["What is shown?"]

    def test_image(self, processor, image):
        inputs = processor(text="<|image_pad|>?", images=image, return_tensors="pt")
        assert inputs["pixel_values"].shape == (1, 3, 24, 32)
        assert (inputs["input_ids"] == processor.image_token_id).sum() == ANCHORS

    @pytest.mark.parametrize(
        ("budget", "kept"),
        [
            ({"keep_frames": 3}, 3),
            ({"keep_frames": 100}, 8),
            ({"keep_ratio": 0.5}, 4),
            ({"keep_ratio": 0.01}, 1),
            ({"keep_ratio": 1.0}, 8),
        ],
    )
    def test_budget(self, processor, path, budget, kept):
        inputs = processor(text="<|video_pad|>", videos=path, return_tensors="pt", **budget)
        assert video_tokens(processor, inputs) == [kept * ANCHORS]
        assert inputs["pixel_values_videos"].shape[1] == 8
        nested = processor(text="<|video_pad|>", videos=path, return_tensors="pt", videos_kwargs=budget)
        assert torch.equal(nested["input_ids"], inputs["input_ids"])
        default = make_processor(**budget)(text="<|video_pad|>", videos=path, return_tensors="pt")
        assert torch.equal(default["input_ids"], inputs["input_ids"])

    def test_budget_of_a_call_replaces_the_default(self, path):
        processor = make_processor(keep_frames=2)
        inputs = processor(text="<|video_pad|>", videos=path, keep_ratio=0.75, return_tensors="pt")
        assert video_tokens(processor, inputs) == [6 * ANCHORS]

    def test_budget_counts_each_video_alone(self, processor, path):
        inputs = processor(
            text=["<|video_pad|>", "<|video_pad|>a<|video_pad|>"],
            videos=[path, frames(2), frames(6)],
            keep_frames=5,
            padding=True,
            return_tensors="pt",
        )
        assert video_tokens(processor, inputs) == [5 * ANCHORS, (2 + 5) * ANCHORS]
        assert inputs["frame_mask"].sum(1).tolist() == [8, 2, 6]

    @pytest.mark.parametrize(
        "budget",
        [{"keep_frames": 2, "keep_ratio": 0.5}, {"keep_frames": 0}, {"keep_ratio": 0.0}, {"keep_ratio": 1.5}],
    )
    def test_impossible_budget(self, processor, path, budget):
        with pytest.raises(ValueError, match="keep_"):
            make_processor(**budget)
        with pytest.raises(ValueError, match="keep_"):
            processor(text="<|video_pad|>", videos=path, **budget)

    def test_number_of_tokens_is_known_beforehand(self, processor):
        sizes = {"image_sizes": [(40, 50)] * 2, "video_sizes": [(8, 48, 64), (5, 20, 20)]}
        numbers = processor._get_num_multimodal_tokens(**sizes)
        assert numbers.num_image_tokens == [ANCHORS, ANCHORS]
        assert numbers.num_video_tokens == [8 * ANCHORS, 5 * ANCHORS]
        numbers = processor._get_num_multimodal_tokens(**sizes, keep_ratio=0.5)
        assert numbers.num_video_tokens == [4 * ANCHORS, 2 * ANCHORS]

    @pytest.mark.parametrize(
        ("prompt", "given"),
        [
            ("What?", {"videos": frames(2)}),
            ("<|video_pad|>What?", {}),
            ("<|video_pad|><|video_pad|>What?", {"videos": [frames(2)]}),
            ("<|video_pad|>What?", {"images": draw_number(1)}),
            ("<|image_pad|>What?", {"videos": frames(2)}),
            ("<|image_pad|>What?", {"images": frames(2)}),
            ("<|image_pad|>What?", {}),
        ],
    )
    def test_placeholders_and_inputs_that_do_not_match(self, processor, prompt, given):
        with pytest.raises(
            ValueError, match="tokens in the prompts should be the same as the number of videos and images"
        ):
            processor(text=prompt, **given)

    def test_image_where_a_video_is_meant(self, processor, image, tmp_path):
        with pytest.raises(ValueError, match="holds an image"):
            processor(text="<|video_pad|>What?", videos=image)
        image.save(tmp_path / "image.png")
        with pytest.raises(ValueError, match="is an image where a video is meant"):
            processor(text="<|video_pad|>What?", videos=tmp_path / "image.png")

    def test_video_where_an_image_is_meant(self, processor, path):
        with pytest.raises(ValueError, match="cannot be read as an image"):
            processor(text="<|image_pad|>What?", images=path)

    def test_nothing(self, processor):
        with pytest.raises(ValueError, match="nothing to process"):
            processor()

    def test_text_that_is_none(self, processor):
        with pytest.raises(ValueError, match="`text` holds 7"):
            processor(text=["a", 7])


class TestTimes:
    TIMES = [0.0, 0.4, 3.0, 3.1, 59.5, 61.0]

    @pytest.mark.parametrize(("time_format", "width"), [(None, 0), ("mm:ss", 5), ("h:mm:ss", 7), ("mm:ss.d", 7)])
    def test_placeholders(self, path, image, tmp_path, time_format, width):
        make_processor(frame_time_format=time_format).save_pretrained(tmp_path)
        processor = MambaMiaProcessor.from_pretrained(tmp_path)
        assert (processor.frame_time_format, processor.tokens_per_frame) == (time_format, ANCHORS)
        assert processor.placeholders_per_frame == width + ANCHORS
        inputs = processor(text="<|image_pad|><|video_pad|>", images=image, videos=path, return_tensors="pt")
        assert video_tokens(processor, inputs) == [8 * (width + ANCHORS)]
        assert (inputs["input_ids"] == processor.image_token_id).sum() == ANCHORS
        assert inputs["video_timestamps"].dtype == torch.float64
        assert inputs["video_timestamps"][0].tolist() == pytest.approx([0.2 + 0.5 * number for number in range(8)])
        inputs = processor(text="<|video_pad|>", videos=path, keep_frames=3, return_tensors="pt")
        assert video_tokens(processor, inputs) == [3 * (width + ANCHORS)]
        sizes = processor._get_num_multimodal_tokens(video_sizes=[(8, 48, 64)], image_sizes=[(8, 8)], keep_ratio=0.5)
        assert (sizes.num_video_tokens, sizes.num_image_tokens) == ([4 * (width + ANCHORS)], [ANCHORS])

    @pytest.mark.parametrize(
        "metadata",
        [
            {"timestamps": TIMES},
            {"timestamps": np.array(TIMES), "duration": 70.0, "width": 64},
            [{"timestamps": torch.tensor(TIMES, dtype=torch.float64), "total_num_frames": 900, "fps": 30}],
            [[{"timestamps": TIMES}]],
            TimedVideoMetadata(total_num_frames=6, duration=62.0, frame_timestamps=np.array(TIMES)),
            [[TimedVideoMetadata(total_num_frames=6, duration=62.0, frame_timestamps=np.array(TIMES))]],
        ],
    )
    def test_own_frames_with_irregular_times(self, metadata):
        processor = make_processor(frame_time_format="mm:ss")
        options = {"video_metadata": metadata, "do_sample_frames": False, "return_tensors": "pt"}
        inputs = processor(text="<|video_pad|>", videos=frames(6), **options)
        assert inputs["video_timestamps"].tolist() == [self.TIMES]
        assert video_tokens(processor, inputs) == [6 * processor.placeholders_per_frame]

    def test_own_frames_are_sampled_by_their_times(self):
        processor = make_processor(frame_time_format="mm:ss")
        inputs = processor(
            text="<|video_pad|>",
            videos=frames(6),
            video_metadata={"timestamps": self.TIMES, "duration": 62.0},
            num_frames=3,
            return_tensors="pt",
        )
        numbers = read_numbers(inputs["pixel_values_videos"][0] * 127.5 + 127.5)
        assert numbers == [3, 3, 3]  # on display at 10.3, 31 and 51.7 s
        assert inputs["video_timestamps"].tolist() == [[3.1, 3.1, 3.1]]

    def test_own_frames_that_begin_later_than_their_video(self):
        processor = make_processor(frame_time_format="mm:ss")
        times = [100.0 + 0.25 * number for number in range(12)]
        inputs = processor(videos=frames(12), video_metadata={"timestamps": times}, return_tensors="pt")
        assert read_numbers(inputs["pixel_values_videos"][0] * 127.5 + 127.5) == [1, 3, 5, 7, 9, 11]
        assert inputs["video_timestamps"].tolist() == [times[1::2]]

    @pytest.mark.parametrize(
        "metadata",
        [
            {"fps": 4.0},
            VideoMetadata(total_num_frames=6, fps=4.0),
            VideoMetadata(total_num_frames=60, fps=40.0, frames_indices=[0, 10, 20, 30, 40, 50]),
            {"total_num_frames": 60, "fps": 40.0, "frames_indices": [0, 10, 20, 30, 40, 50]},
        ],
    )
    def test_own_frames_with_a_rate(self, metadata):
        processor = make_processor(frame_time_format="mm:ss.d")
        options = {"video_metadata": [metadata], "do_sample_frames": False, "return_tensors": "pt"}
        inputs = processor(text="<|video_pad|>", videos=frames(6), **options)
        assert inputs["video_timestamps"].tolist() == [[0.0, 0.25, 0.5, 0.75, 1.0, 1.25]]

    def test_shorter_videos_are_padded(self, path):
        processor = make_processor(frame_time_format="mm:ss")
        inputs = processor(
            text=["<|video_pad|>", "<|video_pad|>a"],
            videos=[path, frames(2)],
            video_metadata=[{}, {"timestamps": [5.0, 6.5]}],  # nothing to tell of the file
            padding=True,
            return_tensors="pt",
        )
        assert inputs["video_timestamps"][1].tolist() == [5.0, 6.5, *6 * [0.0]]

    def test_in_a_chat(self, processor):
        timed = make_processor(frame_time_format="mm:ss")
        pictures = [Image.fromarray(frame) for frame in frames(6)]
        messages = [user({"type": "video", "video": pictures}, text("When?"))]
        options = {"video_metadata": [{"timestamps": self.TIMES}], "do_sample_frames": False}
        arguments = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = timed.apply_chat_template(messages, processor_kwargs=options, **arguments)
        assert inputs["video_timestamps"].tolist() == [self.TIMES]
        with pytest.raises(ValueError, match="'mm:ss' needs the time of each frame, .* pass `video_metadata`"):
            timed.apply_chat_template(messages, **arguments)
        assert "video_timestamps" not in processor.apply_chat_template(messages, **arguments)

    @pytest.mark.parametrize(
        ("times", "message"),
        [
            (TIMES[:5], "A video of 6 frames has 5 times"),
            (TIMES[::-1], "Frame 1 of a video has the time 59.5 s after 61.0 s; .* do not go backwards"),
            ([-1.0, *TIMES[1:]], "Frame 0 of a video has the time -1.0 s"),
            ([*TIMES[:5], float("inf")], "Frame 5 of a video has the time inf s"),
            ([*TIMES[:5], float("nan")], "Frame 5 of a video has the time nan s"),
            ([*TIMES[:5], 6000.0], "A frame at 6000 s does not fit .*use a model with frame_time_format='h:mm:ss'"),
        ],
    )
    def test_times_that_cannot_be(self, times, message):
        processor = make_processor(frame_time_format="mm:ss")
        with pytest.raises(ValueError, match=message):
            processor(videos=frames(6), video_metadata={"timestamps": times}, do_sample_frames=False)

    def test_a_duration_that_cannot_be(self, processor):
        metadata = {"timestamps": self.TIMES, "duration": 60.0}
        with pytest.raises(ValueError, match="has the time 61.0 s and its `duration` is 60.0 s: correct one"):
            processor(videos=frames(6), video_metadata=metadata)

    def test_no_such_format(self):
        with pytest.raises(ValueError, match="frame_time_format='ss' is no format of times; choose from"):
            make_processor(frame_time_format="ss")

    @pytest.mark.parametrize("of", ["processor", "video processor"])
    def test_times_are_never_cast(self, path, of):
        processor = make_processor(frame_time_format="mm:ss")
        process = processor if of == "processor" else processor.video_processor
        inputs = process(videos=path, return_tensors="pt")
        exact = inputs["video_timestamps"].clone()
        inputs = inputs.to("cpu", torch.bfloat16)
        assert inputs["pixel_values_videos"].dtype == torch.bfloat16
        assert inputs["video_timestamps"].dtype == torch.float64 and torch.equal(inputs["video_timestamps"], exact)


class TestTimeInstruction:
    LINE = "The video lasts for {} seconds, and {} frames are sampled from it with FPS {}. " + (
        "Please answer the following questions related to this video."
    )

    def texts(self, processor, prompt, videos, **kwargs):
        inputs = processor(text=prompt, videos=videos, return_tensors="pt", padding=True, **kwargs)
        return [re.sub(r"(<\|video_pad\|>)+", "V", words) for words in processor.batch_decode(inputs["input_ids"])]

    @pytest.mark.parametrize(
        ("prompt", "expected"),
        [
            ("<|video_pad|>\nWhat?", "V\n{}\nWhat?"),
            ("<|video_pad|>What?", "V\n{}\nWhat?"),
            ("<|vision_start|><|video_pad|><|vision_end|>What?", "<|vision_start|>V<|vision_end|>\n{}\nWhat?"),
            ("Look: <|video_pad|>", "Look: V\n{}\n"),
        ],
    )
    def test_a_line_after_the_video(self, path, tmp_path, prompt, expected):
        make_processor(time_instruction=True).save_pretrained(tmp_path)
        processor = MambaMiaProcessor.from_pretrained(tmp_path)
        assert self.texts(processor, prompt, path) == [expected.format(self.LINE.format("4.000", 8, "2.000"))]
        assert self.texts(processor, prompt, path, keep_frames=2) == self.texts(processor, prompt, path)
        processor.time_instruction = False
        assert self.LINE[:10] not in self.texts(processor, prompt, path)[0]

    @pytest.mark.parametrize(
        ("options", "line"),
        [
            ({"fps": 1.2}, ("4.000", 4, "1.200")),
            ({"num_frames": 3}, ("4.000", 3, "0.750")),
            ({"num_frames": 40}, ("4.000", 40, "10.000")),
        ],
    )
    def test_the_rate(self, path, options, line):
        processor = make_processor(time_instruction=True, frame_time_format="mm:ss")
        assert self.texts(processor, "<|video_pad|>", path, **options) == [f"V\n{self.LINE.format(*line)}\n"]

    def test_several_videos_and_an_image(self, path, image):
        processor = make_processor(time_instruction=True)
        prompts = ["<|video_pad|>a<|image_pad|>", "b<|video_pad|><|video_pad|>c"]
        videos = [path, frames(6), frames(2)]
        metadata = [{}, {"timestamps": TestTimes.TIMES, "duration": 62.0}, {"fps": 1.0}]
        inputs = processor(
            text=prompts,
            videos=videos,
            images=image,
            video_metadata=metadata,
            num_frames=2,
            padding=True,
            return_tensors="pt",
            return_text_replacement_offsets=True,
        )
        lines = [
            self.LINE.format(*about)
            for about in (("4.000", 2, "0.500"), ("62.000", 2, "0.032"), ("2.000", 2, "1.000"))
        ]
        decoded = [words.replace("<|endoftext|>", "") for words in processor.batch_decode(inputs["input_ids"])]
        short = [re.sub(r"(<\|(video|image)_pad\|>)+", "V", words) for words in decoded]
        assert short == [f"V\n{lines[0]}\naV", f"bV\n{lines[1]}\nV\n{lines[2]}\nc"]
        for words, places in zip(decoded, inputs["text_replacement_offsets"], strict=True):
            for place in places:
                assert words[slice(*place["new_span"])] == place["replacement"]

    def test_in_a_chat(self, path):
        processor = make_processor(time_instruction=True)
        messages = [user({"type": "video", "path": path}, text("What?"))]
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        (words,) = processor.batch_decode(inputs["input_ids"])
        line = self.LINE.format("4.000", 8, "2.000")
        assert f"<|video_pad|><|vision_end|>\n{line}\nWhat?<|im_end|>" in words

    def test_frames_without_a_duration(self):
        processor = make_processor(time_instruction=True)
        with pytest.raises(ValueError, match="time_instruction=True needs the duration of each video"):
            processor(text="<|video_pad|>", videos=frames(3))


class TestChat:
    def process(self, processor, messages, **kwargs):
        return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **kwargs)

    @pytest.mark.parametrize("key", ["video", "path", "url"])
    def test_video_file(self, processor, path, key):
        inputs = self.process(processor, [user({"type": "video", key: path}, text("What?"))])
        assert set(inputs) == set(processor.model_input_names) - {"pixel_values"} | {"video_timestamps"}
        assert read_numbers(inputs["pixel_values_videos"][0] * 127.5 + 127.5) == [2, 7, 12, 17, 22, 27, 32, 37]
        assert video_tokens(processor, inputs) == [8 * ANCHORS]

    @pytest.mark.parametrize(
        ("settings", "num_frames", "kept"),
        [
            ({"num_frames": 5}, 5, 5),
            ({"fps": 5}, 20, 20),
            ({"num_frames": 5, "keep_frames": 2}, 5, 2),
            ({"fps": 1, "keep_ratio": 0.5}, 4, 2),
            ({"do_sample_frames": False}, 40, 40),
        ],
    )
    def test_settings(self, processor, path, settings, num_frames, kept):
        messages = [user({"type": "video", "path": path}, text("What?"))]
        inputs = self.process(processor, messages, processor_kwargs=dict(settings))
        assert inputs["pixel_values_videos"].shape[1] == num_frames
        assert video_tokens(processor, inputs) == [kept * ANCHORS]
        assert torch.equal(self.process(processor, messages, **settings)["input_ids"], inputs["input_ids"])

    def test_metadata_tell_the_times(self, processor, path):
        messages = [user({"type": "video", "path": path})]
        inputs = self.process(processor, messages, processor_kwargs={"num_frames": 2, "return_metadata": True})
        assert inputs["video_metadata"][0].timestamps == pytest.approx([1.0, 3.0])

    def test_videos_and_images_of_a_batch(self, processor, path, image):
        batch = [
            [user(text("Compare"), {"type": "video", "path": path}, {"type": "video", "video": frames(3)})],
            [user(text("Hello"))],
            [user({"type": "image", "image": image}, {"type": "video", "video": list(frames(4))})],
        ]
        inputs = self.process(processor, batch, processor_kwargs={"padding": True})
        assert video_tokens(processor, inputs) == [11 * ANCHORS, 0, 4 * ANCHORS]
        assert inputs["frame_mask"].sum(1).tolist() == [8, 3, 4]
        assert inputs["pixel_values"].shape == (1, 3, 24, 32)
        assert inputs["attention_mask"][:, -1].tolist() == [1, 1, 1], "padding belongs to the left"

    def test_image_files(self, processor, image, tmp_path):
        image.save(tmp_path / "image.png")
        inputs = self.process(processor, [user({"type": "image", "path": str(tmp_path / "image.png")}, text("What?"))])
        expected = self.process(processor, [user({"type": "image", "image": image}, text("What?"))])
        assert torch.equal(inputs["pixel_values"], expected["pixel_values"])

    def test_marks_what_the_assistant_says(self, processor, path):
        messages = [
            user({"type": "video", "path": path}, text("What is shown?")),
            {"role": "assistant", "content": "A number."},
            user({"type": "video", "video": frames(2)}, text("And now?")),
            {"role": "assistant", "content": [text("Another one.")]},
        ]
        inputs = self.process(
            processor, messages, return_assistant_tokens_mask=True, processor_kwargs={"keep_frames": 4}
        )
        mask = torch.as_tensor(inputs["assistant_masks"]).bool()
        assert mask.shape == inputs["input_ids"].shape
        said = processor.decode(inputs["input_ids"][mask])
        assert said == "A number.<|im_end|>Another one.<|im_end|>"


class TestSaving:
    def test_save_and_load(self, tmp_path, path):
        processor = make_processor(keep_ratio=0.25)
        processor.save_pretrained(tmp_path / "saved")
        loaded = AutoProcessor.from_pretrained(tmp_path / "saved")
        assert type(loaded) is MambaMiaProcessor
        assert (loaded.tokens_per_frame, loaded.keep_frames, loaded.keep_ratio) == (ANCHORS, None, 0.25)
        assert loaded.chat_template == processor.chat_template
        assert loaded.video_processor.to_dict() == processor.video_processor.to_dict()
        messages = [user({"type": "video", "path": path}, text("What?"))]
        kwargs = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        expected = processor.apply_chat_template(messages, **kwargs)
        inputs = loaded.apply_chat_template(messages, **kwargs)
        assert set(inputs) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(inputs[name], tensor)

    def test_video_processor_has_a_file_of_its_own(self, tmp_path):
        processor = make_processor()
        processor.video_processor.num_frames = 7
        processor.save_pretrained(tmp_path)
        (tmp_path / "processor_config.json").unlink()
        loaded = AutoVideoProcessor.from_pretrained(tmp_path)
        assert type(loaded) is MambaMiaVideoProcessor
        for name in ("num_frames", "fps", "size", "seek_mode", "image_mean", "resample"):
            assert getattr(loaded, name) == getattr(processor.video_processor, name)

    def test_own_template_is_kept(self, tmp_path):
        make_processor(chat_template="{{ messages[0]['content'] }}").save_pretrained(tmp_path)
        loaded = MambaMiaProcessor.from_pretrained(tmp_path)
        assert loaded.apply_chat_template([{"role": "user", "content": "Hello."}]) == "Hello."

    def test_loading_with_another_budget(self, tmp_path):
        make_processor().save_pretrained(tmp_path)
        assert MambaMiaProcessor.from_pretrained(tmp_path, keep_frames=5).keep_frames == 5

    def test_a_missing_package_is_no_setting(self, tmp_path, monkeypatch):
        def load(*args, **kwargs):
            raise ImportError("needs another package")

        monkeypatch.setattr(ProcessorMixin, "from_pretrained", load)
        with pytest.raises(ImportError, match="needs another package"):
            MambaMiaProcessor.from_pretrained(tmp_path)

    @pytest.mark.parametrize("value", [-1, "x", [], {"a": 1}, 1.5])
    @pytest.mark.parametrize(
        "name",
        [
            "image_processor",
            "video_processor",
            "tokens_per_frame",
            "keep_frames",
            "keep_ratio",
            "frame_time_format",
            ("image_processor", "image_processor_type"),
            ("image_processor", "size"),
            ("video_processor", "video_processor_type"),
            ("video_processor", "size"),
        ],
    )
    def test_an_absurd_setting(self, tmp_path, name, value):
        """It is named in one sentence when the file is read, or does nothing but what the library makes of it."""
        make_processor().save_pretrained(tmp_path)
        file = tmp_path / "processor_config.json"
        settings = json.loads(file.read_text())
        *parts, key = (name,) if isinstance(name, str) else name
        place = settings
        for part in parts:
            place = place[part]
        place[key] = value
        file.write_text(json.dumps(settings))
        try:
            MambaMiaProcessor.from_pretrained(tmp_path)
        except (OSError, ValueError) as error:
            assert len(str(error)) > 10
        else:
            assert key in ("size", "video_processor")  # sizes have many forms; an object may be empty

    def test_model_input_names(self, processor):
        assert set(processor.model_input_names) == {
            "input_ids",
            "attention_mask",
            "pixel_values",
            "pixel_values_videos",
            "frame_mask",
            "num_kept_frames",
        }
        with_times = make_processor(frame_time_format="mm:ss")
        assert set(with_times.model_input_names) == {*processor.model_input_names, "video_timestamps"}

    def test_tokenizer_without_the_tokens(self):
        tokenizer = tiny_tokenizer(special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        with pytest.raises(ValueError, match=r"no token <\|image_pad\|>"):
            MambaMiaProcessor(SiglipImageProcessor(), tokenizer, MambaMiaVideoProcessor())
