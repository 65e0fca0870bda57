"""Records from files and datasets, and what is no conversation."""

import json

import datasets
import pytest
import torch
from conversations import BROKEN, IMAGE, MIXED, TEXT, VIDEO, record

from mambamia_hf.training import load_records, open_dataset, parse_record


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

    @pytest.mark.parametrize(
        ("text", "parts"),
        [
            ("<image>\nWhat?", [0, "What?"]),
            ("What?\n<image>", ["What?", 0]),
            ("Is <image> it?", ["Is", 0, "it?"]),
            ("What?", [0, "What?"]),
            ("", [0]),
        ],
    )
    @pytest.mark.parametrize(
        ("kind", "media"),
        [("video", {"video": "a.mp4"}), ("image", {"image": "a.jpg"}), ("video", {"image": "a.mp4", "video": None})],
    )
    def test_where_a_medium_stands(self, text, parts, kind, media):
        """As LLaVA-Video-178K, LLaVA-Pretrain and VISTA have it."""
        messages, found = parse_record(record("7", text, "This.", "And?", "That.", **media))
        content = [{"type": "text", "text": part} if part else {"type": kind} for part in parts]
        assert messages[0]["content"] == content and len(messages) == 4
        assert found == [(kind, "a.jpg" if kind == "image" else "a.mp4")]

    def test_several_media(self):
        videos = ["a.mp4", "b.mp4"]
        messages, media = parse_record(record("7", "First.", "Yes?", "Then?", "No.", video=videos))
        assert messages[0]["content"] == [{"type": "video"}, {"type": "video"}, {"type": "text", "text": "First."}]
        assert media == [("video", "a.mp4"), ("video", "b.mp4")]
        messages, media = parse_record(record("7", "<image> or", "What?", "<video>?", "No.", video=videos))
        assert [message["content"][0]["type"] for message in messages] == ["video", "text", "video", "text"]
        assert media == [("video", "a.mp4"), ("video", "b.mp4")]

    @pytest.mark.parametrize("names", [("system", "human", "gpt"), ("system", "user", "assistant")])
    def test_what_the_assistant_says_first_is_left_out(self, names):
        system, user, assistant = names
        turns = [(system, "Be brief."), (assistant, "Hi."), (user, "Hello."), (assistant, "Yes?")]
        for first in (0, 1, 2):
            one = {"conversations": [{"from": name, "value": text} for name, text in turns[first:]], "video": "a.mp4"}
            messages, _ = parse_record(one)
            texts = [message["content"][-1]["text"] for message in messages]
            assert texts == ["Be brief.", "Hello.", "Yes?"][min(first, 1) :]
            assert messages[-2]["content"][0] == {"type": "video"}

    def test_roles(self):
        conversation = [{"from": "system", "value": "Be brief."}, *record("7", "Hello.", "Hi.")["conversations"]]
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
            (
                record("7", "<video>?", "This.", video=["a", "b"]),
                "1 placeholders <video> in its text and 2 of `video`",
            ),
            (record("7", "<image>?", "This.", image="a", video="b"), "0 placeholders <video> in its text and 1"),
            (record("7", "<image><image>?", "No.", image="a", video="b"), "2 placeholders <image> in its text and 1"),
            (record("7", "What?", "This.", image="a", video="b"), "'7' has `image` and `video` and no placeholder"),
            (record("7", "<image>?", "This.", image="a.mp4", video="b.mp4"), "'7' has the video 'a.mp4' in `image`"),
            (record("7", "<image>?", "This.", image=["a.jpg", "b.MP4"]), "'7' has the video 'b.MP4' in `image`"),
            ({"id": "7", "conversations": [{"from": "gpt", "value": "Hi."}]}, "'7' has no turn of the user"),
            ({"id": "7", "conversations": [{"from": "system", "value": "Hi."}]}, "ends with a turn of the system"),
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

    @pytest.mark.parametrize("content", [b'{"id": 1}\n{"id": 2}', b'{"id": 1}', b"[1, 2]", b"\xff"])
    def test_other_files(self, tmp_path, content):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.json (is not JSON|holds no list of records)"):
            load_records([tmp_path / "a.json"])


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
    def test_undecodable_files_within_a_dataset(self, collator, media_folder, tmp_path, streaming, caplog):
        image, video = (media_folder / "a.png").read_bytes(), (media_folder / "a.mp4").read_bytes()
        features = datasets.Features(
            id=datasets.Value("string"),
            image=[datasets.Image()],
            video=datasets.Video(),
            conversations=[{"from": datasets.Value("string"), "value": datasets.Value("string")}],
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

    def test_turns_as_a_sequence(self, tmp_path):
        """Which `datasets` gives as a dictionary of lists."""
        turns = datasets.Sequence({"from": datasets.Value("string"), "value": datasets.Value("string")})
        features = datasets.Features(id=datasets.Value("string"), video=datasets.Value("string"), conversations=turns)
        (tmp_path / "data").mkdir()
        lists = {name: [turn[name] for turn in VIDEO["conversations"]] for name in ("from", "value")}
        dataset = datasets.Dataset.from_list([{**VIDEO, "conversations": lists}], features)
        dataset.to_parquet(tmp_path / "data" / "train.parquet")
        (one,) = open_dataset([tmp_path / "data"])
        assert isinstance(one["conversations"], dict) and parse_record(one) == parse_record(VIDEO)

    def test_several_datasets(self):
        with pytest.raises(ValueError, match=r"The data are a, b; give .* one \.yaml file"):
            open_dataset(["a", "b"])
        with pytest.raises(FileNotFoundError, match=r"no data file at 'gone\.json'; check the path"):
            open_dataset(["gone.json"])
