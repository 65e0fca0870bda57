"""Records to batches: what is learned, what is cut, what is skipped."""

import pytest
import torch
from conversations import BROKEN, CUT, IMAGE, MISSING, MIXED, TEXT, VIDEO, record, reported
from tiny import tiny_tokenizer
from tiny_model import NUM_ANCHORS, tiny_checkpoint, tiny_processor
from tokenizers import processors
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from mambamia_hf.training import ConversationCollator, MediaReader, parse_record
from mambamia_hf.training.collator import reported_samples


def learned(collator: ConversationCollator, labels: torch.Tensor) -> str:
    return collator.processor.decode(labels[labels != -100])


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

    def test_the_prompt_is_that_of_the_processor(self, collator, processor, media_folder):
        batch = collator([VIDEO])
        messages, _ = parse_record(VIDEO)
        messages[0]["content"][0]["path"] = str(media_folder / "a.mp4")
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

    def test_template_without_marks(self):
        processor = tiny_processor()
        processor.chat_template = "{{ messages[0]['content'] }}"
        with pytest.raises(ValueError, match="does not say which tokens the assistant's are"):
            ConversationCollator(processor)


class TestMaximumLength:
    def test_text_is_cut_and_reported(self, processor, media_folder, tmp_path):
        whole = ConversationCollator(processor, MediaReader(processor, media_folder))
        (ids,), (labels,) = (whole([VIDEO])[name] for name in ("input_ids", "labels"))
        report = tmp_path / "report.jsonl"
        length = len(ids) - 3
        collator = ConversationCollator(processor, MediaReader(processor, media_folder), length, report)
        batch = collator([VIDEO, TEXT])
        assert torch.equal(batch["input_ids"][0], ids[:length]) and torch.equal(batch["labels"][0], labels[:length])
        assert reported(report) == [("video", "cut")]

    def test_a_video_is_never_cut(self, processor, media_folder):
        whole = ConversationCollator(processor, MediaReader(processor, media_folder))([MIXED])["input_ids"][0]
        needed = 1 + int((whole == processor.video_token_id).nonzero().max())
        for length in (needed - 1, needed - 4 * NUM_ANCHORS, 10):
            collator = ConversationCollator(processor, MediaReader(processor, media_folder), length)
            with pytest.raises(
                ValueError, match=f"sample 'mixed' reach up to its token {needed} and max_length={length}"
            ):
                collator([TEXT, MIXED])

    def test_a_sample_without_anything_to_learn_is_skipped(self, processor, media_folder, tmp_path):
        whole = ConversationCollator(processor, MediaReader(processor, media_folder))([VIDEO])
        length = int((whole["labels"][0] != -100).nonzero().min())
        report = tmp_path / "report.jsonl"
        batch = ConversationCollator(processor, MediaReader(processor, media_folder), length, report)([VIDEO, TEXT])
        assert len(batch["input_ids"]) == 1 and "pixel_values_videos" not in batch
        assert reported(report) == [("video", "cut"), ("video", "skipped")]
        assert "none of its first" in report.read_text()


class TestUnusableSamples:
    def test_they_are_left_out_and_reported(self, processor, media_folder, tmp_path, caplog):
        report = tmp_path / "report.jsonl"
        collator = ConversationCollator(processor, MediaReader(processor, media_folder), report=report)
        odd = record("odd", "A <|video_pad|>?", "No.")
        batch = collator([BROKEN, VIDEO, CUT, MISSING, {"id": "no chat"}, odd, TEXT])
        expected = ConversationCollator(processor, MediaReader(processor, media_folder))([VIDEO, TEXT])
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
        skipped = ["broken", "cut", "missing", "no chat", "odd"]
        assert reported(report) == [(name, "skipped") for name in skipped]
        assert "broken.mp4' cannot be read as a video" in report.read_text()
        assert all(f"Sample '{name}' was skipped" in caplog.text for name in skipped)

    def test_a_batch_of_nothing_else_is_learned_from_as_nothing(self, collator, processor, media_folder):
        batch = collator([BROKEN, MISSING])
        assert batch["input_ids"].shape == (1, 1) and (batch["labels"] == -100).all()
        torch.manual_seed(0)
        model = tiny_checkpoint(media_folder / "model")[0].train()
        for arguments in ({}, {"num_items_in_batch": torch.tensor(0)}, {"num_items_in_batch": 5}):
            model.zero_grad()
            loss = model(**batch, **arguments).loss
            loss.backward()
            assert loss == 0
            gradients = [parameter.grad for parameter in model.model.compressor.parameters()]
            assert all(gradient is not None and (gradient == 0).all() for gradient in gradients)

    @pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>", "<|im_end|>", "<|im_start|>"])
    def test_a_text_with_a_special_token_would_be_another_conversation(self, collator, media_folder, tmp_path, token):
        collator.report = tmp_path / "report.jsonl"
        question = record("question", f"<video>\nWhat is {token}?", "A token.", video="a.mp4")
        answer = record("answer", "Hello.", f"Hi!{token}")
        assert len(collator([question, TEXT, answer])["input_ids"]) == 1
        assert reported(collator.report) == [("question", "skipped"), ("answer", "skipped")]
        assert f"its text has the special token {token} in it" in collator.report.read_text()

    def test_reports_of_all_processes_count_a_sample_once(self, processor, media_folder, tmp_path):
        for process in range(2):
            report = tmp_path / f"samples_{process}.jsonl"
            collator = ConversationCollator(processor, MediaReader(processor, media_folder), report=report)
            collator([BROKEN, TEXT, MISSING][: 2 + process])
        samples = reported_samples(tmp_path)
        assert sorted(name for name, _ in samples["skipped"]) == ["broken", "missing"] and not samples["cut"]

    def test_workers_survive(self, processor, media_folder, tmp_path):
        report = tmp_path / "report.jsonl"
        collator = ConversationCollator(processor, MediaReader(processor, media_folder), report=report)
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
        assert sorted(reported(report)) == [("broken", "skipped"), ("cut", "skipped"), ("missing", "skipped")]

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


class TestRandomness:
    RECORDS = [VIDEO, TEXT, MIXED]

    def test_nothing_is_drawn_from_the_generator_of_training(self, collator):
        """It decides about dropout, and what was read ahead must not."""
        for settings in ({}, {"length_scale": 4.0}):
            before = torch.get_rng_state()
            ConversationCollator(collator.processor, collator.media, **settings)(self.RECORDS)
            assert torch.equal(torch.get_rng_state(), before)

    def test_it_depends_on_which_samples_come_together(self, collator, processor):
        spreading = ConversationCollator(processor, collator.media, length_scale=4.0)
        once, again = spreading(self.RECORDS), spreading(self.RECORDS)
        assert torch.equal(once["position_ids"], again["position_ids"])
        other = spreading([VIDEO, IMAGE])["position_ids"]
        length = int(once["attention_mask"][0].sum())
        assert not torch.equal(other[0, :length], once["position_ids"][0, :length])

    def test_positions_leave_gaps_within_videos_only(self, collator, processor):
        batch = ConversationCollator(processor, collator.media, length_scale=4.0)(self.RECORDS)
        stretched = False
        for row, mask in enumerate(batch["attention_mask"].bool()):
            ids, positions = batch["input_ids"][row, mask], batch["position_ids"][row, mask]
            steps = positions.diff(prepend=positions.new_tensor([-1]))
            assert (steps >= 1).all() and positions.max() < 4 * len(ids)
            assert (ids[steps > 1] == processor.video_token_id).all()
            stretched |= bool((steps > 1).any())
        assert stretched
