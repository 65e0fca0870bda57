"""The program `mambamia`: questions about a video, from the command line.

Everything that takes long to import is imported where it is used, so that `--help` and wrong arguments answer at once.
"""

import argparse
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from . import BUNDLED_CHECKPOINT


if TYPE_CHECKING:
    import numpy as np
    import torch

    from . import MambaMiaForConditionalGeneration, MambaMiaProcessor


MAX_NEW_TOKENS = 256
THUMBNAIL_PIXELS = 480
DEMO_FRAMES, DEMO_KEEP_RATIO = 64, 0.5


@dataclass
class Answer:
    """What one question about one video gave.

    Args:
        answer: the text that the model wrote.
        frames: how many frames were sampled.
        selected_frames: numbers, among the sampled frames, of those whose tokens the language model read.
        timestamps: seconds from the start of the video, of each sampled frame.
        frame_deltas: Δ of each sampled frame; None for a model without a temporal layer.
        video_tokens: how many tokens of the video the language model read.
        seconds: how long each of decode, vision, compress and generate took.
    """

    answer: str
    frames: int
    selected_frames: list[int]
    timestamps: list[float]
    frame_deltas: list[float] | None
    video_tokens: int
    seconds: dict[str, float]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; the exit code is 0, or 2 after bad input, of which one line on stderr says what is wrong."""
    arguments = _build_parser().parse_args(argv)
    try:
        with _short_warnings():
            arguments.run(arguments)
    except (OSError, ValueError) as error:
        _say(f"error: {error}")
        return 2
    return 0


def ask(
    checkpoint: str | os.PathLike,
    video: str,
    question: str,
    *,
    num_frames: int | None = None,
    keep_frames: int | None = None,
    keep_ratio: float | None = None,
    delta_threshold: float | None = None,
    plot: str | os.PathLike | None = None,
) -> Answer:
    """Ask a checkpoint about a video file, on the GPU where there is one, and measure how long each stage takes.

    Args:
        checkpoint: folder or Hub id of a MambaMia checkpoint.
        video: path or URL.
        question: what to ask; the answer is decoded greedily.
        num_frames: how many frames to sample; by default as the video processor samples.
        keep_frames, keep_ratio: an exact number or share of the frames to keep.
        delta_threshold: δ of the selection, however short the video; 0 keeps every frame. Without it and a budget, the
            checkpoint's own setting holds.
        plot: a file to draw the timeline of the selection into.

    Raises:
        ValueError, OSError: for a checkpoint, a video or a plot's path that cannot be used.
    """
    import torch

    if sum(option is not None for option in (keep_frames, keep_ratio, delta_threshold)) > 1:
        raise ValueError(
            f"Give one of keep_frames, keep_ratio and delta_threshold (got {keep_frames}, {keep_ratio} and "
            f"{delta_threshold})."
        )
    if plot is not None:
        from .timeline import check_plot_path

        check_plot_path(plot)
    processor = _load_processor(checkpoint)
    if delta_threshold is not None:
        keep_ratio = 1.0  # room for every frame, whatever budget the processor was saved with
    watch = _Stopwatch()
    content = [{"type": "video", "path": str(video)}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={
            "num_frames": num_frames,
            "keep_frames": keep_frames,
            "keep_ratio": keep_ratio,
            "return_metadata": True,
            "progress": sys.stderr.isatty(),
        },
    )
    watch.lap("decode")

    model = _load_model(checkpoint)
    if plot is not None and not model.config.compressor_config.num_temporal_layers:
        raise ValueError("the checkpoint has no temporal layer and so no Δ to plot; leave out the plot.")
    selection = {}
    if delta_threshold is not None:
        selection = {"delta_threshold": delta_threshold, "delta_min_frames": 0}
    elif keep_frames is not None or keep_ratio is not None:
        selection = {"delta_threshold": 0.0}  # where the budget is all frames, no threshold takes any away
    num_frames = int(inputs["frame_mask"].sum())
    watch.restart()
    with torch.no_grad(), watch.lap_before(model.model.compressor, "vision"), _vision_progress(model, num_frames):
        features, stays = model.model.encode_videos(
            inputs["input_ids"] == model.config.video_token_id,
            inputs["pixel_values_videos"],
            inputs["frame_mask"],
            **selection,
        )
    watch.lap("compress")

    prompt = inputs["input_ids"][stays][None].to(model.device)
    output = model.generate(
        prompt,
        attention_mask=prompt.new_ones(prompt.shape),
        mm_encoder_outputs={"video": features},
        max_new_tokens=model.generation_config.max_new_tokens or MAX_NEW_TOKENS,
        do_sample=False,
        num_beams=1,
    )
    text = processor.batch_decode(output[:, prompt.shape[1] :], skip_special_tokens=True)[0].strip()
    watch.lap("generate")

    metadata = inputs["video_metadata"][0]
    deltas = features.frame_deltas
    answer = Answer(
        answer=text,
        frames=num_frames,
        selected_frames=features.selected_frames[0].nonzero().flatten().tolist(),
        timestamps=metadata.timestamps,
        frame_deltas=None if deltas is None else deltas[0].float().tolist(),
        video_tokens=len(features.pooler_output[0]),
        seconds=watch.seconds,
    )
    if plot is not None:
        _draw_plot(plot, answer, video, question, metadata.frames_indices, inputs["pixel_values_videos"][0], processor)
    return answer


def _load_processor(checkpoint: str | os.PathLike) -> "MambaMiaProcessor":
    """The processor of a checkpoint, once that is known to be one."""
    from . import MambaMiaConfig, MambaMiaProcessor

    with _loading(checkpoint):
        model_type = MambaMiaConfig.get_config_dict(checkpoint)[0].get("model_type", "unknown")
        if model_type != MambaMiaConfig.model_type:
            raise ValueError(f"its model type is {model_type}, not {MambaMiaConfig.model_type}")
        return MambaMiaProcessor.from_pretrained(checkpoint)


def _load_model(checkpoint: str | os.PathLike) -> "MambaMiaForConditionalGeneration":
    import torch

    from . import MambaMiaConfig, MambaMiaForConditionalGeneration

    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", "auto"
    with _loading(checkpoint):
        config = MambaMiaConfig.from_pretrained(checkpoint)
        if device == "cpu" and config.dtype != torch.float32 and not _multiplies_bfloat16_fast():
            _say(
                f"{config.dtype or 'bfloat16'} is slower than float32 on this CPU: the weights are loaded in float32."
            )
            dtype = torch.float32
        model, report = MambaMiaForConditionalGeneration.from_pretrained(
            checkpoint, config=config, dtype=dtype, output_loading_info=True
        )
        if report["missing_keys"]:
            raise ValueError(f"it lacks {len(report['missing_keys'])} of the model's weights")
    return model.to(device).eval()


@contextmanager
def _loading(checkpoint: str | os.PathLike) -> Iterator[None]:
    """Turn what can go wrong while a checkpoint is loaded into one sentence that names it."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id
    from safetensors import SafetensorError

    name = os.fspath(checkpoint)
    remedy = "give the folder or Hub id of a MambaMia checkpoint"
    if os.path.isdir(name):
        name = f"the folder '{name}'"
    else:
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise ValueError(f"there is no folder '{name}'; {remedy}.") from error
        name = f"'{name}', which is no folder here, from the Hub"
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise ValueError(f"cannot load {name} ({reason}); {remedy}.") from error


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mambamia", description="Answers questions about videos of up to hours.", allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", required=True, metavar="{ask,demo}")

    ask_parser = commands.add_parser("ask", help="ask about a video file", description="Ask about a video file.")
    ask_parser.set_defaults(run=_ask)
    ask_parser.add_argument("video", metavar="VIDEO", type=_some_text, help="path or URL of a video file")
    ask_parser.add_argument("question", metavar="QUESTION", type=_some_text, help="what to ask about it")
    ask_parser.add_argument(
        "--model",
        metavar="DIR_OR_HUB_ID",
        type=_some_text,
        help="a MambaMia checkpoint; without it the small bundled one, which knows shapes, digits and colours",
    )
    ask_parser.add_argument(
        "--num-frames",
        metavar="N",
        type=_whole_number,
        help="sample exactly N frames, evenly (default: 2 a second, at most 384, or as the checkpoint says)",
    )
    kept = ask_parser.add_mutually_exclusive_group()
    kept.add_argument("--keep-frames", metavar="K", type=_whole_number, help="keep the K frames that matter most")
    kept.add_argument("--keep-ratio", metavar="R", type=_share, help="keep this share of the frames, e.g. 0.5")
    kept.add_argument(
        "--delta-threshold", metavar="X", type=_threshold, help="keep a frame each time Δ has added up to X"
    )
    kept.add_argument(
        "--keep-all", dest="delta_threshold", action="store_const", const=0.0, help="keep every sampled frame"
    )
    ask_parser.add_argument(
        "--plot", metavar="FILE", help="draw Δ over time and the kept frames, as .png, .svg, .pdf ..."
    )
    ask_parser.add_argument("--json", action="store_true", help="print one JSON object with all that was measured")

    demo_parser = commands.add_parser(
        "demo",
        help="make a video with something hidden in it, and ask what",
        description="Make a video with something hidden in it, ask what, and draw the timeline of the answer.",
    )
    demo_parser.set_defaults(run=_demo)
    demo_parser.add_argument("--seed", metavar="N", type=_seed, default=5, help="which video to make (default: 5)")
    demo_parser.add_argument(
        "--output",
        metavar="FOLDER",
        type=_some_text,
        default="mambamia_demo",
        help="where to write video and plot (default: mambamia_demo)",
    )
    return parser


