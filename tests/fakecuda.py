"""A GPU that is not there: tensors of device cuda:0 have shapes and no data, those of the CPU are real as ever.

What mixes the two fails as it would on a GPU; where the program would wait for one is noted.
"""

import ctypes
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)


class Gpu(TorchDispatchMode):
    """waits: lines of ldm that read a number off the GPU, which is `number` or True, or copy from or to it and wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.number = 1.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if not any(isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type == "cuda") for x in leaves):
            with _disable_current_modes():
                return function(*args, **kwargs)
        if function is torch.ops.aten._local_scalar_dense.default:
            if args[0].device == CUDA:
                self._note()
            return True if args[0].dtype == torch.bool else self.number if args[0].is_floating_point() else 1
        if function is torch.ops.aten._to_copy.default and not kwargs.get("non_blocking"):
            there = kwargs.get("device") or args[0].device
            if torch.device(there).type != args[0].device.type:
                self._note()
        return function(*args, **kwargs)

    def _note(self) -> None:
        frames = [f for f in traceback.extract_stack() if "/ldm/" in f.filename]
        self.waits.append(f"{frames[-1].filename.rsplit('/ldm/')[-1]}: {frames[-1].line}" if frames else "")


@contextmanager
def gpu() -> Iterator[Gpu]:
    """Within it there is one."""
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    with (
        patch.object(torch.cuda, "Event", lambda: event),
        patch.object(Tensor, "pin_memory", lambda self: self),
        patch.object(nn.Module, "to", _to),
        FakeTensorMode(allow_non_fake_inputs=True),
        Gpu() as device,
    ):
        yield device


def know_cuda() -> None:
    """Let a torch that was built without CUDA keep track of its devices, as of those of `meta`: it does nothing there.

    For the whole process, and before its first backward pass: in a process of its own.
    """
    if torch.backends.cuda.is_built():
        torch._C._ensureCUDADeviceGuardSet()
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 22).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    guards[1] = guards[14]  # by c10/core/DeviceType.h


def _to(self: nn.Module, device: Any = None, **layout: Any) -> nn.Module:
    """nn.Module.to, which cannot put tensors without data in the place of others."""
    for module in self.modules() if device is not None and torch.device(device) == CUDA else ():
        for name, p in module._parameters.items():
            if p is not None and p.device != CUDA:
                module._parameters[name] = nn.Parameter(torch.empty_like(p, device=CUDA), p.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=CUDA)
    return self
