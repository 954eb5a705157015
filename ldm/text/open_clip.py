"""The way to open_clip's text modules where torchvision's own library cannot load.

open_clip imports torchvision at its top, and torchvision asks for two operators of its compiled library. Beside a
CPU-only torch the CUDA build of that library does not load; the schemas alone are enough for what is used here.
"""

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@cache
def open_clip() -> ModuleType:
    """The open_clip package, imported on first use."""
    _torchvision_operators()
    import open_clip as package

    return package


@cache
def _torchvision_operators() -> "torch.library.Library | None":
    """Declare torchvision's operators if its library cannot; the value returned keeps them alive."""
    spec = importlib.util.find_spec("torchvision")
    folder = Path(spec.origin).parent if spec and spec.origin else Path()
    try:
        for library in folder.glob("_C*.so"):
            torch.ops.load_library(library)
            return None
    except OSError:
        pass
    operators = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        operators.define(schema)
    return operators
