"""A video that is encoded once, kept, and asked; against the answers from the file itself."""

import json
import math
import pickle
from copy import deepcopy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_model import tiny_checkpoint, tiny_model, tiny_processor, video_prompt
from video_files import write_video

from mambamia_hf import MambaMiaForConditionalGeneration, VideoMemory


NUM_FRAMES = 12


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "a video.mp4", num_frames=NUM_FRAMES, fps=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_checkpoint(folder)
    return folder


def load(checkpoint):
    return MambaMiaForConditionalGeneration.from_pretrained(checkpoint).eval(), tiny_processor()


@pytest.fixture(scope="module")
def model(checkpoint):
    return load(checkpoint)[0]


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def memory(model, processor, video):
    return model.encode_video(video, processor)


def prompt(processor, *videos, **kwargs):
    """One question about each video, as one batch."""
    text = [f"<|video_pad|>What happens{'?' * number}" for number in range(1, len(videos) + 1)]
    return processor(text=text, videos=list(videos), return_tensors="pt", padding=True, **kwargs)


def assert_same_answers(model, inputs, expected, **kwargs):
    """The same logits to 1e-5, and the same words."""
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    with torch.no_grad():
        given, wanted = model(**inputs, **kwargs), model(**expected, **kwargs)
    assert given.keep_mask.tolist() == wanted.keep_mask.tolist()
    torch.testing.assert_close(given.logits, wanted.logits, atol=1e-5, rtol=0)
    arguments = {"max_new_tokens": 6, "do_sample": False, **kwargs}
    assert torch.equal(model.generate(**inputs, **arguments), model.generate(**expected, **arguments))


# What a memory knows


def test_a_memory_has_every_frame(memory, video):
    assert len(memory) == NUM_FRAMES and memory.anchors.shape == (NUM_FRAMES, 4, 40)
    assert memory.timestamps == [number / 2 for number in range(NUM_FRAMES)]
    assert (memory.name, memory.width, memory.height, memory.duration) == (str(video), 64, 48, 6.0)
    rows = memory.frames()
    assert [row["frame"] for row in rows] == list(range(NUM_FRAMES))
    assert rows[3] == {"frame": 3, "time": 1.5, "delta": float(memory.frame_deltas[3])}
    assert "a video.mp4" in repr(memory) and "12 frames" in repr(memory)
    with pytest.raises(AttributeError, match="never changes"):
        memory.name = "another"
    assert deepcopy(memory) is memory and pickle.loads(pickle.dumps(memory)).timestamps == memory.timestamps


