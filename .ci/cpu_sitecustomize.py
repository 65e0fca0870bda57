"""For an environment with a CPU build of torch and PyPI's torchvision, whose library of operators needs CUDA.

Copied there as `sitecustomize.py`. torchvision registers shapes for two operators of that library when it is imported,
which fails where they are not declared; nothing here calls them.
"""

import sys
from importlib.abc import MetaPathFinder


class _DeclaresOperators(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if "+cpu" in torch.__version__:
                self.library = torch.library.Library("torchvision", "DEF")
                for name in ("nms", "qnms"):
                    self.library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                sys.modules["_torchvision_operators"] = self  # declared as long as the library lives
        return None


sys.meta_path.insert(0, _DeclaresOperators())
