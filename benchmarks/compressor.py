"""The compressor: a block and its parts, reading only anchors, growth with the frames, and the full size.

python benchmarks/compressor.py --parts block layers growth full
python benchmarks/compressor.py --parts block full --dtypes float32 bfloat16    # where bfloat16 is multiplied fast
"""

import argparse
import copy
import gc
import time
from collections.abc import Callable
from functools import partial

import torch
from measure import extra_bytes, median_seconds, peak_rss, plot, report, restart_peak

from mambamia_hf import MambaMiaCompressor, MambaMiaCompressorConfig
from mambamia_hf.modeling_compressor import MambaMiaSpatialBlock
from mambamia_hf.ssd import ssd_chunk_scan


FULL_SIZE = {"input_size": 1152, "hidden_size": 3072, "output_size": 3584}
SMALL = {"input_size": 64, "hidden_size": 64, "output_size": 64, "head_dim": 32, "state_size": 16}


def spatial_block(config: MambaMiaCompressorConfig) -> MambaMiaSpatialBlock:
    return MambaMiaCompressor(config).eval().layers[0]


def projections(config: MambaMiaCompressorConfig, length: int, dtype: torch.dtype) -> Callable[[], None]:
    """in_proj and out_proj alone."""
    width = 2 * config.intermediate_size + 2 * config.n_groups * config.state_size + config.num_heads
    shapes = (
        (width, config.hidden_size),
        (config.hidden_size, config.intermediate_size),
        (length, config.hidden_size),
        (length, config.intermediate_size),
    )
    in_proj, out_proj, x, gated = (torch.randn(*shape).to(dtype) for shape in shapes)

    def run():
        torch.nn.functional.linear(x, in_proj)
        torch.nn.functional.linear(gated, out_proj)

    return run


def scans(config: MambaMiaCompressorConfig, length: int, dtype: torch.dtype) -> Callable[[], None]:
    """The scans of both directions alone."""
    x = torch.randn(1, length, config.num_heads, config.head_dim).to(dtype)
    delta = torch.empty(1, length, config.num_heads).uniform_(config.time_step_min, config.time_step_max)
    A = -torch.empty(config.num_heads).uniform_(*config.A_init_range)
    B, C = torch.randn(2, 1, length, config.n_groups, config.state_size).to(dtype)
    D = torch.ones(config.num_heads)

    def run():
        for _ in range(2):
            ssd_chunk_scan(x, delta, A, B, C, config.chunk_size, D=D)

    return run


def block(dtypes: list[str]) -> list[dict]:
    """One full-width block on 1,200 tokens, which are one segment on a CPU."""
    config, length = MambaMiaCompressorConfig(**FULL_SIZE), 1200
    start, rows = torch.randn(1, length, config.hidden_size), []
    layer = spatial_block(config)
    added = layer(start) - start
    contestants = {}
    for name in dtypes:
        dtype = getattr(torch, name)
        contestants |= {
            ("block", name): partial(copy.deepcopy(layer).to(dtype), start.to(dtype)),
            ("in_proj and out_proj", name): projections(config, length, dtype),
            ("both scans", name): scans(config, length, dtype),
        }
    seconds = median_seconds(contestants)
    for (who, name), value in seconds.items():
        row = {
            "part": "block",
            "who": who,
            "dtype": name,
            "tokens": length,
            "us per token": value / length * 1e6,
            "share of the block's time": value / seconds["block", name],
            f"times {dtypes[0]}": value / seconds[who, dtypes[0]],
        }
        if who == "block":
            error = contestants[who, name]() - start - added
            row["relative rms error"] = (error.norm() / added.norm()).item()
        rows.append(row)
    return rows


