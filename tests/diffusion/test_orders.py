"""The samplers are right: each converges at the order it claims, to the distribution it claims, on closed forms.

Float64, on Gaussian mixtures whose denoiser is exact, in continuous sigma. A stochastic sampler claims the order that
it has with its noise set to 0, and its draws must have the mean and covariance of the data.
"""

import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.diffusion.mixture import Mixture, ring
from ldm.diffusion.samplers import ORDERS, SAMPLERS, SOLVERS
from ldm.diffusion.samplers.analytic import spread
from ldm.errors import UserError

PAGE = Path(__file__).parents[2] / "docs/samplers.md"
ERRORS_FALL = (128, 256, 512)
QUIET: dict[str, dict[str, Any]] = {  # the options that set the noise to 0
    "euler_a": {"eta": 0.0},
    "dpm2_a": {"eta": 0.0},
    "dpmpp_2s_a": {"eta": 0.0},
    "dpmpp_sde": {"eta": 0.0},
    "dpmpp_2m_sde": {"eta": 0.0},
    "dpmpp_3m_sde": {"eta": 0.0},
    "sa_solver": {"tau": lambda sigma: 0.0},
    "restart": {"repeats": 0},
    "tcd": {"eta": 0.0},
    "er_sde": {"phi": lambda sigma: sigma},
}
VARIANTS: list[tuple[str, dict[str, Any], int]] = [  # options that change the order, or could
    ("dpm_solver", {"order": 1}, 1),
    ("dpm_solver", {"order": 2}, 2),
    ("unipc", {"order": 1}, 2),
    ("unipc", {"order": 2}, 3),
    ("unipc", {"rule": "taylor"}, 3),
    ("unipc", {"rule": "exact"}, 3),
    ("lms", {"order": 1}, 1),
    ("lms", {"order": 2}, 2),
    ("deis", {"order": 1}, 1),
    ("deis", {"order": 2}, 2),
    ("dpmpp_2m_sde", {"eta": 0.0, "rule": "exact"}, 2),
    ("dpmpp_3m", {"rule": "published"}, 2),
    ("er_sde", {"order": 1, "phi": lambda sigma: sigma}, 1),
    ("er_sde", {"order": 2, "phi": lambda sigma: sigma}, 2),
    ("sa_solver", {"tau": lambda sigma: 0.0, "rule": "exact"}, 2),
]


def mixture(d: int) -> Mixture:
    k = d + 1
    means = torch.tensor([[1.0, 0.5], [-0.7, 0.9], [0.2, -1.2]], dtype=torch.float64)[:k, :d]
    deviations, weights = torch.tensor([[0.5, 0.6, 0.4], [0.3, 0.4, 0.3]], dtype=torch.float64)[:, :k]
    return Mixture(means, deviations, weights / weights.sum())


def grid(n: int, high: float, low: float) -> Tensor:
    """n steps even in sigma^(1/7), ending above 0: a last step into 0 is first order in every solver."""
    return torch.linspace(high ** (1 / 7), low ** (1 / 7), n + 1, dtype=torch.float64) ** 7


def run(name: str, denoise: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigmas: Any, **options: Any) -> Tensor:
    rng = torch.Generator().manual_seed(3)
    noise = lambda x: torch.randn(x.shape, generator=rng, dtype=x.dtype)  # noqa: E731
    return list(SAMPLERS[name](denoise, x, sigmas, noise, **options))[-1].x


