"""Figures that explain the diffusion: schedules, the forward process, what samplers do and how fast they converge.

Each function returns a matplotlib Figure. The plane figures use a ring of six Gaussians, whose denoiser is exact.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.diffusion.mixture import ring
from ldm.diffusion.samplers import ORDERS, SAMPLERS, Step
from ldm.diffusion.schedules import Schedule, ScheduleConfig, make_schedule
from ldm.errors import UserError
from ldm.evaluation.statistics import Estimate
from ldm.shapes import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0b3954", "#e4572e", "#17a398", "#f3a712", "#8e5572", "#669bbc", "#6a994e", "#a8201a")
SCHEDULES = {
    "scaled linear (SD)": ScheduleConfig(),
    "linear (DDPM)": ScheduleConfig(betas="linear"),
    "cosine": ScheduleConfig(betas="cosine"),
    "sigmoid": ScheduleConfig(betas="sigmoid"),
    "zero terminal SNR": ScheduleConfig(zero_snr=True),
    "flow": ScheduleConfig(kind="flow"),
    "flow, shift 3": ScheduleConfig(kind="flow", shift=3.0),
    "EDM": ScheduleConfig(kind="edm"),
}
SPEED = ("euler", "heun", "dpmpp_2m", "dpm_solver", "unipc", "dpmpp_3m", "plms", "deis")
COUNTS = (4, 8, 16, 32)  # steps
SIDE_BY_SIDE = ("ddim", "euler_a", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc")


@contextmanager
def panels(rows: int, columns: int, width: float, height: float) -> "Iterator[tuple[Figure, Any]]":
    """A figure and its (rows, columns) axes, which are quiet within the with-block. Sizes in inches."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("figures need matplotlib: pip install matplotlib") from None
    from cycler import cycler
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e6e6e6",
    }
    style |= {"axes.titlesize": 10, "font.size": 9, "legend.frameon": False, "savefig.dpi": 100}
    with matplotlib.rc_context(style | {"axes.prop_cycle": cycler(color=COLOURS)}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False)


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def schedules() -> "Figure":
    """Share of signal, log SNR and sigma of each schedule over its time, 0 the picture and 1 the noise."""
    time = torch.linspace(0.001, 1, 1000, dtype=torch.float64)
    titles = (r"signal, $\bar\alpha = 1 / (1 + \sigma^2)$", r"log SNR, $-2\,\ln\sigma$", r"noise level $\sigma$")
    with panels(1, 3, 11, 3.4) as (figure, axes):
        for name, config in SCHEDULES.items():
            sigma = make_schedule(config).sigma(time)
            for axis, values in zip(axes[0], (1 / (1 + sigma**2), -2 * sigma.log(), sigma), strict=True):
                axis.plot(time.numpy(), values.numpy(), label=name, linewidth=1.6)
        for axis, title in zip(axes[0], titles, strict=True):
            axis.set(title=title, xlabel="time")
        axes[0, 1].set_ylim(-14, 14)
        axes[0, 2].set(yscale="log", ylim=(1e-3, 5e3))
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
    return figure


def forward(picture: Image, schedule: Schedule, n: int = 9) -> "Figure":
    """A picture (1, 3, h, w) at n even times: x / sqrt(1 + sigma^2), with the same noise all along."""
    sigmas = schedule.sigma(torch.linspace(0, 1, n, dtype=torch.float64))
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))
    with panels(1, n, 1.25 * n, 1.6) as (figure, axes):
        for i, (axis, sigma) in enumerate(zip(axes[0], sigmas.tolist(), strict=True)):
            x = picture if i == 0 else (picture + sigma * noise) / math.hypot(1, sigma)
            _show(x[0], axis, "the picture" if i == 0 else rf"$\sigma$ {sigma:.3g}")
    return figure


def _show(image: Tensor, axis: Any, title: str) -> None:
    axis.imshow(image.clamp(-1, 1).add(1).div(2).permute(1, 2, 0).float().cpu(), interpolation="nearest")
    axis.set(xticks=[], yticks=[], title=title)
    axis.spines[:].set_visible(False)


def _plane(name: str, n: int, points: int) -> list[Step]:
    """A run on the ring from sigma 20, even in sigma^(1/7), into 0."""
    rng = torch.Generator().manual_seed(0)

    def noise(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=rng, dtype=x.dtype)

    levels = torch.linspace(20 ** (1 / 7), 0.02 ** (1 / 7), n, dtype=torch.float64) ** 7
    x = noise(torch.empty(points, 2, dtype=torch.float64)) * 20
    return list(SAMPLERS[name](ring(), x, [*levels.tolist(), 0.0], noise))


def _scatter(points: Tensor, limit: float, shade: str, axis: Any, title: str) -> None:
    axis.scatter(*points.T.numpy(), s=1.2, color=shade, alpha=0.5, linewidths=0, rasterized=True)
    axis.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], aspect="equal", title=title)
    axis.grid(False)


