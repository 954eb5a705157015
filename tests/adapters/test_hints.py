"""Hints show where a picture's edges are, and only there."""

import pytest
import torch

from ldm.adapters.hints import HINTS, agreement, draw
from ldm.errors import UserError


@pytest.fixture
def square() -> torch.Tensor:
    """A black square on white."""
    image = torch.ones(2, 3, 64, 64)
    image[:, :, 16:48, 16:48] = -1
    return image


@pytest.mark.parametrize("name", HINTS)
def test_a_hint_is_bright_at_the_edges_of_a_square_and_nowhere_else(name: str, square: torch.Tensor) -> None:
    hint = draw(name, square)
    assert hint.shape == square.shape and hint.min() >= 0 and hint.max() <= 1
    border = torch.zeros(64, 64, dtype=torch.bool)
    border[13:51, 13:51] = True
    border[20:44, 20:44] = False
    assert hint[0, 0][border].max() > 0.9
    assert hint[0, 0][:12].max() < 0.05, "nothing on plain white"
    assert hint[0, 0, 26:38, 26:38].max() < 0.05, "nor on plain black"


def test_none_is_the_picture_itself_and_a_wrong_name_is_refused(square: torch.Tensor) -> None:
    assert torch.equal(draw("none", square), square / 2 + 0.5)
    with pytest.raises(UserError, match="unknown hint 'cany' .did you mean 'canny'"):
        draw("cany", square)


def test_agreement_is_the_share_of_edges_that_the_other_has_nearby() -> None:
    edges = torch.zeros(32, 32, dtype=torch.bool)
    edges[8], edges[20] = True, True
    assert agreement(edges, edges) == 1 and agreement(edges, edges.roll(2, 0)) == 1
    assert agreement(edges, edges.roll(3, 0)) == 0
    half = edges.clone()
    half[20] = False
    assert agreement(edges, half) == pytest.approx(2 / 3)  # precision 1/2, recall 1
    none = torch.zeros_like(edges)
    assert agreement(edges, none) == 0 and agreement(none, none) == 1
