"""Noise that belongs to the image: each has its own CPU generator, the same in any batch on any device."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


class SeededNoise:
    """Standard normal noise for a batch of len(seeds) images; the first call gives the initial noise."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """Noise of x's shape, device and dtype, drawn in fp32. ValueError where x holds another number of images."""
        if len(x) != len(self.generators):
            raise ValueError(f"a batch of {len(x)} images has {len(self.generators)} seeds: give one for each")
        draws = [torch.randn((1, *x.shape[1:]), generator=generator) for generator in self.generators]
        return torch.cat(draws).to(x.device, x.dtype)
