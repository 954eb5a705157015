"""Schedules and spacings: against diffusers, the published tables, scipy, and their own definitions."""

import math
from functools import partial
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.config import from_dict, to_dict
from ldm.diffusion.schedules import Schedule, ScheduleConfig, alphas_bar, make_schedule, resolution_shift
from ldm.diffusion.spacings import SPACINGS
from ldm.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")  # of numpy's and diffusers' deprecations
VP, FLOW, EDM = (make_schedule(ScheduleConfig(kind=kind)) for kind in ("vp", "flow", "edm"))  # type: ignore[arg-type]
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def test_scaled_linear_has_the_known_numbers() -> None:
    assert (round(VP.sigma_min, 5), round(VP.sigma_max, 4)) == (0.02917, 14.6146)
    assert float(alphas_bar(VP.config)[-1].sqrt()) == pytest.approx(0.068265, abs=5e-7)


@pytest.mark.parametrize(
    ("betas", "theirs"),
    [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2"), ("sigmoid", "sigmoid")],
)
def test_betas_equal_diffusers(betas: Any, theirs: str) -> None:
    settings = {} if betas in ("linear", "cosine", "sigmoid") else {"beta_start": 0.00085, "beta_end": 0.012}
    wanted = diffusers.DDPMScheduler(beta_schedule=theirs, **settings).alphas_cumprod.double()
    torch.testing.assert_close(alphas_bar(ScheduleConfig(betas=betas)), wanted, rtol=2e-4, atol=1e-7)  # theirs are fp32
    if betas != "cosine":
        other = diffusers.DDPMScheduler(beta_schedule=theirs, beta_start=0.001, beta_end=0.01).alphas_cumprod.double()
        ours = alphas_bar(ScheduleConfig(betas=betas, beta_range=(0.001, 0.01)))
        torch.testing.assert_close(ours, other, rtol=2e-4, atol=1e-7)


def test_zero_terminal_snr_equals_diffusers() -> None:
    theirs = diffusers.EulerDiscreteScheduler(**SD, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    theirs.set_timesteps(20)
    ours = make_schedule(ScheduleConfig(zero_snr=True))
    torch.testing.assert_close(ours.steps(20), theirs.sigmas.double(), rtol=1e-4, atol=0)
    assert ours.sigma_max == pytest.approx(4096, rel=1e-4) and ours.window[1] == 80
    assert VP.sigma_max < 15


@pytest.mark.parametrize("n", [4, 10, 20, 50])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace", "karras", "exponential"])
def test_spacings_equal_diffusers(spacing: str, n: int) -> None:
    curve = {"karras": {"use_karras_sigmas": True}, "exponential": {"use_exponential_sigmas": True}}.get(spacing, {})
    given = "linspace" if curve else spacing
    theirs = diffusers.EulerDiscreteScheduler(**SD, timestep_spacing=given, steps_offset=1, **curve)
    theirs.set_timesteps(n)
    ours = VP.steps(n, spacing)
    # They interpolate sigma, we its logarithm as k-diffusion: the same on the table, close between.
    close = 1e-5 if spacing != "linspace" or n in (4, 10) else 3e-3
    torch.testing.assert_close(ours, theirs.sigmas.double(), rtol=close, atol=1e-5)
    torch.testing.assert_close(VP.label(ours[:-1]), torch.as_tensor(theirs.timesteps).double(), rtol=0, atol=0.01)


def test_leading_takes_whole_strides_also_where_n_does_not_divide() -> None:
    theirs = diffusers.DDIMScheduler(**SD, timestep_spacing="leading", steps_offset=1)
    theirs.set_timesteps(30)
    assert VP.label(VP.steps(30, "leading")[:-1]).round().tolist() == theirs.timesteps.tolist()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_spacing_and_shift_equal_diffusers(shift: float) -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / 20, 20))
    ours = make_schedule(ScheduleConfig(kind="flow", shift=shift)).steps(20)
    t = ours / (1 + ours)
    torch.testing.assert_close(t[1:], theirs.sigmas.double()[1:], rtol=1e-5, atol=1e-7)
    assert t[0] > 0.999 - 1e-12 and theirs.sigmas[0] == 1  # t = 1 is sigma = infinity
    schedule = make_schedule(ScheduleConfig(kind="flow", shift=shift))
    torch.testing.assert_close(schedule.label(ours[1:-1]), theirs.timesteps.double()[1:], rtol=1e-5, atol=1e-4)


