"""Guidance wraps a denoiser and returns a denoiser with its conditions bound; no sampler and no network knows of it."""

from collections.abc import Callable
from typing import Any

import torch

from ldm.conditioning import Conditioning, join
from ldm.shapes import Latent, Sigma

Denoise = Callable[[Latent, Sigma], Latent]
Conditional = Callable[[Latent, Sigma, Any], Latent]


def bind(denoiser: Conditional, cond: Any) -> Denoise:
    """The denoiser under one condition."""
    return lambda x, sigma: denoiser(x, sigma, cond)


def cfg(denoiser: Conditional, cond: Conditioning, uncond: Conditioning, scale: float) -> Denoise:
    """Classifier-free guidance: uncond + scale * (cond - uncond) (Ho & Salimans 2022).

    Both are evaluated in one batch of 2b; scale 1 leaves the unconditional half out.
    """
    if scale == 1:
        return bind(denoiser, cond)
    both = join(uncond, cond)

    def denoise(x: Latent, sigma: Sigma) -> Latent:
        free, bound = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        return free.lerp(bound, scale)

    return denoise