def _ask(arguments: argparse.Namespace) -> None:
    if arguments.model is None:
        _say(
            "no --model given: the bundled checkpoint only knows about shapes and digits that show up in a video: "
            "which, in what colour, in what order, how often."
        )
    _quieten_libraries()
    answer = ask(
        arguments.model or BUNDLED_CHECKPOINT,
        arguments.video,
        arguments.question,
        num_frames=arguments.num_frames,
        keep_frames=arguments.keep_frames,
        keep_ratio=arguments.keep_ratio,
        delta_threshold=arguments.delta_threshold,
        plot=arguments.plot,
    )
    print(json.dumps(asdict(answer), ensure_ascii=False) if arguments.json else answer.answer)


def _demo(arguments: argparse.Namespace) -> None:
    from . import MambaMiaConfig
    from .needle import SAMPLES_PER_SECOND, questions, write_needle_video

    _quieten_libraries()
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    plot = folder / "timeline.png"
    duration = DEMO_FRAMES / SAMPLES_PER_SECOND
    video = write_needle_video(folder / "needle.mp4", arguments.seed, split="test", duration=duration)
    question, truth = questions(video)[0]
    answer = ask(BUNDLED_CHECKPOINT, str(video.path), question, keep_ratio=DEMO_KEEP_RATIO, plot=plot)

    config = MambaMiaConfig.from_pretrained(BUNDLED_CHECKPOINT)
    rows, columns = config.patch_grid()
    patches = answer.frames * rows * columns
    anchors = patches // config.compressor_config.patches_per_anchor
    print(f"question  {question}")
    print(f"answer    {answer.answer}")
    print(f"truth     {truth}")
    print(
        f"tokens    {answer.frames} frames -> {patches:,} patches -> {anchors:,} anchors -> "
        f"{answer.video_tokens:,} video tokens ({len(answer.selected_frames)} frames kept)"
    )
    print(f"seconds   {', '.join(f'{stage} {seconds:.2f}' for stage, seconds in answer.seconds.items())}")
    print(f"video     {video.path}")
    print(f"plot      {plot}")


