"""The compressor as it runs by itself, compiled to one graph, and as ONNX: seconds, memory, and how far they differ.

python benchmarks/compiled.py --num_frames 4 16

At full size by default, in float32, with random weights. Each number of frames goes through the same two graphs.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from measure import extra_bytes, median_seconds, report

from mambamia_hf import MambaMiaCompressor, MambaMiaCompressorConfig


EAGER, COMPILED, ONNX = "eager", "torch.compile", "onnxruntime"


def exported(compressor: MambaMiaCompressor, features: torch.Tensor, folder: str):
    """A session of onnxruntime; its weights stay in the folder."""
    import onnxruntime

    program = torch.export.export(
        compressor,
        (features,),
        dynamic_shapes={"patch_features": {1: torch.export.Dim("frames", min=3, max=4096)}},
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    path = Path(folder, "compressor.onnx")
    torch.onnx.export(program, dynamo=True).save(path, external_data=True)
    return onnxruntime.InferenceSession(path)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_frames", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--hidden_size", type=int, default=3072)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = MambaMiaCompressorConfig(hidden_size=arguments.hidden_size)
    compressor = MambaMiaCompressor(config).eval()
    compiled = torch.compile(compressor, fullgraph=True)
    inputs = [torch.randn(1, frames, 576, config.input_size) for frames in arguments.num_frames]
    for features in inputs:
        torch._dynamo.mark_dynamic(features, 1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        compiled(inputs[0])
        seconds_to_compile = {COMPILED: time.perf_counter() - begin}
        begin = time.perf_counter()
        session = exported(compressor, inputs[0], folder)
        seconds_to_compile[ONNX] = time.perf_counter() - begin
        for features in inputs:
            contestants = {
                EAGER: lambda x=features: compressor(x).last_hidden_state,
                COMPILED: lambda x=features: compiled(x).last_hidden_state,
                ONNX: lambda x=features: torch.from_numpy(session.run(None, {"patch_features": x.numpy()})[0]),
            }
            expected = contestants[EAGER]()
            seconds = median_seconds(contestants, arguments.runs)
            rows += [
                {
                    "who": name,
                    "frames": features.shape[1],
                    "seconds": seconds[name],
                    "times eager": seconds[name] / seconds[EAGER],
                    "peak MB": extra_bytes(contestant) / 1e6,
                    "largest difference": (contestant() - expected).abs().max().item() / expected.abs().max().item(),
                    "seconds to make it": seconds_to_compile.get(name),
                }
                for name, contestant in contestants.items()
            ]
    report("compiled", rows)


if __name__ == "__main__":
    main()
