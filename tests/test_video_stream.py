"""Streams: what is held of a video that has not ended, what is answered about it, and what leaves it unharmed."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import IMAGE_SIZE, tiny_checkpoint, tiny_processor

from mambamia_hf import MambaMiaForConditionalGeneration, VideoMemory, select_frames


QUESTION = "What is shown?"
NUM_FRAMES = 30
TIMES = [0.5 * number for number in range(NUM_FRAMES)]


def tiny_pair(folder, **compressor_config):
    """A model and its processor; the anchors of the model differ clearly from frame to frame."""
    model, processor = tiny_checkpoint(folder)
    config = model.config
    for name, value in compressor_config.items():
        setattr(config.compressor_config, name, value)
    config.delta_threshold = None
    torch.manual_seed(0)
    return MambaMiaForConditionalGeneration(config).eval(), processor


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return tiny_pair(tmp_path_factory.mktemp("causal"), bidirectional=False)


@pytest.fixture(scope="module")
def bidirectional(tmp_path_factory):
    return tiny_pair(tmp_path_factory.mktemp("bidirectional"))


@pytest.fixture(scope="module")
def frames():
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (NUM_FRAMES, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)


def push_all(stream, frames, portion=1, times=TIMES):
    for start in range(0, len(frames), portion):
        stream.push(frames[start : start + portion], times[start : start + portion])
    return stream


def offline_memory(model, processor, frames):
    about = {"total_num_frames": len(frames), "fps": 2.0}
    inputs = processor.video_processor(
        [frames], video_metadata=[about], do_sample_frames=False, return_tensors="pt", return_metadata=True
    )
    return model.encode_video(inputs, processor)


def check_same(stream_memory, memory, **tolerance):
    tolerance = {"rtol": 1e-5, "atol": 1e-5, **tolerance}
    torch.testing.assert_close(stream_memory.anchors, memory.anchors, **tolerance)
    torch.testing.assert_close(stream_memory.frame_deltas, memory.frame_deltas, **tolerance)


def ask_offline(model, processor, frames, **kwargs):
    content = [{"type": "video"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=text, videos=[frames], do_sample_frames=False, return_tensors="pt", **kwargs)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()


@pytest.mark.parametrize("portion", [1, 4, 7, 30])
def test_a_causal_model_remembers_and_answers_what_it_does_offline(causal, frames, portion):
    model, processor = causal
    stream = push_all(model.stream(processor), frames, portion)
    check_same(stream.memory, offline_memory(model, processor, frames))
    assert stream.memory.timestamps == TIMES
    assert stream.ask(QUESTION, max_new_tokens=12) == ask_offline(model, processor, frames)


def test_questions_at_any_moment_are_about_what_has_come(causal, frames):
    model, processor = causal
    stream = model.stream(processor)
    for end in (3, 4, 20, 30):
        push_all(stream, frames[len(stream) : end], 2, TIMES[len(stream) : end])
        assert stream.ask(QUESTION, max_new_tokens=12) == ask_offline(model, processor, frames[:end])
    assert len({ask_offline(model, processor, frames[:end]) for end in (3, 4, 20, 30)}) > 1


def test_a_bidirectional_model_before_its_first_window_is_exact(bidirectional, frames):
    model, processor = bidirectional
    stream = push_all(model.stream(processor), frames)
    check_same(stream.memory, offline_memory(model, processor, frames))
    assert stream.ask(QUESTION, max_new_tokens=12) == ask_offline(model, processor, frames)


def test_a_bidirectional_model_in_windows_is_close(bidirectional, frames):
    model, processor = bidirectional
    offline = offline_memory(model, processor, frames).anchors
    errors = []
    for look_ahead in (0, 2):
        stream = push_all(model.stream(processor, window=3, look_ahead=look_ahead), frames)
        assert len(stream.memory) == NUM_FRAMES
        errors.append(float((stream.memory.anchors - offline).norm() / offline.norm()))
    assert errors[1] < errors[0] and 1e-3 < errors[0] < 0.5


def test_frames_that_wait_are_in_the_memory_and_the_same_once_the_stream_is_closed(bidirectional, frames):
    model, processor = bidirectional
    stream = push_all(model.stream(processor, window=3, look_ahead=4), frames)
    before = stream.memory
    stream.close()
    assert torch.equal(stream.memory.anchors, before.anchors)
    assert torch.equal(stream.memory.frame_deltas, before.frame_deltas)
    assert stream.memory.timestamps == before.timestamps


def test_looking_changes_nothing(bidirectional, frames):
    model, processor = bidirectional
    quiet, watched = (model.stream(processor, keep_frames=6, window=3, look_ahead=4) for _ in range(2))
    for number in range(NUM_FRAMES):
        quiet.push(frames[number : number + 1], TIMES[number : number + 1])
        watched.push(frames[number : number + 1], TIMES[number : number + 1])
        assert len(watched.memory) == min(number + 1, 6)
    assert torch.equal(quiet.memory.anchors, watched.memory.anchors)
    assert quiet.kept_frames == watched.kept_frames


@pytest.mark.parametrize("keep_frames", [1, 2, 7, 29])
def test_a_budget_holds_so_many_frames_and_all_of_their_delta(causal, frames, keep_frames):
    model, processor = causal
    stream = push_all(model.stream(processor, keep_frames=keep_frames), frames, 4)
    offline, memory, kept = offline_memory(model, processor, frames), stream.memory, stream.kept_frames
    assert len(memory) == len(kept) == keep_frames
    assert memory.is_selected
    assert kept == sorted(kept) and kept[-1] == NUM_FRAMES - 1
    assert memory.timestamps == [TIMES[frame] for frame in kept]
    torch.testing.assert_close(memory.anchors, offline.anchors[kept], rtol=1e-5, atol=1e-5)
    accumulated = offline.frame_deltas.cumsum(0)[kept].diff(prepend=torch.zeros(1))
    torch.testing.assert_close(memory.frame_deltas, accumulated, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threshold", [0.1, 0.2, 0.5])
def test_a_threshold_is_algorithm_1_and_the_newest_frame(causal, frames, threshold):
    model, processor = causal
    stream = push_all(model.stream(processor, delta_threshold=threshold), frames, 4)
    kept = select_frames(offline_memory(model, processor, frames).frame_deltas[None], threshold)[0]
    expected = kept.nonzero().flatten().tolist()
    assert 1 < len(expected) < NUM_FRAMES
    assert stream.kept_frames == sorted({*expected, NUM_FRAMES - 1})


def test_what_is_held_does_not_grow(bidirectional, frames):
    model, processor = bidirectional
    stream = model.stream(processor, keep_frames=5, window=3, look_ahead=2)

    def held_numbers():
        tensors = [frame.anchors for frame in stream._state.held]
        for scans in (*stream._state.scans.spatial, *stream._state.scans.temporal):
            tensors += scans or ()
        tensors += [] if stream._state.scans.pending is None else [stream._state.scans.pending]
        return sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in tensors)

    sizes = []
    for number in range(60):
        stream.push(frames[number % NUM_FRAMES][None], [float(number)])
        sizes.append(held_numbers())
    assert max(sizes[30:]) == max(sizes[10:30])


def test_a_memory_of_a_stream_is_saved_and_asked_again(causal, frames, tmp_path):
    model, processor = causal
    stream = push_all(model.stream(processor, keep_frames=9, name="the door"), frames)
    stream.memory.save(tmp_path / "door.memory")
    loaded = VideoMemory.load(tmp_path / "door.memory", model)
    assert loaded.name == "the door" and loaded.timestamps == stream.memory.timestamps
    content = [{"type": "video", "video": loaded}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()
    assert answer == stream.ask(QUESTION, max_new_tokens=12)


@pytest.mark.parametrize(
    "convert",
    [
        lambda frames: [Image.fromarray(frame) for frame in frames],
        lambda frames: list(frames),
        lambda frames: torch.from_numpy(frames).permute(0, 3, 1, 2),
    ],
    ids=["images", "arrays", "tensor"],
)
def test_frames_in_other_forms(causal, frames, convert):
    model, processor = causal
    expected = push_all(model.stream(processor), frames[:5], 5).memory
    stream = model.stream(processor)
    stream.push(convert(frames[:5]), TIMES[:5])
    check_same(stream.memory, expected, rtol=0, atol=0)


BAD_PUSHES = {
    "back in time": (slice(5, 6), [1.9], "at 1.9 s comes after one at 2 s"),
    "the same time": (slice(5, 6), [2.0], "at 2 s comes after one at 2 s"),
    "back within a push": (slice(5, 7), [2.5, 2.4], "at 2.4 s comes after one at 2.5 s"),
    "NaN": (slice(5, 6), [float("nan")], "the time nan"),
    "infinite": (slice(5, 6), [float("inf")], "the time inf"),
    "too few times": (slice(5, 8), [2.5, 3.0], "3 frames and 2 times"),
    "too many times": (slice(5, 6), [2.5, 3.0], "1 frames and 2 times"),
    "no frames": (slice(5, 5), [], "no frames"),
}


@pytest.mark.parametrize("case", BAD_PUSHES)
def test_a_bad_push_leaves_the_stream_unharmed(causal, frames, case):
    model, processor = causal
    which, times, message = BAD_PUSHES[case]
    stream = push_all(model.stream(processor), frames[:5])
    with pytest.raises(ValueError, match=message):
        stream.push(frames[which], times)
    assert len(stream) == 5
    push_all(stream, frames[5:], 1, TIMES[5:])
    check_same(stream.memory, push_all(model.stream(processor), frames).memory, rtol=0, atol=0)


def test_frames_of_another_size_are_resized_or_refused(causal, frames):
    model, processor = causal
    stream = push_all(model.stream(processor), frames[:5])
    stream.push(np.kron(frames[5:6], np.ones((1, 2, 2, 1), dtype=np.uint8)), TIMES[5:6])
    assert len(stream) == 6
    as_they_are = tiny_processor()
    as_they_are.video_processor.do_resize = False
    stream = push_all(model.stream(as_they_are), frames[:5])
    with pytest.raises(ValueError, match="resize them to one size"):
        stream.push(np.kron(frames[5:6], np.ones((1, 2, 2, 1), dtype=np.uint8)), TIMES[5:6])
    push_all(stream, frames[5:], 1, TIMES[5:])
    assert len(stream) == NUM_FRAMES


def test_an_interruption_in_mid_push_leaves_the_stream_unharmed(bidirectional, frames):
    model, processor = bidirectional
    stream = push_all(model.stream(processor, window=3, look_ahead=2), frames[:8])
    for module in (model.model.vision_tower, model.model.compressor.temporal_layers[0].mixer):

        def interrupt(*_):
            raise KeyboardInterrupt

        handle = module.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            stream.push(frames[8:12], TIMES[8:12])
        handle.remove()
        assert len(stream) == 8
    push_all(stream, frames[8:], 1, TIMES[8:])
    expected = push_all(model.stream(processor, window=3, look_ahead=2), frames)
    check_same(stream.memory, expected.memory, rtol=0, atol=0)


def test_frames_that_become_nan_are_refused(causal, frames):
    model, processor = causal
    stream = push_all(model.stream(processor), frames[:5])
    broken = torch.full((1, 3, IMAGE_SIZE, IMAGE_SIZE), torch.nan)
    with pytest.raises(ValueError, match="NaN or infinity"):
        stream.push(broken, TIMES[5:6])
    push_all(stream, frames[5:], 1, TIMES[5:])
    assert len(stream.memory) == NUM_FRAMES


def test_a_closed_stream_takes_no_frames_and_answers(causal, frames):
    model, processor = causal
    stream = push_all(model.stream(processor), frames[:5])
    answer = stream.ask(QUESTION, max_new_tokens=12)
    stream.close()
    stream.close()
    with pytest.raises(ValueError, match="closed"):
        stream.push(frames[5:6], TIMES[5:6])
    assert stream.ask(QUESTION, max_new_tokens=12) == answer


def test_a_question_before_the_first_frame(causal):
    model, processor = causal
    with pytest.raises(ValueError, match="no frame yet"):
        model.stream(processor).ask(QUESTION)


def test_a_model_in_training_mode_takes_no_frames(causal, frames):
    model, processor = causal
    stream = model.stream(processor)
    model.train()
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        stream.push(frames[:1], TIMES[:1])
    model.eval()


def test_a_file_is_no_frame(causal, tmp_path):
    model, processor = causal
    with pytest.raises(ValueError, match="takes frames"):
        model.stream(processor).push(str(tmp_path / "video.mp4"), [0.0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_frames": 0}, "keep_frames"),
        ({"keep_frames": 2.5}, "keep_frames"),
        ({"delta_threshold": -1.0}, "delta_threshold"),
        ({"delta_threshold": float("nan")}, "delta_threshold"),
        ({"window": 0}, "window"),
        ({"window": True}, "window"),
        ({"look_ahead": -1}, "look_ahead"),
        ({"look_ahead": 1.5}, "look_ahead"),
    ],
)
def test_settings_out_of_range(causal, settings, message):
    model, processor = causal
    with pytest.raises(ValueError, match=message):
        model.stream(processor, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_temporal_layers": 0}, "needs a temporal layer"),
        ({"mixer_type": "mamba1"}, "mixer_type='mamba2'"),
        ({"temporal_bidirectional": True}, "temporal_bidirectional=True"),
    ],
)
def test_models_that_need_whole_videos(tmp_path, settings, message):
    model, processor = tiny_pair(tmp_path, **settings)
    with pytest.raises(ValueError, match=message):
        model.stream(processor)


@pytest.mark.parametrize(("time_format", "end"), [("mm:ss", 6000.0), ("h:mm:ss", 36000.0), ("mm:ss.d", 6000.0)])
def test_a_stream_longer_than_the_times_of_the_model(tmp_path, frames, time_format, end):
    """Times go on; questions are about what the format can tell, and `clock_start` says from when on."""
    model, processor = tiny_checkpoint(tmp_path, frame_time_format=time_format)
    times = [0.0, end / 2, end - 1.0, end - 0.0005, 1.4 * end, 1.5 * end, 15 * end + 7]
    starts = [0.0, 0.0, 0.0, end / 2, end / 2, end, 14.5 * end]
    stream = model.stream(processor)
    for number, (time, start) in enumerate(zip(times, starts, strict=True)):
        stream.push(frames[number : number + 1], [time])
        assert stream.clock_start == start
        answer = stream.ask(QUESTION, max_new_tokens=3)
        assert stream.memory.timestamps == times[: number + 1]
    last = model.stream(processor)
    push_all(last, frames[:7], 7, times[:7])
    assert last.ask(QUESTION, max_new_tokens=3) == answer


def test_without_a_format_of_times_the_clock_never_starts_again(causal, frames):
    model, processor = causal
    stream = push_all(model.stream(processor), frames[:2], 2, [0.0, 1e7])
    assert stream.clock_start == 0.0
    assert isinstance(stream.ask(QUESTION, max_new_tokens=2), str)
