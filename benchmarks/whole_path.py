"""Time to first token and peak memory, from the features of a vision tower to the first token of a language model.

python benchmarks/whole_path.py

Four ways into the same random language model of Qwen2-0.5B's shape, from features as a SigLIP-base tower at 384 pixels
gives them; the tower, which costs each way the same, is left out. Every number of frames and way has a process of its
own, and the processes of one number of frames take turns. What would take too long is worked out on paper, and so is
384 frames at the size of 7B.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
from measure import RESULTS, peak_rss, plot, report, restart_peak
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen2Config

from mambamia_hf import MambaMiaCompressor, MambaMiaCompressorConfig, MambaMiaConfig, select_frames


FRAMES = (16, 32, 64, 128)
PATCHES, PATCH_WIDTH, ROWS = 576, 768, 24
PROMPT_TOKENS = 32
# d to the language model's width about as in the paper, where it is 3072 to 3584.
COMPRESSOR_WIDTH = 768
# What takes longer than the first runs once in place of five times, than the second not at all.
LONG_SECONDS, MOST_SECONDS = 60, 300

OURS, OURS_HALF = "this model", "this model, 50 % by Δ"
POOLING, MLP = "average pooling", "MLP, no compression"
WAYS = (OURS, OURS_HALF, POOLING, MLP)


def text_config() -> Qwen2Config:
    return Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    )


def build(way: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
    """The path of one way: features `(1, frames, patches, width)` to the number of the first token."""
    torch.manual_seed(0)
    config = text_config()
    language_model = AutoModelForCausalLM.from_config(config)
    if way in (OURS, OURS_HALF):
        projector = MambaMiaCompressor(
            MambaMiaCompressorConfig(
                input_size=PATCH_WIDTH,
                output_size=config.hidden_size,
                hidden_size=COMPRESSOR_WIDTH,
                patches_per_anchor=PATCHES // ROWS,
            )
        )
    else:  # LLaVA's
        projector = nn.Sequential(
            nn.Linear(PATCH_WIDTH, config.hidden_size),
            nn.GELU(),
            nn.Linear(config.hidden_size, config.hidden_size),
        )
    language_model, projector = (module.to(device, dtype).eval() for module in (language_model, projector))
    prompt = torch.arange(PROMPT_TOKENS, device=device)[None]

    @torch.no_grad()
    def first_token(features: Tensor) -> Tensor:
        if way in (OURS, OURS_HALF):
            compressed = projector(features, return_dict=True)
            tokens = compressed.last_hidden_state
            if way == OURS_HALF:
                tokens = tokens[select_frames(compressed.frame_deltas, keep_ratio=0.5)]
        elif way == POOLING:
            tokens = projector(features.unflatten(2, (ROWS, -1)).mean(dim=3))
        else:
            tokens = projector(features)
        prompt_embeds = language_model.get_input_embeddings()(prompt)
        inputs_embeds = torch.cat([prompt_embeds, tokens.reshape(1, -1, config.hidden_size)], dim=1)
        return language_model(inputs_embeds=inputs_embeds, use_cache=True, logits_to_keep=1).logits.argmax()

    return first_token


def features(num_frames: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(1, num_frames, PATCHES, PATCH_WIDTH).to(device, dtype)


def video_tokens(way: str, num_frames: int, num_patches: int = PATCHES) -> int:
    """How many tokens of the video the language model reads."""
    if way == MLP:
        return num_frames * num_patches
    return (num_frames // 2 if way == OURS_HALF else num_frames) * ROWS


def prefill_flops(config: PreTrainedConfig, tokens: int) -> tuple[float, float]:
    """Of the layers' weights and of causal attention; a multiplication and an addition are two."""
    width, key_value = (
        config.hidden_size,
        config.num_key_value_heads * config.hidden_size // config.num_attention_heads,
    )
    weights = 2 * width * (width + key_value) + 3 * width * config.intermediate_size
    return 2.0 * weights * config.num_hidden_layers * tokens, 2.0 * tokens**2 * width * config.num_hidden_layers


def compressor_flops(config: MambaMiaCompressorConfig, num_frames: int, num_patches: int) -> float:
    """Of the whole compressor; the scan's in chunks of `chunk_size`, of which causality leaves half."""
    inner, state = config.intermediate_size, config.n_groups * config.state_size
    directions = 1 + config.bidirectional
    scan = config.chunk_size * (state + inner) + 4 * config.state_size * inner
    projections = 2 * config.hidden_size * (3 * inner + 2 * state + config.num_heads)
    anchors = num_frames * config.num_anchors(num_patches)
    return (
        2.0 * num_frames * num_patches * config.input_size * config.hidden_size
        + config.num_hidden_layers * (num_frames * num_patches + anchors) * (projections + directions * scan)
        + config.num_temporal_layers * anchors * (projections + scan)
        + 2.0 * anchors * config.hidden_size * config.output_size
    )


def cell(way: str, num_frames: int, connection: Connection):
    """A process: builds its way, then runs it whenever told to and says how long that took and its peak so far."""
    first_token, given = build(way), features(num_frames)
    restart_peak()
    connection.send("ready")
    while connection.recv():
        start = time.perf_counter()
        first_token(given).item()
        connection.send((time.perf_counter() - start, peak_rss()))


