"""What training does to noise, in closed form."""

import itertools

import pytest
import torch

from ldm.diffusion.noise import NOISES, offset, paired, pyramid
from ldm.errors import UserError


def draws(n: int, seed: int = 0):
    """Numbers that depend on the stream's name and shape alone."""
    said: list[tuple[str, tuple[int, ...]]] = []

    def draw(stream: str, shape: tuple[int, ...]) -> torch.Tensor:
        said.append((stream, shape))
        return torch.randn((n, *shape), generator=torch.Generator().manual_seed(seed + sum(map(ord, stream))))

    return draw, said


def test_offset_moves_each_channel_as_a_whole() -> None:
    draw, said = draws(50_000)
    noise = torch.zeros(50_000, 2, 4, 4)
    moved = offset(noise, 0.1, draw)
    assert said == [("offset", (2, 1, 1))]
    assert torch.equal(moved, moved[:, :, :1, :1].expand_as(moved)) and not torch.equal(moved[:, 0], moved[:, 1])
    assert moved.std().item() == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (6, 9), (4, 1)])
def test_pyramid_has_unit_variance_and_the_correlation_of_its_scales(height: int, width: int) -> None:
    n, discount = 20_000, 0.6
    draw, said = draws(n, seed=3)
    noise = pyramid(torch.randn((n, 1, height, width), generator=torch.Generator().manual_seed(9)), discount, draw)
    levels = len(said)
    assert said[-1][1] == (1, 1, 1) and len({stream for stream, _ in said}) == levels
    assert noise.std(0).sub(1).abs().max() < 0.03  # 4 standard errors of a deviation: 0.02
    shared = [discount ** (2 * i) for i in range(levels + 1)]
    # the first two rows share every scale but the finest
    expected = sum(shared[1:]) / sum(shared)
    assert (noise[:, 0, 0, 0] * noise[:, 0, 1, 0]).mean().item() == pytest.approx(expected, abs=0.04)


@pytest.mark.parametrize("name", NOISES)
def test_a_strength_of_0_is_the_noise_itself(name: str) -> None:
    noise = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(NOISES[name](noise, 0.0, draws(2)[0]), noise)


def test_pairs_are_the_best_of_all_and_stay_in_their_group() -> None:
    rng = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn((8, 2, 2, 2), generator=rng) for _ in range(2))
    dealt = paired(noise, x0, 4)
    for part in (slice(0, 4), slice(4, 8)):
        costs = {
            order: (x0[part] - noise[part][list(order)]).square().sum().item()
            for order in itertools.permutations(range(4))
        }
        best = min(costs, key=costs.__getitem__)
        assert torch.equal(dealt[part], noise[part][list(best)])
    assert torch.equal(torch.cat([paired(noise[:4], x0[:4], 4), paired(noise[4:], x0[4:], 4)]), dealt)
    assert (x0 - dealt).square().sum() < (x0 - noise).square().sum()
    with pytest.raises(UserError, match="pairing 3 does not divide the 8 samples"):
        paired(noise, x0, 3)
