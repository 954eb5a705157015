"""Figures that explain the diffusion: schedules, the forward process, what samplers do and how fast they converge.

Each function returns a matplotlib Figure. The plane figures use a ring of six Gaussians, whose denoiser is exact.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.diffusion.mixture import ring
from ldm.diffusion.samplers import ORDERS, SAMPLERS, Step
from ldm.diffusion.schedules import Schedule, ScheduleConfig, make_schedule
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
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    quiet: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    quiet |= {"axes.grid": True, "grid.color": "#e6e6e6", "axes.titlesize": 10, "font.size": 9, "savefig.dpi": 100}
    with matplotlib.rc_context(quiet | {"axes.prop_cycle": cycler(color=COLOURS)}):
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


def _sheet(titles: Sequence[str], labels: Sequence[str], draw: Callable[[Any, int, int], None]) -> "Figure":
    """Small square panels, a column for each title and a row for each label: `draw(axis, row, column)`."""
    with panels(len(labels), len(titles), 1.4 * len(titles), 1.5 * len(labels)) as (figure, axes):
        for row, label in enumerate(labels):
            for column, title in enumerate(titles):
                draw(axes[row, column], row, column)
                axes[row, column].set(xticks=[], yticks=[], title="" if row else title)
            axes[row, 0].set_ylabel(label)
    return figure


def _show(axis: Any, image: Tensor) -> None:
    axis.imshow(image.clamp(-1, 1).add(1).div(2).permute(1, 2, 0).float().cpu(), interpolation="nearest")
    axis.spines[:].set_visible(False)


def _scatter(axis: Any, points: Tensor, limit: float, shade: str) -> None:
    axis.scatter(*points.T.numpy(), s=1.2, color=shade, alpha=0.5, linewidths=0, rasterized=True)
    axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    axis.grid(False)


def _levels(sigmas: Sequence[float]) -> list[str]:
    return [rf"$\sigma$ {sigma:.3g}" for sigma in sigmas]


def forward(picture: Image, schedule: Schedule, n: int = 9) -> "Figure":
    """A picture (1, 3, h, w) at n even times: x / sqrt(1 + sigma^2), with the same noise all along."""
    sigmas = schedule.sigma(torch.linspace(0, 1, n, dtype=torch.float64)).tolist()
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))

    def draw(axis: Any, row: int, column: int) -> None:
        sigma = sigmas[column]
        _show(axis, ((picture + sigma * noise) / math.hypot(1, sigma) if column else picture)[0])

    return _sheet(["the picture", *_levels(sigmas[1:])], [""], draw)


def _plane(name: str, n: int, points: int) -> list[Step]:
    """A run on the ring from sigma 20, even in sigma^(1/7), into 0."""
    rng = torch.Generator().manual_seed(0)

    def noise(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=rng, dtype=x.dtype)

    levels = torch.linspace(20 ** (1 / 7), 0.02 ** (1 / 7), n, dtype=torch.float64) ** 7
    x = noise(torch.empty(points, 2, dtype=torch.float64)) * 20
    return list(SAMPLERS[name](ring(), x, [*levels.tolist(), 0.0], noise))


def trajectory(name: str = "dpmpp_2m", n: int = 8) -> "Figure":
    """One run on the ring: x at each step (scaled by its own deviation), and the x0 that the step steered by."""
    steps = _plane(name, n, 1500)

    def draw(axis: Any, row: int, column: int) -> None:
        step = steps[column]
        points, limit = (step.x0, 2.6) if row else (step.x / math.hypot(1.5, step.sigma), 2.2)
        _scatter(axis, points, limit, COLOURS[row])

    return _sheet(_levels([step.sigma for step in steps]), ("x", "$x_0$"), draw)


def painting(frames: Sequence[tuple[Image, Image, float]]) -> "Figure":
    """A picture as it comes about: (decoded x, decoded x0, sigma) of each step."""
    shown = ([x for x, _, _ in frames], [x0 for _, x0, _ in frames])
    titles = _levels([sigma for _, _, sigma in frames])
    return _sheet(titles, ("x", "$x_0$"), lambda axis, row, column: _show(axis, shown[row][column][0]))


def side_by_side(names: Sequence[str] = SIDE_BY_SIDE, counts: Sequence[int] = COUNTS) -> "Figure":
    """Where samplers end on the ring after 4, 8, 16 and 32 steps."""

    def draw(axis: Any, row: int, column: int) -> None:
        _scatter(axis, _plane(names[column], counts[row], 1500)[-1].x, 2.6, colour(column))

    return _sheet(names, [f"{n} steps" for n in counts], draw)


def pictures(
    paint: Callable[[str, int], Image], names: Sequence[str] = SIDE_BY_SIDE, counts: Sequence[int] = COUNTS
) -> "Figure":
    """One seed by each sampler at each number of steps: `paint(sampler, steps)` -> (1, 3, h, w)."""

    def draw(axis: Any, row: int, column: int) -> None:
        _show(axis, paint(names[column], counts[row])[0])

    return _sheet(names, [f"{n} steps" for n in counts], draw)


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
