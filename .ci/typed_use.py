"""What a type checker sees of the package from outside: names are known, and wrong ones are errors."""

import mambamia_hf
from mambamia_hf import BUNDLED_CHECKPOINT, MambaMiaCompressorConfig, MambaMiaForConditionalGeneration, select_frames


folder: str = BUNDLED_CHECKPOINT
config: MambaMiaCompressorConfig = MambaMiaCompressorConfig(hidden_size=256)
model: MambaMiaForConditionalGeneration = MambaMiaForConditionalGeneration.from_pretrained(folder)
print(config, model, select_frames)
print(mambamia_hf.typo)  # type: ignore[attr-defined]  # has to be an error: mypy warns of an ignore without one
