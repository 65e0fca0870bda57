"""Evaluation while a model trains: what is measured, when, and that the training does not notice."""

import copy
import json
from pathlib import Path

import pytest
import torch
from conversations import BROKEN, IMAGE, MISSING, MIXED, TEXT, VIDEO, record
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from training_runs import losses, run
from transformers import AutoModelForImageTextToText, AutoProcessor, EvalPrediction, Trainer, TrainingArguments

from mambamia_hf.training import ConversationCollator, MediaReader, features
from mambamia_hf.training.arguments import parse_arguments
from mambamia_hf.training.collator import reported_samples
from mambamia_hf.training.evaluation import AnswerMetrics, EvaluationSet, answer_statistics, scored_places


METRICS = ("eval_loss", "eval_accuracy", "eval_token_accuracy", "eval_samples", "eval_skipped")


def evaluations(trainer: Trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "eval_loss" in entry]


def metrics(entry: dict) -> dict[str, float]:
    return {name: entry[name] for name in METRICS}


def measured_alone(model: nn.Module, collator: ConversationCollator, records: list[dict]) -> dict[str, float]:
    """The metrics, from the whole scores of every sample on its own."""
    tokens, right, loss, whole, samples, dropped = 0, 0, 0.0, 0, 0, 0
    for one in records:
        batch = collator([one])
        answers = batch["labels"][0, 1:] != -100
        if not answers.any():
            continue
        with torch.no_grad():
            output = model.eval()(**batch)
        dropped += output.token_indices is not None
        scores, targets = output.logits[0, :-1][answers], batch["labels"][0, 1:][answers]
        loss += nn.functional.cross_entropy(scores, targets, reduction="sum").item()
        hits = scores.argmax(dim=-1) == targets
        tokens, right = tokens + len(hits), right + int(hits.sum())
        samples, whole = samples + 1, whole + bool(hits.all())
    assert dropped, "the selection should drop frames of some video"
    values = (loss / tokens, whole / samples, right / tokens, samples, len(records) - samples)
    return dict(zip(METRICS, values, strict=True))


class TestStatistics:
    LABELS = torch.tensor([[-100, 5, 7, -100, 2], [3, -100, -100, -100, -100], [-100, -100, -100, 6, 9]])

    def test_at_the_places_that_count_or_at_all(self):
        places = scored_places(self.LABELS)
        assert places.tolist() == [[-5, -4, -2], [0, 0, 0], [-3, -2, 0]]
        logits = torch.randn(3, 5, 10)
        logits[0, 0, 5] = logits[2, 2, 6] = logits[2, 3, 9] = 20.0
        logits[0, 1, 8] = logits[0, 3, 0] = 20.0
        whole = answer_statistics(logits, self.LABELS)
        assert whole[:, :2].tolist() == [[3, 1], [0, 0], [2, 2]]
        expected = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), self.LABELS[:, 1:].flatten(), reduction="none"
        )
        torch.testing.assert_close(whole[:, 2], expected.view(3, 4).sum(dim=1))
        kept = logits.take_along_dim(places[..., None] % 5, dim=1)
        assert torch.equal(answer_statistics(kept, self.LABELS), whole)
        # As `Trainer` pads both, where other processes have longer ones.
        padded = nn.functional.pad(kept, (0, 0, 0, 2), value=-100), nn.functional.pad(self.LABELS, (0, 3), value=-100)
        assert torch.equal(answer_statistics(*padded), whole)

    def test_nothing_to_score(self):
        labels = torch.full((2, 1), -100)
        assert scored_places(labels).shape == (2, 0)
        assert answer_statistics(torch.zeros(2, 0, 10), labels).tolist() == [[0, 0, 0]] * 2
        assert answer_statistics(torch.zeros(2, 1, 10), labels).tolist() == [[0, 0, 0]] * 2

    def test_batch_by_batch(self):
        statistics = torch.tensor([[3, 3, 1.5], [0, 0, 0], [1, 0, 2.5]])
        expected = {"loss": 1.0, "accuracy": 0.5, "token_accuracy": 0.75, "samples": 2, "skipped": 1}
        collect = AnswerMetrics()
        for _ in range(2):  # the second evaluation knows nothing of the first
            assert collect(EvalPrediction(statistics[:2], None), compute_result=False) == {}
            assert collect(EvalPrediction(statistics[2:].numpy(), None), compute_result=True) == expected
        assert collect(EvalPrediction([statistics[:1].numpy(), statistics[1:].numpy()], None)) == expected

    def test_nothing_that_could_be_read(self):
        with pytest.raises(ValueError, match="None of the 4 evaluation samples can be read"):
            AnswerMetrics()(EvalPrediction(torch.zeros(4, 3), None))

    def test_scores_that_are_no_numbers(self):
        with pytest.raises(ValueError, match="The loss on the evaluation data is nan"):
            AnswerMetrics()(EvalPrediction(torch.tensor([[2, 1, float("nan")]]), None))


