"""The denoiser, what networks predict, the losses and the noise: the first floor of every run."""

import math

import pytest
import torch

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import cfg
from ldm.diffusion.losses import WEIGHTINGS, diffusion_loss, find_weighting
from ldm.diffusion.noise import SeededNoise
from ldm.diffusion.predictions import PREDICTIONS, edm
from ldm.diffusion.schedules import ScheduleConfig, make_schedule
from ldm.errors import UserError

SCHEDULE = make_schedule(ScheduleConfig(kind="flow"))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_a_network_that_hits_its_target_denoises_exactly(name: str) -> None:
    x0, noise, sigma = draw(4, 3, 2, 2), draw(4, 3, 2, 2, seed=1), torch.tensor([0.1, 1.0, 3.0, 20.0]).double()
    x = x0 + sigma.view(-1, 1, 1, 1) * noise
    scaling = PREDICTIONS[name](sigma.view(-1, 1, 1, 1))
    target = (x0 - scaling.skip * x) / scaling.out
    denoiser = Denoiser(lambda z, label, cond: target[: len(z)], PREDICTIONS[name], SCHEDULE)
    assert torch.allclose(denoiser(x, sigma, None), x0, rtol=0, atol=1e-12)  # each sample at its own level
    assert torch.allclose(denoiser(x[:1], sigma[:1], None), x0[:1], rtol=0, atol=1e-12)  # one level for all
    loss = diffusion_loss(lambda z, label, cond: target, PREDICTIONS[name], SCHEDULE, x0, sigma, noise, None)
    assert loss.shape == (4,) and loss.max() < 1e-20


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("eps", lambda x0, eps, s: eps),
        ("x0", lambda x0, eps, s: x0),
        ("v", lambda x0, eps, s: (eps - s * x0) / math.hypot(1, s)),
        ("flow", lambda x0, eps, s: eps - x0),
        ("edm", lambda x0, eps, s: (x0 - 0.25 / (s * s + 0.25) * (x0 + s * eps)) * math.hypot(s, 0.5) / (s * 0.5)),
    ],
)
def test_the_targets_are_those_of_the_papers(name: str, target) -> None:  # type: ignore[no-untyped-def]
    x0, noise, s = draw(2, 3, 2, 2), draw(2, 3, 2, 2, seed=1), 1.7
    sigma = torch.full((2,), s, dtype=torch.float64)
    wanted = target(x0, noise, s)
    loss = diffusion_loss(lambda z, label, cond: wanted, PREDICTIONS[name], SCHEDULE, x0, sigma, noise, None)
    assert loss.max() < 1e-24


def test_weightings_are_the_published_ones_under_each_prediction() -> None:
    sigma = torch.tensor([0.1, 0.5, 2.0]).double()
    snr = sigma**-2
    out = {name: prediction(sigma).out for name, prediction in PREDICTIONS.items()}
    close = torch.testing.assert_close
    close(WEIGHTINGS["min_snr"](sigma, out["eps"]), snr.clamp(max=5) / snr)
    close(WEIGHTINGS["min_snr"](sigma, out["x0"]), snr.clamp(max=5))
    close(WEIGHTINGS["min_snr"](sigma, out["v"]), snr.clamp(max=5) / (snr + 1))
    close(WEIGHTINGS["soft_min_snr"](sigma, out["x0"]), snr * 5 / (snr + 5))
    close(WEIGHTINGS["uniform"](sigma, out["edm"]) / out["edm"] ** 2, (sigma**2 + 0.25) / (sigma * 0.5) ** 2)
    close(WEIGHTINGS["p2"](sigma, out["eps"]), 1 / (1 + snr))
    close(WEIGHTINGS["p2"](sigma, out["v"], gamma=0.5), (snr + 1) ** -0.5 * snr / (snr + 1))
    close(WEIGHTINGS["edm"](sigma, out["edm"]), torch.ones(3).double())
    close(WEIGHTINGS["edm"](sigma, out["v"], gamma=1.0), torch.ones(3).double())
    x0, noise = draw(3, 3, 2, 2), draw(3, 3, 2, 2, seed=1)
    zero = [  # a network that answers with x0 = 0: under `snr` every prediction has the same loss
        diffusion_loss(
            lambda z, label, cond, p=p: -(p(sigma).skip / (p(sigma).out * p(sigma).inp)).view(-1, 1, 1, 1) * z,
            p, SCHEDULE, x0, sigma, noise, None, WEIGHTINGS["snr"],
        )
        for p in PREDICTIONS.values()
    ]  # fmt: skip
    for loss in zero:
        close(loss, (x0**2).flatten(1).mean(1) * snr)


