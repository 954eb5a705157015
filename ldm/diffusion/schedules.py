"""Noise schedules: the levels sigma of x = x0 + sigma * eps, what the network is told of them, and where it trains.

Every schedule is one rising map from its time t in [0, 1] to sigma. `vp` is a table over 1,000 training steps (DDPM,
step i at t = (i + 1) / 1000), `flow` the straight line sigma = t / (1 - t), `edm` the rho = 7 curve of Karras et al.
A resolution shift multiplies sigma: for flow that is exactly SD3's t' = s t / (1 + (s - 1) t) (Esser et al. 2024,
Eq. 23), for vp the shifted log-SNR of simple diffusion (Hoogeboom et al. 2023).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import torch
from torch import Tensor

from ldm.diffusion.spacings import SPACINGS, TRAIN_STEPS, Map, through
from ldm.errors import UserError, unknown
from ldm.shapes import Sigma, Sigmas

# Beyond sigma 80 less than 1/6400 of the signal's power is left: curves even in some function of sigma would spend
# steps there on nothing, since flow reaches 999 and zero terminal SNR 4096.
BLIND = 80.0


@dataclass(frozen=True)
class ScheduleConfig:
    """Settings of a schedule; a field left None takes the value of its kind.

    betas, beta_range, zero_snr: of vp alone. shift: factor on sigma. density: of training noise levels, `uniform`
    in time (what vp does by itself) or `lognormal` in sigma with `mean` and `std` of ln sigma (flow 0 and 1, edm
    -1.2 and 1.2): for flow that is SD3's logit-normal density of t. start: the scale of a run's first noise, see
    `Schedule.start`. whole_labels: a flow's network is told whole steps, rounded down, as diffusers does.
    """

    kind: Literal["vp", "flow", "edm"] = "vp"
    betas: Literal["linear", "scaled_linear", "cosine", "sigmoid"] = "scaled_linear"
    beta_range: tuple[float, float] | None = None
    zero_snr: bool = False
    shift: float = 1.0
    density: Literal["uniform", "lognormal"] | None = None
    mean: float | None = None
    std: float | None = None
    start: Literal["unit", "sigma", "sum"] = "unit"
    whole_labels: bool = False


@dataclass(frozen=True)
class Schedule:
    """A noise schedule: three maps and a training density, all computed in float64."""

    config: ScheduleConfig
    sigma: Map  # time in [0, 1] -> sigma, clamped to the range
    at: Map  # training step 0..999 -> sigma
    label_of: Map  # sigma -> what the network is told
    sigma_min: float
    sigma_max: float
    window: tuple[float, float]  # least and greatest level of the curves even in a function of sigma

    def label(self, sigma: Sigma) -> Tensor:
        """What the network is told: the training step 0..999 (vp), 1000 t (flow), ln(sigma) / 4 (edm)."""
        return self.label_of(sigma.double()).to(sigma.dtype)

    def steps(self, n: int, spacing: str | Sequence[float] = "trailing") -> Sigmas:
        """The n + 1 falling levels of a run, float64; the last is 0. A list in place of a name is taken as it is.

        UserError for an unknown name, n < 1, or a list that is not n + 1 levels.
        """
        if n < 1:
            raise UserError(f"steps is {n}: needs at least 1")
        if not isinstance(spacing, str):
            if len(spacing) != n + 1:
                raise UserError(f"{len(spacing)} noise levels for {n} steps: give {n + 1}, falling, the last of them 0")
            return torch.tensor(spacing, dtype=torch.float64)
        if spacing not in SPACINGS:
            raise unknown("spacing", spacing, SPACINGS)
        return _levels(self, n, spacing).clone()

    def quantile(self, u: Tensor) -> Tensor:
        """The level below which a share u of training falls; even u in (0, 1) stratify the density."""
        config, wide = self.config, u.double()
        if (config.density or ("uniform" if config.kind == "vp" else "lognormal")) == "uniform":
            # A table has 1,000 levels: draw one of them, never one between.
            time = (wide * TRAIN_STEPS).ceil() / TRAIN_STEPS if config.kind == "vp" else wide
            return self.sigma(time).to(u.dtype)
        mean, std = (-1.2, 1.2) if config.kind == "edm" else (0.0, 1.0)
        mean = (mean if config.mean is None else config.mean) + math.log(config.shift)
        std = std if config.std is None else config.std
        return (mean + std * torch.special.ndtri(wide)).exp().clamp(self.sigma_min, self.sigma_max).to(u.dtype)

    def sample(self, n: int, rng: torch.Generator) -> Sigma:
        """n training levels, float32, from a CPU generator."""
        return self.quantile(torch.rand(n, generator=rng, dtype=torch.float64)).float()

    def start(self, sigma: float) -> float:
        """The scale of the first noise: x's deviation where latents have unit deviation, or k-diffusion's, or a sum."""
        return {"unit": math.hypot(1.0, sigma), "sigma": sigma, "sum": 1.0 + sigma}[self.config.start]


@lru_cache(maxsize=64)
def _levels(schedule: Schedule, n: int, spacing: str) -> Sigmas:
    levels = torch.cat([SPACINGS[spacing](schedule, n), torch.zeros(1, dtype=torch.float64)])
    if levels.diff().max() >= 0:
        raise UserError(f"{n} steps with {spacing} spacing are more than there are: fewer, or choose trailing")
    return levels


def make_schedule(config: ScheduleConfig) -> Schedule:
    """Build the schedule that a config describes; UserError for settings that cannot be."""
    if config.shift <= 0:
        raise UserError(f"shift is {config.shift}: needs a factor above 0")
    if config.std is not None and config.std <= 0:
        raise UserError(f"std is {config.std}: needs a deviation above 0")
    return {"vp": _vp, "flow": _flow, "edm": _edm}[config.kind](config)


def resolution_shift(tokens: float, base: float = 256.0) -> float:
    """SD3's factor on sigma for a latent of `tokens` cells where the schedule was made for `base`: sqrt(m / n)."""
    return math.sqrt(tokens / base)


