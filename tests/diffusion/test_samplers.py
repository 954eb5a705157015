"""What every sampler promises, whatever it computes: shapes and dtypes, images on their own, and clear errors."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import bind
from ldm.diffusion.mixture import ring
from ldm.diffusion.noise import SeededNoise
from ldm.diffusion.predictions import PREDICTIONS
from ldm.diffusion.samplers import SAMPLERS, find_sampler
from ldm.diffusion.schedules import ScheduleConfig, make_schedule
from ldm.errors import UserError

GRID = [8.0, 3.0, 1.5, 0.7, 0.3, 0.08, 0.0]


def soft(x: Tensor, sigma: Tensor) -> Tensor:
    return (x / (1 + sigma.view(-1, *[1] * (x.ndim - 1)) ** 2)).sin()


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 6, 5), (2, 3, 2, 2, 2)])
def test_any_shape_and_the_dtype_is_kept(name: str, shape: tuple[int, ...]) -> None:
    for dtype, kept in ((torch.float32, torch.float32), (torch.float64, torch.float64), (torch.half, torch.float32)):
        x = torch.randn(shape).to(dtype) * 8
        steps = list(SAMPLERS[name](soft, x, torch.tensor(GRID), torch.randn_like))
        for step in steps:
            assert step.x.shape == step.x0.shape == shape and step.x.dtype == step.x0.dtype == kept
        assert steps[-1].sigma == 0
        assert len(steps) >= (len(GRID) - 1 if name != "dpm_adaptive" else 2)


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n != "dpm_adaptive"])  # it chooses one step for a whole batch
def test_an_image_is_the_same_alone_and_in_a_batch(name: str) -> None:
    def paint(seeds: list[int]) -> Tensor:
        noise = SeededNoise(seeds)
        x = noise(torch.empty(len(seeds), 4, 8, 8)) * 8
        return list(SAMPLERS[name](soft, x, GRID, noise))[-1].x

    assert torch.allclose(paint([1, 2, 3])[1:2], paint([2]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n != "dpm_adaptive"])  # its tolerance is relative to x: huge
def test_a_first_step_out_of_pure_noise_does_no_harm(name: str) -> None:
    """Flow begins at sigma 999 and is at 24 one step later: a correction over such a step would swamp the picture."""
    schedule, rng = make_schedule(ScheduleConfig(kind="flow")), torch.Generator().manual_seed(0)

    def exact(x: Tensor, sigma: Tensor) -> Tensor:  # of normal data with mean 2 and deviation 0.5
        variance = sigma[:, None] ** 2
        return (0.25 * x + 2 * variance) / (0.25 + variance)

    noise = lambda x: torch.randn(x.shape, generator=rng, dtype=x.dtype)  # noqa: E731
    sigmas = schedule.steps(25)
    x = torch.randn((2000, 1), generator=rng, dtype=torch.float64) * schedule.start(float(sigmas[0]))
    *_, last = SAMPLERS[name](exact, x, sigmas, noise)
    assert abs(last.x.mean() - 2) < 0.1 and last.x.std() < 0.7


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_sampler_knows_the_prediction_type(name: str) -> None:
    """The exact network of each type, on the ring: the same picture from all."""
    mix, schedule, found = ring(), make_schedule(ScheduleConfig(kind="flow")), []
    for prediction in PREDICTIONS.values():

        def exact(z: Tensor, label: Tensor, cond: Any, prediction: Any = prediction) -> Tensor:
            sigma = label / (1000 - label)
            skip, out, inp = (f[:, None, None, None] for f in prediction(sigma))
            x = z / inp
            return (mix(x[..., 0, 0], sigma)[..., None, None] - skip * x) / out

        rng = torch.Generator().manual_seed(0)
        noise = lambda x, rng=rng: torch.randn(x.shape, generator=rng, dtype=x.dtype)  # noqa: E731
        x = noise(torch.empty(4, 2, 1, 1, dtype=torch.float64)) * 8
        denoise = bind(Denoiser(exact, prediction, schedule), None)
        found.append(list(SAMPLERS[name](denoise, x, GRID, noise))[-1].x)
    for other in found[1:]:
        assert torch.allclose(other, found[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_nan_from_the_network_names_step_and_sigma(name: str) -> None:
    def breaks(x: Tensor, sigma: Tensor) -> Tensor:
        return soft(x, sigma) if sigma[0] > 1 else x * float("nan")

    with pytest.raises(UserError, match=r"not finite at step \d+ of 6, sigma [\d.]+: .*fp32"):
        list(SAMPLERS[name](breaks, torch.randn(2, 3), GRID, torch.randn_like))
    if name == "ddim":
        with pytest.raises(UserError, match=r"at step 4 of 6, sigma 0\.7"):
            list(SAMPLERS[name](breaks, torch.randn(2, 3), GRID, torch.randn_like))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("sigmas", [[], [1.0], [1.0, 2.0], [1.0, 1.0, 0.0], [1.0, -1.0], [float("inf"), 1.0]])
def test_levels_that_do_not_fall_are_refused(name: str, sigmas: list[float]) -> None:
    with pytest.raises(UserError, match=r"at least 1|must fall"):
        list(SAMPLERS[name](soft, torch.randn(2, 3), sigmas, torch.randn_like))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ddim", {"eta": 1.5}),
        ("euler_a", {"eta": -0.1}),
        ("dpm2_a", {"eta": 2.0}),
        ("dpmpp_2s_a", {"eta": 2.0}),
        ("dpmpp_sde", {"eta": 2.0}),
        ("dpmpp_2m_sde", {"eta": -1.0}),
        ("dpmpp_3m_sde", {"eta": float("nan")}),
        ("tcd", {"eta": 1.1}),
        ("lms", {"order": 5}),
        ("deis", {"order": 0}),
        ("unipc", {"order": 4}),
        ("dpm_solver", {"order": 4}),
        ("dpm_adaptive", {"order": 1}),
        ("er_sde", {"order": 4}),
        ("heun", {"s_churn": -1.0}),
        ("restart", {"repeats": -1}),
        ("restart", {"steps": 0}),
        ("restart", {"low": 3.0, "high": 1.0}),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"(eta|order|s_churn|repeats|steps|high) is .*: needs a value from"):
        list(SAMPLERS[name](soft, torch.randn(2, 3), GRID, torch.randn_like, **options))


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(UserError, match=r"unknown rule 'heun': choose one of exact, midpoint"):
        list(SAMPLERS["dpmpp_3m"](soft, torch.randn(2, 3), GRID, torch.randn_like, rule="heun"))


def test_unknown_names_suggest_the_nearest() -> None:
    assert find_sampler("dpmpp_2m") is SAMPLERS["dpmpp_2m"]
    with pytest.raises(UserError, match=r"unknown sampler 'dpmp_2m' .did you mean 'dpmpp_2m'"):
        find_sampler("dpmp_2m")
