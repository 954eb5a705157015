"""LoRA (Hu et al. 2021, arXiv:2106.09685), also on convolutions, and DoRA (Liu et al. 2024, arXiv:2402.09353).

An adapter changes a weight and nothing else: it costs nothing while a model runs, and reaches the text towers' joined
queries, keys and values too.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

Weight = Float[Tensor, "out _ ..."]


class LowRank(nn.Module):
    """W -> W + scale * up @ down; trains as a parametrization of the weight (`torch.nn.utils.parametrize`).

    down: (r, in) or (r, in, k, k); up: (out, r) or (out, r, 1, 1). mid: (r, r, k, k), a kernel between two matrices.
    magnitude: DoRA's, the norm of each row or column of the result, 1 along the axes that a norm is taken over.
    """

    def __init__(
        self,
        down: Tensor,
        up: Tensor,
        *,
        mid: Tensor | None = None,
        magnitude: Tensor | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.mid = None if mid is None else nn.Parameter(mid)
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)
        self.scale = scale

    def delta(self, shape: torch.Size) -> Tensor:
        """The low-rank product in a weight's shape."""
        up, down = self.up.flatten(1), self.down.flatten(1)
        product = up @ down if self.mid is None else torch.einsum("om,mnhw,ni->oihw", up, self.mid, down)
        return self.scale * product.reshape(shape)

    def change(self, weight: Weight) -> Weight:
        """W' - W."""
        delta = self.delta(weight.shape)
        if self.magnitude is None:
            return delta
        changed = weight + delta
        over = [axis for axis, side in enumerate(self.magnitude.shape) if side == 1]
        norm = torch.linalg.vector_norm(
            changed.detach(), dim=over, keepdim=True
        )  # a constant to the gradient: Sec. 4.3
        return changed * (self.magnitude / norm) - weight

    def forward(self, weight: Weight) -> Weight:
        """W', computed in fp32 at least, in W's own type."""
        wide = weight.to(torch.promote_types(weight.dtype, self.down.dtype))
        return (wide + self.change(wide)).to(weight.dtype)


class Place(NamedTuple):
    """A weight of a model by its name in a file of ours; or one of `parts` stacked in it, or its transpose."""

    name: str
    part: int = 0
    parts: int = 1
    turned: bool = False

    def view(self, weight: Tensor) -> Tensor:
        """What an adapter of this place changes."""
        rows = weight.chunk(self.parts)[self.part]
        return rows.T if self.turned else rows


@dataclass(frozen=True, eq=False)
class Patch:
    """An adapter at a place, and the weight that it was given."""

    place: Place
    adapter: LowRank
    weight: float


class Adapted(nn.Parameter):
    """A weight with patches in it. It remembers the parameter that it stands for, which no patch ever touches."""

    original: nn.Parameter
    patches: list[Patch]


Modules = Mapping[str, nn.Module]
Adapters = Iterable[tuple[Place, LowRank]]


class Injected:
    """Adapters in a model, until `eject`. Any number may be in it, and leave it in any order."""

    def __init__(self, modules: Modules, patches: list[Patch]) -> None:
        self._modules, self._patches = modules, patches

    def eject(self) -> None:
        """Take them out: without others the model holds its own parameters again, the very same. Twice does no harm."""
        for name, mine in _by_name(self._patches):
            owner, leaf, original, patches = _find(self._modules, name)
            _put(owner, leaf, original, [patch for patch in patches if patch not in mine])


def inject(modules: Modules, adapters: Adapters, weight: float = 1.0) -> Injected:
    """Put adapters into networks, what they change multiplied by `weight`.

    Several add up, each computed from the model's own weights, whatever else is in it.
    """
    patches = [Patch(place, adapter, weight) for place, adapter in adapters]
    for name, mine in _by_name(patches):
        owner, leaf, original, before = _find(modules, name)
        _put(owner, leaf, original, before + mine)
    return Injected(modules, patches)


def fuse(modules: Modules, adapters: Adapters, weight: float = 1.0) -> None:
    """Make adapters part of the networks for good, without keeping what was there before."""
    for name, mine in _by_name([Patch(place, adapter, weight) for place, adapter in adapters]):
        owner, leaf, original, others = _find(modules, name)
        _put(owner, leaf, nn.Parameter(_patched(original, mine), original.requires_grad), others)


def _by_name(patches: list[Patch]) -> list[tuple[str, list[Patch]]]:
    ordered = sorted(patches, key=lambda patch: patch.place.name)
    return [(name, list(group)) for name, group in groupby(ordered, key=lambda patch: patch.place.name)]


def _find(modules: Modules, name: str) -> tuple[nn.Module, str, nn.Parameter, list[Patch]]:
    """The module that owns a weight, its own name there, and what stands there without and with patches."""
    network, _, inner = name.partition(".")
    path, _, leaf = inner.rpartition(".")
    owner = modules[network].get_submodule(path)
    parameter = owner.get_parameter(leaf)
    original, patches = (parameter.original, parameter.patches) if isinstance(parameter, Adapted) else (parameter, [])
    return owner, leaf, original, patches


def _put(owner: nn.Module, leaf: str, original: nn.Parameter, patches: list[Patch]) -> None:
    here = owner.get_parameter(leaf)
    if original.device != here.device:  # the model has moved since
        original = nn.Parameter(original.to(here.device), original.requires_grad)
    if not patches:
        owner.register_parameter(leaf, original)
        return
    adapted = Adapted(_patched(original, patches), original.requires_grad)
    adapted.original, adapted.patches = original, patches
    owner.register_parameter(leaf, adapted)


@torch.no_grad()
def _patched(original: nn.Parameter, patches: list[Patch]) -> Tensor:
    own = original.to(torch.promote_types(original.dtype, torch.float32))
    total = own.clone()
    for patch in patches:
        adapter = patch.adapter.to(own.device)
        patch.place.view(total).add_(adapter.change(patch.place.view(own)), alpha=patch.weight)
    return torch.empty_like(original).copy_(total)