def test_encoding_is_what_the_processor_and_the_model_do(model, processor, video, memory):
    inputs = processor(videos=[video], return_tensors="pt")
    features = model.get_video_features(inputs["pixel_values_videos"])
    torch.testing.assert_close(memory.anchors, features.last_hidden_state[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(memory.frame_deltas, features.frame_deltas[0], atol=1e-6, rtol=0)
    of_inputs = model.encode_video(inputs, processor)
    assert torch.equal(of_inputs.anchors, features.last_hidden_state[0])
    assert of_inputs.timestamps == memory.timestamps
    of_inputs.check({name: memory.fingerprint[name] for name in of_inputs.fingerprint})


def test_a_part_of_a_video_at_a_rate(model, processor, video):
    memory = model.encode_video(video, processor, fps=1.0, start=2.0, end=5.0)
    assert memory.timestamps == [2.5, 3.5, 4.5]
    assert len(model.encode_video(video, processor, num_frames=5)) == 5


def test_progress_is_told(model, processor, video):
    told = []
    model.encode_video(video, processor, num_frames=10, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (10, 10) and all(total == 10 for _, total in told)


# It goes where a video goes


@pytest.mark.parametrize(
    ("of_prompt", "of_model"),
    [
        ({}, {}),
        ({"keep_frames": 5}, {}),
        ({"keep_ratio": 0.25}, {}),
        ({}, {"delta_threshold": 0.2}),
        ({}, {"delta_threshold": 0}),
        ({}, {"delta_min_frames": 100}),
    ],
)
def test_same_answers_as_from_the_file(model, processor, video, memory, of_prompt, of_model):
    assert_same_answers(
        model, prompt(processor, memory, **of_prompt), prompt(processor, video, **of_prompt), **of_model
    )


@pytest.mark.parametrize("settings", [{"end_of_frame": True}, {"compressor_config": {"patches_per_anchor": 16}}])
def test_any_number_of_tokens_per_frame(video, settings):
    processor = tiny_processor()
    config = {"text_config": {"vocab_size": len(processor.tokenizer)}, **settings}
    model = tiny_model(image_token_id=processor.image_token_id, video_token_id=processor.video_token_id, **config)
    processor.tokens_per_frame = model.config.tokens_per_frame()
    memory = model.encode_video(video, processor)
    assert memory.anchors.shape[1] == processor.tokens_per_frame - model.config.end_of_frame
    for budget in ({}, {"keep_frames": 3}):
        assert_same_answers(model, prompt(processor, memory, **budget), prompt(processor, video, **budget))


def test_a_batch_of_memories_and_videos(model, processor, video, memory, tmp_path):
    short = write_video(tmp_path / "short.mp4", num_frames=3, fps=2)
    remembered = model.encode_video(short, processor)
    expected = prompt(processor, video, short, video)
    for videos in ([memory, short, video], [video, remembered, memory], [memory, remembered, memory]):
        inputs = prompt(processor, *videos)
        assert inputs["video_timestamps"].tolist() == expected["video_timestamps"].tolist()
        assert_same_answers(model, inputs, expected)
        assert_same_answers(
            model, prompt(processor, *videos, keep_frames=2), prompt(processor, video, short, video, keep_frames=2)
        )


def test_several_memories_in_one_prompt(model, processor, video, memory):
    text = "<|video_pad|> and <|video_pad|>?"
    inputs = processor(text=text, videos=[memory[:4], memory[4:]], return_tensors="pt")
    assert int((inputs["input_ids"] == processor.video_token_id).sum()) == NUM_FRAMES * 4
    output = model(**inputs)
    assert output.keep_mask.shape == (2, 8) and output.keep_mask[0, 4:].sum() == 0


def test_in_a_chat(model, processor, video, memory):
    question = "What happens?"
    assert_same_answers(model, video_prompt(processor, memory, question), video_prompt(processor, video, question))


# Parts and selections


def test_slices(memory):
    part = memory[2:8:2]
    assert part.timestamps == [1.0, 2.0, 3.0] and not part.is_selected
    assert torch.equal(part.anchors, memory.anchors[2:8:2])
    assert torch.equal(part.frame_deltas, memory.frame_deltas[2:8:2])
    with pytest.raises(TypeError, match=r"memory\[10:20\]"):
        memory[3]
    with pytest.raises(ValueError, match="must ascend, and frame 1 is at 5 s after one at 5.5 s"):
        memory[::-1]
    with pytest.raises(ValueError, match="at least one frame"):
        memory[5:5]


@pytest.mark.parametrize("how", [{"keep_frames": 4}, {"keep_ratio": 0.5}, {"threshold": 0.2}])
def test_a_selection_keeps_all_of_its_frames(model, processor, memory, how):
    selected = memory.select(**how)
    assert selected.is_selected and 0 < len(selected) < len(memory)
    for asked in ({}, {"keep_frames": 2}):
        inputs = prompt(processor, selected, **asked)
        assert int((inputs["input_ids"] == processor.video_token_id).sum()) == len(selected) * 4
        assert model(**inputs).keep_mask.sum() == len(selected)
    inputs = prompt(processor, selected, memory, keep_frames=2)
    assert model(**inputs).keep_mask.sum(dim=1).tolist() == [len(selected), 2]


def test_a_selection_is_the_models_own(model, processor, video, memory):
    kept = model(**prompt(processor, video, keep_frames=4)).keep_mask[0]
    times = [time for time, stays in zip(memory.timestamps, kept.tolist(), strict=True) if stays]
    assert memory.select(keep_frames=4).timestamps == times


def test_a_selection_of_a_time(memory):
    assert memory.select(start=1.0, end=2.5).timestamps == [1.0, 1.5, 2.0]
    assert len(memory.select(start=1.0)) == NUM_FRAMES - 2
    assert len(memory.select(keep_frames=2, end=3.0)) == 2
    with pytest.raises(ValueError, match="no frame from 7 to 9 s"):
        memory.select(start=7, end=9)
    with pytest.raises(ValueError, match="not both"):
        memory.select(keep_frames=1, keep_ratio=0.5)
    with pytest.raises(ValueError, match="needs their Δ"):
        VideoMemory(memory.anchors, None, memory.timestamps, {}).select(keep_frames=1)


# Files


def test_a_saved_memory_is_the_same(model, processor, memory, tmp_path):
    path = tmp_path / "video.memory"
    for saved in (memory, memory[2:5], memory.select(keep_frames=3)):
        saved.save(path)
        loaded = VideoMemory.load(path, model, processor)
        assert torch.equal(loaded.anchors, saved.anchors) and torch.equal(loaded.frame_deltas, saved.frame_deltas)
        for name in ("timestamps", "name", "width", "height", "duration", "fingerprint", "is_selected"):
            assert getattr(loaded, name) == getattr(saved, name)
    assert [file.name for file in tmp_path.iterdir()] == ["video.memory"]


def test_half_the_bytes(model, processor, video, tmp_path):
    half = tiny_model().bfloat16()
    memory = half.encode_video(video, processor)
    memory.save(tmp_path / "memory")
    loaded = VideoMemory.load(tmp_path / "memory", half)
    assert loaded.anchors.dtype == torch.bfloat16 and torch.equal(loaded.anchors, memory.anchors)
    assert loaded.frame_deltas.dtype == torch.float32


def rewritten(path, change=lambda tensors, metadata: None):
    """The file with something changed, and a digest that fits."""
    from mambamia_hf.video_memory import _file_digest

    with safe_open(path, "pt") as file:
        metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}
    change(tensors, metadata)
    metadata["digest"] = _file_digest(tensors, metadata["about"])
    save_file(tensors, path, metadata)


def set_about(name, value):
    def change(tensors, metadata):
        metadata["about"] = json.dumps({**json.loads(metadata["about"]), name: value})

    return change


def set_number(name, index, value):
    def change(tensors, metadata):
        tensors[name][index] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_number("anchors", (3, 1, 2), math.nan), "NaN"),
        (set_number("frame_deltas", 2, math.inf), "NaN or infinity"),
        (set_number("frame_deltas", 2, -1.0), "negative"),
        (set_number("timestamps", 2, 7.0), "frame 3 is at 1.5 s after one at 7 s"),
        (lambda tensors, _: tensors.update(timestamps=tensors["timestamps"][:5].clone()), "12 frames, 5 times"),
        (lambda tensors, _: tensors.update(frame_deltas=tensors["frame_deltas"][:5].clone()), "5 Δ"),
        (lambda tensors, _: tensors.update(anchors=tensors["anchors"][0].clone()), "of shape"),
        (lambda tensors, _: tensors.update(anchors=tensors["anchors"].long()), "floating-point"),
        (lambda tensors, _: tensors.pop("timestamps"), "timestamps"),
        (set_about("colour", "red"), "colour"),
        (lambda _, metadata: metadata.update(version="2"), "version 2"),
        (lambda _, metadata: metadata.update(format="another"), "no video memory"),
        (lambda _, metadata: metadata.update(about="{"), "cannot be used"),
    ],
)
def test_files_that_cannot_be_used(memory, tmp_path, change, message):
    path = tmp_path / "video.memory"
    memory.save(path)
    rewritten(path)
    VideoMemory.load(path)
    rewritten(path, change)
    with pytest.raises(ValueError, match=message) as error:
        VideoMemory.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_cut_files(memory, tmp_path, share):
    path = tmp_path / "video.memory"
    memory.save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="a part of it is missing"):
        VideoMemory.load(path)