def _vp(config: ScheduleConfig) -> Schedule:
    abar = _zero_snr(alphas_bar(config)) if config.zero_snr else alphas_bar(config)
    table = ((1 - abar) / abar).sqrt() * config.shift
    logs, steps = table.log(), torch.arange(TRAIN_STEPS, dtype=torch.float64)
    log_of, step_of = through(steps, logs), through(logs, steps)

    def at(step: Tensor) -> Tensor:
        return log_of(step).exp()

    def sigma(time: Tensor) -> Tensor:
        return at(time * TRAIN_STEPS - 1)

    low, high = float(table[0]), float(table[-1])
    return Schedule(config, sigma, at, lambda level: step_of(level.log()), low, high, (low, min(high, BLIND)))


def _flow(config: ScheduleConfig) -> Schedule:
    shift, first, last = config.shift, 0.001, 0.999  # t = 1 is sigma = infinity
    low, high = shift * first / (1 - first), shift * last / (1 - last)
    # The noise of a unit-deviation latent is out of sight below 0.02. A last step from far above to far below that
    # would be endless in log sigma, where multistep solvers extrapolate.
    floor = max(low, 0.02)
    lowest = floor / (shift + floor)

    def sigma(time: Tensor) -> Tensor:
        t = time.clamp(first, last)
        return shift * t / (1 - t)

    def at(step: Tensor) -> Tensor:
        return sigma(lowest + (last - lowest) * step / (TRAIN_STEPS - 1))

    def label(level: Tensor) -> Tensor:
        step = TRAIN_STEPS * level / (1 + level)
        return step.floor() if config.whole_labels else step

    return Schedule(config, sigma, at, label, low, high, (floor, min(high, BLIND)))


def _edm(config: ScheduleConfig) -> Schedule:
    low, high, rho = 0.002 * config.shift, 80.0 * config.shift, 7.0

    def sigma(time: Tensor) -> Tensor:
        return (low ** (1 / rho) * (1 - time) + high ** (1 / rho) * time) ** rho

    def at(step: Tensor) -> Tensor:
        return sigma(step / (TRAIN_STEPS - 1))

    return Schedule(config, sigma, at, lambda level: level.log() / 4, low, high, (low, high))


def alphas_bar(config: ScheduleConfig) -> Tensor:
    """The share of signal power left after each of the 1,000 training steps: (1000,), falling."""
    line = partial(torch.linspace, dtype=torch.float64)
    if config.betas == "cosine":  # Nichol & Dhariwal 2021, Eq. 17, betas clipped at 0.999
        share = ((line(0, 1, TRAIN_STEPS + 1) + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        return (share[1:] / share[:-1]).clamp(min=0.001).cumprod(0)
    low, high = config.beta_range or ((0.00085, 0.012) if config.betas == "scaled_linear" else (1e-4, 0.02))
    if not 0 < low < high < 1:
        raise UserError(f"beta_range is [{low}, {high}]: needs 0 < first < last < 1")
    if config.betas == "sigmoid":  # GeoDiff (Xu et al. 2022)
        betas = line(-6, 6, TRAIN_STEPS).sigmoid() * (high - low) + low
    elif config.betas == "linear":
        betas = line(low, high, TRAIN_STEPS)
    else:
        betas = line(low**0.5, high**0.5, TRAIN_STEPS) ** 2
    return (1 - betas).cumprod(0)


def _zero_snr(abar: Tensor) -> Tensor:
    """Stretch sqrt(abar) to end at zero (Lin et al. 2024, algorithm 1); 2^-24 in its place keeps sigma finite."""
    root = abar.sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return (root**2).clamp(min=2.0**-24)
