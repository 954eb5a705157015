"""Editing as guidance, each by a closed form."""

import math

import pytest
import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.diffusion.editing import consistent, invert, keep, slerp, windows
from ldm.diffusion.samplers import SAMPLERS

SIGMAS = torch.tensor([8.0, 5.0, 3.0, 2.0, 1.2, 0.7, 0.4, 0.2, 0.1, 0.0], dtype=torch.float64)


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact denoiser of standard normal data."""
    return x / (1 + sigma.view(-1, *[1] * (x.ndim - 1)) ** 2)


def noise(x: Tensor, rng: torch.Generator | None = None) -> Tensor:
    return torch.randn(x.shape, generator=rng or torch.Generator().manual_seed(1), dtype=x.dtype)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m", "heun", "lms"])
def test_what_is_kept_stays_on_its_line(sampler: str) -> None:
    """Outside the mask the state is the picture with the noise of the level, at every level, whatever the sampler."""
    known = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    eps = noise(known)
    mask = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    mask[..., :3] = 1
    x = known + SIGMAS[0] * eps
    for step in SAMPLERS[sampler](keep(gaussian, known, mask), x, SIGMAS, noise):
        torch.testing.assert_close(step.x[..., 3:], (known + step.sigma * eps)[..., 3:])
        if step.sigma > 0.5:
            assert not torch.allclose(step.x[..., :3], (known + step.sigma * eps)[..., :3])


def test_slerp_keeps_the_length_of_noise() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 4, 64, 64, generator=rng), torch.randn(3, 4, 64, 64, generator=rng)
    assert torch.equal(slerp(a, a, 0.3), a)
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b, atol=1e-5, rtol=1e-5)
    half = slerp(a, b, 0.5)
    assert half.std() == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(half, slerp(b, a, 0.5), atol=1e-5, rtol=1e-5)
    assert a.lerp(b, 0.5).std() == pytest.approx(0.5**0.5, abs=0.02)  # what a straight line would do


def test_an_inversion_comes_back() -> None:
    """On the exact denoiser of a Gaussian: the more rounds, the nearer to the first-order sampler's inverse."""
    x0 = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def flatter(x: Tensor, sigma: Tensor) -> Tensor:  # data of deviation 4: the fixed point contracts
        s2 = sigma.view(-1, 1, 1, 1) ** 2
        return x * 16 / (16 + s2)

    errors = []
    for rounds in (1, 3, 8, 16):
        *_, last = SAMPLERS["ddim"](flatter, invert(flatter, x0, SIGMAS, rounds), SIGMAS, noise)
        errors.append(float((last.x - x0).square().mean().sqrt()))
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.01, errors


def test_windows_of_a_pointwise_denoiser_are_the_whole() -> None:
    seen: list[tuple[int, ...]] = []

    def denoiser(x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        assert cond.concat is not None and cond.concat.shape[2:] == x.shape[2:]
        seen.append(tuple(x.shape[2:]))
        return x / (1 + sigma.view(-1, 1, 1, 1)) + cond.concat

    x, sigma = torch.randn(2, 4, 10, 21), torch.tensor([2.0, 2.0])
    cond = Conditioning(torch.zeros(2, 3, 5), concat=torch.randn(2, 1, 10, 21))
    tiled = windows(denoiser, 8)(x, sigma, cond)
    assert set(seen) == {(8, 8)} and len(seen) == 2 * 5
    torch.testing.assert_close(tiled, denoiser(x, sigma, cond))
    seen.clear()
    windows(denoiser, 32)(x, sigma, cond)
    assert seen == [(10, 21)]


def test_windows_join_without_a_seam() -> None:
    """Answers that differ from window to window are mixed: no step between neighbours as large as between windows."""
    answers = iter([0.0, 1.0])
    tiled = windows(lambda x, sigma, cond: torch.full_like(x, next(answers)), 8)
    row = tiled(torch.zeros(1, 1, 8, 12), torch.ones(1), Conditioning(torch.zeros(1, 1, 1)))[0, 0, 0]
    assert row[0] == 0 and row[-1] == 1
    assert 0 < row.diff().max() < 0.5


def test_a_measurement_is_met() -> None:
    """What is known of the answer becomes what was measured, and the rest stays the denoiser's."""
    truth = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def measure(z: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(z, 2)

    x, sigma = noise(truth), torch.ones(2)
    one, ten = (consistent(gaussian, measure, measure(truth), rounds=n)(x, sigma) for n in (1, 10))
    before = (measure(gaussian(x, sigma)) - measure(truth)).norm()
    errors = [float((measure(z) - measure(truth)).norm() / before) for z in (one, ten)]
    assert errors[0] == pytest.approx(0.5, abs=0.01) and errors[1] < 0.01  # Polyak's step halves a linear residual
    assert not math.isnan(errors[0]) and not ten.requires_grad
    rest = ten - gaussian(x, sigma)
    torch.testing.assert_close(
        rest, torch.nn.functional.interpolate(measure(rest), scale_factor=2.0), atol=1e-5, rtol=0
    )
