"""Attention by hand against torch's fused kernel, with and without a mask, on both sides of the limit."""

import sys
from types import ModuleType

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


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no kernels for bf16")
    monkeypatch.setattr(attention, "_tiles_pay", lambda dtype: dtype != torch.float64)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.02), (torch.float32, 2e-6)])
def test_long_sequences_go_by_tiles(dtype: torch.dtype, error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As near to exact as the numbers allow, whole tiles or not; with a mask or gradients torch's kernel does it."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 16, generator=rng) for length in (1300, 700, 700))
    wanted, kernel, calls = F.scaled_dot_product_attention(*(y.double() for y in (q, k, v))), attention.fused, []
    monkeypatch.setattr(attention, "fused", lambda *given: calls.append(1) or kernel(*given))
    q, k, v = (y.to(dtype) for y in (q, k, v))
    got = attention.attend(q, k, v)
    assert not calls and got.dtype == dtype
    assert (got - wanted).norm() < error * wanted.norm()
    attention.attend(q, k, v, torch.ones(2, 1, 1, 700, dtype=torch.bool))
    attention.attend(q.requires_grad_(), k, v)
    assert len(calls) == 2


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("score", [160.0, -160.0])
def test_tiles_hold_scores_that_powers_cannot(score: float) -> None:
    """All keys alike, so that the answer is the values' mean; as powers their weights overflow or vanish."""
    q, k = torch.full((1, 1, 600, 16), score / 4).bfloat16(), torch.ones(1, 1, 550, 16).bfloat16()
    v = torch.randn(1, 1, 550, 16, generator=torch.Generator().manual_seed(0)).bfloat16() + 1
    got = attention.attend(q, k, v)
    torch.testing.assert_close(got.float(), v.float().mean(2, keepdim=True).expand_as(got), rtol=0.01, atol=0)


def test_xformers_gets_its_own_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels need a GPU: here torch's stands in for them, in xformers' layout (batch, length, heads, width)."""

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        assert q.shape == (2, 5, 3, 8) and k.shape == v.shape == (2, 7, 3, 8)
        return F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v))).transpose(1, 2)

    ops = ModuleType("xformers.ops")
    ops.memory_efficient_attention = kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    q, k, v = (torch.randn(2, 3, length, 8, dtype=torch.float64) for length in (5, 7, 7))
    torch.testing.assert_close(attention.xformers(q, k, v), attention.attend(q, k, v))
    mask = torch.tensor([True] * 4 + [False] * 3).expand(2, 1, 1, 7)
    torch.testing.assert_close(attention.xformers(q, k, v, mask), attention.attend(q, k, v, mask))


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="width 10 is not divisible by heads 4"):
        attention.Attention(10, 4)


def test_sliced_attention_is_the_same_and_holds_few_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((2, 3, length, 8), generator=rng) for length in (1100, 40, 40))
    mask = torch.arange(40).expand(2, 1, 1, 40) < torch.tensor([40, 7]).reshape(2, 1, 1, 1)
    asked: list[int] = []
    kernel = attention.fused
    monkeypatch.setattr(attention, "fused", lambda q, k, v, m: asked.append(q.shape[2]) or kernel(q, k, v, m))
    torch.testing.assert_close(attention.sliced(q, k, v, mask), kernel(q, k, v, mask))
    assert asked == [512, 512, 76]