def _pairs(pairs: Sequence[tuple[Callable[[Any, str], None], Callable[[Any, str], None], float]]) -> "Figure":
    """x above, and the x0 that was steered by below: what draws each (axis, title), and the sigma of the step."""
    with panels(2, len(pairs), 1.27 * len(pairs), 2.85) as (figure, axes):
        for i, (x, x0, sigma) in enumerate(pairs):
            x(axes[0, i], rf"$\sigma$ {sigma:.3g}")
            x0(axes[1, i], "")
        axes[0, 0].set_ylabel("x")
        axes[1, 0].set_ylabel(r"$x_0$")
    return figure


def trajectory(name: str = "dpmpp_2m", n: int = 8) -> "Figure":
    """One run on the ring: x at each step (scaled by its own deviation), and the x0 that the step steered by."""
    return _pairs(
        [
            (
                partial(_scatter, step.x / math.hypot(1.5, step.sigma), 2.2, COLOURS[0]),
                partial(_scatter, step.x0, 2.6, COLOURS[1]),
                step.sigma,
            )
            for step in _plane(name, n, 1500)
        ]
    )


def painting(frames: Sequence[tuple[Image, Image, float]]) -> "Figure":
    """A picture as it comes about: (decoded x, decoded x0, sigma) of each step."""
    return _pairs([(partial(_show, x[0]), partial(_show, x0[0]), sigma) for x, x0, sigma in frames])


def _compared(draw: Callable[..., None], names: Sequence[str], counts: Sequence[int]) -> "Figure":
    """A column for each sampler and a row for each number of steps: `draw(axis, title, sampler, steps)`."""
    with panels(len(counts), len(names), 1.45 * len(names), 1.5 * len(counts)) as (figure, axes):
        for column, name in enumerate(names):
            for row, n in enumerate(counts):
                draw(axes[row, column], "" if row else name, name, n)
        for row, n in enumerate(counts):
            axes[row, 0].set_ylabel(f"{n} steps")
    return figure


def side_by_side(names: Sequence[str] = SIDE_BY_SIDE, counts: Sequence[int] = COUNTS) -> "Figure":
    """Where samplers end on the ring after 4, 8, 16 and 32 steps."""

    def draw(axis: Any, title: str, name: str, n: int) -> None:
        _scatter(_plane(name, n, 1500)[-1].x, 2.6, colour(names.index(name)), axis, title)

    return _compared(draw, names, counts)


def pictures(
    paint: Callable[[str, int], Image], names: Sequence[str] = SIDE_BY_SIDE, counts: Sequence[int] = COUNTS
) -> "Figure":
    """One seed by each sampler at each number of steps: `paint(sampler, steps)` -> (1, 3, h, w)."""
    return _compared(lambda axis, title, name, n: _show(paint(name, n)[0], axis, title), names, counts)


def convergence(names: Sequence[str] = SPEED) -> "Figure":
    """Error against network evaluations on the ring, with the fitted slopes of the last four runs."""
    x = torch.randn((64, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1.8

    def solve(name: str, n: int) -> tuple[Tensor, int]:
        calls = [0]

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            calls[0] += 1
            return ring(deviation=0.5)(x, sigma)

        levels = torch.linspace(1, 0.05 ** (1 / 7), n + 1, dtype=torch.float64) ** 7
        return list(SAMPLERS[name](denoise, x, levels, torch.zeros_like))[-1].x, calls[0]

    truth, _ = solve("dpm_solver", 2400)
    with panels(1, 1, 6.4, 4.2) as (figure, axes):
        for name, marker in zip(names, "os^Dv<>P", strict=False):
            runs = [solve(name, n) for n in (6, 12, 24, 48, 96, 192, 384)]
            errors = [float((found - truth).square().sum(1).mean().sqrt()) for found, _ in runs]
            calls = [count for _, count in runs]
            slope = math.log(errors[-4] / errors[-1]) / math.log(calls[-1] / calls[-4])
            label = f"{name}: slope {slope:.2f}, claims {ORDERS[name]}"
            axes[0, 0].loglog(calls, errors, marker=marker, markersize=4, linewidth=1.4, label=label)
        axes[0, 0].set(xlabel="network evaluations", ylabel="error of the ODE's end", title="six Gaussians, float64")
        axes[0, 0].legend(fontsize=8)
    return figure


def quantities(names: Sequence[str], width: float, height: float, draw: Callable[[Any, str], None]) -> "Figure":
    """A panel of its own for each of some quantities, four to a row: `draw(axis, name)`. Sizes of one, in inches."""
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    with panels(rows, columns, width * columns, height * rows) as (figure, axes):
        for axis, name in zip(axes.flat, names, strict=False):
            axis.set_title(name.replace("_", " "))
            draw(axis, name)
        for axis in axes.flat[len(names) :]:
            axis.remove()
    return figure


def curves(setting: str, places: Sequence[float], figures: Mapping[str, Sequence[Estimate]]) -> "Figure":
    """Each figure over the values of a setting that it was measured at, with its interval."""

    def draw(axis: Any, name: str) -> None:
        shade = colour(list(figures).index(name))
        low, value, high = zip(*((e.low, e.value, e.high) for e in figures[name]), strict=True)
        axis.plot(places, value, marker="o", markersize=4, color=shade)
        axis.fill_between(places, low, high, color=shade, alpha=0.15)
        axis.set(xlabel=setting, xticks=places)

    return quantities(list(figures), 2.7, 2.2, draw)
