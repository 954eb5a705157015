"""Learned variances: against torch's own divergences, the paper's formulas, and a network that is told the truth."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ldm.diffusion.losses import diffusion_loss
from ldm.diffusion.predictions import PREDICTIONS
from ldm.diffusion.schedules import ScheduleConfig, alphas_bar, make_schedule
from ldm.diffusion.variance import bounds, variance_bound

CONFIG = ScheduleConfig()
VP = make_schedule(CONFIG)
STEPS = torch.tensor([1.0, 2.0, 500.0, 999.0], dtype=torch.float64)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_bounds_are_those_of_ddpm() -> None:
    abar = alphas_bar(CONFIG)
    t = STEPS.long()
    beta = 1 - abar[t] / abar[t - 1]
    tilde = beta * (1 - abar[t - 1]) / (1 - abar[t])
    least, most = bounds(VP.at(STEPS), VP.at(STEPS - 1))
    # theirs are of sqrt(abar) x
    torch.testing.assert_close(least, (tilde / abar[t - 1]).log(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(most, (beta / abar[t - 1]).log(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("said", [-1.0, 0.3, 1.0])
def test_the_bound_is_the_divergence_of_the_two_steps(said: float) -> None:
    x0, guess = draw(4, 2, 3, 3), draw(4, 2, 3, 3, seed=1)
    sigma, below = VP.at(STEPS), VP.at(STEPS - 1)
    least, most = bounds(sigma, below)
    share, known = ((below / sigma) ** 2).view(-1, 1, 1, 1), (0.5 * least).exp().view(-1, 1, 1, 1)
    x = draw(4, 2, 3, 3, seed=2)
    logvar = (said + 1) / 2 * most + (1 - said) / 2 * least
    real = Normal((1 - share) * x0 + share * x, known.expand_as(x))
    step = Normal((1 - share) * guess + share * x, (0.5 * logvar).exp().view(-1, 1, 1, 1).expand_as(x))
    expected = kl_divergence(real, step).flatten(1).mean(1) / math.log(2)
    found = variance_bound(VP, x0, guess, sigma, torch.full_like(x0, said))
    torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=1e-5)


def test_the_last_step_is_a_likelihood() -> None:
    x0, guess, said = draw(1, 2, 3, 3), draw(1, 2, 3, 3, seed=1), torch.ones(1, 2, 3, 3).double()
    sigma = VP.at(torch.zeros(1, dtype=torch.float64))
    beta = 1 - alphas_bar(CONFIG)[0]
    expected = -Normal(guess, beta.sqrt()).log_prob(x0).mean() / math.log(2)
    torch.testing.assert_close(variance_bound(VP, x0, guess, sigma, said)[0].double(), expected, rtol=1e-4, atol=1e-4)
    lowest = bounds(VP.at(torch.ones(1).double()), sigma)[0]  # the variance of the step before it
    expected = -Normal(guess, (0.5 * lowest).exp()).log_prob(x0).mean() / math.log(2)
    torch.testing.assert_close(variance_bound(VP, x0, guess, sigma, -said)[0].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["eps", "v", "x0"])
def test_the_hybrid_loss_trains_the_mean_by_its_error_and_the_variance_by_the_bound(name: str) -> None:
    x0, noise, sigma = draw(4, 2, 3, 3), draw(4, 2, 3, 3, seed=1), VP.at(STEPS)
    answer, said = draw(4, 2, 3, 3, seed=2).requires_grad_(), draw(4, 2, 3, 3, seed=3).requires_grad_()
    rest = (PREDICTIONS[name], VP, x0, sigma, noise, None)

    def both(z: torch.Tensor, label: torch.Tensor, cond: object) -> torch.Tensor:
        return torch.cat([answer, said], dim=1)

    hybrid = diffusion_loss(both, *rest, vlb=0.25)
    plain = diffusion_loss(lambda z, label, cond: answer, *rest)
    scaling = PREDICTIONS[name](sigma.view(-1, 1, 1, 1))
    guess = scaling.skip * (x0 + sigma.view(-1, 1, 1, 1) * noise) + scaling.out * answer
    bound = variance_bound(VP, x0, guess.detach(), sigma, said)
    torch.testing.assert_close(hybrid, plain + 0.25 * bound.double())
    ours, theirs = (torch.autograd.grad(loss.sum(), answer, retain_graph=True)[0] for loss in (hybrid, plain))
    assert torch.equal(ours, theirs)
    (ours,), (theirs,) = (torch.autograd.grad(loss.sum(), said) for loss in (hybrid, 0.25 * bound))
    torch.testing.assert_close(ours, theirs)
