"""Attention by hand against torch's fused kernel, with and without a mask, on both sides of the limit."""

import pytest
import torch
import torch.nn.functional as F

from ldm.models import attention


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("limit", [0, 2**16])
def test_both_ways_are_one_function(masked: bool, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SHORT", limit)
    q, k, v = (torch.randn(2, 3, length, 8, dtype=torch.float64) for length in (5, 7, 7))
    mask = torch.rand(2, 1, 1, 7) < 0.6 if masked else None
    if mask is not None:
        mask[..., 0] = True
    got = attention.attend(q, k, v, mask)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, mask), rtol=1e-12, atol=1e-12)


def test_short_sequences_do_without_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the fused kernel was called")

    monkeypatch.setattr(F, "scaled_dot_product_attention", refuse)
    short, long = torch.randn(1, 1, 16, 4), torch.randn(1, 1, 300, 4)
    attention.attend(short, short, short)
    with pytest.raises(AssertionError, match="fused"):
        attention.attend(long, long, long)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="width 10 is not divisible by heads 4"):
        attention.Attention(10, 4)
