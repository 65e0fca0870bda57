"""vLLM answers as Transformers does: the same text, as many tokens, the first of them as likely."""

import functools
import gc
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from asked_of_both import MAX_NEW_TOKENS, Transformers, Vllm, check_same, conversation, for_servers, image, video
from pages import code_with
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from tiny import tiny_tokenizer
from tiny_model import IMAGE_SIZE, tiny_config, tiny_processor
from transformers import SiglipImageProcessor
from video_files import draw_number, write_video

from mambamia_hf import (
    BUNDLED_CHECKPOINT,
    MambaMiaForConditionalGeneration,
    MambaMiaProcessor,
    MambaMiaVideoProcessor,
)
from mambamia_hf.frame_times import time_token_ids


if find_spec("vllm") is None:
    pytest.skip("needs vLLM", allow_module_level=True)

# One process, no compiled code: an engine starts in seconds. Only here: in a run without vLLM, the tests after these
# would compile nothing either.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import vllm


pytestmark = pytest.mark.slow

DEMO = Path(BUNDLED_CHECKPOINT).parent / "demo" / "needle.mp4"
ON_CPU = {"enforce_eager": True, "distributed_executor_backend": "uni", "gpu_memory_utilization": 0.2}
# vLLM's attention on CPUs takes heads of 32 and more.
TEXT = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
SHAPE = "What shape appears in the video?"


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Videos and images by name, in one folder, which servers may read."""
    folder = tmp_path_factory.mktemp("media")
    needle = folder / "needle.mp4"
    needle.write_bytes(DEMO.read_bytes())
    files = {
        "needle": video(needle),
        "short": video(write_video(folder / "short.mp4", num_frames=20)),
        "longer": video(write_video(folder / "longer.mp4", num_frames=90)),
        # An hour: more frames than are sampled, not equally far apart.
        "hour": video(write_video(folder / "hour.mp4", 3300, fps=1, times=[n**1.01 for n in range(3300)])),
    }
    for number, name in enumerate(("red", "blue")):
        path = folder / f"{name}.png"
        picture = Image.fromarray(draw_number(37 + 1000 * number, 96, 128))
        picture.paste(name, (30, 30, 66, 66))
        picture.save(path)
        files[name] = image(path)
    files["folder"] = folder
    return files


def engine(checkpoint, media, **kwargs):
    """vLLM's engine in this process, with steps that are shorter than a video."""
    settings = {
        **ON_CPU,
        "dtype": "float32",
        "max_num_batched_tokens": 48,
        "max_num_seqs": 8,
        "limit_mm_per_prompt": {"image": 2, "video": 2},
        "allowed_local_media_path": str(media["folder"]),
        "seed": 0,
    }
    return vllm.LLM(str(checkpoint), **{**settings, **kwargs})


def served(checkpoint, media, budget=(), **kwargs):
    """A checkpoint in Transformers, whose processor is told a budget, and in vLLM."""
    from vllm.distributed import cleanup_dist_env_and_memory

    model = MambaMiaForConditionalGeneration.from_pretrained(checkpoint)
    both = Transformers(model, MambaMiaProcessor.from_pretrained(checkpoint), **dict(budget))
    llm = engine(checkpoint, media, **kwargs)
    sampling = vllm.SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS, logprobs=0)
    yield both, Vllm(llm, sampling)
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def bundled(media):
    """The checkpoint of the package: one token and a time per frame, every frame unless a request has a budget."""
    yield from served(BUNDLED_CHECKPOINT, media, max_model_len=4096)


def write_checkpoint(folder: Path, time_format: str | None = None, **config) -> Path:
    """A checkpoint of random weights with 4 anchors per frame."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    tokenizer = tiny_tokenizer()
    config = tiny_config(
        text_config={
            **TEXT,
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            **config.pop("text", {}),
        },
        vision_config=config.pop("vision", {}),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        frame_time_format=time_format,
        time_token_ids=None if time_format is None else time_token_ids(tokenizer, time_format),
        **config,
    )
    torch.manual_seed(0)
    MambaMiaForConditionalGeneration(config).save_pretrained(folder)
    MambaMiaProcessor(
        image_processor=SiglipImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=MambaMiaVideoProcessor(size=size, num_frames=24),
        tokens_per_frame=config.tokens_per_frame(),
        frame_time_format=time_format,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The name of a folder for an adapter of `timed`, made by PEFT."""
    return tmp_path_factory.mktemp("adapter")


