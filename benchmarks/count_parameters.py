"""Counts the parameters of the full-size presets, part by part, on the meta device.

python benchmarks/count_parameters.py
"""

import torch
from measure import report

from mambamia_hf import MambaMiaConfig, MambaMiaForConditionalGeneration


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def main():
    rows = []
    for preset in ("qwen2-7b", "vicuna-7b"):
        with torch.device("meta"):
            model = MambaMiaForConditionalGeneration(MambaMiaConfig.from_preset(preset))
        compressor = model.model.compressor
        parts = {
            "vision tower": model.model.vision_tower,
            "compressor": compressor,
            "  input projection": compressor.input_proj,
            "  stage 1, a block": compressor.layers[0],
            "    mixer": compressor.layers[0].mixer,
            "    gated patch aggregation": compressor.layers[0].gpa,
            "  stage 2, a block": compressor.temporal_layers[0],
            "  output projection": compressor.output_proj,
            "language model": model.model.language_model,
            "head": model.lm_head,
            "all": model,
        }
        rows += [{"preset": preset, "part": part, "parameters": count(module)} for part, module in parts.items()]
    report("count_parameters", rows)


if __name__ == "__main__":
    main()
