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
    "select_frames",
]

# These import nothing heavy, so that the command line answers at once.
_LIGHT_MODULES = ("__main__", "cli", "files", "inputs")

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
        select_frames,
    )
else:  # a type checker would take any name for one that `__getattr__` knows

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
        return getattr(import_module(".auto", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _RegistersOnImport(MetaPathFinder, Loader):
    """Registers the classes of this package with Transformers' Auto classes.

    It does so right after the first import of Transformers, or of a module of this package that needs it.
    """

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, module = fullname.partition(".")
        if fullname != "transformers" and (package != __name__ or module.partition(".")[0] in _LIGHT_MODULES):
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        import_module(".auto", __name__)


if "transformers" in sys.modules:
    import_module(".auto", __name__)
else:
    sys.meta_path.insert(0, _RegistersOnImport())
