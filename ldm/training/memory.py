"""The memory of a training step: how to need less, and before it starts, how much, by tensors without data."""

import copy
import functools
import os
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ldm.diffusion import constants
from ldm.errors import UserError
from ldm.models import autoencoder, layers, unet
from ldm.training.config import LdmRun, VaeRun
from ldm.training.processes import launched, precision


class Memory(NamedTuple):
    """Bytes: held of networks that are not trained; step of activations and gradients at the worst moment."""

    weights: int
    held: int
    average: int
    optimizer: int
    step: int

    @property
    def total(self) -> int:
        return sum(self)

    def __str__(self) -> str:
        weights, average, optimizer, step = map(size, (self.weights + self.held, *self[2:]))
        return (
            f"{size(self.total)} for a step: weights {weights}, their average {average}, optimiser {optimizer}, "
            f"gradients and activations {step}"
        )


class Counter(TorchDispatchMode):
    """Within it, counts the bytes of tensors that live at one time, besides `known` ones, and remembers the peak.

    A number that is asked of a tensor without data, a noise level, say, is 1.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            if isinstance(args[0], FakeTensor):
                return 1.0
            with _disable_current_modes():  # a constant
                return args[0].item()
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and (storage := value.untyped_storage()) not in self._known:
                self._known.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage.nbytes())
        return result

    def _free(self, size: int) -> None:
        self.live -= size


BLOCKS = (unet.Block, layers.Middle, autoencoder.Stage)
# Bytes of an optimiser's state for a byte of its parameters.
STATE = {"adamw": 2.0, "adamw8bit": 0.5, "prodigy": 4.0, "adafactor": 0.01, "muon": 1.0}


def predict(task: Any, config: VaeRun | LdmRun, processes: int = 1, device: torch.device | None = None) -> Memory:
    """The memory of a step of one of `processes` processes that share the batch. `task` is left as it is.

    Not counted are the libraries, the data loader, and what a kernel takes for itself while it runs.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    share = max(config.run.batch_size // (processes * config.optim.accumulate), 1)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision(config.run))
    sample = task.dataset.__getitems__([0])
    with FakeTensorMode(allow_non_fake_inputs=True), torch.compiler.set_stance("force_eager"):
        double, tensors = _double(task, device)
        double.hint = "none"  # of the size of any, and drawn by no library that wants to see the picture
        batch: dict[str, Any] = {"step": 10**9}
        for name, value in sample.items():
            many = isinstance(value, Tensor)
            batch[name] = value.new_empty(share, *value.shape[1:], device=device) if many else value * share
        if isinstance(config, LdmRun) and config.cache:
            with Counter(tensors), torch.no_grad():
                shape = double.latent(batch).shape
            batch |= {name: torch.empty(shape, dtype=torch.float16, device=device) for name in ("mean", "std")}
            del batch["image"]
        objectives, gradients = double.objectives(), list[Tensor | None]()
        moved = [_trained(objective.networks.values()) for objective in objectives]
        counter = Counter(tensors)
        with counter, torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            for objective, parameters in zip(objectives, moved, strict=True):
                loss = objective.loss(batch)["loss"]
                gradients += torch.autograd.grad(loss, parameters, allow_unused=True)
                del loss
        constants.forget()
        trained, split = sum(map(_bytes, moved)), _bytes(moved[0]) if config.run.shard else 0
        averaged = _bytes(_trained(double.networks[name] for name in double.averaged))
    away = split - split // processes  # what others keep
    copies = (config.optim.accumulate > 1) + (processes > 1)  # gradients that wait for more, or to be sent
    return Memory(
        weights=trained + (split // processes if away else 0),
        held=_bytes(tensors) - trained,
        average=(averaged - away) * max(len(config.run.ema.widths), 1),
        optimizer=int((trained - away) * STATE[config.optim.kind]),
        step=counter.peak + copies * trained,
    )


def recompute(network: nn.Module) -> None:
    """Keep what goes into each block of a network, and compute the inside once more for the gradient: less memory for
    one more forward pass (Chen et al. 2016, arXiv:1604.06174).
    """
    for block in network.modules():
        if isinstance(block, BLOCKS):
            again = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
            block.forward = again  # type: ignore[method-assign]


def announce(task: Any, config: VaeRun | LdmRun) -> None:
    """Say on stderr what a step will take, in the first process of those that a launcher started."""
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        line = str(predict(task, config, launched()))
    except UserError:
        raise
    except Exception as error:  # an operator that has no rule for shapes keeps nobody from training
        line = f"a step's is not known before it is taken ({type(error).__name__})"
    sys.stderr.write(f"memory: {line}\n")


def free(device: torch.device) -> int:
    """Bytes that are free on a GPU, or in the machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = file.read_text().splitlines() if (file := Path("/proc/meminfo")).exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), sys.maxsize)


def _double(task: Any, device: torch.device) -> tuple[Any, list[Tensor]]:
    """A copy of the task whose tensors are fake, and these; everything else is shared."""

    def fake(value: Tensor) -> Tensor:
        empty = torch.empty_like(value, device=device)
        return nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty

    double, parts = copy.copy(task), {name: tree_leaves(kept) for name, kept in vars(task).items()}
    copied = {name for name, leaves in parts.items() if any(isinstance(v, nn.Module | Tensor) for v in leaves)}
    inside = [leaf for name in copied for leaf in parts[name]]
    tensors = [t for m in inside for t in ((m,) if isinstance(m, Tensor) else (*m.parameters(), *m.buffers()))]
    memo: dict[int, Any] = {id(tensor): fake(tensor) for tensor in tensors}
    fakes = list(memo.values())
    for name in copied:
        setattr(double, name, copy.deepcopy(getattr(task, name), memo))
    double.device = device
    return double, fakes


def _trained(networks: Iterable[nn.Module]) -> list[Tensor]:
    return [p for network in networks for p in network.parameters() if p.requires_grad]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
