"""A small network with random weights that the parity tests give to us and to others alike."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Net = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(scope="session")
def net() -> Net:
    """(z, training step) -> output of z's shape; smooth, bounded and far from linear in both."""
    rng = torch.Generator().manual_seed(0)
    first, time, last = (torch.randn(shape, generator=rng) for shape in ((32, 4), (32, 1), (4, 32)))

    def forward(z: Tensor, step: Tensor | float) -> Tensor:
        t = torch.as_tensor(step, dtype=z.dtype).reshape(-1, 1) / 1000
        hidden = z.flatten(2).transpose(1, 2) @ first.T.to(z) * 0.5 + (time.T.to(z) * t)[:, None]
        return (hidden.tanh() @ last.T.to(z) * 0.3).transpose(1, 2).reshape(z.shape)

    return forward