def draws(n: int, d: int, scale: float) -> Tensor:
    return torch.randn((n, d), generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale


def test_every_sampler_claims_an_order_and_names_its_source() -> None:
    assert list(SAMPLERS) == list(ORDERS) == list(SOLVERS) and set(QUIET) <= set(SAMPLERS)
    assert all(re.search(r"\b20[12]\d", solver.source) for solver in SOLVERS.values())
    rows = re.findall(r"^\| ([a-z0-9_, ]+) \| ([0-9a-z ]*?) ?\| [1-4] \|", PAGE.read_text(), re.MULTILINE)
    told = {name: order for names, order in rows for name in names.split(", ")}
    assert set(told) == set(SAMPLERS)
    assert all(order is None or told[name] == str(order) for name, order in ORDERS.items())


@pytest.fixture(scope="module")
def solutions() -> dict[int, Tensor]:
    """Where the probability-flow ODE leads, in one and two dimensions."""
    return {d: run("dpm_solver", mixture(d), draws(32, d, 1.4), grid(2400, 1.0, 0.05)) for d in (1, 2)}


CLAIMS = [(name, QUIET.get(name, {}), order) for name, order in ORDERS.items() if order is not None]


@pytest.mark.parametrize(
    ("name", "options", "order", "d"), [(*claim, d) for d in (1, 2) for claim in CLAIMS] + [(*v, 2) for v in VARIANTS]
)
def test_error_falls_at_the_claimed_order(
    name: str, options: dict[str, Any], order: int, d: int, solutions: dict[int, Tensor]
) -> None:
    """Slope of the global error from sigma 1, where multistep solvers show their start. From sigma 10 x0 hardly moves
    at first, which hides it: there lms, deis, dpmpp_3m and er_sde look third order, unipc fourth, up to N = 200."""
    errors = [
        float((run(name, mixture(d), draws(32, d, 1.4), grid(n, 1.0, 0.05), **options) - solutions[d]).square().mean())
        for n in ERRORS_FALL
    ]
    slope = math.log(errors[0] / errors[-1]) / 2 / math.log(ERRORS_FALL[-1] / ERRORS_FALL[0])
    print(f"{name} {slope:.2f}")
    assert abs(slope - order) <= 0.15


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_point_is_found_exactly_from_anywhere(name: str) -> None:
    """Where the data are one point every solver is exact, at any number of steps."""
    point = torch.tensor([[0.3, -1.1]], dtype=torch.float64)
    for sigmas in ([5.0, 0.0], [5.0, 1.0, 0.0], [5.0, 3.0, 1.0, 0.3, 0.05, 0.0]):
        found = run(name, lambda x, sigma: point.expand_as(x), draws(4, 2, 5.0), sigmas)
        assert torch.allclose(found, point.expand(4, 2), rtol=0, atol=1e-12)


def test_ddim_on_a_gaussian_is_a_product_of_scalars() -> None:
    c, levels = 0.7, grid(20, 8.0, 0.01).tolist()
    gaussian = Mixture(*(torch.tensor(v, dtype=torch.float64) for v in ([[0.4]], [c], [1.0])))
    x = draws(16, 1, 8.0)
    product = math.prod((c * c + s * t) / (c * c + s * s) for s, t in pairwise(levels))
    assert torch.allclose(run("ddim", gaussian, x, levels), 0.4 + (x - 0.4) * product, rtol=1e-12, atol=1e-12)


def test_runs_of_one_step() -> None:
    """Into 0 every solver without a distilled network's habits answers with x0; above 0 the multistep ones are DDIM."""
    mix, x = mixture(2), draws(8, 2, 3.0)
    x0 = mix(x, x.new_full((8,), 3.0))
    for name in SAMPLERS:
        if name not in ("dpm_adaptive",):
            assert torch.allclose(run(name, mix, x, [3.0, 0.0]), x0, atol=1e-12), name
    for name in ("dpmpp_2m", "dpmpp_3m", "unipc", "lms", "deis", "ipndm"):
        assert torch.allclose(run(name, mix, x, [3.0, 2.0]), run("ddim", mix, x, [3.0, 2.0]), atol=1e-12), name


# name, options, steps: first-order ones need many before their bias is under the standard error of 1e5 draws
STOCHASTIC: list[tuple[str, dict[str, Any], int]] = [
    ("euler_a", {}, 150),  # and ddpm: the same function
    ("ddim", {"eta": 0.5}, 80),
    ("analytic_dpm", {}, 80),
    ("dpm2_a", {}, 20),
    ("dpmpp_2s_a", {}, 20),
    ("dpmpp_sde", {}, 20),
    ("dpmpp_2m_sde", {}, 20),
    ("dpmpp_3m_sde", {}, 20),
    ("sa_solver", {}, 20),
    ("sa_solver", {"tau": lambda sigma: 1.0}, 20),
    ("er_sde", {}, 20),
    ("heun", {"s_churn": 3.0, "s_range": (0.3, 0.8)}, 30),
    ("restart", {"low": 0.4, "high": 0.8, "repeats": 2, "steps": 12}, 20),
]


def within_standard_errors(x: Tensor, data: Mixture, sigma: float = 0.0, count: float = 4.0) -> None:
    """Mean and covariance of x against the mixture's at noise level sigma, in standard errors of len(x) draws."""
    mean = (data.weights[:, None] * data.means).sum(0)
    apart = data.means - mean
    eye = torch.eye(len(mean), dtype=x.dtype)
    parts = (data.deviations[:, None, None] ** 2 + sigma**2) * eye + apart[:, :, None] * apart[:, None]
    covariance = (data.weights[:, None, None] * parts).sum(0)
    products = (x - mean)[:, :, None] * (x - mean)[:, None]
    assert ((x.mean(0) - mean).abs() <= count * x.std(0) / len(x) ** 0.5).all()
    assert ((products.mean(0) - covariance).abs() <= count * products.std(0) / len(x) ** 0.5).all()


def noisy(data: Mixture, n: int, sigma: float) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    clean = data.sample(n, rng)
    return clean + sigma * torch.randn(clean.shape, generator=rng, dtype=clean.dtype)


@pytest.mark.parametrize(("name", "options", "steps"), STOCHASTIC)
def test_draws_have_the_moments_of_the_data(name: str, options: dict[str, Any], steps: int) -> None:
    """From exact draws at level 1 to level 0.2, on a line."""
    data, levels = mixture(1), grid(steps, 1.0, 0.2)
    if name == "analytic_dpm":
        options = {
            "variance": spread(data, data.sample(20_000, torch.Generator().manual_seed(2)), levels, torch.randn_like)
        }
    x = run(name, data, noisy(data, 100_000, 1.0), levels, **options)
    within_standard_errors(x, data, 0.2)


@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "er_sde"])
def test_whole_runs_draw_the_data_in_the_plane(name: str) -> None:
    """From pure noise into 0."""
    x = run(name, mixture(2), draws(100_000, 2, math.hypot(10.0, 1.0)), [*grid(40, 10.0, 0.01).tolist(), 0.0])
    within_standard_errors(x, mixture(2))


