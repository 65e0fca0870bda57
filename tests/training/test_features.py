"""Features in place of pixels: the command that writes them, and what reads them."""

import copy
import json
from pathlib import Path

import pytest
import torch
from conversations import BROKEN, CUT, IMAGE, MIXED, TEXT, VIDEO, arguments, record, reported
from PIL import Image
from safetensors.torch import load_file
from tiny_model import tiny_checkpoint

from mambamia_hf import MambaMiaForConditionalGeneration, MambaMiaProcessor
from mambamia_hf.training import ConversationCollator, MediaReader, VisionFeatures, features, parse_record


RECORDS = [VIDEO, IMAGE, MIXED, TEXT, BROKEN]


def write(model, processor, media_folder, folder, records, **settings):
    """Runs the command over records, into `features` within a folder."""
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    (folder / "data.json").write_text(json.dumps(records))
    paths = {"model": folder / "model", "data": folder / "data.json", "output": folder / "features"}
    features.main(arguments(**paths, media_folder=media_folder, **{"num_workers": 0, **settings}))


@pytest.fixture
def written(model, processor, media_folder, tmp_path) -> Path:
    write(model, processor, media_folder, tmp_path, RECORDS)
    return tmp_path / "features"


def test_features_give_the_loss_of_pixels(written, model, processor, media_folder):
    reader = MediaReader(processor, media_folder)
    pixels = ConversationCollator(processor, reader)(RECORDS)
    batch = ConversationCollator(processor, VisionFeatures(written, reader.settings(model)))(RECORDS)
    images, videos = batch["patch_features"], batch["patch_features_videos"]
    assert images.dtype == videos.dtype == torch.float16
    assert images.shape == (2, 16, 24) and videos.shape == (3, 8, 16, 24)
    for name in ("input_ids", "attention_mask", "labels", "frame_mask"):
        assert torch.equal(batch[name], pixels[name])
    expected = model(**pixels, delta_threshold=0)
    output = model(**batch, delta_threshold=0)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def timed(tmp_path_factory) -> tuple[MambaMiaForConditionalGeneration, MambaMiaProcessor]:
    """A model that writes the times of frames, and its processor."""
    model, processor = tiny_checkpoint(tmp_path_factory.mktemp("timed"), frame_time_format="mm:ss.d")
    return model.eval(), processor


def test_times_are_those_of_pixels(timed, media_folder, tmp_path):
    model, processor = timed
    write(model, processor, media_folder, tmp_path, RECORDS)
    reader = MediaReader(processor, media_folder)
    pixels = ConversationCollator(processor, reader)(RECORDS)
    batch = ConversationCollator(processor, VisionFeatures(tmp_path / "features", reader.settings(model)))(RECORDS)
    assert torch.equal(batch["input_ids"], pixels["input_ids"]) and torch.equal(batch["labels"], pixels["labels"])
    assert batch["video_timestamps"] == pixels["video_timestamps"]
    assert [len(times) for times in batch["video_timestamps"]] == [8, 8, 4]
    is_video = batch["input_ids"] == processor.video_token_id
    assert is_video.sum() == 20 * processor.placeholders_per_frame and (batch["labels"][is_video] == -100).all()
    output, expected = (model(**batch, delta_threshold=0), model(**pixels, delta_threshold=0))
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-3, atol=1e-3)


def test_the_time_instruction_is_that_of_the_processor(model, processor, media_folder, tmp_path):
    """From pixels and from features, with the template of our models and one that breaks the line after a video."""
    processor = copy.deepcopy(processor)
    processor.time_instruction = True
    write(model, processor, media_folder, tmp_path, RECORDS)
    reader = MediaReader(processor, media_folder)
    sources = (reader, VisionFeatures(tmp_path / "features", reader.settings(model)))
    marks = "<|vision_start|><|video_pad|><|vision_end|>"
    for template in (processor.chat_template, processor.chat_template.replace(marks, "<|video_pad|>\\n")):
        processor.chat_template = template
        for sample, files in ((VIDEO, ["a.mp4"]), (MIXED, ["a.mp4", "b.mp4"])):
            messages, _ = parse_record(sample)
            text = processor.apply_chat_template(messages)
            images = Image.open(media_folder / "a.png") if "image" in sample else None
            expected = processor(text=text, videos=[str(media_folder / file) for file in files], images=images)
            assert "The video lasts for 4.000 seconds, and 8 frames" in processor.decode(expected["input_ids"][0])
            for media in sources:
                batch = ConversationCollator(processor, media)([sample])
                assert batch["input_ids"].tolist() == expected["input_ids"]
                learned = batch["labels"][batch["labels"] >= 0]
                assert processor.decode(learned) == f"{sample['conversations'][1]['value']}<|im_end|>"


