"""Saves the bundled model with its code, or loads it where the package cannot be imported; the logits must be equal.

python .ci/exchange.py save FOLDER
python .ci/exchange.py load FOLDER
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor


def logits(model: torch.nn.Module, processor) -> torch.Tensor:
    """Of a prompt with a video of noise, half of whose frames are kept."""
    video = torch.randint(0, 256, (8, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    content = [{"type": "video", "video": video}, {"type": "text", "text": "What appears in the video?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"keep_ratio": 0.5, "video_metadata": [{"fps": 2.0}]},
    )
    with torch.no_grad():
        return model(**inputs).logits


def main(task: str, folder: Path) -> None:
    if task == "save":
        import mambamia_hf

        model = AutoModelForImageTextToText.from_pretrained(mambamia_hf.BUNDLED_CHECKPOINT)
        processor = AutoProcessor.from_pretrained(mambamia_hf.BUNDLED_CHECKPOINT)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        torch.save(logits(model, processor), folder / "logits.pt")
        return
    sys.modules["mambamia_hf"] = None  # type: ignore[assignment]  # any import of it fails
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    torch.testing.assert_close(logits(model, processor), torch.load(folder / "logits.pt"), atol=1e-5, rtol=1e-4)
    print(f"{folder.name}: equal logits")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
