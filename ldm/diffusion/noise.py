"""Noise that belongs to the image: each has its own CPU generator, the same in any batch on any device.

And what training may do to noise: NOISES, and pairing with pictures.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ldm.errors import UserError
from ldm.shapes import Latent

Draw = Callable[[str, tuple[int, ...]], Tensor]  # (name of a stream, shape) -> standard normal numbers (b, *shape)


class SeededNoise:
    """Standard normal noise for a batch of len(seeds) images; the first call gives the initial noise."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """Noise of x's shape, device and dtype, drawn in fp32. ValueError where x holds another number of images."""
        if len(x) != len(self.generators):
            raise ValueError(f"a batch of {len(x)} images has {len(self.generators)} seeds: give one for each")
        drawn = torch.cat([torch.randn((1, *x.shape[1:]), generator=generator) for generator in self.generators])
        return (drawn.pin_memory() if x.is_cuda else drawn).to(x.device, x.dtype, non_blocking=True)


def offset(noise: Latent, strength: float, draw: Draw) -> Latent:
    """Beside it one draw for each channel as a whole: pictures may become dark or bright (Guttenberg 2023)."""
    return noise + strength * draw("offset", (noise.shape[1], 1, 1))


def pyramid(noise: Latent, discount: float, draw: Draw) -> Latent:
    """Noise at each halving of the sides too, `discount` times that before, in all of unit variance (Whitaker 2023)."""
    (channels, *side), size, weight, power = noise.shape[1:], noise.shape[2:], 1.0, 1.0
    while max(side) > 1:
        side = [(length + 1) // 2 for length in side]
        weight *= discount
        power += weight**2
        coarse = draw(f"pyramid {max(side)}", (channels, *side))
        noise = noise + weight * F.interpolate(coarse, size, mode="nearest")
    return noise / power**0.5


NOISES: dict[str, Callable[[Latent, float, Draw], Latent]] = {"offset": offset, "pyramid": pyramid}


def paired(noise: Latent, x0: Latent, size: int) -> Latent:
    """The same noise, dealt among each `size` successive samples so that it lies nearest to them in sum.

    Minibatch optimal transport (Tong et al. 2023, arXiv:2302.00482): paths cross less, and become straighter.
    UserError where the batch is not whole groups, or scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise UserError("loss.pairing needs scipy: pip install scipy, or set it to 0") from None
    if len(x0) % size:
        raise UserError(f"loss.pairing {size} does not divide the {len(x0)} samples that a process takes at a time")
    order = []
    for start in range(0, len(x0), size):
        part = slice(start, start + size)
        cost = torch.cdist(x0[part].flatten(1).double(), noise[part].flatten(1).double()).square()
        order += [start + column for column in linear_sum_assignment(cost.cpu().numpy())[1].tolist()]
    return noise[torch.tensor(order, device=noise.device)]