def _draw_plot(
    path: str | os.PathLike,
    answer: Answer,
    video: str,
    question: str,
    frame_numbers: list[int],
    pixel_values: "torch.Tensor",
    processor: "MambaMiaProcessor",
) -> None:
    """Draw the timeline; its thumbnails are decoded once more, in the video's own shape and larger."""
    import torch

    from .timeline import find_cuts, plot_timeline
    from .video_decoding import decode_video

    def thumbnail(frame: "torch.Tensor") -> "torch.Tensor":
        scale = min(1.0, THUMBNAIL_PIXELS / max(frame.shape[1:]))
        size = [max(1, round(scale * side)) for side in frame.shape[1:]]
        frame = torch.nn.functional.interpolate(frame[None].float(), size, mode="bilinear", antialias=True)[0]
        return frame.round().clamp(0, 255).to(torch.uint8)

    def load_frames(numbers: list[int]) -> "np.ndarray":
        wanted = [frame_numbers[number] for number in numbers]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what there is to say of the file has been said
            frames, _ = decode_video(video, lambda metadata: wanted, transform=thumbnail)
        return frames.permute(0, 2, 3, 1).numpy()

    small = torch.nn.functional.adaptive_avg_pool2d(pixel_values, 32)
    mean, std = (
        torch.tensor(values).view(-1, 1, 1)
        for values in (processor.video_processor.image_mean, processor.video_processor.image_std)
    )
    plot_timeline(
        path,
        answer.timestamps,
        answer.frame_deltas,
        answer.selected_frames,
        load_frames,
        cuts=find_cuts(small * std + mean),
        question=question,
        answer=answer.answer,
    )


