import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_tokenizer
from transformers import AutoProcessor, SiglipImageProcessor
from video_files import draw_number, read_numbers, write_video

from mambamia_hf import MambaMiaProcessor, MambaMiaVideoProcessor


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


class TestChat:
    def process(self, processor, messages, **kwargs):
        return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **kwargs)

    @pytest.mark.parametrize("key", ["video", "path", "url"])
    def test_video_file(self, processor, path, key):
        inputs = self.process(processor, [user({"type": "video", key: path}, text("What?"))])
        assert set(inputs) == set(processor.model_input_names) - {"pixel_values"}
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

    def test_own_template_is_kept(self, tmp_path):
        make_processor(chat_template="{{ messages[0]['content'] }}").save_pretrained(tmp_path)
        loaded = MambaMiaProcessor.from_pretrained(tmp_path)
        assert loaded.apply_chat_template([{"role": "user", "content": "Hello."}]) == "Hello."

    def test_loading_with_another_budget(self, tmp_path):
        make_processor().save_pretrained(tmp_path)
        assert MambaMiaProcessor.from_pretrained(tmp_path, keep_frames=5).keep_frames == 5

    def test_model_input_names(self, processor):
        assert set(processor.model_input_names) == {
            "input_ids",
            "attention_mask",
            "pixel_values",
            "pixel_values_videos",
            "frame_mask",
            "num_kept_frames",
            "video_timestamps",
        }

    def test_tokenizer_without_the_tokens(self):
        tokenizer = tiny_tokenizer(special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        with pytest.raises(ValueError, match=r"no token <\|image_pad\|>"):
            MambaMiaProcessor(SiglipImageProcessor(), tokenizer, MambaMiaVideoProcessor())