def test_gamma_and_the_deviation_of_the_data_count() -> None:
    sigma = torch.tensor([0.1, 0.5, 2.0]).double()
    one, v = edm(sigma, sd=1.0), PREDICTIONS["v"](sigma)  # on data of unit deviation edm is v with its sign turned
    assert torch.allclose(one.out, -v.out) and torch.allclose(one.skip, v.skip) and torch.allclose(one.inp, v.inp)
    ones = torch.ones_like(sigma)
    assert torch.allclose(WEIGHTINGS["min_snr"](sigma, ones, gamma=2.0), (sigma**-2).clamp(max=2))
    assert torch.allclose(WEIGHTINGS["soft_min_snr"](sigma, ones, gamma=2.0), 1 / (sigma**2 + 0.5))


@pytest.mark.parametrize(("name", "gamma"), [("min_snr", 2.0), ("soft_min_snr", 2.0), ("p2", 0.5), ("edm", 1.0)])
def test_a_gamma_of_ones_own(name: str, gamma: float) -> None:
    sigma, out = torch.tensor([0.1, 0.5, 2.0]).double(), torch.ones(3).double()
    assert find_weighting(name) is WEIGHTINGS[name]
    assert torch.equal(find_weighting(name, gamma)(sigma, out), WEIGHTINGS[name](sigma, out, gamma=gamma))
    assert not torch.allclose(find_weighting(name, gamma)(sigma, out), WEIGHTINGS[name](sigma, out))
    with pytest.raises(UserError, match="needs a number above 0"):
        find_weighting(name, -1.0)


@pytest.mark.parametrize("name", ["uniform", "snr"])
def test_a_weighting_without_gamma_takes_none(name: str) -> None:
    with pytest.raises(UserError, match=f"the weighting '{name}' has no such number"):
        find_weighting(name, 5.0)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_perturbed_input_keeps_the_target(name: str) -> None:
    x0, noise, more = (draw(2, 3, 2, 2, seed=seed) for seed in range(3))
    sigma, given = torch.tensor([0.3, 2.0]).double(), []

    def net(z: torch.Tensor, label: torch.Tensor, cond: object) -> torch.Tensor:
        given.append(z)
        return torch.zeros_like(z)

    rest = (net, PREDICTIONS[name], SCHEDULE, x0, sigma)
    plain, other = diffusion_loss(*rest, noise, None), diffusion_loss(*rest, noise, None, seen=noise + 0.1 * more)
    assert torch.equal(plain, other)
    scale = (PREDICTIONS[name](sigma).inp * sigma).view(-1, 1, 1, 1)
    torch.testing.assert_close(given[1] - given[0], 0.1 * scale * more)


def test_the_backbone_runs_in_its_own_dtype_and_the_rest_in_fp32() -> None:
    seen = []

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))

        def forward(self, z: torch.Tensor, label: torch.Tensor, cond: Conditioning) -> torch.Tensor:
            seen.append((z.dtype, label.dtype, cond.tokens.dtype, z.shape[1], cond.concat))
            return z[:, :4] * self.weight

    cond = Conditioning(torch.zeros(2, 1, 8), concat=torch.ones(2, 5, 4, 4))
    x = torch.randn(2, 4, 4, 4).half()
    vp = make_schedule(ScheduleConfig())
    out = Denoiser(Net(), PREDICTIONS["eps"], vp)(x, torch.full((2,), 14.6146), cond)
    assert seen == [(torch.bfloat16, torch.float32, torch.bfloat16, 9, None)]
    assert out.dtype == torch.float32


def test_cfg_is_one_batch_and_scale_one_costs_one_evaluation() -> None:
    rows = []

    def denoiser(x: torch.Tensor, sigma: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        rows.append(len(x))
        return x * cond.tokens[:, :1, :1, None] / sigma.view(-1, 1, 1, 1)

    x, sigma = torch.randn(2, 3, 4, 4), torch.tensor([1.0, 2.0])
    cond, uncond = Conditioning(torch.full((2, 1, 1), 3.0)), Conditioning(torch.full((2, 1, 1), 1.0))
    guided = cfg(denoiser, cond, uncond, 7.5)(x, sigma)
    torch.testing.assert_close(guided, (1 + 7.5 * 2) * x / sigma.view(-1, 1, 1, 1))
    cfg(denoiser, cond, uncond, 1.0)(x, sigma)
    assert rows == [4, 2]


def test_noise_belongs_to_the_image() -> None:
    x = torch.zeros(3, 4, 2, 2)
    together, alone = SeededNoise([5, 6, 7]), SeededNoise([6])
    for _ in range(3):
        assert torch.equal(together(x)[1:2], alone(x[:1]))
    first = torch.randn((1, 4, 2, 2), generator=torch.Generator().manual_seed(6))
    assert torch.equal(SeededNoise([6])(x[:1]), first)
    assert SeededNoise([6])(x[:1].double()).dtype == torch.float64
    with pytest.raises(ValueError, match="3 images has 1 seeds"):
        alone(x)
