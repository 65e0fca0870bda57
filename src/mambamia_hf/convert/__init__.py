"""Conversion between checkpoints in the layout of the released code (LLaVA's) and ours, in both directions.

    python -m mambamia_hf.convert SRC DST [--reverse] [--push-to-hub ID] [--ignore PATTERN ...]

- `names`: names of the tensors in both layouts, and the check that a checkpoint holds the right ones
- `configurations`: configurations in both layouts
- `weights`: weights files, read and written one shard at a time
- `processors`: tokenizer, processor and chat templates
- `compressor`: the compressor alone, in memory
- `checkpoints`: whole checkpoints
- `command`: the command line
"""

from .checkpoints import convert_from_original, convert_to_original
from .compressor import compressor_from_original, compressor_to_original


__all__ = ["compressor_from_original", "compressor_to_original", "convert_from_original", "convert_to_original"]
