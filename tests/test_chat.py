"""Conversations about a video give what `generate` gives for the whole conversation, from what was read before."""

import sys
import threading
import time
from contextlib import closing
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from tiny_model import TEXT_CONFIG, random_videos, tiny_config, tiny_processor

from mambamia_hf import MambaMiaForConditionalGeneration
from mambamia_hf.chat import VideoChat
from mambamia_hf.versions import CACHE_NAME
from mambamia_hf.video_memory import VideoMemory


NUM_FRAMES, KEPT, NEW_TOKENS = 12, 5, 12
QUESTIONS = ["What is shown?", "And then? \n", "Why is that, and what else is shown?"]

COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.2, "eos_token_id": None}
ATTENTION = {**COMMON, "intermediate_size": 64, "num_attention_heads": 4, "max_position_embeddings": 2048}
GROUPED = {**ATTENTION, "num_key_value_heads": 2}
STATE_SPACE = {**COMMON, "num_heads": 4, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 16}
LINEAR = {f"linear_{name}": 8 for name in ("key_head_dim", "value_head_dim")}
LINEAR |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
# Caches that can be cut back, that lose what leaves a window, and that are a state.
LANGUAGE_MODELS = {
    "qwen2": {"model_type": "qwen2", **GROUPED},
    "qwen2, windows": {"model_type": "qwen2", **GROUPED, "use_sliding_window": True, **WINDOW},
    "mistral, windows": {"model_type": "mistral", **GROUPED, "sliding_window": 16},
    "gpt_neox": {"model_type": "gpt_neox", **ATTENTION},
    "gemma3, windows": {"model_type": "gemma3_text", **GROUPED, "head_dim": 8, **WINDOW},
    "mamba2": {"model_type": "mamba2", **STATE_SPACE},
    "qwen3_next, hybrid": {
        "model_type": "qwen3_next",
        **GROUPED,
        **LINEAR,
        "head_dim": 16,
        "num_experts": 0,
        "layer_types": ["linear_attention", "full_attention"],
    },
}


def build(text: dict, **kwargs) -> tuple[MambaMiaForConditionalGeneration, object]:
    processor = tiny_processor()
    vocabulary = {"vocab_size": len(processor.tokenizer), "pad_token_id": processor.tokenizer.pad_token_id}
    # Settings of another model would stay in the configuration without a word.
    config = tiny_config(image_token_id=processor.image_token_id, video_token_id=processor.video_token_id, **kwargs)
    settings = config.to_dict()
    settings["text_config"] = {**text, **vocabulary}
    torch.manual_seed(0)
    return MambaMiaForConditionalGeneration(type(config).from_dict(settings)).eval(), processor


def remember(model, processor, num_frames: int = NUM_FRAMES) -> VideoMemory:
    inputs = {
        "pixel_values_videos": random_videos(1, num_frames),
        "video_timestamps": 0.5 * torch.arange(num_frames, dtype=torch.float64)[None],
    }
    return model.encode_video(inputs, processor)


@pytest.fixture(scope="module", params=LANGUAGE_MODELS)
def any_model(request):
    """A model with each kind of cache, its processor, and a memory."""
    model, processor = build(LANGUAGE_MODELS[request.param])
    return model, processor, remember(model, processor)


@pytest.fixture(scope="module")
def qwen2():
    model, processor = build({**TEXT_CONFIG, "max_position_embeddings": 512})
    return model, processor, remember(model, processor)


def new_chat(parts, **kwargs) -> VideoChat:
    return VideoChat(*parts, **{"keep_frames": KEPT, "max_new_tokens": NEW_TOKENS, **kwargs})


def whole_prompt(parts, messages, **kwargs):
    """What the processor makes of a conversation that ends with a question."""
    _, processor, memory = parts
    messages = deepcopy(messages)
    messages[0]["content"][0]["video"] = memory
    return processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=kwargs or {"keep_frames": KEPT},
    )


