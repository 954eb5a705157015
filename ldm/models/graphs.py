"""A UNet's forward as a CUDA graph: recorded once for inputs of a form, then replayed as one launch.

At batch 1 a GPU waits for Python more than it works. What a graph replays are addresses, so inputs are copied to where
they stood when it was recorded, and the answer is copied away. Tested with a stand-in for torch's graphs, which replays
what was recorded operation by operation; measured on no GPU yet.
"""

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.models.layers import Features
from ldm.models.unet import Control, UNet
from ldm.shapes import Sigma

DEVICE = "cuda"
KEPT = 8  # recordings of a network, the least used going first: their memory is shared, but for inputs and answers
WARM_UPS = 3  # as torch advises: libraries choose kernels and take workspaces, which a recording may not


def parts(value: Any) -> Iterator[Any]:
    """The tensors of an input in order, and whatever else there is: None, numbers, and the kind of what holds them."""
    if isinstance(value, Conditioning):
        value = tuple(vars(value).values())
    if isinstance(value, tuple | list):
        yield len(value)
        for inner in value:
            yield from parts(inner)
    else:
        yield value


def copied(value: Any) -> Any:
    """The same input in memory of its own."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Conditioning):
        return value.map(copied)
    if isinstance(value, Control):
        return Control(*map(copied, value))
    return [copied(inner) for inner in value] if isinstance(value, tuple | list) else value


class Recording:
    """One form of input. Called with inputs of that form it gives an answer that nobody overwrites later."""

    def __init__(self, forward: Callable[..., Tensor], inputs: tuple[Any, ...], pool: Any) -> None:
        self.inputs = copied(inputs)
        self.places = [part for part in parts(self.inputs) if isinstance(part, Tensor)]
        stream, self.graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                forward(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        # Other threads may go on using the device meanwhile.
        with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.answer = forward(*self.inputs)

    def __call__(self, inputs: tuple[Any, ...]) -> Tensor:
        for place, value in zip(self.places, (p for p in parts(inputs) if isinstance(p, Tensor)), strict=True):
            place.copy_(value)
        self.graph.replay()
        return self.answer.clone()


class Recordings:
    """Those of one network, for as long as it is made of the same modules and its weights stay where they are.

    A form is recorded when it comes the second time: what comes once is not worth five times its cost.
    """

    def __init__(self) -> None:
        self._made: OrderedDict[Any, Recording] = OrderedDict()
        self._seen: dict[Any, bool] = {}  # whether a form may be recorded: not where that failed
        self._state: list[Any] = []
        self._pool: Any = None

    def __call__(self, network: nn.Module, forward: Callable[..., Tensor], inputs: tuple[Any, ...]) -> Tensor:
        """forward(*inputs), which is the network's."""
        if (now := state(network)) != self._state:
            self._drop(len(self._made))
            self._seen, self._state = {}, now
        form = tuple(
            (tuple(p.shape), p.dtype, p.device) if isinstance(p, Tensor) else (type(p), p) for p in parts(inputs)
        )
        if self._seen.get(form) and form not in self._made:
            self._record(form, forward, inputs)
        self._seen.setdefault(form, True)
        if form not in self._made:
            return forward(*inputs)
        self._made.move_to_end(form)
        return self._made[form](inputs)

    def _record(self, form: Any, forward: Callable[..., Tensor], inputs: tuple[Any, ...]) -> None:
        self._drop(len(self._made) - KEPT + 1)
        if not self._made:  # a pool that nothing uses any more cannot be joined
            self._pool = torch.cuda.graph_pool_handle()
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._made[form] = Recording(forward, inputs, self._pool)
        except RuntimeError as error:  # out of memory, or an operation that asks the device for a number
            self._drop(len(self._made))
            self._seen[form] = False
            sys.stderr.write(f"steps are not replayed as a CUDA graph: {str(error).splitlines()[0][:200]}\n")

    def _drop(self, count: int) -> None:
        if count > 0 and self._made:
            torch.cuda.synchronize()  # a replay may still run
            for form in list(self._made)[:count]:
                del self._made[form]


def state(network: nn.Module) -> list[Any]:
    """What a recording holds on to: the modules inside a network, and where its weights are."""
    found: list[Any] = []
    waiting = [network]
    while waiting:
        module = waiting.pop()
        tensors = (*module._parameters.values(), *module._buffers.values())
        found += [tensor.data_ptr() for tensor in tensors if tensor is not None]
        inner = [child for child in module._modules.values() if child is not None]
        found += inner  # the modules themselves, which compare by identity: a number might be given to another later
        waiting += inner
    return found


class Recorded(UNet):
    """A UNet that on a GPU replays itself where no gradient is wanted and the form of input is not new."""

    def forward(self, z: Features, label: Sigma, cond: Conditioning, control: Control | None = None) -> Features:
        inputs = (z, label, cond, control)
        if not _recordable(inputs):
            return super().forward(*inputs)
        return _RECORDINGS.setdefault(self, Recordings())(self, super().forward, inputs)


# Beside the networks, so that a copy of one does not carry them along.
_RECORDINGS: WeakKeyDictionary[nn.Module, Recordings] = WeakKeyDictionary()


def _recordable(inputs: tuple[Any, ...]) -> bool:
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled(DEVICE):
        return False
    on_device = all(part.device.type == DEVICE for part in parts(inputs) if isinstance(part, Tensor))
    return on_device and not torch.cuda.is_current_stream_capturing()


def install(network: nn.Module) -> None:
    """Let a UNet record itself, from now on: what was recorded before is forgotten."""
    _RECORDINGS.pop(network, None)
    if type(network) is UNet:
        network.__class__ = Recorded
