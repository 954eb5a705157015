"""Guidance: against closed forms, against diffusers' guiders, and that each option does something."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.diffusion.guidance import (
    Guidance,
    apg,
    autoguidance,
    bind,
    cfg,
    cfgpp,
    classifier,
    guided,
    interval,
    threshold,
)
from ldm.diffusion.mixture import Mixture, ring
from ldm.diffusion.samplers import SAMPLERS
from ldm.errors import UserError
from ldm.text.open_clip import open_clip

open_clip()  # declares torchvision's operators, which diffusers' guiders ask for by way of transformers

RNG = torch.Generator().manual_seed(0)
X, SIGMA = torch.randn((2, 3, 4, 4), generator=RNG), torch.tensor([2.0, 2.0])
COND, UNCOND = (Conditioning(torch.full((2, 1, 1), v)) for v in (3.0, 1.0))


def denoiser(x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
    return (x * cond.tokens[..., None] / (1 + sigma.view(-1, 1, 1, 1) ** 2)).sin()


def answers(x: Tensor = X, sigma: Tensor = SIGMA) -> tuple[Tensor, Tensor]:
    return denoiser(x, sigma, COND), denoiser(x, sigma, UNCOND)


def test_rescale_equals_diffusers() -> None:
    from diffusers.guiders.guider_utils import rescale_noise_cfg

    bound, free = answers()
    for share in (0.3, 1.0):
        wanted = rescale_noise_cfg(free + 7 * (bound - free), bound, guidance_rescale=share)
        torch.testing.assert_close(cfg(denoiser, COND, UNCOND, 7.0, rescale=share)(X, SIGMA), wanted)
    torch.testing.assert_close(cfg(denoiser, COND, UNCOND, 7.0)(X, SIGMA), free + 7 * (bound - free))
    with pytest.raises(UserError, match="rescale is 2.0"):
        cfg(denoiser, COND, UNCOND, 7.0, rescale=2.0)


def test_apg_equals_diffusers_over_a_run() -> None:
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

    for options in ({}, {"parallel": 0.4, "momentum": -0.8, "radius": 2.0}):
        given = {"parallel": 0.0, "momentum": -0.5, "radius": 15.0, **options}
        denoise = guided(denoiser, COND, UNCOND, apg(6.0, **options))
        for _ in range(2):  # the second run starts without momentum
            buffer = MomentumBuffer(given["momentum"])
            for s in (4.0, 2.0, 1.0):
                sigma = torch.full((2,), s)
                bound, free = answers(X, sigma)
                # in the paper's form their scale is the w - 1 of w = 6
                wanted = normalized_guidance(bound, free, 5.0, buffer, given["parallel"], given["radius"], True)
                torch.testing.assert_close(denoise(X, sigma), wanted)


@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_cfgpp_renoises_with_the_unconditional_noise(name: str) -> None:
    grid, scale, x = [5.0, 2.0, 0.8, 0.1, 0.0], 0.6, X * 5
    denoise = guided(denoiser, COND, UNCOND, cfgpp(scale, grid))
    got = list(SAMPLERS[name](denoise, x, grid, torch.randn_like))[-1].x
    for s, t in pairwise(grid):  # algorithm 2 of the paper, in x = x0 + sigma * eps
        bound, free = answers(x, torch.full((2,), s))
        x = free + scale * (bound - free) + t * (x - free) / s
    torch.testing.assert_close(got, x)
    with pytest.raises(UserError, match=r"CFG\+\+ scale is 7.5"):
        cfgpp(7.5, grid)


def test_interval_guides_only_inside_it() -> None:
    plain, strong = bind(denoiser, COND), cfg(denoiser, COND, UNCOND, 5.0)
    denoise = interval(strong, plain, 1.0, 2.0)
    for s, wanted in ((0.5, plain), (1.0, plain), (1.5, strong), (2.0, strong), (3.0, plain)):
        sigma = torch.full((2,), s)
        assert torch.equal(denoise(X, sigma), wanted(X, sigma))
    with pytest.raises(UserError, match="needs 0 <= low < high"):
        interval(strong, plain, 2.0, 1.0)


def test_a_text_says_how_to_guide() -> None:
    bound, free = answers()
    for text, wanted in {
        "": cfg(denoiser, COND, UNCOND, 5.0),
        "rescale:0.7": cfg(denoiser, COND, UNCOND, 5.0, rescale=0.7),
        "apg": guided(denoiser, COND, UNCOND, apg(5.0)),
        "apg:2": guided(denoiser, COND, UNCOND, apg(5.0, radius=2)),
        "threshold:0.9-0.5": threshold(cfg(denoiser, COND, UNCOND, 5.0), 0.9, 0.5),
        "apg + interval:3-4": bind(denoiser, COND),
    }.items():
        guidance = Guidance(text, 5.0, [2.0, 0.0])
        got = guidance.limit(guided(denoiser, COND, UNCOND, guidance.combine), bind(denoiser, COND))(X, SIGMA)
        assert torch.equal(got, wanted(X, SIGMA)), text
    assert Guidance("apg", 1.0, [2.0, 0.0]).alone and not Guidance("cfgpp", 1.0, [2.0, 0.0]).alone
    assert torch.equal(Guidance("cfgpp", 0.5, [2.0, 0.0]).combine(bound, free, 2.0), free.lerp(bound, 0.5))


def test_thresholding_equals_diffusers() -> None:
    import diffusers

    theirs = diffusers.DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1e9)
    for gain in (0.2, 3.0):
        wild = lambda x, sigma, gain=gain: x * gain  # noqa: E731
        torch.testing.assert_close(threshold(wild, 0.9)(X, SIGMA), theirs._threshold_sample(X * gain))
    calm = threshold(lambda x, sigma: x * 9, 0.9, limit=3.0)(X, SIGMA)
    assert float(calm.abs().max()) == pytest.approx(3.0)
    with pytest.raises(UserError, match="share 2.0"):
        threshold(lambda x, sigma: x, 2.0)


def test_autoguidance_pushes_away_from_the_weak_model() -> None:
    good, weak = bind(denoiser, COND), bind(denoiser, UNCOND)
    wanted = weak(X, SIGMA) + 2.5 * (good(X, SIGMA) - weak(X, SIGMA))
    torch.testing.assert_close(autoguidance(good, weak, 2.5)(X, SIGMA), wanted)
    assert autoguidance(good, weak, 1.0) is good


def test_classifier_guidance_is_bayes_on_a_mixture() -> None:
    """Guided by the exact p(y | x) the mixture's denoiser becomes that of the component y."""
    mix = ring()
    x = torch.randn((8, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    for s in (0.3, 1.0, 4.0):
        sigma = torch.full((8,), s, dtype=torch.float64)

        def log_prob(x: Tensor, sigma: Tensor) -> Tensor:
            spread = mix.deviations**2 + sigma[:, None] ** 2
            apart = (x[:, None] - mix.means).square().sum(2)
            return (-apart / (2 * spread) - spread.log()).log_softmax(1)[:, 2]

        alone = Mixture(mix.means[2:3], mix.deviations[2:3], torch.ones(1, dtype=torch.float64))
        with torch.no_grad():
            torch.testing.assert_close(classifier(mix, log_prob)(x, sigma), alone(x, sigma))
            away: Any = classifier(mix, log_prob, scale=0.0)(x, sigma)
        torch.testing.assert_close(away, mix(x, sigma))