def test_lcm_draws_from_the_data_when_the_network_is_a_consistency_function() -> None:
    c = 0.7
    gaussian = Mixture(*(torch.tensor(v, dtype=torch.float64) for v in ([[0.4]], [c], [1.0])))
    jump = lambda x, sigma: 0.4 + (x - 0.4) * c / (c * c + sigma[:, None] ** 2).sqrt()  # noqa: E731
    for steps in ([10.0, 0.0], [10.0, 2.0, 0.5, 0.0]):
        x = draws(100_000, 1, math.hypot(10.0, c)) + 0.4
        within_standard_errors(run("lcm", jump, x, steps), gaussian)


def test_tcd_lies_between_ddim_and_lcm() -> None:
    mix, x, levels = mixture(2), draws(8, 2, 5.0), [5.0, 2.0, 0.7, 0.0]
    assert torch.equal(run("tcd", mix, x, levels, eta=1.0), run("lcm", mix, x, levels))
    assert torch.equal(run("tcd", mix, x, levels, eta=0.0), run("ddim", mix, x, levels))
    half = run("tcd", mix, x, levels, eta=0.5)
    assert torch.equal(half, run("tcd", mix, x, levels, eta=0.1, below=lambda t, eta: t / 2))
    assert not torch.equal(half, run("tcd", mix, x, levels))


