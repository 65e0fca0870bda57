"""MambaMia for Hugging Face Transformers: questions about hour-long videos.

Importing the package takes no time: its classes load when they are used, and are registered with Transformers' Auto
classes as soon as Transformers is imported.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any


__version__ = "0.2.0"
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
    "VideoMemory",
    "select_frames",
]

# These import nothing heavy, so that the command line answers at once.
_LIGHT_MODULES = ("__main__", "checkpoint_layout", "cli", "files", "inputs", "messages")

# Folder of the small checkpoint that comes with the package.
BUNDLED_CHECKPOINT = str(Path(__file__).parent / "checkpoint")

if TYPE_CHECKING:
    from .auto import (
        MambaMiaCompressor,
        MambaMiaCompressorConfig,
        MambaMiaConfig,
        MambaMiaEncoder,
        MambaMiaForConditionalGeneration,
        MambaMiaModel,
        MambaMiaProcessor,
        MambaMiaVideoProcessor,
        VideoMemory,
        select_frames,
    )
else:  # a type checker would take any name for one that `__getattr__` knows

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
        return getattr(import_module(".auto", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _RegistersOnImport(MetaPathFinder):
    """Registers the classes of this package with Transformers' Auto classes.

    It does so right after the first import of Transformers, or of a module of this package that needs it.
    """

    is_searching = False

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, module = fullname.partition(".")
        is_light = package != __name__ or module.partition(".")[0] in _LIGHT_MODULES
        if self.is_searching or (is_light and fullname != "transformers"):
            return None
        self.is_searching = True
        try:
            spec = find_spec(fullname)
        finally:
            self.is_searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, self)
        return spec


class _RegisteringLoader(Loader):
    """Loads a module as its own loader does, and registers the classes once that is done."""

    def __init__(self, loader: Any, finder: MetaPathFinder):
        self.loader = loader
        self.finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        self.loader.exec_module(module)
        import_module(".auto", __name__)


if "transformers" in sys.modules:
    import_module(".auto", __name__)
else:
    sys.meta_path.insert(0, _RegistersOnImport())
