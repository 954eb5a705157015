"""Other people's names for our tensors: rules that rename, and numbering computed from the config.

A KeyMap is one to one. A foreign tensor may hold the same numbers in another form: stacked (query, key, value),
transposed (a projection that multiplies from the other side), or as a 1 x 1 convolution where ours is a linear layer.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.errors import UserError

# (pattern, replacement) as re.sub has them; the replacement computes what is numbered otherwise.
Rules = list[tuple[str, str | Callable[[re.Match[str]], str]]]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class KeyMap:
    """names: ours -> theirs, several where theirs are stacked along the first axis to give ours.

    turned: those of ours that are the transpose of theirs; pointwise: those that theirs hold as 1 x 1 convolutions.
    """

    names: dict[str, tuple[str, ...]]
    turned: frozenset[str] = frozenset()
    pointwise: frozenset[str] = frozenset()

    def shapes(self, like: Shapes) -> dict[str, tuple[int, ...]]:
        """The foreign tensors, and the shapes they have where ours are of the shapes `like`."""
        return {
            name: self._form(ours, like[ours], len(theirs)) for ours, theirs in self.names.items() for name in theirs
        }

    def _form(self, ours: str, shape: tuple[int, ...], parts: int) -> tuple[int, ...]:
        shape = (shape[0] // parts, *shape[1:]) if parts > 1 else tuple(shape)
        shape = shape[::-1] if ours in self.turned else shape
        return (*shape, 1, 1) if ours in self.pointwise else shape

    def compare(self, foreign: Shapes, like: Shapes) -> None:
        """UserError that counts and names what is missing, left over or misshapen (but for a trailing 1 x 1)."""
        wanted = self.shapes(like)
        shared = wanted.keys() & foreign.keys()
        refuse(
            missing=wanted.keys() - foreign.keys(),
            unexpected=foreign.keys() - wanted.keys(),
            misshapen={name for name in shared if _matrix(foreign[name]) != _matrix(wanted[name])},
        )

    def unused(self, foreign: Iterable[str]) -> set[str]:
        """Foreign names that none of ours stands for."""
        return set(foreign).difference(*self.names.values())

    def tensor(self, ours: str, foreign: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """One of our tensors; a view of the foreign one where it can be."""
        parts = [foreign[name] for name in self.names[ours]]
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        return (value.T if ours in self.turned else value).reshape(shape)

    def load(self, foreign: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Foreign tensors under our names, in the shapes of `like`. UserError as in `compare`."""
        self.compare({n: tuple(v.shape) for n, v in foreign.items()}, {n: tuple(v.shape) for n, v in like.items()})
        return {ours: self.tensor(ours, foreign, tuple(like[ours].shape)) for ours in self.names}

    def save(self, native: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors under foreign names, in their form."""
        return {
            name: (part.T.contiguous() if ours in self.turned else part).reshape(
                self._form(ours, tuple(native[ours].shape), len(theirs))
            )
            for ours, theirs in self.names.items()
            for name, part in zip(theirs, native[ours].chunk(len(theirs)), strict=True)
        }

    def under(self, ours: str, theirs: str) -> "KeyMap":
        """The same map with prefixes on both sides."""
        names = {ours + name: tuple(theirs + part for part in parts) for name, parts in self.names.items()}
        return KeyMap(names, frozenset(ours + n for n in self.turned), frozenset(ours + n for n in self.pointwise))


def union(maps: Iterable[KeyMap]) -> KeyMap:
    """The maps of a model's parts as one."""
    whole = KeyMap({})
    for part in maps:
        whole = KeyMap(whole.names | part.names, whole.turned | part.turned, whole.pointwise | part.pointwise)
    return whole


def refuse(**faults: Iterable[str]) -> None:
    """UserError that counts the tensors of each fault and names three; nothing where there are none."""
    listed = {kind: sorted(names) for kind, names in faults.items()}
    if said := [f"{len(names)} {kind} ({some(names)})" for kind, names in listed.items() if names]:
        raise UserError(f"tensors do not fit: {'; '.join(said)}")


def some(names: Iterable[str]) -> str:
    """The first three of them."""
    listed = list(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")


def renamed(module: nn.Module, rules: Rules) -> KeyMap:
    """The tensors of a module, each named by what every rule in turn makes of our name."""
    names: dict[str, tuple[str, ...]] = {}
    for ours in module.state_dict():
        theirs = ours
        for pattern, replacement in rules:
            theirs = re.sub(pattern, replacement, theirs)
        names[ours] = (theirs,)
    return KeyMap(names)


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[:2]) if len(shape) == 4 and tuple(shape[2:]) == (1, 1) else tuple(shape)