def from_scratch(parts, messages, **kwargs) -> str:
    """The answer that `generate` gives to the whole conversation."""
    model, processor, _ = parts
    inputs = whole_prompt(parts, messages, **kwargs)
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_three_turns_are_those_from_scratch(any_model):
    chat = new_chat(any_model)
    answers = [chat.ask(question) for question in QUESTIONS]
    assert len(set(answers)) > 1
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 3
    for turn, answer in enumerate(answers):
        assert chat.messages[2 * turn + 1]["content"] == [{"type": "text", "text": answer}]
        assert answer == from_scratch(any_model, chat.messages[: 2 * turn + 1])


def test_logits_are_those_from_scratch(any_model):
    """Of the last answer, from the cache that the next question would go on from."""
    model, processor, _ = any_model
    chat = new_chat(any_model)
    for question in QUESTIONS:
        chat.ask(question)
    inputs = whole_prompt(any_model, chat.messages[:-1])
    expected = model(**inputs).logits[:, -1]
    prompt = chat._prompt(chat.messages[:-1])
    assert [prompt] == inputs["input_ids"].tolist()
    cache = chat._cache_for(prompt)
    if cache is None:
        pytest.skip("this language model reads the whole conversation")
    assert len(chat._prefix.ids) <= cache.get_seq_length() < len(prompt)
    rest = torch.tensor([prompt[cache.get_seq_length() :]])
    torch.testing.assert_close(model(rest, **{CACHE_NAME: cache}).logits[:, -1], expected, atol=1e-4, rtol=1e-4)


def test_forks_and_many_questions_know_nothing_of_each_other(any_model):
    model = any_model[0]
    chat = new_chat(any_model)
    alone = [new_chat(any_model).ask(question) for question in QUESTIONS]
    chat.ask("What else?")
    assert [chat.fork().ask(question) for question in QUESTIONS] == alone
    implementation = model.model.language_model.config._attn_implementation
    assert chat.ask_many(QUESTIONS) == alone
    assert model.model.language_model.config._attn_implementation == implementation
    assert chat.ask_many([]) == []
    assert len(chat.messages) == 2 and chat.fork().messages == []


