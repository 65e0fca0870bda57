"""Mixtures of data sets: which records an epoch has, where their media are, and what is refused."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conversations import IMAGE, MIXED, TEXT, VIDEO, arguments, record
from pages import code_with
from published_data import write_llava_video, write_vista
from training_runs import losses, run

from mambamia_hf.training import ConversationCollator, MediaReader, features, load_mixture, open_dataset
from mambamia_hf.training.mixtures import MixtureEntry


GUIDE = Path(__file__).parents[2] / "docs" / "training.md"


def write(folder, yaml, **files):
    """Writes a YAML file, and JSON files of ten records each or as given."""
    for name, records in files.items():
        records = [record(f"{name}{number}", "Hello.", "Hi.") for number in range(10)] if records is None else records
        (folder / f"{name}.json").write_text(json.dumps(records))
    (folder / "mixture.yaml").write_text(yaml)
    return folder / "mixture.yaml"


def ids(mixture):
    return [one["id"] for one in mixture]


def numbered(name, numbers):
    return [f"{name}{number}" for number in numbers]


class TestChoice:
    @pytest.mark.parametrize(
        ("strategy", "expected"),
        [
            ("all", range(10)),
            ("first:3", range(3)),
            ("first: 30%", range(3)),
            ("first:25%", range(3)),  # rounded up, as LLaVA-NeXT does
            ("first:0.5%", range(1)),
            ("first:1000", range(10)),
            ("end:3", range(7, 10)),
            ("end:100%", range(10)),
        ],
    )
    def test_in_order(self, tmp_path, strategy, expected):
        file = write(tmp_path, f"datasets:\n- json_path: a.json\n  sampling_strategy: '{strategy}'", a=None)
        assert ids(load_mixture(file)) == numbered("a", expected)

    def test_random(self, tmp_path):
        entries = "".join(f"\n- json_path: {name}.json\n  sampling_strategy: random:40%" for name in "ab")
        file = write(tmp_path, "datasets:" + entries, a=None, b=None)
        drawn = ids(load_mixture(file, seed=1))
        assert drawn == ids(load_mixture(file, seed=1)) and len(drawn) == len(set(drawn)) == 8
        assert drawn == sorted(drawn)
        places = [[name[1:] for name in drawn if name[0] == data] for data in "ab"]
        assert places[0] != places[1]
        assert len({tuple(ids(load_mixture(file, seed=seed))) for seed in range(8)}) > 4

    @pytest.mark.parametrize("weight", [0.3, 1, 2, 2.3])
    def test_weights(self, tmp_path, weight):
        file = write(
            tmp_path, f"datasets:\n- json_path: a.json\n  weight: {weight}\n- json_path: b.json", a=None, b=None
        )
        counts = Counter(ids(load_mixture(file)))
        assert sum(counts[name] for name in numbered("a", range(10))) == 10 * weight
        assert all(int(weight) <= counts[name] <= weight + 1 for name in numbered("a", range(10)))
        assert all(counts[name] == 1 for name in numbered("b", range(10)))

    def test_a_weight_of_0_leaves_out(self, tmp_path):
        file = write(tmp_path, "datasets:\n- json_path: a.json\n- {json_path: gone.json, weight: 0}", a=None)
        assert ids(load_mixture(file)) == numbered("a", range(10))

    def test_other_entries_and_folders_change_nothing(self, tmp_path):
        """Nor does another process: what is drawn is that of the seed and the name."""
        entry = "\n- {json_path: a.json, sampling_strategy: 'random:5', weight: 1.5}"
        drawn = ids(load_mixture(write(tmp_path, f"datasets:{entry}", a=None)))
        (tmp_path / "other").mkdir()
        file = write(tmp_path / "other", f"datasets:\n- json_path: b.json{entry}", a=None, b=None)
        assert ids(load_mixture(file))[10:] == drawn
        code = f"from mambamia_hf.training import load_mixture; print([r['id'] for r in load_mixture({str(file)!r})])"
        for seed in "01":
            environment = {**os.environ, "PYTHONHASHSEED": seed}
            process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
            assert process.stdout.strip() == str(ids(load_mixture(file))), process.stderr

    def test_names_in_braces(self, tmp_path):
        (tmp_path / "{a}.json").write_text("[]")
        (tmp_path / "c.jsonl").write_text(json.dumps(record("c", "Hello.", "Hi.")))
        file = write(tmp_path, "datasets:\n- json_path: '{b,a}.json'\n- json_path: c.json{l}", a=[VIDEO], b=[TEXT])
        assert ids(load_mixture(file)) == ["text", "video", "c"]
        assert open_dataset([tmp_path / "{a,b}.json"]) == [VIDEO, TEXT] and open_dataset([tmp_path / "{a}.json"]) == []


class TestMedia:
    def test_media_folders(self, processor, media_folder, tmp_path):
        (tmp_path / "deep").symlink_to(media_folder)
        yaml = "datasets:\n- {json_path: a.json, media_folder: deep}\n- json_path: b.json\n  media_folder: "
        parts = {"video": {"path": "a.mp4", "video_start": 1.0}}
        cut = {**record("cut", "<video>?", "Yes."), **parts}
        file = write(tmp_path, f"{yaml}{media_folder}", a=[VIDEO, MIXED, TEXT], b=[IMAGE, cut])
        mixture = load_mixture(file)
        assert mixture[0]["video"] == str(tmp_path / "deep" / "a.mp4")
        assert mixture[1]["video"] == [str(tmp_path / "deep" / name) for name in ("a.mp4", "b.mp4")]
        assert mixture[4]["video"] == {"path": str(media_folder / "a.mp4"), "video_start": 1.0}
        batch = ConversationCollator(processor, MediaReader(processor))(list(mixture))
        collator = ConversationCollator(processor, MediaReader(processor, media_folder))
        expected = collator([VIDEO, MIXED, TEXT, IMAGE, cut])
        assert all(torch.equal(batch[name], expected[name]) for name in expected)

    def test_another_root(self, tmp_path):
        """Paths stay relative, so that features can be carried to another machine."""
        yaml = "datasets:\n- {json_path: a.json, media_folder: deep}\n- json_path: b.json"
        other = record("other", "<image>?", "Yes.", image="https://host/a.png")
        mixture = load_mixture(write(tmp_path, yaml, a=[VIDEO, other], b=[IMAGE]), media_folder="media")
        assert [mixture[0]["video"], mixture[1]["image"], mixture[2]["image"]] == [
            os.path.join("deep", "a.mp4"),
            "https://host/a.png",
            "a.png",
        ]

    def test_configurations_of_a_dataset(self, processor, tmp_path):
        """As on the Hub: the README says which configurations and splits there are."""
        data = write_llava_video(tmp_path / "LLaVA-Video-178K", ("0_30_s",))
        yaml = "datasets:"
        for config, split in (("academic", "caption"), ("academic", "open_ended"), ("youtube", "multi_choice[:1]")):
            subset = f"0_30_s_{config}_v0_1"
            yaml += f"\n- name: LLaVA-Video-178K\n  config: {subset}\n  split: '{split}'"
            yaml += f"\n  media_folder: LLaVA-Video-178K/{subset}"
        mixture = load_mixture(write(tmp_path, yaml))
        names = ("academic_v0_1_cap", "academic_oe_v0_1_qa", "youtube_mc_v0_1_qa")
        subsets = [data / f"0_30_s_{name.split('_')[0]}_v0_1" for name in names]
        expected = []
        for name, subset in zip(names, subsets, strict=True):
            records = json.loads((subset / f"0_30_s_{name}_processed.json").read_text())
            expected += [{**one, "video": str(subset / one["video"])} for one in records]
        assert list(mixture) == expected[:5]
        batch = ConversationCollator(processor, MediaReader(processor, num_frames=3))(list(mixture))
        assert batch["pixel_values_videos"].shape[:2] == (5, 3)

    def test_the_example_of_the_guide(self, tmp_path):
        """With folders in place of what it names on the Hub."""
        write_llava_video(tmp_path / "lmms-lab" / "LLaVA-Video-178K", ("0_30_s",))
        subset = tmp_path / "LLaVA-Video-178K" / "0_30_s_nextqa"
        subset.mkdir(parents=True)
        for task in ("oe", "mc"):
            records = [record(f"{task}{number}", "<image>?", "Yes.", video="a.mp4") for number in range(20)]
            (subset / f"0_30_s_nextqa_{task}_qa_processed.json").write_text(json.dumps(records))
        drawn = ids(load_mixture(write(tmp_path, code_with(GUIDE, "yaml", "json_path"))))
        assert len(drawn) == 4 + 5 and drawn[4:] == 5 * ["AC587"] and len(set(drawn[:4])) == 4

    def test_several_configurations_and_none_named(self, tmp_path):
        data = write_llava_video(tmp_path / "data", ("0_30_s",))
        with pytest.raises(
            ValueError, match="Config name is missing.*0_30_s_academic_v0_1.*`config` and `split` in a YAML"
        ):
            open_dataset([data])
        yaml = "datasets:\n- {name: data, config: 0_30_s_academic_v0_1, split: captions}"
        with pytest.raises(ValueError, match='Entry 1 of .* cannot be loaded .Unknown split "captions"'):
            load_mixture(write(tmp_path, yaml))

    def test_vista(self, processor, tmp_path):
        write_vista(tmp_path / "VISTA-400K")
        yaml = "datasets:\n- {json_path: VISTA-400K/temporal_niah_qa.json, media_folder: VISTA-400K/temporal_niah_qa}"
        (one,) = load_mixture(write(tmp_path, yaml))
        batch = ConversationCollator(processor, MediaReader(processor, num_frames=4))([one])
        assert batch["pixel_values_videos"].shape[:2] == (1, 4)
        assert processor.decode(batch["labels"][0][batch["labels"][0] >= 0]) == "A<|im_end|>"


class TestRefused:
    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ("json_path: gone.json", r"There is no data file at '.*gone\.json'; check the path"),
            ("json_path: '{a,gone}.json'", r"There is no data file at '.*gone\.json'"),
            ("json_path: a.json\n  sampling_strategy: last:10", "sampling_strategy is 'last:10' and has to be"),
            ("json_path: a.json\n  sampling_strategy: first", "sampling_strategy is 'first' and has to be"),
            ("json_path: a.json\n  sampling_strategy: first:-3", "sampling_strategy is 'first:-3' and has to be"),
            ("json_path: a.json\n  sampling_strategy: first:1.5", "sampling_strategy is 'first:1.5' and has to be"),
            ("json_path: a.json\n  sampling_strategy: {first: 3}", "{'first': 3} and has to be a text"),
            ("json_path: a.json\n  sampling_strategy: random:101%", "'random:101%', more than 100 %; give a weight"),
            (
                "json_path: a.json\n  sampling_strategy: end:0",
                "nothing is left of its 10 records by .*'end:0'",
            ),
            ("json_path: a.json\n  weight: 0.01", "nothing is left of its 10 records by .*'all' and weight 0.01"),
            ("json_path: empty.json", "nothing is left of its 0 records"),
            ("json_path: a.json\n  weight: -1", "weight is -1 and has to be a number from 0 on"),
            ("json_path: a.json\n  weight: .nan", "weight is nan and has to be"),
            ("json_path: a.json\n  weight: '2'", "weight is '2' and has to be"),
            ("json_path: a.json\n  weight: true", "weight is True and has to be"),
            (
                "json_path: a.json\n  weights: 2\n  folder: b",
                "it has weights, folder, and the keys are json_path",
            ),
            ("json_path: a.json\n  name: b", "either json_path, for a file, or name"),
            ("weight: 2", "either json_path, for a file, or name"),
            ("json_path: a.json\n  split: train", "config and split are those of a data set of the Hub"),
            ("a.json", "it is 'a.json' and has to have some of the keys json_path"),
            ("json_path: mixture.yaml", r"mixture\.yaml is not JSON"),
        ],
    )
    def test_entries(self, tmp_path, entry, message):
        file = write(tmp_path, f"datasets:\n- json_path: a.json\n- {entry}", a=None, empty=[])
        message = f"Entry 2 of '.*mixture.yaml' cannot be used: .*{message}"
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_mixture(file)

    @pytest.mark.parametrize(
        ("yaml", "message"),
        [
            ("datasets: [", r"mixture\.yaml' is not YAML: while parsing"),
            (
                "datasets:\n- json_path: a.json\n  json_path: b.json",
                "json_path is there twice; begin each entry with a dash",
            ),
            ("", "has no keys and is no mixture of data sets; write `datasets:`"),
            ("stage: align\ndata: a.json", "has stage, data and is no mixture"),
            ("datasets: []", "has datasets and is no mixture"),
            ("datasets: a.json", "has datasets and is no mixture"),
            ("datasets:\n- {json_path: a.json, weight: 0}", r"All weights in '.*mixture\.yaml' are 0"),
        ],
    )
    def test_files(self, tmp_path, yaml, message):
        with pytest.raises(ValueError, match=message):
            load_mixture(write(tmp_path, yaml))

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no data file at '.*gone\.yaml'"):
            open_dataset([tmp_path / "gone.yaml"])

    def test_as_a_stream_or_beside_others(self, tmp_path):
        file = write(tmp_path, "datasets:\n- json_path: a.json", a=None)
        with pytest.raises(ValueError, match=r"mixture\.yaml' cannot be read as a stream; leave --streaming out"):
            open_dataset([file], streaming=True)
        with pytest.raises(ValueError, match=r"give \.json and \.jsonl files, one \.yaml file"):
            open_dataset([file, file])


MIXTURE = """
datasets:
- {json_path: data.json, sampling_strategy: "first:6", weight: 1.5}
- {json_path: data.json, sampling_strategy: "random:50%"}
"""


@pytest.fixture
def mixture(training_folder):
    file = training_folder / "mixture.yaml"
    file.write_text(MIXTURE)
    return file


def test_a_run_that_goes_on_has_the_same_records(training_folder, mixture, tmp_path):
    settings = {"data": mixture.name, "seed": 7, "save_strategy": "steps", "save_steps": 2}
    unbroken = run(training_folder, tmp_path, "align", **settings)
    checkpoint = tmp_path / "checkpoint-2"
    resumed = run(training_folder, tmp_path / "again", "align", resume_from_checkpoint=checkpoint, **settings)
    assert losses(resumed) == losses(unbroken)
    other = run(training_folder, tmp_path / "other", "align", data=mixture.name, seed=8)
    assert losses(other) != losses(unbroken)


def test_features_of_a_mixture(training_folder, mixture, tmp_path):
    """Those of the seed, of paths that are relative to a media folder."""
    command = {"model": training_folder / "model", "data": mixture, "num_workers": 0, "seed": 7}
    command |= {"media_folder": training_folder, "num_frames": 3, "output": tmp_path / "features"}
    features.main(arguments(**command))
    settings = {"data": mixture.name, "stage": "align", "seed": 7}
    expected = losses(run(training_folder, tmp_path / "pixels", **settings))
    got = run(training_folder, tmp_path / "run", features=tmp_path / "features", media_folder="nowhere", **settings)
    assert losses(got) == pytest.approx(expected, rel=1e-3)
    mixture.write_text(MIXTURE.replace("50%", "100%"))
    with pytest.raises(ValueError, match=r"There are no features of '.*' of sample '.*' in .*; run"):
        run(training_folder, tmp_path / "more", features=tmp_path / "features", media_folder="nowhere", **settings)


def test_what_an_entry_calls_itself():
    assert MixtureEntry(name="a/b", config="c", split="d").title == "a/b c d"