def layers() -> list[dict]:
    """Three full-width blocks: every token of the last block against its anchors only."""
    rows, length = [], 2400
    for placement in ("post_mixer", "pre_mixer", None):
        config = MambaMiaCompressorConfig(**FULL_SIZE, gpa_placement=placement)
        blocks = MambaMiaCompressor(config).eval().layers
        start = torch.randn(1, length, config.hidden_size)

        def run(anchors_only: bool, blocks=blocks, start=start) -> torch.Tensor:
            hidden_states = start.clone()
            for layer in blocks[:-1]:
                hidden_states = layer(hidden_states, needs_gradient=False)
            return blocks[-1](hidden_states, anchors_only=anchors_only, needs_gradient=False)

        row_length = config.patches_per_anchor + 1
        difference = (run(False)[:, row_length - 1 :: row_length] - run(True)).abs().max().item()
        seconds = median_seconds({"every token": lambda run=run: run(False), "anchors": lambda run=run: run(True)})
        rows += [
            {
                "part": "layers",
                "who": f"{placement}, {who} of the last block",
                "tokens": length,
                "us per token": value / length * 1e6,
                "times faster": seconds["every token"] / value,
                "largest difference": difference,
            }
            for who, value in seconds.items()
        ]
    return rows


def growth() -> list[dict]:
    """A small width from 96 frames to 6,144: time per frame, and the memory that a call takes."""
    compressor, rows = MambaMiaCompressor(MambaMiaCompressorConfig(**SMALL)).eval(), []
    for frames in (96, 384, 1536, 6144):
        patch_features = torch.randn(1, frames, 576, SMALL["input_size"])

        def run(patch_features=patch_features):
            return compressor(patch_features, return_dict=True)

        seconds = median_seconds({"ours": run}, runs=5 if frames < 6144 else 1)["ours"]
        memory, anchors = extra_bytes(run), run().last_hidden_state.nbytes
        sequence = frames * 600 * SMALL["hidden_size"] * 4
        rows.append(
            {
                "part": "growth",
                "frames": frames,
                "ms per frame": seconds / frames * 1e3,
                "MB beside features": memory / 1e6,
                "MB of the sequence": sequence / 1e6,
                "MB of the anchors": anchors / 1e6,
                "MB of the rest": (memory - sequence - anchors) / 1e6,
            }
        )
    frames = [row["frames"] for row in rows]
    plot(
        "compressor_growth",
        "frames",
        "MB",
        {name: (frames, [row[name] for row in rows]) for name in ("MB beside features", "MB of the rest")},
        log=True,
    )
    return rows


def full(frames: int, dtype_name: str) -> list[dict]:
    """The full-size compressor: its time by stage, and the most memory that the process held."""
    dtype = getattr(torch, dtype_name)
    compressor = MambaMiaCompressor(MambaMiaCompressorConfig(**FULL_SIZE)).eval().to(dtype)
    patch_features = torch.randn(1, frames, 576, FULL_SIZE["input_size"]).to(dtype)
    marks = []
    gc.collect()
    restart_peak()

    def mark(*_):
        marks.append(time.perf_counter())

    stages = [*compressor.layers, *compressor.temporal_layers]
    for stage in stages:
        stage.register_forward_hook(mark)
    compressor.layers[0].register_forward_pre_hook(mark)
    mark()
    compressor(patch_features)
    mark()
    names = ["input projection", *(f"stage 1, block {index + 1}" for index in range(len(compressor.layers)))]
    names += ["stage 2", "output projection"]
    seconds = {name: end - start for name, start, end in zip(names, marks[:-1], marks[1:], strict=True)}
    about = {"part": "full", "dtype": dtype_name, "frames": frames}
    return [
        {**about, "stage": stage, "seconds": value, "ms per frame": value / frames * 1e3}
        for stage, value in {**seconds, "all": sum(seconds.values())}.items()
    ] + [{**about, "stage": "peak resident GB", "GB": peak_rss() / 1e9}]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=["block", "layers", "growth", "full"], required=True)
    parser.add_argument("--frames", type=int, default=384, help="number of frames of the part full")
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"], help="of the parts block and full"
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    parts = {
        "block": lambda: block(arguments.dtypes),
        "layers": layers,
        "growth": growth,
        "full": lambda: [row for name in arguments.dtypes for row in full(arguments.frames, name)],
    }
    with torch.no_grad():
        for part in arguments.parts:
            report(f"compressor_{part}", parts[part]())
            gc.collect()


if __name__ == "__main__":
    main()