def test_many_questions_by_the_rules_of_generation(qwen2):
    """Answers that end early, and penalties that depend on the prompt."""
    model, processor, _ = qwen2
    chat = new_chat(qwen2)
    first = processor.tokenizer(new_chat(qwen2).ask(QUESTIONS[0]), add_special_tokens=False)["input_ids"]
    before = deepcopy(model.generation_config)
    model.generation_config.eos_token_id = first[len(first) // 2]
    model.generation_config.repetition_penalty = 1.5
    model.generation_config.no_repeat_ngram_size = 2
    try:
        alone = [chat.fork().ask(question) for question in QUESTIONS]
        assert chat.ask_many(QUESTIONS) == alone
    finally:
        model.generation_config = before
    assert alone != chat.ask_many(QUESTIONS)


def test_more_questions_than_at_once(qwen2, monkeypatch):
    chat = new_chat(qwen2)
    together = chat.ask_many(QUESTIONS)
    monkeypatch.setattr("mambamia_hf.chat._QUESTIONS_AT_ONCE", 2)
    assert chat.ask_many(QUESTIONS) == together


def test_the_video_is_read_once(qwen2):
    model = qwen2[0]
    lengths = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    try:
        chat = new_chat(qwen2)
        assert lengths == []
        for question in QUESTIONS:
            chat.ask(question)
        chat.fork().ask(QUESTIONS[0])
        chat.fork().ask_many(QUESTIONS)
    finally:
        handle.remove()
    assert [length for length in lengths if length >= KEPT * 4] and max(lengths[1:]) < max(lengths) + 200
    prefix = len(chat._prefix.ids)
    assert lengths.count(prefix) == 1
    # No turn reads what the turns before have read, but for what is tokenised in another way.
    turns = [length for length in lengths[1:] if length > 1]
    assert all(length < prefix + 60 for length in turns[:3])


def test_a_dialogue_that_is_tokenised_as_it_was_written_goes_on_from_its_end(qwen2):
    """Where an answer's text gives its tokens again, only the new turn is read."""
    model, processor, memory = qwen2
    chat = new_chat(qwen2)
    chat.ask(QUESTIONS[0])
    cached = list(chat._cached)
    prompt = chat._tokens([*chat.messages, {"role": "user", "content": [{"type": "text", "text": "Why?"}]}])
    common = next(place for place, pair in enumerate(zip(cached, prompt, strict=False)) if pair[0] != pair[1])
    cache = chat._cache_for(prompt)
    assert cache.get_seq_length() == common
    assert cached[:common] == prompt[:common] and common >= len(chat._prefix.ids)


@pytest.mark.parametrize("selection", [{}, {"keep_frames": 3}, {"keep_ratio": 0.5}, {"delta_threshold": 0.0}])
def test_selections(qwen2, selection):
    model, processor, memory = qwen2
    chat = new_chat(qwen2, **{"keep_frames": None, **selection})
    kwargs = {"delta_min_frames": 0} if "delta_threshold" in selection else {}
    features = model.get_video_features(video_memories=[memory], **selection, **kwargs)
    assert chat.kept_frames == features.keep_mask[0].nonzero().flatten().tolist()
    assert chat.video_tokens == 4 * len(chat.kept_frames)
    assert chat.memory is memory
    if "delta_threshold" not in selection:
        answer = chat.ask(QUESTIONS[0])
        budget = selection or {"keep_frames": None}
        assert answer == from_scratch(qwen2, chat.messages[:1], **budget)


def test_a_budget_of_the_processor(qwen2):
    model, processor, memory = qwen2
    processor.keep_frames = 4
    try:
        assert len(new_chat(qwen2, keep_frames=None).kept_frames) == 4
        assert len(new_chat(qwen2, keep_frames=6).kept_frames) == 6
        assert len(new_chat(qwen2, keep_frames=None, delta_threshold=0.0).kept_frames) == NUM_FRAMES
    finally:
        processor.keep_frames = None


def test_other_frames_in_the_middle_of_a_conversation(qwen2):
    chat = new_chat(qwen2)
    first = chat.ask(QUESTIONS[0])
    other = chat.with_selection(keep_frames=8)
    assert other.messages == chat.messages and len(other.kept_frames) == 8
    answer = other.ask(QUESTIONS[1])
    assert other.messages[1]["content"][0]["text"] == first
    assert answer == from_scratch(qwen2, other.messages[:3], keep_frames=8)
    assert len(chat.messages) == 2


def test_pieces_are_the_answer(qwen2):
    chat, other = new_chat(qwen2), new_chat(qwen2)
    for question in QUESTIONS:
        pieces = list(chat.stream(question))
        assert len(pieces) > 1 and all(pieces)
        assert "".join(pieces) == other.ask(question)
    assert chat.messages == other.messages


@pytest.mark.parametrize("stop", ["close", "interrupt"])
def test_a_cut_answer_is_what_is_remembered(any_model, stop):
    chat = new_chat(any_model)
    written = {question: list(new_chat(any_model).stream(question)) for question in QUESTIONS}
    question = max(written, key=lambda question: len(written[question]))
    if len(written[question]) < 3:
        pytest.skip("this untrained model writes parts of characters")
    whole = "".join(written[question])
    pieces = chat.stream(question)
    cut = next(pieces) + next(pieces)
    if stop == "close":
        pieces.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            pieces.throw(KeyboardInterrupt())
    assert whole.startswith(cut) and len(cut) < len(whole)
    assert chat.messages[1]["content"] == [{"type": "text", "text": cut}]
    answer = chat.ask(QUESTIONS[1])
    assert answer == from_scratch(any_model, chat.messages[:3])


def ctrl_c_at(moment: int):
    """A profiler that raises `KeyboardInterrupt` where Python looks for Ctrl-C for the n-th time in our module and
    those of threads: as a function begins, and as one of C has returned."""
    left = moment

    def profile(frame, event, _):
        nonlocal left
        module = Path(frame.f_code.co_filename).name
        # Python's own `Condition` does not stand it everywhere.
        is_ours = module == "chat.py" or (
            module in ("thread.py", "threading.py") and not isinstance(frame.f_locals.get("self"), threading.Condition)
        )
        begins = event == "call" and frame.f_lasti <= 0  # and does not go on, as a generator
        if is_ours and (begins or event == "c_return"):
            left -= 1
            if left == 0:
                sys.setprofile(None)
                raise KeyboardInterrupt

    return profile


def num_threads() -> int:
    """How many run; `active_count` goes on to count those that Ctrl-C kept from starting."""
    return sum(thread.is_alive() for thread in threading.enumerate())


def test_ctrl_c_at_any_moment(qwen2):
    """The conversation goes on from what was given, and nothing goes on in the background."""
    chat = new_chat(qwen2, max_new_tokens=4)
    expected, threads, moment, is_stopped = chat.ask(QUESTIONS[0]), num_threads(), 0, True
    while is_stopped:
        moment, chat, given, is_stopped = moment + 1, chat.fork(), "", False
        try:
            sys.setprofile(ctrl_c_at(moment))
            with closing(chat.stream(QUESTIONS[0])) as pieces:
                for piece in pieces:
                    given += piece
        except KeyboardInterrupt:
            is_stopped = True
        finally:
            sys.setprofile(None)
        assert expected.startswith(given)
        if chat.messages:
            assert chat.messages[1]["content"][0]["text"].startswith(given)
            chat.messages = []
        else:
            assert not given
        assert chat.ask(QUESTIONS[0]) == expected
        while num_threads() > threads:  # a thread that was just starting ends by itself
            time.sleep(0.01)
    assert given == expected and moment > 50, moment


def test_a_question_that_was_not_answered_leaves_no_trace(qwen2, monkeypatch):
    model = qwen2[0]
    chat = new_chat(qwen2)
    expected = [new_chat(qwen2).ask(QUESTIONS[0]), chat.ask(QUESTIONS[0])]
    messages = chat.messages

    def fail(*arguments, **kwargs):
        raise RuntimeError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(model.lm_head, "forward", fail)
        with pytest.raises(RuntimeError, match="no memory left"):
            chat.ask(QUESTIONS[1])
    assert chat.messages == messages
    answer = chat.ask(QUESTIONS[1])
    assert answer == from_scratch(qwen2, chat.messages[:3]) and expected[0] == expected[1]


def test_two_answers_at_a_time_are_refused(qwen2):
    chat = new_chat(qwen2)
    pieces = chat.stream(QUESTIONS[0])
    next(pieces)
    with pytest.raises(ValueError, match="still answering"):
        chat.ask(QUESTIONS[1])
    assert chat.fork().ask(QUESTIONS[1])
    pieces.close()
    assert chat.ask(QUESTIONS[1])


def test_forks_in_threads(qwen2):
    chat = new_chat(qwen2)
    expected = [chat.fork().ask(question) for question in QUESTIONS]
    answers = {}
    fresh = new_chat(qwen2)

    def ask(fork, question):
        answers[question] = fork.ask(question)

    threads = [threading.Thread(target=ask, args=(fresh.fork(), question)) for question in QUESTIONS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[question] for question in QUESTIONS] == expected


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (" ", "the question is empty"),
        ("What is <|video_pad|>?", "stands for a video; leave it out"),
        ("What is <|image_pad|>?", "stands for an image; leave it out"),
        ("What? " * 200, "would not fit into the 512 of the language model"),
    ],
)
def test_questions_that_cannot_be_asked(qwen2, question, message):
    chat = new_chat(qwen2)
    with pytest.raises(ValueError, match=message):
        chat.ask(question)
    with pytest.raises(ValueError, match=message):
        chat.ask_many([QUESTIONS[0], question])
    assert chat.messages == []
    assert chat.ask(QUESTIONS[0]) == new_chat(qwen2).ask(QUESTIONS[0])