def test_damaged_and_foreign_files(memory, tmp_path):
    path = tmp_path / "video.memory"
    memory.save(path)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        VideoMemory.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="no video memory"):
        VideoMemory.load(path)
    path.write_text("A video of a cat.")
    with pytest.raises(ValueError, match="no video memory"):
        VideoMemory.load(path)
    with pytest.raises(FileNotFoundError, match="no video memory at"):
        VideoMemory.load(tmp_path / "nowhere")


def test_an_existing_file_survives_an_error(memory, tmp_path, monkeypatch):
    path = tmp_path / "video.memory"
    memory.save(path)
    monkeypatch.setattr("mambamia_hf.video_memory.save_file", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        memory[:2].save(path)
    assert len(VideoMemory.load(path)) == NUM_FRAMES
    assert [file.name for file in tmp_path.iterdir()] == ["video.memory"]


# Another model


def changed(module_name, how):
    def change(model):
        how(dict(model.named_parameters())[module_name].data)

    return change


def first(numbers):
    numbers.view(-1)[:1].add_(1e-3)


def mirrored(numbers):
    numbers.copy_(numbers.flip(1))


TOWER, COMPRESSOR = "model.vision_tower.", "model.compressor."


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (changed(TOWER + "embeddings.patch_embedding.weight", first), "the weights of the vision tower"),
        (changed(TOWER + "embeddings.patch_embedding.weight", mirrored), "the weights of the vision tower"),
        (changed(COMPRESSOR + "layers.0.mixer.in_proj.weight", first), "the weights of the compressor"),
        (changed(COMPRESSOR + "anchor", first), "the weights of the compressor"),
        (lambda model: setattr(model.config, "vision_feature_layer", -1), "the settings of the vision tower"),
        (lambda model: setattr(model.config.compressor_config, "rms_norm_eps", 0.1), "the settings of the compressor"),
    ],
)
def test_a_memory_of_another_model(checkpoint, memory, processor, tmp_path, change, part):
    """Weights may change in place, unknown to PyTorch."""
    memory.save(tmp_path / "memory")
    other, _ = load(checkpoint)
    other(**prompt(processor, memory))
    change(other)
    for use in (
        lambda: VideoMemory.load(tmp_path / "memory", other),
        lambda: other.generate(**prompt(processor, memory), max_new_tokens=1),
    ):
        with pytest.raises(ValueError, match=part) as error:
            use()
        assert "a video.mp4" in str(error.value) and str(error.value).count("differ") == 1
        assert str(error.value).count("the ") - str(error.value).count("the video again") < 4


