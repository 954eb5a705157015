"""Guidance wraps a denoiser and returns a denoiser with its conditions bound; no sampler and no network knows of it.

Classifier-free kinds differ only in how they combine the answers with and without the condition: a Combine. Others wrap
a Denoise that is already bound, so that they stack: interval(threshold(cfg(...)), bind(...), 0.3, 5).
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.conditioning import Conditioning, join
from ldm.diffusion.constants import column, first, level, uniform
from ldm.errors import UserError, nearest

Denoise = Callable[[Tensor, Tensor], Tensor]
Conditional = Callable[[Tensor, Tensor, Any], Tensor]
Combine = Callable[[Tensor, Tensor, float], Tensor]  # x0 with the condition, x0 without, sigma -> x0


def bind(denoiser: Conditional, cond: Any) -> Denoise:
    """The denoiser under one condition."""
    return lambda x, sigma: denoiser(x, sigma, cond)


def guided(denoiser: Conditional, cond: Conditioning, uncond: Conditioning, combine: Combine) -> Denoise:
    """Evaluate with and without the condition, in one batch of 2b, and combine the two."""
    both = join(uncond, cond)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        one = level(sigma)
        twice = torch.cat([sigma, sigma]) if one is None else uniform(one, 2 * len(x), sigma.dtype, sigma.device)
        pair = x.expand(2, *x.shape[1:]) if len(x) == 1 else torch.cat([x, x])  # of one picture no copy
        free, bound = denoiser(pair, twice, both).chunk(2)
        return combine(bound, free, first(sigma))

    return denoise


def cfg(
    denoiser: Conditional, cond: Conditioning, uncond: Conditioning, scale: float, *, rescale: float = 0.0
) -> Denoise:
    """Classifier-free guidance, uncond + scale * (cond - uncond) (Ho & Salimans 2022); scale 1 leaves uncond out."""
    combine = mixed(scale, rescale)
    return bind(denoiser, cond) if scale == 1 else guided(denoiser, cond, uncond, combine)


def mixed(scale: float, rescale: float = 0.0) -> Combine:
    """uncond + scale * (cond - uncond), as in `cfg`. UserError for a share out of range.

    rescale in [0, 1] is the share by which the deviation of each image is brought back to that under the condition
    alone, against over-exposure at high scales (Lin et al. 2024, Eq. 14 to 16, here on x0).
    """
    if not 0 <= rescale <= 1:
        raise UserError(f"guidance rescale is {rescale}: needs a value from 0 to 1")

    def combine(bound: Tensor, free: Tensor, sigma: float) -> Tensor:
        x0 = free.lerp(bound, scale)
        if rescale == 0:
            return x0
        dims = tuple(range(1, x0.ndim))
        ratio = bound.std(dims, keepdim=True) / x0.std(dims, keepdim=True)
        return x0 * (1 + rescale * (ratio - 1))

    return combine


def cfgpp(scale: float, sigmas: Sequence[float] | Tensor) -> Combine:
    """CFG++ (Chung et al. 2024): x0 guided with a scale in [0, 1], noise added back as the unconditional answer has it.

    For a deterministic first-order step from s to t that is classifier-free guidance of scale * s / (s - t), which is
    why it needs the levels of the run. UserError for a scale out of range.
    """
    if not 0 <= scale <= 1:
        raise UserError(f"CFG++ scale is {scale:g}: needs a value from 0 to 1")
    rising = sorted(float(level) for level in sigmas)

    def combine(bound: Tensor, free: Tensor, sigma: float) -> Tensor:
        below = bisect_left(rising, sigma * (1 - 1e-6))  # fp32 sigma against float64 levels
        lower = rising[below - 1] if below else 0.0
        return free.lerp(bound, scale * sigma / (sigma - lower))

    return combine


def apg(scale: float, *, parallel: float = 0.0, momentum: float = -0.5, radius: float = 15.0) -> Combine:
    """Adaptive projected guidance (Sadat et al. 2025, algorithm 1): high scales without over-saturation.

    Of the difference cond - uncond only the share `parallel` along cond is kept; the difference carries a (negative)
    momentum over the steps, and its norm is held to `radius`. A rise of sigma starts a new run.
    """
    before: list[tuple[float, Tensor]] = []

    def combine(bound: Tensor, free: Tensor, sigma: float) -> Tensor:
        dims = tuple(range(1, bound.ndim))
        change = bound - free
        if before and before[0][0] > sigma and before[0][1].shape == change.shape:
            change = change.add(before[0][1], alpha=momentum)
        before[:] = [(sigma, change)]
        change = change * (radius / torch.linalg.vector_norm(change, dim=dims, keepdim=True)).clamp(max=1)
        along = bound / torch.linalg.vector_norm(bound, dim=dims, keepdim=True)
        along = (change * along).sum(dims, keepdim=True) * along
        return bound + (scale - 1) * (change - (1 - parallel) * along)

    return combine


def autoguidance(denoise: Denoise, weak: Denoise, scale: float) -> Denoise:
    """Away from a weaker model, smaller or less trained: weak + scale * (D - weak) (Karras et al. 2024, Eq. 3)."""
    return denoise if scale == 1 else lambda x, sigma: weak(x, sigma).lerp(denoise(x, sigma), scale)


def interval(inside: Denoise, outside: Denoise, low: float, high: float) -> Denoise:
    """`inside` where low < sigma <= high, else `outside` (Kynkäänniemi et al. 2024): guidance where it helps."""
    if not 0 <= low < high:
        raise UserError(f"guidance interval ({low}, {high}]: needs 0 <= low < high")
    return lambda x, sigma: (inside if low < first(sigma) <= high else outside)(x, sigma)


def threshold(denoise: Denoise, share: float = 0.995, limit: float = 1.0) -> Denoise:
    """Dynamic thresholding (Saharia et al. 2022, section 2.3): where the quantile `share` of an image's |x0| is beyond
    `limit`, clip at it and scale back to `limit` (1 for pixels; latents of unit deviation want 3 or more)."""
    if not 0 < share <= 1 or limit <= 0:
        raise UserError(f"dynamic thresholding at share {share}, limit {limit}: needs 0 < share <= 1 and limit > 0")

    def clipped(x: Tensor, sigma: Tensor) -> Tensor:
        x0 = denoise(x, sigma)
        top = column(x0.abs().flatten(1).quantile(share, dim=1).clamp(min=limit), x0)
        return x0.clamp(-top, top) * (limit / top)

    return clipped


def classifier(denoise: Denoise, log_prob: Callable[[Tensor, Tensor], Tensor], scale: float = 1.0) -> Denoise:
    """Classifier guidance (Dhariwal & Nichol 2021, Eq. 13): x0 + scale * sigma^2 * grad log p(y | x).

    log_prob(x, sigma) -> (b,): of the wanted y, differentiable.
    """

    def denoise_towards(x: Tensor, sigma: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(log_prob(leaf, sigma).sum(), leaf)
        return denoise(x, sigma) + scale * column(sigma, x) ** 2 * gradient

    return denoise_towards


KINDS = {  # name -> how it is written, and how few and how many numbers it takes
    "rescale": ("rescale:0.7", 1, 1),
    "apg": ("apg", 0, 1),
    "cfgpp": ("cfgpp", 0, 0),
    "threshold": ("threshold:0.995-3", 2, 2),
    "interval": ("interval:0.3-5", 2, 2),
}


class Guidance:
    """What a text such as `apg+interval:0.3-5` asks for: KINDS with their numbers, joined by a plus. UserError: others.

    combine: see Combine; alone: the answer without the condition is not needed.
    """

    def __init__(self, text: str, scale: float, sigmas: Sequence[float] | Tensor) -> None:
        self.parts = dict(map(_part, filter(None, text.split("+"))))
        chosen = [name for name in ("rescale", "apg", "cfgpp") if name in self.parts]
        if len(chosen) > 1:
            raise UserError(f"guidance {text!r} joins {' and '.join(chosen)}: choose one of them")
        match chosen:
            case ["apg"]:
                self.combine = apg(scale, radius=(*self.parts["apg"], 15.0)[0])
            case ["cfgpp"]:
                self.combine = cfgpp(scale, sigmas)
            case _:
                self.combine = mixed(scale, *self.parts.get("rescale", ()))
        self.alone = scale == 1 and chosen != ["cfgpp"]
        self.limit(lambda x, sigma: x, lambda x, sigma: x)  # refuses numbers that cannot be

    def limit(self, guided: Denoise, bound: Denoise) -> Denoise:
        """A guided denoiser with its answers clipped, and one that is not guided where the interval does not reach."""
        if "threshold" in self.parts:
            guided = threshold(guided, *self.parts["threshold"])
        return interval(guided, bound, *self.parts["interval"]) if "interval" in self.parts else guided


def _part(text: str) -> tuple[str, list[float]]:
    name, _, numbers = text.strip().partition(":")
    _, least, most = KINDS.get(name, ("", 1, 0))
    try:
        values = [float(number) for number in numbers.split("-")] if numbers else []
        understood = least <= len(values) <= most and all(map(math.isfinite, values))
    except ValueError:
        understood = False
    if not understood:
        known = ", ".join(form for form, _, _ in KINDS.values())
        close = "" if name in KINDS else nearest(name, list(KINDS))
        raise UserError(f"guidance {text!r} cannot be read{close}: write {known}, joined by +")
    return name, values
