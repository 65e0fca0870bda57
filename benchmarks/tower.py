"""The vision tower up to the layer that is read, beside all of it with all hidden states, as LLaVA reads it.

python benchmarks/tower.py

The tower has so400m's shape and random weights, and sees 16 frames of 384 pixels; its hidden state before the last
layer is read. Both ways take turns; memory is the peak above the weights and the pixels, the result included.
"""

import argparse

import torch
from measure import extra_bytes, median_seconds, report
from transformers import AutoModel, SiglipVisionConfig

from mambamia_hf.vision_tower import tower_until


FRAMES, LAYER = 16, 26
SO400M = SiglipVisionConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=384,
    patch_size=16,
    vision_use_head=False,
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    tower = AutoModel.from_config(SO400M, dtype=dtype).eval()
    pixels = torch.randn(FRAMES, 3, 384, 384).to(dtype)

    @torch.inference_mode()
    def whole() -> torch.Tensor:
        return tower(pixels, output_hidden_states=True).hidden_states[LAYER]

    @torch.inference_mode()
    def until() -> torch.Tensor:
        return tower_until(tower, LAYER)(pixels).last_hidden_state

    assert torch.equal(whole(), until())
    ways = {"all hidden states": whole, "up to the layer that is read": until}
    seconds = median_seconds(ways, arguments.runs)
    rows = [
        {
            "way": name,
            "seconds": seconds[name],
            "times the whole": seconds[name] / seconds["all hidden states"],
            "MB": extra_bytes(way) / 1e6,
        }
        for name, way in ways.items()
    ]
    report(f"tower_{arguments.dtype}", rows)


if __name__ == "__main__":
    main()
