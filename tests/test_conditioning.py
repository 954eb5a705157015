"""Conditions join, slice and move field by field."""

import pytest
import torch

from ldm.conditioning import Conditioning, join


def conditions(b: int, vector: bool = True) -> Conditioning:
    tokens = torch.arange(b * 6, dtype=torch.float32).reshape(b, 2, 3)
    mask = torch.tensor([[True, False]] * b)
    return Conditioning(tokens, mask=mask, vector=torch.full((b, 4), float(b)) if vector else None)


def test_join_and_slice_are_inverse() -> None:
    a, b = conditions(2), conditions(3)
    both = join(a, b)
    assert len(both) == 5
    assert torch.equal(both[:2].tokens, a.tokens)
    assert torch.equal(both[2:].tokens, b.tokens)
    assert both.concat is None
    assert both.mask is not None and both.mask.shape == (5, 2)
    assert both.vector is not None and both.vector[0, 0] == 2.0 and both.vector[4, 0] == 3.0


def test_slice_by_index() -> None:
    picked = conditions(3)[torch.tensor([2, 0])]
    assert torch.equal(picked.tokens, conditions(3).tokens[[2, 0]])


def test_to_casts_floats_and_leaves_the_mask() -> None:
    moved = conditions(1).to("cpu", torch.bfloat16)
    assert moved.tokens.dtype == torch.bfloat16
    assert moved.vector is not None and moved.vector.dtype == torch.bfloat16
    assert moved.mask is not None and moved.mask.dtype == torch.bool
    assert conditions(1).to("cpu").tokens.dtype == torch.float32


def test_join_refuses_different_fields() -> None:
    with pytest.raises(ValueError, match="different fields"):
        join(conditions(1), conditions(1, vector=False))
