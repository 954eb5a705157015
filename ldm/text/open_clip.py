"""The way to open_clip: to its text transformer and its tokenizer alone, and to all of it.

Its top imports torchvision, timm and more, which takes longer than loading a model. torchvision, in turn, asks for two
operators of a compiled library that, built for CUDA, does not load beside a CPU-only torch: their schemas are enough.
"""

import importlib
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_ALONE = "_open_clip_alone"  # a name of its own: the whole package can still be imported beside it
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@cache
def part(name: str) -> ModuleType:
    """`transformer` or `tokenizer` of open_clip, imported on first use, alone where that is possible."""
    spec = importlib.util.find_spec("open_clip")
    alone: Any = sys.modules.setdefault(_ALONE, ModuleType(_ALONE))
    alone.__path__ = list(spec.submodule_search_locations or ()) if spec else []
    # What both share imports one class of torchvision, for pictures: an empty one stands in where it is not loaded.
    stand_in: Any = ModuleType("torchvision.ops.misc")
    stand_in.FrozenBatchNorm2d = type("FrozenBatchNorm2d", (), {})
    names = ("torchvision", "torchvision.ops", "torchvision.ops.misc") if "torchvision" not in sys.modules else ()
    try:
        sys.modules.update(dict.fromkeys(names, stand_in))
        return importlib.import_module(f"{_ALONE}.{name}")
    except (ImportError, AttributeError):  # another version, whose parts need more
        for stand in names:
            del sys.modules[stand]
        names = ()
        open_clip()
        return importlib.import_module(f"open_clip.{name}")
    finally:
        for stand in names:
            del sys.modules[stand]


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
