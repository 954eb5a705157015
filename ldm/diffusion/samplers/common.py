"""What all samplers share: the step they yield, the denoiser as they call it, and plans.

A sampler is called as (denoise, x, sigmas, noise, *, options) and gives Step, Step, ... over falling sigmas. Its state
is x in x = x0 + sigma * eps; levels are plain floats, so that all coefficients are arithmetic of Python. A step is
linear in x and in the answers so far. Where the levels alone decide how, a solver is a function of them, its PLAN: a
row of weights for each evaluation, be that a stage of a step or the only one of a step that remembers others.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.constants import uniform, wide
from ldm.errors import UserError

State = Float[Tensor, "b ..."]
Denoise = Callable[[Tensor, Tensor], Tensor]
NoiseFn = Callable[[Tensor], Tensor]
Levels = Sequence[float] | Tensor
Grid = tuple[float, ...]


class Step(NamedTuple):
    """What a step arrived at: x at level sigma, and the clean picture x0 that it steered by."""

    x: State
    x0: State
    sigma: float


Sampler = Callable[..., Iterator[Step]]


class Model:
    """A denoiser called with one level for the whole batch, its answer checked: NaN is an error, not a black image.

    A GPU is asked while it works on the next answer, for it would stand still meanwhile: see `settle`.
    """

    def __init__(self, denoise: Denoise, grid: Grid) -> None:
        self.denoise = denoise
        self.grid = grid
        self._unread: tuple[float, Tensor, torch.cuda.Event] | None = None

    def __call__(self, x: State, sigma: float) -> State:
        x0 = self.denoise(x, uniform(sigma, len(x), x.dtype, x.device))
        total = x0.sum()  # finite only where every term is, at a third of the cost of isfinite().all()
        if total.device.type != "cuda":
            self._check(total, sigma)
            return x0
        self.settle()
        self._unread = sigma, total.to("cpu", non_blocking=True), torch.cuda.Event()
        self._unread[2].record()
        return x0

    def settle(self) -> None:
        """Check the last answer, if that is still to be done. UserError where it is not finite."""
        if self._unread is not None:
            (sigma, total, copied), self._unread = self._unread, None
            copied.synchronize()
            self._check(total, sigma)

    def _check(self, total: Tensor, sigma: float) -> None:
        if not math.isfinite(total):
            steps = len(self.grid) - 1
            step = min(1 + sum(level > sigma for level in self.grid), steps)
            raise UserError(
                f"the network returned values that are not finite at step {step} of {steps}, sigma {sigma:.5g}: "
                "try --precision fp32, a lower guidance scale, or check the model file"
            )


def begin(denoise: Denoise, x: State, sigmas: Levels) -> tuple[Model, State, Grid]:
    """The checked denoiser, the state in fp32 or wider, and the levels as floats. UserError where they do not fall."""
    grid = tuple(sigmas.tolist() if isinstance(sigmas, Tensor) else map(float, sigmas))
    if len(grid) < 2:
        raise UserError(f"a run of {max(len(grid) - 1, 0)} steps: needs at least 1")
    for s, t in pairwise(grid):
        if not math.inf > s > t >= 0:
            raise UserError(f"noise levels must fall, finite and at or above 0: {s:.5g} is followed by {t:.5g}")
    return Model(denoise, grid), wide(x), grid


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """UserError unless low <= value <= high."""
    if not low <= value <= high:
        raise UserError(f"{name} is {value}: needs a value from {low:g} to {high:g}")


def ancestral(s: float, t: float, eta: float) -> tuple[float, float]:
    """Split a step from level s to t: (down, up) = the level to go down to, the noise to add, down^2 + up^2 = t^2.

    eta 1 gives the variance of DDPM's posterior (Ho et al. 2020, Eq. 7), eta 0 no noise (Song et al. 2021, Eq. 16).
    """
    up = min(t, eta * t * math.sqrt(s * s - t * t) / s)
    return math.sqrt(t * t - up * up), up


def renoise(x: State, noise: NoiseFn, up: float) -> State:
    """x with fresh noise of deviation `up`; none is drawn where up is 0."""
    return x.add(noise(x), alpha=up) if up > 0 else x


class Row(NamedTuple):
    """One evaluation, at level s: x becomes lerp(x0, x, keep) + sum(weights * past) + up * noise, of level t.

    The past is of x0, or of x - x0, newest first, this row's own in front. The lerp alone is a first-order step, and
    exact where the data are one point; the weights correct it. It is no x + slope * (t - s), which at sigma 1e4 loses
    1e-4 to cancellation. t None: a stage within a step, of which nobody is told. lift: noise that is added first.
    """

    s: float
    t: float | None
    keep: float
    weights: Sequence[float] = ()
    up: float = 0.0
    lift: float = 0.0


Plan = Callable[..., list[Row]]  # (levels, *, options)


def follow(model: Model, x: State, rows: Sequence[Row], noise: NoiseFn, *, of_noise: bool = False) -> Iterator[Step]:
    """The steps of a plan."""
    past: list[Tensor] = []
    depth = max(len(row.weights) for row in rows)
    for s, t, keep, weights, up, lift in rows:
        x = renoise(x, noise, lift)
        x0 = model(x, s)
        past = [x - x0 if of_noise else x0, *past][:depth]
        x = renoise(x0.lerp(x, keep), noise, up)
        for weight, value in zip(weights, past, strict=False):
            x.add_(value, alpha=weight)
        if t is not None:
            yield Step(x, x0, t)


def sampler(steps: Callable[..., Iterator[Step]]) -> Sampler:
    """The sampler of a generator (model, x, grid, noise, *, options) that has its arguments from `begin`."""

    def run(denoise: Denoise, x: State, sigmas: Levels, noise: NoiseFn, **options: Any) -> Iterator[Step]:
        model, x, grid = begin(denoise, x, sigmas)
        yield from steps(model, x, grid, noise, **options)
        model.settle()

    return run


def planned(plan: Plan, *, of_noise: bool = False) -> Sampler:
    """The sampler that follows a plan, which is worked out once for all runs over the same levels."""
    made = lru_cache(maxsize=8)(plan)

    def steps(model: Model, x: State, grid: Grid, noise: NoiseFn, **options: Any) -> Iterator[Step]:
        return follow(model, x, made(grid, **options), noise, of_noise=of_noise)

    return sampler(steps)
