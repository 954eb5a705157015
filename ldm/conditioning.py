"""What a backbone is conditioned on, whatever the family: one frozen value that can be joined and moved."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ldm.shapes import Latent, TokenMask, Tokens, Vector


@dataclass(frozen=True)
class Conditioning:
    """Conditions of a batch.

    tokens: (b, l, d) text states for cross-attention; mask: (b, l), True where attention may look, None for everywhere;
    vector: (b, v) pooled features added to the time embedding (SDXL: 2816); concat: (b, c, h, w) channels appended to
    the latent (inpainting models).
    """

    tokens: Tokens
    mask: TokenMask | None = None
    vector: Vector | None = None
    concat: Latent | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Conditioning":
        """Apply a function to each tensor that is there."""
        present = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return Conditioning(**{name: function(value) for name, value in present.items()})

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: slice | Tensor) -> "Conditioning":
        return self.map(lambda value: value[index])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Conditioning":
        """Move every tensor, and cast those of floating point."""
        return self.map(lambda value: value.to(device, dtype if value.is_floating_point() else None))


def join(*conditions: Conditioning) -> Conditioning:
    """Concatenate along the batch. All must carry the same fields; ValueError where they do not."""
    present = {tuple(getattr(c, f.name) is not None for f in fields(c)) for c in conditions}
    if len(present) != 1:
        raise ValueError("conditions to join carry different fields")
    columns = {f.name: [getattr(c, f.name) for c in conditions] for f in fields(Conditioning)}
    joined: dict[str, Any] = {name: None if vs[0] is None else torch.cat(vs) for name, vs in columns.items()}
    return Conditioning(**joined)
