"""One model for several threads, copied, pickled, and asked without what could be left out: the same answers."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_model import VIDEO_TOKEN, ask, prompt, random_videos, tiny_checkpoint, tiny_model
from video_files import read_numbers, write_video

from mambamia_hf.video_decoding import VideoReader


IDS, VIDEOS = prompt([5, 6], 6, [7]), random_videos(1, 6)


@pytest.fixture
def model():
    return tiny_model(text_config={"pad_token_id": 0, "eos_token_id": 1})


def test_threads_share_a_model(tmp_path):
    model, processor = tiny_checkpoint(tmp_path / "model")
    model.eval()
    videos = [write_video(tmp_path / f"{size}.mp4", num_frames=size) for size in (10, 20, 30, 40)]
    questions = [(video, "What? " * length) for video in videos for length in (1, 7)]

    def answer(task) -> str:
        video, question = task
        return ask(model, processor, video, question, {"keep_ratio": 0.5}, max_new_tokens=5)

    alone = [answer(task) for task in questions]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(answer, questions)) == alone


def test_threads_share_a_reader(tmp_path):
    with VideoReader(write_video(tmp_path / "v.mp4")) as reader, ThreadPoolExecutor(8) as pool:
        wanted = [[number, 39 - number, number] for number in range(16)]
        batches = list(pool.map(reader.frames_at, wanted))
    assert [read_numbers(batch.data) for batch in batches] == wanted


def test_copies_after_use(model):
    arguments = {"pixel_values_videos": VIDEOS, "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(IDS, **arguments)
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for other in others:
        assert torch.equal(other.generate(IDS, **arguments), expected)
    with torch.no_grad():
        output = other(input_ids=IDS, pixel_values_videos=VIDEOS)
    for again in (copy.deepcopy(output), pickle.loads(pickle.dumps(output))):
        assert torch.equal(again.logits, output.logits) and torch.equal(again.keep_mask, output.keep_mask)


def test_copies_of_a_processor(tmp_path):
    _, processor = tiny_checkpoint(tmp_path / "model")
    video = str(write_video(tmp_path / "v.mp4"))
    expected = processor(text="<|video_pad|>What?", videos=video, return_tensors="pt")
    for other in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        inputs = other(text="<|video_pad|>What?", videos=video, return_tensors="pt")
        assert all(torch.equal(torch.as_tensor(inputs[name]), torch.as_tensor(expected[name])) for name in expected)


class TestMaskOfPadding:
    """As Transformers does for text, what is padding is inferred where no mask is given."""

    def padded(self):
        ids = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS], dim=1)
        return ids, (ids != 0).long()

    @pytest.mark.parametrize("selection", [{}, {"keep_frames": 2}])
    def test_it_is_inferred(self, model, selection):
        ids, mask = self.padded()
        arguments = {"pixel_values_videos": VIDEOS, "max_new_tokens": 4, "do_sample": False, **selection}
        out = model.generate(ids, **arguments)
        assert torch.equal(out, model.generate(ids, attention_mask=mask, **arguments))
        assert torch.equal(out[:, 3:], model.generate(IDS, **arguments))
        assert torch.equal(out, model.generate(input_ids=ids, pad_token_id=0, **arguments))

    def test_a_token_that_ends_answers_is_none(self, model):
        ids, _ = self.padded()
        arguments = {"pixel_values_videos": VIDEOS, "max_new_tokens": 2, "do_sample": False}
        everything = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=[1, 0], **arguments)
        assert torch.equal(model.generate(ids, eos_token_id=[1, 0], **arguments), everything)


class TestLogitsAndLabels:
    def test_positions_of_each_row(self, model):
        ids, videos = IDS.repeat(2, 1), random_videos(2, 6)
        inputs = {"input_ids": ids, "pixel_values_videos": videos, "delta_threshold": 0.0}
        logits = model(**inputs).logits
        positions = torch.tensor([[0, 3], [5, 1]])
        kept = model(**inputs, logits_to_keep=positions).logits
        assert torch.equal(kept, torch.stack([logits[0, [0, 3]], logits[1, [5, 1]]]))
        from_the_end = positions - torch.tensor([[0, IDS.shape[1]]])
        assert torch.equal(model(**inputs, logits_to_keep=from_the_end).logits, kept)
        assert torch.equal(model(**inputs, logits_to_keep=torch.tensor([4, 2])).logits, logits[:, [4, 2]])
        assert torch.equal(model(**inputs, logits_to_keep=2).logits, logits[:, -2:])

    def test_shifted_labels(self, model):
        inputs = {"input_ids": IDS, "pixel_values_videos": VIDEOS}
        labels = IDS.masked_fill(IDS == VIDEO_TOKEN, -100)
        shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        for selection in ({"delta_threshold": 0.0}, {"keep_frames": 2}):
            expected = model(**inputs, labels=labels, **selection).loss
            loss = model(**inputs, labels=labels, shift_labels=shifted, **selection).loss
            torch.testing.assert_close(loss, expected)
        # Where labels are shifted already, the first of `labels` may count.
        rolled = shifted.roll(1, dims=1)
        loss = model(**inputs, labels=shifted, shift_labels=shifted, delta_threshold=0.0).loss
        torch.testing.assert_close(loss, model(**inputs, labels=rolled, delta_threshold=0.0).loss)