def test_edm_equals_diffusers() -> None:
    theirs = diffusers.EDMEulerScheduler()
    theirs.set_timesteps(18)
    torch.testing.assert_close(EDM.steps(18, "karras"), theirs.sigmas.double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(EDM.label(EDM.steps(18, "karras")[:-1]), theirs.timesteps.double(), rtol=1e-5, atol=1e-5)
    # Time is even on the same curve.
    torch.testing.assert_close(EDM.steps(18, "linspace"), EDM.steps(18, "karras"))


def test_beta_spacing_is_scipys_quantile() -> None:
    from scipy.stats import beta

    for n in (5, 20, 100):
        steps = beta.ppf(1 - np.linspace(0, 1, n, endpoint=False), 0.6, 0.6) * 999
        torch.testing.assert_close(VP.label(VP.steps(n, "beta")[:-1]), torch.tensor(steps), rtol=0, atol=0.05)


def test_align_your_steps_is_the_published_table() -> None:
    from diffusers.schedulers import AysSchedules

    for name, key in (("", "StableDiffusion"), ("_sdxl", "StableDiffusionXL"), ("_svd", "StableDiffusionVideo")):
        assert VP.steps(10, "align_your_steps" + name).tolist() == pytest.approx(AysSchedules[key + "Sigmas"], rel=1e-6)
    steps = VP.label(VP.steps(10, "align_your_steps")[:-1])
    assert steps.tolist() == pytest.approx(AysSchedules["StableDiffusionTimesteps"], abs=1.0)
    twenty = VP.steps(20, "align_your_steps")
    torch.testing.assert_close(twenty[:-1:2], VP.steps(10, "align_your_steps")[:-1])
    after = torch.cat([twenty[2:-1:2], twenty.new_tensor([0.029])])
    torch.testing.assert_close(twenty[1:-1:2] ** 2, twenty[:-1:2] * after)  # half way in log sigma


def test_the_spacings_are_what_their_names_say() -> None:
    low, high = VP.window
    kl = VP.steps(10, "kl_optimal")[:-1].atan()
    torch.testing.assert_close(kl.diff(), kl.diff()[:1].expand(9))
    assert (kl[0].tan(), kl[-1].tan()) == (pytest.approx(high), pytest.approx(low))
    logs = VP.steps(10, "exponential")[:-1].log()
    torch.testing.assert_close(logs.diff(), logs.diff()[:1].expand(9))
    torch.testing.assert_close(VP.steps(10, "polyexponential"), VP.steps(10, "exponential"))
    roots = VP.steps(10, "karras")[:-1] ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff()[:1].expand(9))
    assert VP.label(VP.steps(8, "sgm_uniform")[:-1]).tolist() == pytest.approx([999 - 999 * i / 8 for i in range(8)])
    assert VP.label(VP.steps(30, "simple")[:-1]).tolist() == pytest.approx([999 - i * 1000 // 30 for i in range(30)])


@pytest.mark.parametrize("schedule", [VP, FLOW, EDM], ids=lambda s: s.config.kind)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_spacing_falls_to_zero_on_every_schedule(schedule: Schedule, spacing: str) -> None:
    for n in (1, 2, 3, 7, 30, 250):
        levels = schedule.steps(n, spacing)
        assert levels.dtype == torch.float64 and len(levels) == n + 1
        assert (levels.diff() < 0).all() and levels[-1] == 0 and levels[-2] > 0 and levels.isfinite().all()
        published = spacing.startswith("align")
        assert published or (
            schedule.sigma_min * (1 - 1e-9) <= levels[-2] and levels[0] <= schedule.sigma_max * (1 + 1e-9)
        )


def test_label_inverts_exactly_on_the_grid_and_interpolates_between() -> None:
    steps = torch.arange(1000, dtype=torch.float64)
    assert VP.label(VP.at(steps)).sub(steps).abs().max() < 1e-9
    between = VP.label(VP.at(steps[:-1] + 0.25))
    torch.testing.assert_close(between, steps[:-1] + 0.25, rtol=0, atol=1e-9)
    assert VP.label(VP.at(steps).float()).sub(steps).abs().max() < 0.01
    assert VP.label(torch.tensor([1e-9, 1e9])).tolist() == [0, 999]
    assert FLOW.label(torch.tensor([1.0, 3.0])).tolist() == [500, 750]
    assert EDM.label(torch.tensor([math.e])).item() == pytest.approx(0.25)


def test_shift_multiplies_sigma() -> None:
    for kind in ("vp", "flow", "edm"):
        plain, shifted = (make_schedule(ScheduleConfig(kind=kind, shift=s)) for s in (1.0, 2.5))  # type: ignore[arg-type]
        torch.testing.assert_close(shifted.steps(10)[:-1], 2.5 * plain.steps(10)[:-1])
        u = torch.tensor([0.2, 0.5, 0.8]).double()
        torch.testing.assert_close(shifted.quantile(u), 2.5 * plain.quantile(u))
    assert resolution_shift(1024) == 2 and resolution_shift(256) == 1 and resolution_shift(64, base=16) == 2


def test_training_levels_follow_their_density() -> None:
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    # vp: each training step as often as any other, and no level between two
    steps = VP.label(VP.quantile(u))
    assert (
        torch.equal(steps.round().long().bincount(), torch.full((1000,), 4))
        and steps.sub(steps.round()).abs().max() < 1e-9
    )
    # flow: logit-normal t; edm: ln sigma ~ N(-1.2, 1.2)
    for schedule, mean, std in ((FLOW, 0.0, 1.0), (EDM, -1.2, 1.2)):
        logs = schedule.quantile(u).log()
        assert (float(logs.mean()), float(logs.std())) == (pytest.approx(mean, abs=0.01), pytest.approx(std, rel=0.01))
    given = make_schedule(ScheduleConfig(kind="flow", mean=0.5, std=0.7)).quantile(u).log()
    assert (float(given.mean()), float(given.std())) == (pytest.approx(0.5, abs=0.01), pytest.approx(0.7, rel=0.01))
    level = make_schedule(ScheduleConfig(kind="flow", density="uniform")).quantile(u)
    torch.testing.assert_close(level / (1 + level), u, rtol=0, atol=2e-3)  # clamped to [0.001, 0.999]
    bell = make_schedule(ScheduleConfig(density="lognormal", mean=0.0, std=1.0)).quantile(u).log()
    assert float(bell.std()) == pytest.approx(1, abs=0.05)
    for schedule in (VP, FLOW, EDM):
        rng = partial(torch.Generator().manual_seed, 3)
        drawn = schedule.sample(20_000, rng())
        assert drawn.dtype == torch.float32 and torch.equal(drawn, schedule.sample(20_000, rng()))
        assert float(drawn.double().log().mean()) == pytest.approx(float(schedule.quantile(u).log().mean()), abs=0.04)
        assert drawn.min() >= schedule.sigma_min * (1 - 1e-6) and drawn.max() <= schedule.sigma_max * (1 + 1e-6)
        assert schedule.quantile(torch.tensor([0.0, 1.0])).isfinite().all()


def test_start_is_the_deviation_of_unit_data() -> None:
    assert VP.start(3.0) == pytest.approx(10**0.5) and FLOW.start(0.0) == 1


def test_config_round_trips() -> None:
    config = ScheduleConfig(kind="flow", shift=3.0, density="uniform", beta_range=(0.001, 0.02))
    assert from_dict(ScheduleConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: VP.steps(0), "steps is 0: needs at least 1"),
        (lambda: VP.steps(10, "karas"), r"unknown spacing 'karas' \(did you mean 'karras'\?\)"),
        (lambda: VP.steps(1001, "leading"), "1001 steps with leading"),
        (lambda: VP.steps(1001, "simple"), "1001 steps with simple"),
        (lambda: VP.steps(1000, "leading_dpm"), "1000 steps with leading_dpm"),
        (lambda: VP.steps(3, [5.0, 1.0, 0.0]), "3 noise levels for 3 steps: give 4"),
        (lambda: make_schedule(ScheduleConfig(shift=0.0)), "shift is 0.0"),
        (lambda: make_schedule(ScheduleConfig(kind="edm", std=-1.0)), "std is -1.0"),
        (lambda: make_schedule(ScheduleConfig(beta_range=(0.02, 0.01))), r"beta_range is \[0.02, 0.01\]"),
    ],
)
def test_bad_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


def test_explicit_levels_are_taken_as_they_are() -> None:
    levels: Tensor = VP.steps(2, [7.0, 1.0, 0.0])
    assert levels.tolist() == [7, 1, 0] and levels.dtype == torch.float64