@pytest.fixture(scope="module")
def timed(media, adapter, tmp_path_factory):
    """Four tokens and the time of each frame; the threshold of the checkpoint is replaced by the server's budget."""
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("timed"), "mm:ss.d")
    model = MambaMiaForConditionalGeneration.from_pretrained(checkpoint)
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules=r".*language_model.*(q|v)_proj", init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(adapter)
    settings = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1}
    budget = {"keep_ratio": 0.5}
    yield from served(checkpoint, media, budget, mm_processor_kwargs=budget, max_model_len=512, **settings)


@pytest.fixture(scope="module")
def vicuna(media, tmp_path_factory):
    """Like the paper's second model: Llama, CLIP with its class token, and a vector after each frame; a budget in the
    model's own configuration."""
    llama = {"model_type": "llama", "tie_word_embeddings": True}
    clip = {"model_type": "clip_vision_model"}
    budget = {"delta_threshold": None, "keep_frames": 5}
    folder = tmp_path_factory.mktemp("vicuna")
    checkpoint = write_checkpoint(folder, text=llama, vision=clip, end_of_frame=True, **budget)
    yield from served(checkpoint, media, {"keep_frames": 5}, max_model_len=512)


QUESTIONS = {
    "video": ("needle", SHAPE),
    "short video": ("short", "What is shown?"),
    "an hour": ("hour", "What is shown?"),
    "image": ("red", "What colour is it?"),
    "two images": ("red", "blue", "Are they the same?"),
    "image and video": ("red", "needle", SHAPE),
    "video, text, image": ("longer", "and", "blue", "what?"),
    "two videos": ("short", "needle", "Which is longer?"),
    "the same video twice": ("short", "then", "short", "what?"),
    "text": ("What is shown?",),
}
OPTIONS = {
    "keep_ratio": {"keep_ratio": 0.25},
    "keep_frames": {"keep_frames": 7},
    "one frame": {"keep_frames": 1},
    "more than there are": {"keep_frames": 1000},
    "of videos only": {"videos_kwargs": {"keep_frames": 3}},
    "fps": {"fps": 0.5},
    "max_frames": {"max_frames": 10, "keep_ratio": 1.0},
    "num_frames": {"num_frames": 12, "keep_frames": 4},
    "a part": {"video_start": 1.0, "video_end": 3.5},
    "key frames": {"seek_mode": "keyframe", "max_frames": 6},
}
MODELS = ("bundled", "timed", "vicuna")


@pytest.fixture
def both(request):
    return request.getfixturevalue(request.param)


def parts(media, names):
    return [media.get(name, name) for name in names]


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("both", MODELS, indirect=True)
def test_media(both, media, question):
    transformers, engine = both
    asked = parts(media, QUESTIONS[question])
    check_same(engine.ask(asked), transformers.ask(asked))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("both", MODELS, indirect=True)
def test_options(both, media, options):
    transformers, engine = both
    asked = parts(media, ("longer", "What is shown?"))
    expected = dict(OPTIONS[options])
    budget = {"keep_frames", "keep_ratio"} & {*expected, *expected.get("videos_kwargs", {})}
    server, transformers.server = transformers.server, {} if budget else transformers.server
    try:
        check_same(engine.ask(asked, **OPTIONS[options]), transformers.ask(asked, **expected))
    finally:
        transformers.server = server


@pytest.mark.parametrize("both", MODELS, indirect=True)
def test_many_at_once(both, media):
    """Videos of different lengths and budgets in one step, among images and text."""
    transformers, engine = both
    asked = [parts(media, QUESTIONS[name]) for name in ("video", "short video", "image", "text", "two videos")]
    prompts = [
        {"prompt": transformers.processor.apply_chat_template(conversation(question), add_generation_prompt=True)}
        for question in asked
    ]
    loader = vllm.multimodal.video.VIDEO_LOADER_REGISTRY.load("mambamia")
    budgets = [{"keep_frames": 2}, {"keep_frames": 3}, {}, {}, {"keep_frames": 4}]
    for prompt, question, budget in zip(prompts, asked, budgets, strict=True):
        files = [part for part in question if isinstance(part, dict)]
        data = {
            "video": [loader.load_bytes(Path(file["path"]).read_bytes()) for file in files if file["type"] == "video"],
            "image": [Image.open(file["path"]) for file in files if file["type"] == "image"],
        }
        prompt["multi_modal_data"] = {kind: items for kind, items in data.items() if items}
        prompt["mm_processor_kwargs"] = budget
    transformers.server, server = {}, transformers.server
    try:
        for answer, question, budget in zip(engine.generate(prompts), asked, budgets, strict=True):
            check_same(answer, transformers.ask(question, **budget))
    finally:
        transformers.server = server


