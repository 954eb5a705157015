"""Editing as guidance: wrappers of a denoiser that hold a picture to what is known of it (see guidance)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ldm.conditioning import Conditioning, join
from ldm.diffusion.constants import column, first, level, uniform
from ldm.diffusion.guidance import Combine, Conditional, Denoise


def keep(denoise: Denoise, known: Tensor, mask: Tensor) -> Denoise:
    """Paint where the mask is 1, and answer `known` where it is 0; between them a mixture (RePaint's blending, 2022).

    A state that began as known + sigma * noise outside the mask then stays so at each level, whatever the sampler.
    """
    return lambda x, sigma: torch.lerp(known, denoise(x, sigma), mask)


def composed(
    denoiser: Conditional, conds: Conditioning, uncond: Conditioning, weights: Tensor, owner: Tensor, combine: Combine
) -> Denoise:
    """Several prompts a picture at once: uncond + sum of w * (cond - uncond) as cond (Liu et al. 2022, Eq. 11).

    weights: (m,), of each condition; owner: (m,), the picture that it belongs to. combine: see `guidance`.
    """
    both, weights = join(uncond, conds), weights.to(uncond.tokens.device)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        rows = torch.cat([torch.arange(len(x), device=x.device), owner])
        one = level(sigma)
        levels = sigma[rows] if one is None else uniform(one, len(rows), sigma.dtype, sigma.device)
        answers = denoiser(x[rows], levels, both)
        free, bound = answers[: len(x)], answers[len(x) :]
        change = (bound - free[owner]) * column(weights.to(x), x)
        return combine(free.index_add(0, owner, change), free, first(sigma))

    return denoise


def by_step(sigmas: Sequence[float] | Tensor, choices: Sequence[Callable[..., Tensor]]) -> Callable[..., Tensor]:
    """Another denoiser, bound or not, at each step of a run: choices[i] from sigmas[i] down to above sigmas[i + 1]."""
    below = [float(level) for level in sigmas[1:]]

    def denoise(x: Tensor, sigma: Tensor, *cond: Any) -> Tensor:
        at = first(sigma) * (1 - 1e-6)  # fp32 sigma against float64 levels
        step = next((i for i, level in enumerate(below) if at > level), len(below) - 1)
        return choices[step](x, sigma, *cond)

    return denoise


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From noise a to noise b along the sphere, each picture by itself: what lies between is as long as noise is."""
    dims = tuple(range(1, a.ndim))
    lengths = torch.linalg.vector_norm(a, dim=dims, keepdim=True) * torch.linalg.vector_norm(b, dim=dims, keepdim=True)
    angle = ((a * b).sum(dims, keepdim=True) / lengths).clamp(-1, 1).acos()
    between = (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()
    return torch.where(angle.sin() < 1e-4, a.lerp(b, share), between)


def windows(denoiser: Conditional, side: int, overlap: float = 0.5) -> Conditional:
    """A denoiser for latents larger than it knows: windows of `side` cells that overlap, their answers averaged.

    Each counts most in its middle, so that no seam is seen (MultiDiffusion, Bar-Tal et al. 2023, Eq. 5).
    """

    def starts(length: int) -> list[int]:
        stride = max(1, round(side * (1 - overlap)))
        return [*range(0, max(length - side, 0), stride), max(length - side, 0)]

    def tiled(x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        height, width = x.shape[2:]
        if max(height, width) <= side:
            return denoiser(x, sigma, cond)
        total, weight = torch.zeros_like(x), x.new_zeros(1, 1, height, width)
        for top in starts(height):
            for left in starts(width):
                rows, columns = slice(top, top + side), slice(left, left + side)
                part = None if cond.concat is None else cond.concat[:, :, rows, columns]
                answer = denoiser(x[:, :, rows, columns], sigma, replace(cond, concat=part))
                h, w = answer.shape[2:]
                ramp = [(torch.arange(n, device=x.device) + 0.5).to(x) / n for n in (h, w)]
                share = [torch.minimum(r, 1 - r) for r in ramp]
                hill = share[0][:, None] * share[1][None, :]
                total[:, :, rows, columns] += answer * hill
                weight[:, :, rows, columns] += hill
        return total / weight

    return tiled


def invert(denoise: Denoise, x0: Tensor, sigmas: Sequence[float] | Tensor, rounds: int = 3) -> Tensor:
    """The state at sigmas[0] from which the first-order sampler comes back to x0 (DDIM inversion, Song et al. 2021).

    Each step up from level t to s wants x_s with x_t = lerp(D(x_s), x_s, t / s): solved by `rounds` of fixed-point
    iteration (Pan et al. 2023). The lowest level above 0 is reached by adding the noise that the denoiser sees in x0.
    """
    rising = [float(level) for level in sigmas][-2::-1]
    lowest = uniform(rising[0], len(x0), x0.dtype, x0.device)
    x = x0
    for _ in range(rounds):
        x = x0 + (x - denoise(x, lowest))
    for t, s in pairwise(rising):
        known, upper = x, uniform(s, len(x), x.dtype, x.device)
        for _ in range(rounds):
            towards = denoise(x, upper)
            x = towards + (known - towards) * (s / t)
    return x


def consistent(
    denoise: Denoise, measure: Callable[[Tensor], Tensor], measured: Tensor, *, rounds: int = 3, strength: float = 1.0
) -> Denoise:
    """Posterior sampling for an inverse problem: D's answer, moved until it measures as was measured.

    `measure` maps a latent to what is known of its picture, differentiably. Each round is a gradient step on the
    squared difference, of Polyak's length, which takes its linear part to 0 (DiffPIR's data term, Zhu et al. 2023).
    """

    def towards(x: Tensor, sigma: Tensor) -> Tensor:
        z = denoise(x, sigma)
        dims = tuple(range(1, z.ndim))
        for _ in range(rounds):
            with torch.enable_grad():
                leaf = z.detach().requires_grad_()
                loss = (measure(leaf) - measured).square().flatten(1).sum(1)
                (slope,) = torch.autograd.grad(loss.sum(), leaf)
            length = column(loss, z) / slope.square().sum(dims, keepdim=True).clamp(min=1e-12)
            z = z - strength * length * slope
        return z.detach()

    return towards