def _multiplies_bfloat16_fast() -> bool:
    """Whether products in bfloat16 are no slower than in float32; measured, since the flags of a CPU may mislead."""
    import torch

    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(256, 256, dtype=dtype)
        matrix @ matrix
        runs = []
        for _ in range(3):
            start = time.perf_counter()
            matrix @ matrix
            runs.append(time.perf_counter() - start)
        seconds[dtype] = min(runs)
    return seconds[torch.bfloat16] <= seconds[torch.float32]


@dataclass
class _Stopwatch:
    """Seconds of stages that follow each other, what the GPU still has to do of each included."""

    seconds: dict[str, float] = field(default_factory=dict)
    start: float = field(default_factory=time.perf_counter)

    def restart(self) -> None:
        self.start = time.perf_counter()

    def lap(self, stage: str) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[stage] = now - self.start
        self.start = now

    @contextmanager
    def lap_before(self, module: "torch.nn.Module", stage: str) -> Iterator[None]:
        """Let `stage` end where `module` is called."""
        handle = module.register_forward_pre_hook(lambda *_: self.lap(stage))
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def _vision_progress(model: "MambaMiaForConditionalGeneration", num_frames: int) -> Iterator[None]:
    """A bar over the frames that go through the vision tower, on a terminal: on a CPU that is most of the work."""
    from tqdm import tqdm

    with tqdm(total=num_frames, desc="Looking at the frames", unit="frame", disable=not sys.stderr.isatty()) as bar:

        def advance(tower: "torch.nn.Module", inputs: tuple, output: object) -> None:
            bar.update(len(inputs[0]))

        handle = model.model.vision_tower.register_forward_hook(advance)
        try:
            yield
        finally:
            handle.remove()


def _quieten_libraries() -> None:
    """Errors only, since what matters of the rest becomes an error here; progress bars on a terminal only."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Warnings as one line each, without the place in the code that they come from."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
        yield


def _say(text: str) -> None:
    print(f"mambamia: {' '.join(text.split())}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"mambamia: error: {message}; see {self.prog} --help.\n")


def _some_text(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    return text


def _whole_number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not '{text}'")
    return int(text)


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 on, not '{text}'")
    return int(text)


def _share(text: str) -> float:
    share = _number(text)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"must lie above 0 and at most at 1, not '{text}'")
    return share


def _threshold(text: str) -> float:
    threshold = _number(text)
    if not 0 <= threshold < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number from 0 on, not '{text}'")
    return threshold


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, not '{text}'") from None


if __name__ == "__main__":
    sys.exit(main())
