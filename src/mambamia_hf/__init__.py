"""MambaMia for Hugging Face Transformers: questions about hour-long videos."""

import sys
from importlib import import_module
from pathlib import Path


__version__ = "0.1.0"
__all__ = [
    "BUNDLED_CHECKPOINT",
    "MambaMiaCompressor",
    "MambaMiaCompressorConfig",
    "MambaMiaConfig",
    "MambaMiaEncoder",
    "MambaMiaForConditionalGeneration",
    "MambaMiaModel",
    "MambaMiaProcessor",
    "MambaMiaVideoProcessor",
    "select_frames",
]

# Folder of the small checkpoint that comes with the package.
BUNDLED_CHECKPOINT = str(Path(__file__).parent / "checkpoint")


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(".auto", __name__), name)


# Importing the package registers its classes with Transformers. Only the program `mambamia` waits with that until it
# needs them, so that --help and wrong arguments are answered at once.
if Path(*sys.argv[:1]).name.removesuffix(".exe") != "mambamia":
    import_module(".auto", __name__)
