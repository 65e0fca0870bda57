"""A sharded checkpoint of a model of the 0.5B class: written, loaded lazily with most of it left on disk, and asked.

python benchmarks/offload.py
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import peak_rss, report

from mambamia_hf import MambaMiaConfig, MambaMiaForConditionalGeneration


FRAMES = 16


def config() -> MambaMiaConfig:
    return MambaMiaConfig(
        vision_config={"model_type": "siglip_vision_model", "image_size": 224, "vision_use_head": False},
        text_config={
            "model_type": "qwen2",
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        compressor_config={"hidden_size": 768, "patches_per_anchor": 14},
    )


def answer(folder: Path, resident: str):
    """Loads the checkpoint with at most `resident` of its weights in memory and asks it; prints the peak in bytes."""
    model = MambaMiaForConditionalGeneration.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": resident}, offload_folder=folder / "offload"
    )
    torch.manual_seed(0)
    tokens = FRAMES * model.config.num_frame_tokens
    input_ids = torch.tensor([[1, 2] + [model.config.video_token_id] * tokens + [3, 4]])
    output = model.generate(input_ids, pixel_values_videos=torch.randn(1, FRAMES, 3, 224, 224), max_new_tokens=2)
    assert output.shape[1] > input_ids.shape[1]
    devices = getattr(model, "hf_device_map", {})  # absent where everything fits in memory
    print(peak_rss(), sum(device == "disk" for device in devices.values()))


def main():
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        torch.manual_seed(0)
        model = MambaMiaForConditionalGeneration(config())
        weights = sum(parameter.nbytes for parameter in model.parameters())
        model.save_pretrained(folder, max_shard_size="500MB")
        shards = len(list(folder.glob("*.safetensors")))
        del model
        for resident in ("10GB", "1GB"):
            start = time.perf_counter()
            command = [sys.executable, __file__, str(folder), resident]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            rows.append(
                {
                    "weights allowed in memory": resident,
                    "weights MB": weights / 1e6,
                    "shards": shards,
                    "modules on disk": int(output[-1]),
                    "peak MB": int(output[-2]) / 1e6,
                    "seconds, start included": time.perf_counter() - start,
                }
            )
    report("offload", rows)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        answer(Path(sys.argv[1]), sys.argv[2])
    else:
        main()