def test_analytic_variance_is_the_closed_form_on_gaussians() -> None:
    c, d, levels = 0.7, 4000, [4.0, 2.0, 1.0, 0.4, 0.0]
    gaussian = Mixture(*(torch.tensor(v, dtype=torch.float64) for v in ([[0.0] * d], [c], [1.0])))
    clean = gaussian.sample(200, torch.Generator().manual_seed(1))
    found = spread(gaussian, clean, levels, torch.randn_like)
    wanted = [c * c * s * s / (c * c + s * s) for s in levels[:-1]]
    for s, variance, closed in zip(levels, found, wanted, strict=False):
        assert abs(variance - closed) <= 4 * s * s * (2 / clean.numel()) ** 0.5
    # With it the reverse kernels are exact, and the marginals with them: variance c^2 + t^2 after 1, 2, 3 steps.
    rng = torch.Generator().manual_seed(4)
    noise = lambda x: torch.randn(x.shape, generator=rng, dtype=x.dtype)  # noqa: E731
    start = noise(clean) * math.hypot(c, levels[0])
    for given in (wanted, None):  # None: each image of 4,000 dimensions estimates its own
        for step in list(SAMPLERS["analytic_dpm"](gaussian, start, levels, noise, variance=given))[:-1]:
            assert float(step.x.var()) == pytest.approx(c * c + step.sigma**2, rel=4 * (2 / clean.numel()) ** 0.5)
    ddpm = list(SAMPLERS["ddpm"](gaussian, start, levels, noise))[2]
    assert float(ddpm.x.var()) < 0.9 * (c * c + ddpm.sigma**2)  # what it repairs


def test_adaptive_steps_follow_the_tolerance(solutions: dict[int, Tensor]) -> None:
    x, seen = draws(32, 2, 1.4), []
    for order in (2, 3):
        for rtol in (1e-2, 1e-4, 1e-6):
            steps = list(
                SAMPLERS["dpm_adaptive"](
                    mixture(2), x, [1.0, 0.05], torch.zeros_like, order=order, rtol=rtol, atol=rtol
                )
            )
            assert steps[-1].sigma == 0.05
            error = float((steps[-1].x - solutions[2]).abs().max())
            assert error < 20 * rtol
            seen.append(len(steps))
    assert seen[0] < seen[1] < seen[2] and seen[3] < seen[4] < seen[5] < seen[2]
    assert len(list(SAMPLERS["dpm_adaptive"](mixture(2), x, [1.0, 0.05, 0.0], torch.zeros_like))) > 2


def test_restart_repeats_only_where_it_says() -> None:
    levels = [*grid(20, 10.0, 0.02).tolist(), 0.0]
    args = (mixture(2), draws(4, 2, 10.0), levels, torch.randn_like)
    plain = list(SAMPLERS["heun"](*args))
    none = list(SAMPLERS["restart"](*args, repeats=0))
    assert torch.equal(plain[-1].x, none[-1].x)
    steps = list(SAMPLERS["restart"](*args, low=0.5, high=3.0, repeats=3, steps=5))
    assert len(steps) == len(plain) + 15
    rises = [(a.sigma, b.sigma) for a, b in pairwise(steps) if b.sigma > a.sigma]
    assert len(rises) == 3 and all(a <= 0.5 and b < 3.0 for a, b in rises)


def test_the_adaptive_step_gives_up_where_nothing_helps() -> None:
    jagged = lambda x, sigma: torch.sin(x * 1e7)  # noqa: E731
    with pytest.raises(UserError, match="adaptive step"):
        run("dpm_adaptive", jagged, draws(4, 2, 1.0), [1.0, 0.1], atol=1e-9, rtol=1e-9)


def test_the_ring_is_a_mixture_of_the_right_moments() -> None:
    data = ring()
    x = data.sample(100_000, torch.Generator().manual_seed(0))
    within_standard_errors(x, data)
