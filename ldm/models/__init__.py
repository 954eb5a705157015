"""Networks: weights and forward passes, nothing else."""

import sys
from types import ModuleType
from typing import Any


def _einops_alone() -> None:
    """Let einops meet torch without torch's compiler, which it would import to register itself: 1.4 s of every start.

    What compiles a network registers it then (`einops._torch_specific.allow_ops_in_compiled_graph`).
    """
    if "torch._dynamo" in sys.modules:
        return
    stand_in: Any = ModuleType("torch._dynamo")
    stand_in.allow_in_graph = lambda function: function
    sys.modules["torch._dynamo"] = stand_in
    try:
        import einops._torch_specific  # noqa: F401
    finally:
        del sys.modules["torch._dynamo"]


_einops_alone()