def test_features_of_a_model_without_times_have_them(timed, written, media_folder):
    _, processor = timed
    collator = ConversationCollator(processor, VisionFeatures(written, {}))
    reader = MediaReader(processor, media_folder)
    assert collator([VIDEO])["video_timestamps"] == [reader.read("video", "a.mp4").times.tolist()]


def test_features_without_times(timed, written, model, processor, media_folder, tmp_path):
    index = json.loads((written / "index.json").read_text())
    del index["settings"]["video times"]  # as earlier versions wrote it
    (written / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="made with video times None and it is True now; precompute them again"):
        VisionFeatures(written, MediaReader(timed[1], media_folder).settings(timed[0])).check_settings("video")
    write(model, processor, media_folder, tmp_path, [*RECORDS, record("more", "<video>?", "Yes.", video="b.mp4")])
    made = VisionFeatures(written, MediaReader(processor, media_folder).settings(model))
    assert not made.has_times and made.read("video", "b.mp4").times is None
    batch = ConversationCollator(processor, made)([VIDEO])
    assert "video_timestamps" not in batch


def test_what_is_there_is_not_made_again(written, model, processor, media_folder, tmp_path, capsys):
    files = {path.name: path.stat().st_mtime_ns for path in written.glob("*.safetensors")}
    more = [*RECORDS, record("more", "<video>?", "Yes.", video="b.mp4"), CUT]
    write(model, processor, media_folder, tmp_path, more)
    assert {path.name: path.stat().st_mtime_ns for path in written.glob("*.safetensors")} == files
    output = capsys.readouterr()
    assert "3 files have features" in output.out and "2 were skipped" in output.out
    assert all(f"{name}.mp4 is skipped: " in output.out + output.err for name in ("cut", "broken"))


def test_what_could_not_be_read_is_tried_again(written, model, processor, media_folder, tmp_path):
    (tmp_path / "media").mkdir()
    for path, source in (("a.mp4", "a.mp4"), ("a.png", "a.png"), ("b.mp4", "b.mp4"), ("broken.mp4", "a.mp4")):
        (tmp_path / "media" / path).write_bytes((media_folder / source).read_bytes())
    write(model, processor, tmp_path / "media", tmp_path, RECORDS)
    made = VisionFeatures(written, {})
    assert not made.skipped
    assert torch.equal(made.read("video", "broken.mp4").tensor, made.read("video", "a.mp4").tensor)