def test_a_conversation_that_grows_too_long_says_so_before(qwen2):
    chat = new_chat(qwen2, max_new_tokens=80)
    with pytest.raises(ValueError, match="begin a new one"):
        for _ in range(20):
            chat.ask(QUESTIONS[2])
    assert len(chat._cached) + 1 <= 512
    assert chat.fork().ask(QUESTIONS[0])


def test_evidence_is_the_attention_of_the_last_turn(qwen2):
    """Also of a later turn, and in parts of another length."""
    model, processor, memory = qwen2
    chat = new_chat(qwen2)
    for question in QUESTIONS[:2]:
        chat.ask(question)
        rows = chat.evidence(count=KEPT)
        tokens = chat._tokens(chat.messages, add_generation_prompt=False)
        before = chat._tokens(chat.messages[:-2], add_generation_prompt=False) if len(chat.messages) > 2 else []
        start = len(before) or len(chat._prefix.ids)
        assert tokens[: len(before)] == before
        model.model.language_model.set_attn_implementation("eager")
        try:
            output = model(
                torch.tensor([tokens]), mm_encoder_outputs={"video": chat._prefix.features}, output_attentions=True
            )
        finally:
            model.model.language_model.set_attn_implementation("sdpa")
        attention = torch.stack(output.attentions)[:, 0, :, start:].mean(dim=(0, 1, 2))
        frames = attention[torch.tensor(tokens) == processor.video_token_id].view(KEPT, -1).sum(dim=1)
        frames = frames / frames.sum()
        expected = dict(zip(chat.kept_frames, frames.tolist(), strict=True))
        assert [row["frame"] for row in rows] == sorted(expected, key=expected.get, reverse=True)
        for row in rows:
            assert row["attention"] == pytest.approx(expected[row["frame"]], abs=1e-5)
            assert row["time"] == memory.timestamps[row["frame"]]
            assert row["delta"] == float(memory.frame_deltas[row["frame"]])
    assert chat.evidence() == rows[:3]


