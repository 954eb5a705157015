"""Importance sampling of noise levels: the density it learns, that it biases nothing, and whose losses count."""

import pytest
import torch

from ldm.training.importance import FLOOR, Importance


def taught(bins: int, rounds: int = 10) -> Importance:
    """One that has seen losses of u + 0.5 everywhere."""
    memory, u = Importance(bins), (torch.arange(bins) + 0.5) / bins
    for step in range(rounds):
        memory.draw(u, step)
        memory.see(u, u + 0.5)
    return memory


def test_the_density_is_the_root_of_the_mean_square() -> None:
    memory = taught(8)
    u = (torch.arange(8000, dtype=torch.float64) + 0.5) / 8000
    drawn, density = memory.draw(u, 10)
    middle = (torch.arange(8) + 0.5) / 8 + 0.5
    expected = (1 - FLOOR) * middle / middle.sum() + FLOOR / 8
    counts = (drawn * 8).long().bincount(minlength=8)
    torch.testing.assert_close(counts.double() / 8000, expected.double(), atol=2 / 8000, rtol=0)
    torch.testing.assert_close(density, (expected * 8).double()[(drawn * 8).long()])
    assert drawn.min() > 0 and drawn.max() < 1 and (drawn.diff() > 0).all()


@pytest.mark.parametrize("bins", [1, 7, 100])
def test_the_expectation_stays_what_it_was(bins: int) -> None:
    memory = taught(bins)
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    drawn, density = memory.draw(u, 10)
    for function in (torch.exp, torch.sin, lambda v: (v > 0.3).double()):
        assert (function(drawn) / density).mean().item() == pytest.approx(function(u).mean().item(), abs=2e-5)


def test_it_lowers_the_variance_of_the_loss() -> None:
    memory, u = Importance(20), torch.rand(4000, generator=torch.Generator().manual_seed(0))
    loss = 1e-3 + u**8
    for step in range(2):
        memory.draw(u, step)
        memory.see(u, loss)
    drawn, density = memory.draw(u, 2)
    assert ((1e-3 + drawn**8) / density).var() < 0.2 * loss.var()


def test_drawing_is_even_until_every_bin_has_seen_enough() -> None:
    memory, u = taught(4, rounds=9), torch.tensor([0.1, 0.4, 0.9])
    drawn, density = memory.draw(u, 9)
    torch.testing.assert_close(drawn, u)
    assert torch.equal(density, torch.ones(3))


def test_a_step_is_drawn_by_the_steps_before_it_in_any_parts() -> None:
    whole, parts = taught(4), taught(4)
    u = torch.tensor([0.1, 0.3, 0.6, 0.9])
    first, _ = whole.draw(u, 10)
    whole.see(first, torch.tensor([9.0, 1.0, 1.0, 1.0]))
    for part in (u[:2], u[2:]):
        second, _ = parts.draw(part, 10)
        parts.see(second, torch.tensor([9.0, 1.0]) if part[0] < 0.2 else torch.ones(2))
    assert torch.equal(second, first[2:])
    assert torch.equal(whole.draw(u, 11)[0], parts.draw(u, 11)[0])
    assert not torch.equal(whole.draw(u, 11)[0], first)


def test_the_memory_is_of_the_last_ten_losses_and_of_finite_ones() -> None:
    memory = taught(1)
    for step in range(10, 100):
        memory.draw(torch.tensor([0.5]), step)
        memory.see(torch.tensor([0.5]), torch.tensor([4.0 if step < 99 else torch.nan]))
    memory.draw(torch.tensor([0.5]), 100)
    assert memory.square.item() == pytest.approx(16 + (1 - 16) * 0.9**89, rel=1e-6)
    assert memory.seen.item() == 99


def test_its_state_is_all_there_is() -> None:
    a, b = taught(5), Importance(5)
    b.load_state_dict(a.state_dict())
    u = torch.rand(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(a.draw(u, 10)[0], b.draw(u, 10)[0])