def test_budgets_do_not_mix(timed, media):
    """The same video with other budgets and questions: what was cached belongs to one budget."""
    transformers, engine = timed
    transformers.server = {}
    try:
        for keep_frames in (2, 5, 2, 5):
            for text in ("What is shown?", "When?"):
                asked = parts(media, ("longer", text))
                budget = {"keep_frames": keep_frames}
                check_same(engine.ask(asked, **budget), transformers.ask(asked, **budget))
    finally:
        transformers.server = {"keep_ratio": 0.5}


def test_prefixes_are_cached(bundled, media):
    transformers, engine = bundled
    for text in ("What shape appears in the video?", "What colour is it?"):
        asked = parts(media, ("hour", text))
        (output,) = engine.chat([for_servers(asked)])
        check_same(engine._answer(output), transformers.ask(asked))
    assert output.num_cached_tokens >= 256  # most of the frames of the video


def test_adapters(timed, media, adapter):
    """An adapter of the language model, loaded as PEFT has written it."""
    from vllm.lora.request import LoRARequest

    transformers, engine = timed
    asked = parts(media, ("longer", "What is shown?"))
    without = transformers.ask(asked)
    adapted = PeftModel.from_pretrained(transformers.model, adapter)
    try:
        expected = Transformers(adapted, transformers.processor, keep_ratio=0.5).ask(asked)
    finally:
        adapted.unload()
    assert abs(expected.logprob - without.logprob) > 0.01
    (output,) = engine.chat([for_servers(asked)], lora_request=LoRARequest("tuned", 1, str(adapter)))
    check_same(engine._answer(output), expected)
    check_same(engine.ask(asked), without)


def frames(num_frames: int) -> np.ndarray:
    return np.stack([draw_number(number) for number in range(num_frames)])


@pytest.mark.parametrize(
    "about",
    [
        {"fps": 4.0},
        {"fps": 1.0, "total_num_frames": 90, "frames_indices": list(range(0, 90, 3)), "do_sample_frames": False},
        {"timestamps": [number**1.1 for number in range(30)], "do_sample_frames": False},
    ],
    ids=["rate", "sampled", "times"],
)
@pytest.mark.parametrize("both", ("bundled", "timed"), indirect=True)
def test_frames(both, about):
    """Frames that somebody has decoded, with what is known of them."""
    transformers, engine = both
    prompt = transformers.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What is shown?"}]}],
        add_generation_prompt=True,
    )
    known = dict(about)
    sampling = {name: known.pop(name) for name in ("do_sample_frames",) if name in known}
    inputs = transformers.processor(
        text=prompt,
        videos=[frames(30)],
        video_metadata=[known],
        return_tensors="pt",
        **{**transformers.server, **sampling},
    )
    (answer,) = engine.generate([{"prompt": prompt, "multi_modal_data": {"video": [(frames(30), about)]}}])
    check_same(answer, transformers.generate(inputs))


def test_frames_without_times(vicuna, timed):
    prompt = "<|vision_start|><|video_pad|><|vision_end|>What?"
    inputs = {"prompt": prompt, "multi_modal_data": {"video": frames(30)}}
    transformers, engine = vicuna
    (answer,) = engine.generate([inputs])
    processed = transformers.processor(text=prompt, videos=[frames(30)], return_tensors="pt", **transformers.server)
    check_same(answer, transformers.generate(processed))
    with pytest.raises(ValueError, match="frame_time_format='mm:ss.d' needs the time of each frame"):
        timed[1].generate([inputs])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_frame": 4}, "did you mean 'keep_frames'"),
        ({"budget": 4}, "no option 'budget': leave it out"),
        ({"videos_kwargs": {"keep_frame": 4}}, "did you mean 'keep_frames'"),
        ({"keep_frames": 0}, "keep_frames must be a whole number of at least 1, not 0"),
        ({"keep_frames": "many"}, "keep_frames"),
        ({"keep_ratio": 2}, "keep_ratio must lie above 0"),
        ({"keep_frames": 4, "keep_ratio": 0.5}, "not both"),
        ({"size": {"height": 64, "width": 64}}, "leave `size` as the checkpoint has it"),
        ({"num_frames": 1000}, "`num_frames=1000` cannot be sampled"),
        ({"video_start": 1000}, "The video ends after"),
    ],
    ids=str,
)
def test_bad_options_are_refused(timed, media, options, message):
    transformers, engine = timed
    asked = parts(media, ("short", "What is shown?"))
    with pytest.raises(ValueError, match=message):
        engine.ask(asked, **options)
    check_same(engine.ask(asked), transformers.ask(asked))


