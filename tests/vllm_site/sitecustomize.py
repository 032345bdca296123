"""On PYTHONPATH of vLLM's processes: lets PyPI's torchvision, which is built for CUDA, be imported beside a CPU torch.

Its Python files look for two operators of its library, which does not load.
"""

import sys
from typing import Any


class _BeforeTorchvision:
    """Finds nothing; declares the operators when torchvision is first looked for."""

    kept: Any = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision" and self.kept is None:
            import torch

            self.kept = torch.library.Library("torchvision", "DEF")
            for operator in ("nms(Tensor dets, Tensor scores, float threshold) -> Tensor", "qnms(Tensor a) -> Tensor"):
                self.kept.define(operator)


sys.meta_path.insert(0, _BeforeTorchvision())