def measure_in_turns(ways: list[str], num_frames: int) -> dict[str, tuple[list[float], int]]:
    """Seconds of every run and peak memory in bytes, of each way."""
    context = multiprocessing.get_context("spawn")
    connections, processes = {}, []
    for way in ways:
        connections[way], theirs = context.Pipe()
        processes.append(context.Process(target=cell, args=(way, num_frames, theirs)))
        processes[-1].start()
    for connection in connections.values():
        connection.recv()
    seconds, peaks, runs = {way: [] for way in ways}, {}, dict.fromkeys(ways, 5)
    for run in range(5):
        for way, connection in connections.items():
            if run < runs[way]:
                connection.send(True)
                elapsed, peaks[way] = connection.recv()
                seconds[way].append(elapsed)
                if not run and elapsed > LONG_SECONDS:
                    runs[way] = 1
    for connection, process in zip(connections.values(), processes, strict=True):
        connection.send(False)
        process.join()
    return {way: (seconds[way], peaks[way]) for way in ways}


def measured_cells(ways: list[str], num_frames: int) -> list[dict]:
    return [
        {
            **cell_on_paper(way, num_frames),
            "runs": len(seconds),
            "s to first token": statistics.median(seconds),
            "peak MB": peak / 1e6,
        }
        for way, (seconds, peak) in measure_in_turns(ways, num_frames).items()
    ]


def cell_on_paper(way: str, num_frames: int) -> dict:
    tokens = video_tokens(way, num_frames)
    flops = sum(prefill_flops(text_config(), PROMPT_TOKENS + tokens))
    return {"frames": num_frames, "way": way, "video tokens": tokens, "prefill TFLOP": flops / 1e12}


def table(cells: list[dict]) -> list[dict]:
    """Every cell in order: what was measured, beside this model, and how long the others would take."""
    found = {(row["frames"], row["way"]): row for row in cells}
    rows = []
    for num_frames in FRAMES:
        for way in WAYS:
            row, ours = found.get((num_frames, way)), found.get((num_frames, OURS))
            if row is None:
                row = {**cell_on_paper(way, num_frames), "not measured": expected(cells, way, num_frames)[1]}
            elif ours is not None:
                row = {**row, "times ours": row["s to first token"] / ours["s to first token"]}
            rows.append(row)
    return rows


def expected(cells: list[dict], way: str, num_frames: int) -> tuple[float, str]:
    """The seconds of a cell of the MLP's by the speed of its longest measured run, and how they come about."""
    measured = [row for row in cells if row["way"] == way == MLP]
    if not measured:
        return 0.0, "not yet"
    longest = max(measured, key=lambda row: row["frames"])
    rate = longest["prefill TFLOP"] / longest["s to first token"]
    flops = cell_on_paper(way, num_frames)["prefill TFLOP"]
    return flops / rate, f"some {flops / rate:.0f} s: {flops:.0f} TFLOP at {1000 * rate:.0f} GFLOP/s"


def on_paper(num_frames: int = 384) -> list[dict]:
    """The same ways at the paper's size, in bfloat16."""
    config = MambaMiaConfig()
    text, compressor = config.text_config, config.compressor_config
    rows_of_patches, columns = config.patch_grid()
    patches = rows_of_patches * columns
    rows = []
    for way in WAYS:
        tokens = video_tokens(way, num_frames, patches)
        weights, attention = prefill_flops(text, tokens)
        if way in (OURS, OURS_HALF):
            before = compressor_flops(compressor, num_frames, patches)
        else:
            before = 2.0 * tokens * text.hidden_size * (config.vision_hidden_size + text.hidden_size)
        key_value = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
        rows.append(
            {
                "frames": num_frames,
                "way": way,
                "video tokens": tokens,
                "before the LM TFLOP": before / 1e12,
                "LM weights TFLOP": weights / 1e12,
                "LM attention TFLOP": attention / 1e12,
                "all TFLOP": (before + weights + attention) / 1e12,
                "KV cache GB": 2 * 2 * text.num_hidden_layers * key_value * tokens / 1e9,
                "LM hidden states GB": 2 * tokens * text.hidden_size / 1e9,
                "LM widest activation GB": 2 * tokens * text.intermediate_size / 1e9,
            }
        )
    return rows


def series(rows: list[dict], column: str) -> dict[str, tuple[tuple[int, ...], tuple[float, ...]]]:
    """Of each way, the numbers of frames and what `column` holds for them."""
    points = {way: sorted((row["frames"], row[column]) for row in rows if row["way"] == way) for way in WAYS}
    return {way: tuple(zip(*pairs, strict=True)) for way, pairs in points.items() if pairs}


def main():
    parser = argparse.ArgumentParser(
        description="Measures some cells and leaves the results of the others as they are."
    )
    parser.add_argument("--frames", type=int, nargs="+", choices=FRAMES, default=FRAMES)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    arguments = parser.parse_args()
    report("whole_path_7b", on_paper())
    results, cells = RESULTS / "whole_path.json", []
    if results.exists():
        cells = [row for row in json.loads(results.read_text())["rows"] if "runs" in row]
    cells = [row for row in cells if row["frames"] not in arguments.frames or row["way"] not in arguments.ways]
    for num_frames in arguments.frames:
        ways = [way for way in arguments.ways if way != MLP or expected(cells, way, num_frames)[0] < MOST_SECONDS]
        cells += measured_cells(ways, num_frames) if ways else []
        report("whole_path", table(cells))
    for name, column in (("whole_path", "s to first token"), ("whole_path_memory", "peak MB")):
        plot(name, "frames", column, series(cells, column))


if __name__ == "__main__":
    main()