def test_evidence_without_attention_is_delta():
    parts = build(LANGUAGE_MODELS["mamba2"])
    parts = (*parts, remember(*parts))
    chat = new_chat(parts)
    with pytest.raises(ValueError, match="no answer yet"):
        chat.evidence()
    chat.ask(QUESTIONS[2])
    rows = chat.evidence(count=KEPT)
    assert all(row["attention"] is None for row in rows)
    deltas = [float(parts[2].frame_deltas[frame]) for frame in chat.kept_frames]
    assert [row["delta"] for row in rows] == sorted(deltas, reverse=True)


def test_no_evidence_without_both():
    parts = build(LANGUAGE_MODELS["mamba2"], compressor_config={"num_temporal_layers": 0}, delta_threshold=None)
    parts = (*parts, remember(*parts))
    chat = new_chat(parts, keep_frames=None)
    chat.ask(QUESTIONS[0])
    with pytest.raises(ValueError, match="no Δ"):
        chat.evidence()


def test_a_saved_memory_and_one_of_another_model(qwen2, tmp_path):
    model, processor, memory = qwen2
    memory.save(tmp_path / "video.safetensors")
    chat = new_chat((model, processor, tmp_path / "video.safetensors"))
    assert chat.ask(QUESTIONS[0]) == new_chat(qwen2).ask(QUESTIONS[0])
    torch.manual_seed(1)
    other = MambaMiaForConditionalGeneration(model.config).eval()
    for source in (memory, tmp_path / "video.safetensors"):
        with pytest.raises(ValueError, match="weights of the vision tower"):
            VideoChat(other, processor, source)


@pytest.mark.parametrize("time_format", ["mm:ss", "mm:ss.d"])
def test_a_model_that_writes_times(time_format):
    processor = tiny_processor()
    from mambamia_hf.frame_times import time_token_ids

    model, processor = build(
        {**TEXT_CONFIG, "max_position_embeddings": 2048},
        frame_time_format=time_format,
        time_token_ids=time_token_ids(processor.tokenizer, time_format),
    )
    processor.frame_time_format = time_format
    parts = (model, processor, remember(model, processor))
    chat = new_chat(parts)
    assert chat.video_tokens == KEPT * processor.placeholders_per_frame
    for turn, question in enumerate(QUESTIONS):
        assert chat.ask(question) == from_scratch(parts, chat.messages[: 2 * turn + 1])
    assert chat.ask_many(QUESTIONS) == [chat.fork().ask(question) for question in QUESTIONS]
    assert len(chat.evidence()) == 3
