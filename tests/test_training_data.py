"""Records to batches: what is learned, what is cut, what is skipped, and features in place of pixels."""

import io
import json
from pathlib import Path

import datasets
import numpy as np
import precompute_features
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from tiny_model import NUM_ANCHORS, tiny_checkpoint, tiny_processor
from tokenizers import processors
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast
from video_files import draw_number, read_numbers, write_video

from mambamia_hf import MambaMiaForConditionalGeneration, MambaMiaProcessor
from mambamia_hf.training_data import (
    ConversationCollator,
    MediaReader,
    VisionFeatures,
    load_records,
    open_dataset,
    parse_record,
)


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


def record(name: str, *texts: str, **media) -> dict:
    return {"id": name, **media, "conversations": turns(*texts)}


VIDEO = record("video", "<video>\nWhat is shown?", "A number.", video="a.mp4")
IMAGE = record("image", "<image>\nWhat is shown?", "Another number.", image="a.png")
TEXT = record("text", "Hello.", "Hi!", "Who is there?", "Me.")
MIXED = record("mixed", "Is <image> in <video> or in <video>?", "In neither.", image="a.png", video=["a.mp4", "b.mp4"])
BROKEN = record("broken", "<video>\nWhat?", "Nothing.", video="broken.mp4")
CUT = record("cut", "<video>\nWhat?", "Nothing.", video="cut.mp4")
MISSING = record("missing", "<image>\nWhat?", "Nothing.", image="missing.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "a.mp4", num_frames=40)
    write_video(folder / "b.mp4", num_frames=20)
    (folder / "broken.mp4").write_bytes(b"no video at all")
    (folder / "cut.mp4").write_bytes((folder / "a.mp4").read_bytes()[:2000])
    Image.fromarray(draw_number(5)).save(folder / "a.png")
    return folder


@pytest.fixture(scope="module")
def model_and_processor(tmp_path_factory) -> tuple[MambaMiaForConditionalGeneration, MambaMiaProcessor]:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(model_and_processor) -> MambaMiaForConditionalGeneration:
    return model_and_processor[0].eval()


@pytest.fixture(scope="module")
def processor(model_and_processor) -> MambaMiaProcessor:
    return model_and_processor[1]


@pytest.fixture
def collator(processor, folder) -> ConversationCollator:
    return ConversationCollator(processor, MediaReader(processor, folder))


def learned(collator: ConversationCollator, labels: torch.Tensor) -> str:
    return collator.processor.decode(labels[labels != -100])


def notes(report: Path) -> list[tuple[str, str]]:
    lines = report.read_text().splitlines() if report.exists() else []
    return [(note["sample"], note["event"]) for note in map(json.loads, lines)]


class TestRecords:
    def test_chat_of_a_record(self):
        messages, media = parse_record(MIXED)
        assert messages == [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Is"},
                    {"type": "image"},
                    {"type": "text", "text": "in"},
                    {"type": "video"},
                    {"type": "text", "text": "or in"},
                    {"type": "video"},
                    {"type": "text", "text": "?"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "In neither."}]},
        ]
        assert media == [("image", "a.png"), ("video", "a.mp4"), ("video", "b.mp4")]

    def test_image_placeholder_of_a_video(self):
        messages, media = parse_record(record("7", "<image>\nWhat?", "This.", video="a.mp4"))
        assert messages[0]["content"][0] == {"type": "video"} and media == [("video", "a.mp4")]

    def test_roles(self):
        conversation = [{"from": "system", "value": "Be brief."}, *turns("Hello.", "Hi.")]
        assert [message["role"] for message in parse_record({"conversations": conversation})[0]] == [
            "system",
            "user",
            "assistant",
        ]

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"id": "7"}, "Sample '7' has no `conversations` but 'id'"),
            (record("7", "<video>What?", "This."), "1 placeholders <video> in its text and 0 of `video`"),
            (record("7", "What?", "This.", video="a.mp4"), "0 placeholders <video> in its text and 1 of `video`"),
            (record("7", "<image>What?", "This.", image=["a", "b"]), "1 placeholders <image> in its text and 2"),
            (record("7", "What?", "This.", "And?"), "ends with a turn of the user"),
            ({"id": "7", "conversations": [{"from": "bot", "value": "Hi."}]}, "'bot'.*is one of system, human"),
            ({"id": "7", "conversations": [{"from": "gpt", "value": None}]}, "None.*`value` a text"),
            ({"id": "7", "conversations": ["Hi."]}, "the turn 'Hi.'"),
        ],
    )
    def test_no_conversation(self, wrong, message):
        with pytest.raises(ValueError, match=message):
            parse_record(wrong)

    def test_json_and_jsonl(self, tmp_path):
        (tmp_path / "a.json").write_text(json.dumps([VIDEO, IMAGE], indent=1))
        odd = record("odd", "A line\u2028separator", "Yes.")
        lines = [json.dumps(one, ensure_ascii=False) for one in (TEXT, odd)]
        (tmp_path / "b.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
        assert load_records([tmp_path / "a.json", tmp_path / "b.jsonl"]) == [VIDEO, IMAGE, TEXT, odd]
        assert open_dataset([str(tmp_path / "a.json")]) == [VIDEO, IMAGE]

    @pytest.mark.parametrize("content", ['{"id": 1}\n{"id": 2}', '{"id": 1}', "[1, 2]"])
    def test_other_files(self, tmp_path, content):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(ValueError, match=r"a\.json (is not JSON|holds no list of records)"):
            load_records([tmp_path / "a.json"])


class TestBatches:
    def test_only_the_assistant_is_learned(self, collator):
        batch = collator([VIDEO, TEXT, MIXED])
        assert [learned(collator, labels) for labels in batch["labels"]] == [
            "A number.<|im_end|>",
            "Hi!<|im_end|>Me.<|im_end|>",
            "In neither.<|im_end|>",
        ]
        learning = batch["labels"] != -100
        assert torch.equal(batch["labels"][learning], batch["input_ids"][learning])

    def test_the_prompt_is_that_of_the_processor(self, collator, processor, folder):
        batch = collator([VIDEO])
        messages, _ = parse_record(VIDEO)
        messages[0]["content"][0]["path"] = str(folder / "a.mp4")
        expected = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        for name in ("input_ids", "attention_mask", "pixel_values_videos", "frame_mask"):
            assert torch.equal(batch[name], expected[name])

    def test_a_beginning_of_text_is_that_of_the_processor(self):
        backend = tiny_tokenizer().backend_tokenizer
        backend.post_processor = processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
        processor = tiny_processor()
        processor.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|endoftext|>")
        ids = ConversationCollator(processor)([TEXT])["input_ids"]
        assert ids[0, 0] == 0
        expected = processor.apply_chat_template(parse_record(TEXT)[0], tokenize=True, return_dict=True)
        assert ids.tolist() == expected["input_ids"]
        # A template that writes the token itself does not get a second one.
        processor.chat_template = "{{ bos_token }}" + processor.chat_template
        assert torch.equal(ConversationCollator(processor)([TEXT])["input_ids"], ids)

    def test_padding_is_at_the_end(self, collator):
        batch = collator([TEXT, VIDEO])
        alone = collator([TEXT])["input_ids"][0]
        assert torch.equal(batch["input_ids"][0, : len(alone)], alone)
        assert batch["attention_mask"].sum(dim=1).tolist() == [len(alone), batch["input_ids"].shape[1]]
        assert batch["attention_mask"][0, len(alone) :].sum() == 0
        assert (batch["labels"][0, len(alone) :] == -100).all()

    def test_media_in_order(self, collator, processor):
        batch = collator([MIXED, VIDEO, IMAGE])
        assert batch["pixel_values"].shape == (2, 3, 32, 32)
        assert batch["frame_mask"].sum(dim=1).tolist() == [8, 4, 8]
        assert (batch["pixel_values_videos"][1, 4:] == 0).all()
        videos = (batch["input_ids"] == processor.video_token_id).sum(dim=1)
        images = (batch["input_ids"] == processor.image_token_id).sum(dim=1)
        assert videos.tolist() == [12 * NUM_ANCHORS, 8 * NUM_ANCHORS, 0]
        assert images.tolist() == [NUM_ANCHORS, 0, NUM_ANCHORS]

    def test_loss_is_that_of_the_samples_alone(self, collator, model):
        records = [VIDEO, TEXT, MIXED, IMAGE]
        model.eval()
        tokens = losses = 0
        for one in records:
            batch = collator([one])
            learning = int((batch["labels"][:, 1:] != -100).sum())
            losses += model(**batch, delta_threshold=0).loss.item() * learning
            tokens += learning
        together = model(**collator(records), delta_threshold=0).loss
        torch.testing.assert_close(together.item(), losses / tokens, rtol=1e-5, atol=1e-5)

    def test_frames_at_most(self, processor, folder):
        collator = ConversationCollator(processor, MediaReader(processor, folder, num_frames=6))
        batch = collator([VIDEO, record("b", "<video>?", "Yes.", video="b.mp4")])
        assert batch["frame_mask"].sum(dim=1).tolist() == [6, 4]
        fast = ConversationCollator(processor, MediaReader(processor, folder, fps=5))([VIDEO])
        assert fast["frame_mask"].sum() == 20
        assert processor.video_processor.num_frames == 384 and processor.video_processor.fps == 2

    @pytest.mark.parametrize("how", ["bytes", "dict of bytes", "dict of a path", "frames"])
    def test_sources_of_videos(self, collator, folder, how):
        source = {
            "bytes": (folder / "a.mp4").read_bytes(),
            "dict of bytes": {"bytes": (folder / "a.mp4").read_bytes(), "path": "a.mp4"},
            "dict of a path": {"bytes": None, "path": "a.mp4"},
            "frames": np.stack([draw_number(number) for number in range(3)]),
        }[how]
        batch = collator([record("7", "<video>?", "Yes.", video=source)])
        if how == "frames":
            assert read_numbers(batch["pixel_values_videos"][0] * 127.5 + 127.5) == [0, 1, 2]
        else:
            assert torch.equal(batch["pixel_values_videos"], collator([VIDEO])["pixel_values_videos"])

    @pytest.mark.parametrize("how", ["bytes", "dict of bytes", "PIL"])
    def test_sources_of_images(self, collator, folder, how):
        content = (folder / "a.png").read_bytes()
        source = {"bytes": content, "dict of bytes": {"bytes": content}, "PIL": Image.open(io.BytesIO(content))}[how]
        batch = collator([record("7", "<image>?", "Yes.", image=source)])
        assert torch.equal(batch["pixel_values"], collator([IMAGE])["pixel_values"])

    def test_template_without_marks(self):
        processor = tiny_processor()
        processor.chat_template = "{{ messages[0]['content'] }}"
        with pytest.raises(ValueError, match="does not say which tokens the assistant's are"):
            ConversationCollator(processor)


class TestMaximumLength:
    def test_text_is_cut_and_reported(self, processor, folder, tmp_path):
        whole = ConversationCollator(processor, MediaReader(processor, folder))
        (ids,), (labels,) = (whole([VIDEO])[name] for name in ("input_ids", "labels"))
        report = tmp_path / "report.jsonl"
        length = len(ids) - 3
        collator = ConversationCollator(processor, MediaReader(processor, folder), length, report)
        batch = collator([VIDEO, TEXT])
        assert torch.equal(batch["input_ids"][0], ids[:length]) and torch.equal(batch["labels"][0], labels[:length])
        assert notes(report) == [("video", "cut")]

    def test_a_video_is_never_cut(self, processor, folder):
        whole = ConversationCollator(processor, MediaReader(processor, folder))([MIXED])["input_ids"][0]
        needed = 1 + int((whole == processor.video_token_id).nonzero().max())
        for length in (needed - 1, needed - 4 * NUM_ANCHORS, 10):
            collator = ConversationCollator(processor, MediaReader(processor, folder), length)
            with pytest.raises(
                ValueError, match=f"sample 'mixed' reach up to its token {needed} and max_length={length}"
            ):
                collator([TEXT, MIXED])

    def test_a_sample_without_anything_to_learn_is_skipped(self, processor, folder, tmp_path):
        whole = ConversationCollator(processor, MediaReader(processor, folder))([VIDEO])
        length = int((whole["labels"][0] != -100).nonzero().min())
        report = tmp_path / "report.jsonl"
        batch = ConversationCollator(processor, MediaReader(processor, folder), length, report)([VIDEO, TEXT])
        assert len(batch["input_ids"]) == 1 and "pixel_values_videos" not in batch
        assert notes(report) == [("video", "cut"), ("video", "skipped")]
        assert "none of its first" in report.read_text()


class TestUnusableSamples:
    def test_they_are_left_out_and_reported(self, processor, folder, tmp_path, caplog):
        report = tmp_path / "report.jsonl"
        collator = ConversationCollator(processor, MediaReader(processor, folder), report=report)
        odd = record("odd", "A <|video_pad|>?", "No.")
        batch = collator([BROKEN, VIDEO, CUT, MISSING, {"id": "no chat"}, odd, TEXT])
        expected = ConversationCollator(processor, MediaReader(processor, folder))([VIDEO, TEXT])
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
        skipped = ["broken", "cut", "missing", "no chat", "odd"]
        assert notes(report) == [(name, "skipped") for name in skipped]
        assert "broken.mp4' cannot be read as a video" in report.read_text()
        assert all(f"Sample '{name}' was skipped" in caplog.text for name in skipped)

    def test_a_batch_of_nothing_else_is_learned_from_as_nothing(self, collator, processor, folder):
        batch = collator([BROKEN, MISSING])
        assert batch["input_ids"].shape == (1, 1) and (batch["labels"] == -100).all()
        torch.manual_seed(0)
        model = tiny_checkpoint(folder / "model")[0].train()
        for arguments in ({}, {"num_items_in_batch": torch.tensor(0)}, {"num_items_in_batch": 5}):
            model.zero_grad()
            loss = model(**batch, **arguments).loss
            loss.backward()
            assert loss == 0
            gradients = [parameter.grad for parameter in model.model.compressor.parameters()]
            assert all(gradient is not None and (gradient == 0).all() for gradient in gradients)

    def test_workers_survive(self, processor, folder, tmp_path):
        report = tmp_path / "report.jsonl"
        collator = ConversationCollator(processor, MediaReader(processor, folder), report=report)
        records = [VIDEO, BROKEN, TEXT, MISSING, CUT, IMAGE]
        loader = DataLoader(records, batch_size=1, num_workers=2, collate_fn=collator)
        learning = [learned(collator, batch["labels"][0]) for batch in loader]
        assert learning == [
            "A number.<|im_end|>",
            "",
            "Hi!<|im_end|>Me.<|im_end|>",
            "",
            "",
            "Another number.<|im_end|>",
        ]
        assert sorted(notes(report)) == [("broken", "skipped"), ("cut", "skipped"), ("missing", "skipped")]

    def test_if_nothing_can_be_used_that_is_an_error(self, processor):
        collator = ConversationCollator(processor)
        for number in range(9):
            collator([record(f"{number}", "<image>?", "Yes.", image="nowhere.png")] * 2)
        with pytest.raises(
            ValueError, match="None of the first 20 samples can be used; the last is 'last': .*nowhere"
        ):
            collator([record("last", "<image>?", "Yes.", image="nowhere.png")] * 2)

    def test_after_a_usable_one_it_goes_on(self, collator):
        collator([TEXT])
        for _ in range(30):
            assert (collator([MISSING])["labels"] == -100).all()


class TestDatasets:
    def test_stream_of_files(self, collator, tmp_path):
        lines = [json.dumps(one) for one in (VIDEO, BROKEN, TEXT, IMAGE)]
        (tmp_path / "a.jsonl").write_text("\n".join(lines))
        stream = open_dataset([tmp_path / "a.jsonl"], streaming=True)
        assert isinstance(stream, datasets.IterableDataset)
        batch = collator(list(stream.take(4)))
        expected = collator([VIDEO, TEXT, IMAGE])
        assert all(torch.equal(batch[name], expected[name]) for name in expected)

    @pytest.mark.parametrize("streaming", [False, True])
    def test_undecodable_files_within_a_dataset(self, collator, folder, tmp_path, streaming, caplog):
        image, video = (folder / "a.png").read_bytes(), (folder / "a.mp4").read_bytes()
        features = datasets.Features(
            id=datasets.Value("string"),
            image=datasets.List(datasets.Image()),
            video=datasets.Video(),
            conversations=datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")}),
        )
        rows = [
            record("image", "<image>\nWhat is shown?", "Another number.", image=[{"bytes": image}], video=None),
            record("broken", "<image>?", "No.", image=[{"bytes": b"no image"}], video=None),
            record("video", "<video>\nWhat is shown?", "A number.", image=None, video={"bytes": video}),
            record("broken video", "<video>?", "No.", image=None, video={"bytes": b"no video"}),
        ]
        (tmp_path / "data").mkdir()
        datasets.Dataset.from_list(rows, features).to_parquet(tmp_path / "data" / "train.parquet")
        batch = collator(list(open_dataset([tmp_path / "data"], streaming).take(4)))
        expected = collator([IMAGE, VIDEO])
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
        assert "'broken' was skipped" in caplog.text and "'broken video' was skipped" in caplog.text

    def test_several_datasets(self):
        with pytest.raises(ValueError, match="The data are a, b; give"):
            open_dataset(["a", "b"])


class TestFeatures:
    RECORDS = [VIDEO, IMAGE, MIXED, TEXT, BROKEN]

    @pytest.fixture
    def written(self, model, processor, folder, tmp_path) -> Path:
        self.write(model, processor, folder, tmp_path, self.RECORDS)
        return tmp_path / "features"

    @staticmethod
    def write(model, processor, folder, tmp_path, records, *arguments: str):
        model.save_pretrained(tmp_path / "model")
        processor.save_pretrained(tmp_path / "model")
        (tmp_path / "data.json").write_text(json.dumps(records))
        paths = {"model": "model", "data": "data.json", "output": "features"}
        command = [text for name, path in paths.items() for text in (f"--{name}", str(tmp_path / path))]
        precompute_features.main([*command, "--media_folder", str(folder), "--num_workers", "0", *arguments])

    def test_features_give_the_loss_of_pixels(self, written, model, processor, folder):
        reader = MediaReader(processor, folder)
        pixels = ConversationCollator(processor, reader)(self.RECORDS)
        features = ConversationCollator(processor, VisionFeatures(written, reader.settings(model)))(self.RECORDS)
        assert features["video_features"].dtype == features["image_features"].dtype == torch.float16
        assert features["video_features"].shape == (3, 8, 16, 24) and features["image_features"].shape == (2, 16, 24)
        for name in ("input_ids", "attention_mask", "labels", "frame_mask"):
            assert torch.equal(features[name], pixels[name])
        expected = model(**pixels, delta_threshold=0)
        output = model(**features, delta_threshold=0)
        torch.testing.assert_close(output.loss, expected.loss, rtol=1e-3, atol=1e-3)

    def test_what_is_there_is_not_made_again(self, written, model, processor, folder, tmp_path, capsys):
        files = {path.name: path.stat().st_mtime_ns for path in written.glob("*.safetensors")}
        more = [*self.RECORDS, record("more", "<video>?", "Yes.", video="b.mp4"), CUT]
        self.write(model, processor, folder, tmp_path, more)
        assert {path.name: path.stat().st_mtime_ns for path in written.glob("*.safetensors")} == files
        output = capsys.readouterr()
        assert "3 files have features" in output.out and "2 were skipped" in output.out
        assert all(f"{name}.mp4 is skipped: " in output.out + output.err for name in ("cut", "broken"))

    def test_what_could_not_be_read_is_tried_again(self, written, model, processor, folder, tmp_path):
        (tmp_path / "media").mkdir()
        for path, source in (("a.mp4", "a.mp4"), ("a.png", "a.png"), ("b.mp4", "b.mp4"), ("broken.mp4", "a.mp4")):
            (tmp_path / "media" / path).write_bytes((folder / source).read_bytes())
        self.write(model, processor, tmp_path / "media", tmp_path, self.RECORDS)
        features = VisionFeatures(written, {})
        assert not features.skipped
        assert torch.equal(features.read("video", "broken.mp4"), features.read("video", "a.mp4"))

    def test_another_file_of_the_same_name(self, written, model, processor, folder, tmp_path):
        (tmp_path / "media").mkdir()
        (tmp_path / "media" / "a.mp4").write_bytes((folder / "b.mp4").read_bytes())
        with pytest.raises(ValueError, match=r"'a.mp4' has \d+ bytes and the file .* choose another output folder"):
            self.write(model, processor, tmp_path / "media", tmp_path, [VIDEO])

    def test_a_wrong_media_folder(self, model, processor, folder, tmp_path):
        records = [record(f"{number}", "<video>?", "Yes.", video=f"{number}.mp4") for number in range(20)]
        with pytest.raises(ValueError, match="None of the first 20 files can be read; the last is '19.mp4'"):
            self.write(model, processor, tmp_path / "nowhere", tmp_path, records)
        assert not (tmp_path / "features" / "index.json").exists()

    def test_shards(self, model, processor, folder, tmp_path):
        self.write(model, processor, folder, tmp_path, self.RECORDS, "--shard_size", "0")
        shards = sorted((tmp_path / "features").glob("*.safetensors"))
        assert len(shards) == 3
        stored = {path: tensor for shard in shards for path, tensor in load_file(shard).items()}
        assert stored.keys() == {"a.mp4", "a.png", "b.mp4"}
        features = VisionFeatures(tmp_path / "features", {})
        assert all(torch.equal(features.read("video", path), tensor) for path, tensor in stored.items())

    def test_stopped_on_the_way(self, model, processor, folder, tmp_path, monkeypatch):
        encode = type(model.model).encode_frames
        done = []

        def stop_at_the_third(self, frames, *args, **kwargs):
            done.append(len(frames))
            if len(done) == 3:
                raise KeyboardInterrupt
            return encode(self, frames, *args, **kwargs)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(type(model.model), "encode_frames", stop_at_the_third)
            self.write(model, processor, folder, tmp_path, self.RECORDS, "--shard_size", "0")
        stopped = VisionFeatures(tmp_path / "features", {})
        assert len(stopped.shards) == 2
        assert all(stopped.read("video", path).isfinite().all() for path in stopped.shards)
        self.write(model, processor, folder, tmp_path, self.RECORDS, "--shard_size", "0")
        assert VisionFeatures(tmp_path / "features", {}).shards.items() > stopped.shards.items()

    def test_of_another_tower_or_other_frames(self, written, model, processor, folder, tmp_path):
        with pytest.raises(ValueError, match="made with video num_frames 384 and it is 6 now"):
            VisionFeatures(written, MediaReader(processor, folder, num_frames=6).settings(model))
        with pytest.raises(ValueError, match="made with video fps 2.0 and it is 1 now"):
            VisionFeatures(written, MediaReader(processor, folder, fps=1).settings(model))
        other = MambaMiaForConditionalGeneration(model.config)
        with pytest.raises(ValueError, match="made with vision_tower 'siglip_vision_model [0-9a-f]{16}' and it is"):
            VisionFeatures(written, MediaReader(processor, folder).settings(other))
        with pytest.raises(ValueError, match="video num_frames 384 and it is 6"):
            self.write(model, processor, folder, tmp_path, self.RECORDS, "--num_frames", "6")
        with pytest.raises(ValueError, match="it has no index.json; precompute"):
            VisionFeatures(folder, {})

    def test_settings_do_not_depend_on_the_type_it_was_loaded_in(self, model, processor, tmp_path):
        model.save_pretrained(tmp_path)
        loaded = MambaMiaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
        processor.save_pretrained(tmp_path)
        saved = MambaMiaProcessor.from_pretrained(tmp_path)
        assert MediaReader(saved).settings(loaded) == MediaReader(processor).settings(model)

    def test_all_media_can_be_checked_before(self, written, processor):
        collator = ConversationCollator(processor, VisionFeatures(written, {}))
        collator.require_features([*self.RECORDS, {"id": "no chat"}])
        with pytest.raises(ValueError, match="no features of 'nowhere.mp4' of sample 'missing'"):
            collator.require_features([*self.RECORDS, record("missing", "<video>?", "Yes.", video="nowhere.mp4")])

    def test_media_without_features(self, written, model, processor):
        collator = ConversationCollator(processor, VisionFeatures(written, {}))
        new = record("new", "<video>?", "Yes.", video="b2.mp4")
        with pytest.raises(ValueError, match="no features of 'b2.mp4' of sample 'new' in .* adds what is missing"):
            collator([VIDEO, new])

    def test_what_could_not_be_decoded_then_is_skipped_now(self, written, processor, tmp_path):
        report = tmp_path / "report.jsonl"
        batch = ConversationCollator(processor, VisionFeatures(written, {}), report=report)([BROKEN, VIDEO])
        assert len(batch["input_ids"]) == 1
        assert notes(report) == [("broken", "skipped")] and "cannot be read as a video" in report.read_text()


class TestRandomness:
    RECORDS = [VIDEO, TEXT, MIXED]

    def test_nothing_is_drawn_from_the_generator_of_training(self, collator):
        """It decides about dropout, and what was read ahead must not."""
        for settings in ({}, {"position_stretch": 4.0}):
            before = torch.get_rng_state()
            ConversationCollator(collator.processor, collator.media, **settings)(self.RECORDS)
            assert torch.equal(torch.get_rng_state(), before)

    def test_it_depends_on_which_samples_come_together(self, collator, processor):
        spreading = ConversationCollator(processor, collator.media, position_stretch=4.0)
        once, again = spreading(self.RECORDS), spreading(self.RECORDS)
        assert torch.equal(once["position_ids"], again["position_ids"])
        other = spreading([VIDEO, IMAGE])["position_ids"]
        length = int(once["attention_mask"][0].sum())
        assert not torch.equal(other[0, :length], once["position_ids"][0, :length])

    def test_positions_leave_gaps_within_videos_only(self, collator, processor):
        batch = ConversationCollator(processor, collator.media, position_stretch=4.0)(self.RECORDS)
        stretched = False
        for row, mask in enumerate(batch["attention_mask"].bool()):
            ids, positions = batch["input_ids"][row, mask], batch["position_ids"][row, mask]
            steps = positions.diff(prepend=positions.new_tensor([-1]))
            assert (steps >= 1).all() and positions.max() < 4 * len(ids)
            assert (ids[steps > 1] == processor.video_token_id).all()
            stretched |= bool((steps > 1).any())
        assert stretched