def test_bad_media_are_refused(timed, media):
    transformers, engine = timed
    text = media["folder"] / "text.mp4"
    text.write_text("no video")
    with pytest.raises(ValueError, match="cannot be read as a video"):
        engine.ask([video(text), "What?"])
    with pytest.raises(ValueError, match=r"The prompt has 2 <\|video_pad\|> for 1 videos"):
        engine.ask([media["short"], "<|video_pad|>"])
    with pytest.raises(ValueError, match=r"the model reads at most 512 \(max_model_len\): keep fewer frames"):
        engine.ask([media["needle"], media["needle"], "What?"], keep_ratio=1.0)
    broken = frames(8).astype(np.float32)
    broken[3, 5, 5] = np.nan
    with pytest.raises(ValueError, match="pixel_values_videos"):
        engine.generate([{"prompt": "<|video_pad|>", "multi_modal_data": {"video": [(broken, {"fps": 1.0})]}}])
    check_same(engine.ask([media["short"], "What?"]), transformers.ask([media["short"], "What?"]))


def test_sampling_is_no_option_of_loading(media):
    loader = vllm.multimodal.video.VIDEO_LOADER_REGISTRY.load("mambamia")
    with pytest.raises(ValueError, match="use mm_processor_kwargs in its place"):
        loader.load_bytes(b"", num_frames=64)


def test_wrong_numbers_of_tokens_are_refused(timed):
    def check(model):
        video = {
            "pixel_values_videos": torch.zeros(1, 4, 3, IMAGE_SIZE, IMAGE_SIZE),
            "num_kept_frames": torch.tensor([2]),
            "video_time_ids": torch.zeros(1, 4, 7, dtype=torch.long),
        }
        right = model.embed_multimodal(**video, num_video_tokens=torch.tensor([22]))
        assert [len(tokens) for tokens in right] == [22]
        with pytest.raises(RuntimeError, match=r"gave \[22\] tokens and have \[33\] placeholders"):
            model.embed_multimodal(**video, num_video_tokens=torch.tensor([33]))

    timed[1].llm.apply_model(check)


def test_documented_program(media, monkeypatch, capsys):
    """The program of docs/vllm.md, with the settings of these tests beside its own."""
    page = Path(__file__).parents[2] / "docs" / "vllm.md"
    code = code_with(page, "python", "from vllm")
    monkeypatch.setattr(vllm, "LLM", functools.partial(vllm.LLM, **ON_CPU))
    exec(code.replace("/videos/video.mp4", media["needle"]["path"]).replace("/videos", str(media["folder"])), {})
    assert capsys.readouterr().out.splitlines()[-1] == "star"


def test_backend_for_models_of_transformers_is_refused(media, tmp_path):
    """Also where a checkpoint brings its code."""
    checkpoint = write_checkpoint(tmp_path, delta_threshold=None)
    with pytest.raises(ValueError, match="install the package mambamia_hf beside vLLM"):
        engine(checkpoint, media, model_impl="transformers", trust_remote_code=True)


def test_threshold_is_refused_at_load(media, tmp_path):
    checkpoint = write_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"delta_threshold=0.3 of this checkpoint .* set a budget in its place"):
        engine(checkpoint, media)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"keep_frame": 4}, "did you mean 'keep_frames'"), ({"keep_ratio": 2}, "keep_ratio must lie above 0")],
    ids=str,
)
def test_bad_options_are_refused_at_load(media, options, message):
    with pytest.raises(ValueError, match=message):
        engine(BUNDLED_CHECKPOINT, media, mm_processor_kwargs=options)


def test_other_language_models_are_refused_at_load(media, tmp_path):
    checkpoint = write_checkpoint(
        tmp_path, text={"model_type": "gpt_neox", "num_key_value_heads": 2}, delta_threshold=None
    )
    with pytest.raises(ValueError, match="is a gpt_neox, and those that run in vLLM are llama and qwen2"):
        engine(checkpoint, media)


def test_lines_about_times_are_refused_at_load(media, tmp_path):
    checkpoint = write_checkpoint(tmp_path, delta_threshold=None)
    tiny_processor(time_instruction=True).save_pretrained(checkpoint)
    with pytest.raises(ValueError, match="time_instruction=True of this checkpoint's processor"):
        engine(checkpoint, media)
