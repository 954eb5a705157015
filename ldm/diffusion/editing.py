"""Editing as guidance: wrappers of a denoiser that hold a picture to what is known of it (see guidance)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.conditioning import Conditioning, join
from ldm.diffusion.guidance import Conditional, Denoise


def keep(denoise: Denoise, known: Tensor, mask: Tensor) -> Denoise:
    """Paint where the mask is 1, and answer `known` where it is 0; between them a mixture (RePaint's blending, 2022).

    A state that began as known + sigma * noise outside the mask then stays on that line at each noise level: the first-
    order step from s to t leaves it at known + t * noise, whatever the sampler's history says.
    """
    return lambda x, sigma: torch.lerp(known, denoise(x, sigma), mask)


def composed(
    denoiser: Conditional,
    conds: Conditioning,
    uncond: Conditioning,
    weights: Tensor,
    owner: Tensor,
    scale: float,
) -> Denoise:
    """Several prompts a picture at once: uncond + scale * sum of w * (cond - uncond) (Liu et al. 2022, Eq. 11).

    weights: (m,), of each condition; owner: (m,), the picture that it belongs to.
    """
    both = join(uncond, conds)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        rows = torch.cat([torch.arange(len(x), device=x.device), owner])
        answers = denoiser(x[rows], sigma[rows], both)
        free, bound = answers[: len(x)], answers[len(x) :]
        change = (bound - free[owner]) * weights.to(x).view(-1, *[1] * (x.ndim - 1))
        return free.index_add(0, owner, change, alpha=scale)

    return denoise


def by_step(sigmas: Sequence[float] | Tensor, choices: Sequence[Denoise]) -> Denoise:
    """Another denoiser at each step of a run: choices[i] from sigmas[i] down to, and without, sigmas[i + 1]."""
    below = [float(level) for level in sigmas[1:]]

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        at = float(sigma[0]) * (1 - 1e-6)  # fp32 sigma against float64 levels
        step = next((i for i, level in enumerate(below) if at > level), len(below) - 1)
        return choices[step](x, sigma)

    return denoise