def test_a_memory_of_other_frames(model, memory, tmp_path):
    memory.save(tmp_path / "memory")
    other = tiny_processor()
    other.video_processor.image_mean = [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="size or normalisation of the frames differ"):
        VideoMemory.load(tmp_path / "memory", model, other)


def test_the_language_model_may_change(checkpoint, memory, processor):
    other, _ = load(checkpoint)
    changed("lm_head.weight", first)(other)
    other(**prompt(processor, memory))


def test_what_counts_is_the_values_of_the_weights(video, processor):
    """A checkpoint in bfloat16 may be loaded in float32."""
    half = tiny_model().bfloat16()
    memory = half.encode_video(video, processor)
    ids = torch.tensor([[5, *len(memory) * 4 * [4], 6]])
    half(ids, video_memories=[memory], delta_threshold=0)
    whole = tiny_model()
    with pytest.raises(ValueError, match="its anchors are bfloat16"):
        whole(ids, video_memories=[memory])
    whole.load_state_dict(half.state_dict())
    assert whole(ids, video_memories=[memory]).logits.dtype == torch.float32


# Mistakes


def test_what_cannot_be_encoded(model, processor, video, tmp_path):
    with pytest.raises(ValueError, match="Pass the processor"):
        model.encode_video(video)
    with pytest.raises(FileNotFoundError, match=r"no video file 'nowhere.mp4'"):
        model.encode_video("nowhere.mp4", processor)
    with pytest.raises(ValueError, match="ends after 6 seconds"):
        model.encode_video(video, processor, start=9.0)
    with pytest.raises(ValueError, match="not for 2"):
        model.encode_video(processor(videos=[video, video], return_tensors="pt"))
    with pytest.raises(ValueError, match="not for 0"):
        model.encode_video(processor(text="What?", return_tensors="pt"))
    frames = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match="times of the frames are missing"):
        model.encode_video(processor(videos=[frames], do_sample_frames=False, return_tensors="pt"))
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        tiny_model().train().encode_video(video, processor)


def test_videos_and_memories_that_do_not_fit(model, memory, processor, video):
    inputs = prompt(processor, video, memory)
    inputs["video_memories"] = [None, None]
    with pytest.raises(ValueError, match="2 of 2 videos are None in video_memories, and pixels or features hold 1"):
        model(**inputs)
    inputs["video_memories"] = [memory, memory]
    with pytest.raises(ValueError, match="0 of 2 videos are None"):
        model(**inputs)
    with pytest.raises(ValueError, match="holds a int"):
        model.get_video_features(video_memories=[3])