def test_another_file_of_the_same_name(written, model, processor, media_folder, tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.mp4").write_bytes((media_folder / "b.mp4").read_bytes())
    with pytest.raises(ValueError, match=r"'a.mp4' has \d+ bytes and the file .* choose another output folder"):
        write(model, processor, tmp_path / "media", tmp_path, [VIDEO])


def test_a_wrong_media_folder(model, processor, media_folder, tmp_path):
    records = [record(f"{number}", "<video>?", "Yes.", video=f"{number}.mp4") for number in range(20)]
    with pytest.raises(ValueError, match="None of the first 20 files can be read; the last is '19.mp4'"):
        write(model, processor, tmp_path / "nowhere", tmp_path, records)
    assert not (tmp_path / "features" / "index.json").exists()


@pytest.mark.parametrize("source", [b"no file", {"bytes": b"no file", "path": "a.png"}])
def test_images_within_the_data(written, source):
    message = "Features are those of files, and the content of .* is in the data itself; train on pixels"
    with pytest.raises(ValueError, match=message):
        features.media_files([record("within", "<image>?", "Yes.", image=source)])
    with pytest.raises(ValueError, match=message):
        VisionFeatures(written, {}).read("image", source)


def test_shards(model, processor, media_folder, tmp_path):
    write(model, processor, media_folder, tmp_path, RECORDS, shard_size=0)
    shards = sorted((tmp_path / "features").glob("*.safetensors"))
    assert len(shards) == 3
    stored = {path: tensor for shard in shards for path, tensor in load_file(shard).items()}
    assert stored.keys() == {"a.mp4", "a.png", "b.mp4", "times of a.mp4", "times of b.mp4"}
    made = VisionFeatures(tmp_path / "features", {})
    for kind, path in (("video", "a.mp4"), ("video", "b.mp4"), ("image", "a.png")):
        medium = made.read(kind, path)
        assert torch.equal(medium.tensor, stored[path])
        if kind == "video":
            assert [*medium.times.tolist(), medium.duration] == stored[f"times of {path}"].tolist()


def test_stopped_on_the_way(model, processor, media_folder, tmp_path, monkeypatch):
    encode, done = features.encode, []

    def stop_at_the_third(*args):
        done.append(args)
        if len(done) == 3:
            raise KeyboardInterrupt
        return encode(*args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(features, "encode", stop_at_the_third)
        write(model, processor, media_folder, tmp_path, RECORDS, shard_size=0)
    stopped = VisionFeatures(tmp_path / "features", {})
    assert len(stopped.shards) == 2
    kinds = {"a.mp4": "video", "a.png": "image", "b.mp4": "video"}
    assert all(stopped.read(kinds[path], path).tensor.isfinite().all() for path in stopped.shards)
    write(model, processor, media_folder, tmp_path, RECORDS, shard_size=0)
    assert VisionFeatures(tmp_path / "features", {}).shards.items() > stopped.shards.items()


def test_of_another_tower_or_other_frames(written, model, processor, media_folder, tmp_path):
    fewer = VisionFeatures(written, MediaReader(processor, media_folder, num_frames=6).settings(model))
    collator = ConversationCollator(processor, fewer)
    with pytest.raises(ValueError, match="made with video num_frames 384 and it is 6 now"):
        collator([VIDEO])
    with pytest.raises(ValueError, match="made with video num_frames 384 and it is 6 now"):
        collator.require_features([IMAGE, MIXED])
    assert len(collator([IMAGE, TEXT])["patch_features"]) == 1  # of which the number of frames is no concern
    slower = VisionFeatures(written, MediaReader(processor, media_folder, fps=1).settings(model))
    with pytest.raises(ValueError, match="made with video fps 2.0 and it is 1 now"):
        slower.check_settings("video")
    other = MambaMiaForConditionalGeneration(model.config)
    with pytest.raises(ValueError, match="made with vision_tower 'siglip_vision_model [0-9a-f]{16}' and it is"):
        VisionFeatures(written, MediaReader(processor, media_folder).settings(other))
    with pytest.raises(ValueError, match="video num_frames 384 and it is 6"):
        write(model, processor, media_folder, tmp_path, RECORDS, num_frames=6)
    with pytest.raises(ValueError, match="it has no index.json; precompute"):
        VisionFeatures(media_folder, {})


def test_settings_do_not_depend_on_the_type_it_was_loaded_in(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = MambaMiaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    processor.save_pretrained(tmp_path)
    saved = MambaMiaProcessor.from_pretrained(tmp_path)
    assert MediaReader(saved).settings(loaded) == MediaReader(processor).settings(model)


def test_all_media_can_be_checked_before(written, processor):
    collator = ConversationCollator(processor, VisionFeatures(written, {}))
    collator.require_features([*RECORDS, {"id": "no chat"}])
    with pytest.raises(ValueError, match="no features of 'nowhere.mp4' of sample 'missing'"):
        collator.require_features([*RECORDS, record("missing", "<video>?", "Yes.", video="nowhere.mp4")])


def test_media_without_features(written, model, processor):
    collator = ConversationCollator(processor, VisionFeatures(written, {}))
    new = record("new", "<video>?", "Yes.", video="b2.mp4")
    with pytest.raises(ValueError, match="no features of 'b2.mp4' of sample 'new' in .* adds what is missing"):
        collator([VIDEO, new])


def test_what_could_not_be_decoded_then_is_skipped_now(written, processor, tmp_path):
    report = tmp_path / "report.jsonl"
    batch = ConversationCollator(processor, VisionFeatures(written, {}), report=report)([BROKEN, VIDEO])
    assert len(batch["input_ids"]) == 1
    assert reported(report) == [("broken", "skipped")] and "cannot be read as a video" in report.read_text()


def test_a_second_process_is_refused_until_the_first_ends(model, processor, media_folder, tmp_path):
    with (
        features.only_writer(tmp_path / "features"),
        pytest.raises(RuntimeError, match="Another process is writing features"),
    ):
        write(model, processor, media_folder, tmp_path, RECORDS)
    assert not (tmp_path / "features" / "index.json").exists()
    write(model, processor, media_folder, tmp_path, RECORDS)
    assert len(VisionFeatures(tmp_path / "features", {}).shards) == 3


def test_features_that_do_not_fit_into_float16(model, processor, media_folder, tmp_path, monkeypatch):
    encode = features.encode
    monkeypatch.setattr(features, "encode", lambda *args: encode(*args) * torch.tensor(1e5, dtype=torch.float16))
    with pytest.raises(ValueError, match="features of '.*' do not fit into float16"):
        write(model, processor, media_folder, tmp_path, RECORDS)


def test_workers_make_the_same_features(written, model, processor, media_folder, tmp_path):
    (tmp_path / "again").mkdir()
    write(model, processor, media_folder, tmp_path / "again", RECORDS, num_workers=2)
    once, again = VisionFeatures(written, {}), VisionFeatures(tmp_path / "again" / "features", {})
    assert once.shards.keys() == again.shards.keys() and once.skipped.keys() == again.skipped.keys()
    assert all(torch.equal(once.read("image", path).tensor, again.read("image", path).tensor) for path in once.shards)