class TestBatches:
    def test_every_record_has_its_row(self, collator, tmp_path):
        collator.report = tmp_path / "samples_0.jsonl"
        records = EvaluationSet([BROKEN, VIDEO, TEXT, MISSING])
        batch = collator([records[index] for index in range(4)])
        assert (batch["labels"] != -100).any(dim=1).tolist() == [False, True, True, False]
        assert batch["attention_mask"].sum(dim=1)[[0, 3]].tolist() == [1, 1]
        learned_from = collator([VIDEO, TEXT])
        for name in ("input_ids", "labels", "attention_mask"):
            assert torch.equal(batch[name][1:3], learned_from[name])
        assert torch.equal(batch["logits_to_keep"], scored_places(batch["labels"]))
        assert "logits_to_keep" not in learned_from
        assert {name for name, _ in reported_samples(tmp_path)["not evaluated"]} == {"broken", "missing"}
        assert not reported_samples(tmp_path)["skipped"]

    def test_neither_gaps_nor_cuts(self, collator, processor):
        records = list(EvaluationSet([VIDEO, TEXT, MIXED]))
        whole = collator(records)
        other = ConversationCollator(processor, collator.media, max_length=10, length_scale=8.0)(records)
        assert other.keys() == whole.keys() and torch.equal(other["labels"], whole["labels"])

    def test_they_do_not_count_for_the_training(self, collator):
        records = list(EvaluationSet([MISSING] * 25))
        collator(records)
        collator(list(EvaluationSet([TEXT])))
        for _ in range(19):
            collator([MISSING])
        with pytest.raises(ValueError, match="None of the first 20 samples can be used"):
            collator([MISSING])

    def test_the_model_scores_these_places_alone(self, collator, model):
        records = list(EvaluationSet([VIDEO, BROKEN, MIXED, IMAGE, TEXT]))
        batch = collator(records)
        places = batch.pop("logits_to_keep")
        with torch.no_grad():
            whole = model(**batch)
            kept = model(**batch, logits_to_keep=places)
        assert whole.token_indices is not None and kept.logits.shape[1] == places.shape[1] < whole.logits.shape[1] / 4
        labels = batch["labels"]
        torch.testing.assert_close(answer_statistics(kept.logits, labels), answer_statistics(whole.logits, labels))
        torch.testing.assert_close(kept.loss, whole.loss)

    @pytest.mark.parametrize("config", [PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig])
    def test_a_learned_prompt_moves_no_places(self, collator, model, config):
        model = get_peft_model(copy.deepcopy(model), config(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
        batch = collator(list(EvaluationSet([TEXT, BROKEN, record("long", "Hello.", "Hi! And again: hi!")])))
        places, labels = batch.pop("logits_to_keep"), batch["labels"]
        with torch.no_grad():
            whole, kept = model(**batch), model(**batch, logits_to_keep=places)
        for output in (whole, kept):
            tokens, _, losses = answer_statistics(output.logits, labels).sum(dim=0)
            torch.testing.assert_close(losses / tokens, whole.loss)


@pytest.fixture(scope="module")
def learner(training_folder, tmp_path_factory) -> Path:
    """A model that has learned some of the answers."""
    folder = tmp_path_factory.mktemp("learner")
    run(training_folder, folder, learning_rate=3e-3, max_steps=24, per_device_train_batch_size=6)
    return folder


@pytest.fixture(scope="module")
def expected(training_folder, learner) -> dict[str, float]:
    model = AutoModelForImageTextToText.from_pretrained(learner)
    processor = AutoProcessor.from_pretrained(learner)
    collator = ConversationCollator(processor, MediaReader(processor, training_folder, num_frames=3))
    return measured_alone(model, collator, json.loads((training_folder / "data.json").read_text()))


def evaluate(folder: Path, output: Path, **settings) -> Trainer:
    """Evaluates on what is trained on, whose 12 samples are not a multiple of the batches."""
    settings = {"eval_data": folder / "data.json", "per_device_eval_batch_size": 5, **settings}
    return run(folder, output, **settings)


class TestMetrics:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"per_device_eval_batch_size": 1},
            {"batch_eval_metrics": True},
            {"eval_accumulation_steps": 1, "dataloader_num_workers": 2},
            {"eval_do_concat_batches": False},
            {"length_scale": 4.0, "max_length": 60},
            {"data": "data.jsonl", "streaming": True},
            {"lora_rank": 4, "include_for_metrics": "loss"},
        ],
        ids=str,
    )
    def test_they_are_those_of_the_samples_alone(self, training_folder, learner, tmp_path, capsys, expected, settings):
        """A rate of 0 keeps the model as it is."""
        settings = {"model": learner, "max_steps": 1, "learning_rate": 0.0, **settings}
        trainer = evaluate(training_folder, tmp_path, **settings)
        (entry,) = evaluations(trainer)
        assert metrics(entry) == pytest.approx(expected, rel=1e-4)
        assert 0 < entry["eval_accuracy"] < entry["eval_token_accuracy"] < 1
        assert entry["eval_samples"] == 11 and entry["eval_skipped"] == 1
        assert ", 1 could not be evaluated;" in capsys.readouterr().out

    def test_a_model_that_knows_the_answers(self, training_folder, tmp_path):
        (tmp_path / "data.json").write_text(json.dumps([record("text", "Hello.", "Hi!")]))
        settings = {"learning_rate": 1e-2, "max_steps": 40, "lr_scheduler_type": "constant", "eval_on_start": True}
        trainer = evaluate(
            training_folder, tmp_path, data=tmp_path / "data.json", eval_data=tmp_path / "data.json", **settings
        )
        before, after = evaluations(trainer)
        assert (before["eval_accuracy"], after["eval_accuracy"], after["eval_token_accuracy"]) == (0.0, 1.0, 1.0)
        assert after["eval_loss"] < 0.5 < before["eval_loss"]

    def test_features_in_place_of_pixels(self, training_folder, learner, tmp_path, expected):
        features.main(
            [
                *("--model", str(learner), "--data", str(training_folder / "data.json")),
                *("--media_folder", str(training_folder), "--num_frames", "3", "--num_workers", "0"),
                *("--output", str(tmp_path / "features")),
            ]
        )
        settings = {
            "features": tmp_path / "features",
            "media_folder": "nowhere",
            "learning_rate": 0.0,
            "model": learner,
        }
        trainer = evaluate(training_folder, tmp_path / "run", max_steps=1, **settings)
        assert metrics(evaluations(trainer)[0]) == pytest.approx(expected, rel=1e-2)
        other = record("other", "<image>\nWhat?", "Nothing.", image="elsewhere.png")
        (tmp_path / "other.json").write_text(json.dumps([other]))
        with pytest.raises(ValueError, match="no features of 'elsewhere.png' of sample 'other'"):
            evaluate(training_folder, tmp_path / "none", eval_data=tmp_path / "other.json", **settings)

    def test_a_trainer_of_ones_own(self, training_folder, learner, tmp_path, expected):
        folder, processor = training_folder, AutoProcessor.from_pretrained(learner)
        trainer = Trainer(
            AutoModelForImageTextToText.from_pretrained(learner),
            TrainingArguments(tmp_path, per_device_eval_batch_size=5, remove_unused_columns=False, use_cpu=True),
            eval_dataset=EvaluationSet(json.loads((folder / "data.json").read_text())),
            data_collator=ConversationCollator(processor, MediaReader(processor, folder, num_frames=3)),
            compute_metrics=AnswerMetrics(),
            preprocess_logits_for_metrics=answer_statistics,
        )
        assert metrics(trainer.evaluate()) == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope="module")
