"""Random numbers that are a pure function of (seed, stream, position of the sample, element), on any device.

By SplitMix64 (Steele et al. 2014, doi:10.1145/2660193.2660195) in int64 arithmetic, which wraps.
"""

import hashlib
import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15, as all constants here in two's complement


def uniform(seed: int, stream: str, position: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """One number of each sample, strictly between 0 and 1, fp32."""
    return ((_words(seed, stream, position, 1)[:, 0] & 0x7FFFFF) + 0.5) / 2**23


def normal(seed: int, stream: str, position: Int[Tensor, " b"], shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers (b, *shape) of each sample, fp32, on the device of `position`."""
    words = _words(seed, stream, position, math.prod(shape))
    radius = (2 * (32 * math.log(2) - ((words & 0xFFFFFFFF) + 0.5).log())).clamp(min=0).sqrt()
    angle = _shifted(words, 32).float() * (2 * math.pi / 2**32)
    return (radius * angle.cos()).reshape(-1, *shape)  # Box & Muller 1958


def _words(seed: int, stream: str, position: Tensor, count: int) -> Int[Tensor, "b n"]:
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
    start = _mixed(position * _GOLDEN + int.from_bytes(digest, "little", signed=True))
    return _mixed(start[:, None] + torch.arange(1, count + 1, device=position.device) * _GOLDEN)


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits with zeros coming in: torch's own shift carries the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