def random_model(training_folder, tmp_path_factory) -> Path:
    """A model whose training draws random numbers wherever it can."""
    folder = tmp_path_factory.mktemp("random")
    model = AutoModelForImageTextToText.from_pretrained(training_folder / "model")
    model.config.frame_dropout = 0.8
    model.config.compressor_config.gpa_dropout = 0.3
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(training_folder / "model").save_pretrained(folder)
    return folder


class TestTraining:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_it_goes_on_as_without_evaluation(self, training_folder, random_model, tmp_path, workers):
        settings = {"model": random_model, "dataloader_num_workers": workers, "length_scale": 4.0, "max_steps": 6}
        alone = run(training_folder, tmp_path / "alone", **settings)
        more = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1}
        evaluated = evaluate(training_folder, tmp_path / "evaluated", **settings, **more)
        assert len(evaluations(evaluated)) == 7 and len(set(losses(alone))) == 6
        assert losses(evaluated) == losses(alone)
        weights = [load_file(tmp_path / name / "model.safetensors") for name in ("alone", "evaluated")]
        assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())

    def test_resuming(self, training_folder, random_model, tmp_path):
        settings = {"model": random_model, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
        settings |= {"eval_strategy": "steps", "eval_steps": 1}
        unbroken = evaluate(training_folder, tmp_path, **settings)
        checkpoint = tmp_path / "checkpoint-2"
        resumed = evaluate(training_folder, tmp_path / "again", resume_from_checkpoint=checkpoint, **settings)
        assert losses(resumed) == losses(unbroken)
        assert [metrics(entry) for entry in evaluations(resumed)] == [
            metrics(entry) for entry in evaluations(unbroken)
        ]

    def test_seconds_of_evaluation_are_not_those_of_training(self, training_folder, tmp_path, monkeypatch):
        from mambamia_hf.training import logs

        clock = iter(range(0, 10**6, 100))
        monkeypatch.setattr(logs.time, "perf_counter", lambda: next(clock))
        callback = logs.MediaLogCallback()
        callback._start = 100.0
        callback.on_evaluate(None, None, None, metrics={"eval_runtime": 30.0, "eval_loss": 1.0})
        assert callback._start == 130.0


class TestWhen:
    @pytest.mark.parametrize(
        ("settings", "steps"),
        [
            ({}, [4]),
            ({"eval_on_start": True}, [0, 4]),
            ({"eval_strategy": "steps", "eval_steps": 2}, [2, 4]),
            ({"eval_strategy": "steps", "eval_steps": 3}, [3, 4]),
            ({"eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}, [4, 8]),
            ({"eval_strategy": "epoch", "max_steps": 6}, [4, 6]),
            ({"eval_strategy": "steps", "eval_steps": 1, "eval_delay": 3}, [3, 4]),
        ],
        ids=str,
    )
    def test_steps(self, training_folder, tmp_path, settings, steps):
        trainer = evaluate(training_folder, tmp_path, stage="align", **settings)
        assert [entry["step"] for entry in evaluations(trainer)] == steps

    @pytest.mark.parametrize("lora_rank", [0, 4])
    def test_the_best_model_is_what_is_saved(self, training_folder, tmp_path, lora_rank):
        settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
        settings |= {"load_best_model_at_end": True, "metric_for_best_model": "token_accuracy", "max_steps": 5}
        settings |= {"learning_rate": 3e-2, "lr_scheduler_type": "constant", "lora_rank": lora_rank}
        trainer = evaluate(training_folder, tmp_path, **settings)
        measured = {entry["step"]: entry["eval_token_accuracy"] for entry in evaluations(trainer)}
        best = trainer.state.best_global_step
        assert measured[best] == trainer.state.best_metric == max(measured.values())
        name = "adapter_model.safetensors" if lora_rank else "model.safetensors"
        saved, kept = load_file(tmp_path / name), load_file(tmp_path / f"checkpoint-{best}" / name)
        assert saved.keys() == kept.keys() and all(torch.equal(tensor, saved[key]) for key, tensor in kept.items())

    def test_grouping_by_length_is_for_the_training(self, training_folder, tmp_path):
        datasets = pytest.importorskip("datasets")
        records = [record(f"text{number}", "Hello.", "Hi" * number) for number in range(1, 7)]
        rows = [{**one, "length": len(one["conversations"][1]["value"])} for one in records]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data" / "train.parquet")
        settings = {"train_sampling_strategy": "group_by_length", "max_steps": 1}
        trainer = evaluate(training_folder, tmp_path / "run", data=tmp_path / "data", **settings)
        assert evaluations(trainer)[0]["eval_samples"] == 11


class TestArguments:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"eval_strategy": "steps", "eval_steps": 5},
                "eval_strategy=steps needs data to evaluate on: give --eval_",
            ),
            ({"do_eval": True}, "do_eval needs data"),
            ({"eval_on_start": True}, "eval_on_start needs data"),
            (
                {"eval_data": "data.json", "prediction_loss_only": True},
                "prediction_loss_only must be False: .* cannot be read as 0",
            ),
        ],
    )
    def test_what_does_not_fit_together(self, tmp_path, settings, message):
        given = {"stage": "video", "model": "m", "data": "a.json", "output_dir": tmp_path, "use_cpu": True, **settings}
        with pytest.raises(ValueError, match=message):
            parse_arguments([text for name, value in given.items() for text in (f"--{name}", str(value))])

    def test_data_that_are_all_elsewhere(self, training_folder, tmp_path):
        missing = [record(f"{number}", "<image>?", "Yes.", image="nowhere.png") for number in range(30)]
        (tmp_path / "data.json").write_text(json.dumps(missing))
        with pytest.raises(ValueError, match="None of the first 20 evaluation samples can be used"):
            evaluate(training_folder, tmp_path / "run", eval_data=tmp_path / "data.json")
        assert len(reported_samples(tmp_path / "run")["not evaluated"]) == 20

    def test_a_split_of_a_dataset(self, training_folder, tmp_path):
        folder = tmp_path / "data"
        folder.mkdir()
        for split, count in (("train", 1), ("validation", 2), ("test", 5)):
            rows = [record(f"{split}{number}", "Hello.", "Hi!") for number in range(count)]
            (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        settings = {"eval_data": folder, "max_steps": 1}
        assert evaluations(evaluate(training_folder, tmp_path / "1", **settings))[0]["eval_samples"] == 2
        trainer = evaluate(training_folder, tmp_path / "2", eval_split="test[:3]", **settings)
        assert evaluations(trainer)[0]["eval_samples"] == 3
        with pytest.raises(ValueError, match="Unknown split"):
            evaluate(training_folder, tmp_path / "3", eval_split="elsewhere", **settings)

    def test_data_without_records(self, training_folder, tmp_path):
        (tmp_path / "data.json").write_text("[]")
        with pytest.raises(ValueError, match="evaluation data have no records"):
            evaluate(training_folder, tmp_path / "run", eval_data=tmp_path / "data.json")
