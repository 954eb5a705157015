"""Low-rank adapters on their own: the formula, in and out, and that they train."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ldm.adapters.lora import LowRank, Place, fuse, inject
from ldm.models.layers import Upsample
from ldm.models.speed import _LAID_OUT, Phased


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture
def modules() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"net": nn.Sequential(nn.Linear(6, 8), nn.Conv2d(4, 8, 3)), "text": nn.MultiheadAttention(8, 2)}


def low_rank(out: int = 8, into: int = 6, seed: int = 0) -> LowRank:
    return LowRank(rand(2, into, seed=seed), rand(out, 2, seed=seed), scale=0.5)


def test_a_layer_computes_what_the_paper_says(modules: dict[str, nn.Module]) -> None:
    layer, adapter, x = modules["net"][0], low_rank(), rand(3, 6)  # type: ignore[index]
    expected = layer(x) + 0.8 * 0.5 * (x @ adapter.down.T @ adapter.up.T)
    inject(modules, [(Place("net.0.weight"), adapter)], 0.8)
    assert torch.allclose(layer(x), expected, atol=1e-6)


def test_a_convolution_and_a_kernel_between(modules: dict[str, nn.Module]) -> None:
    layer, x = modules["net"][1], rand(1, 4, 5, 5)  # type: ignore[index]
    for down, mid, up in (
        (rand(2, 4, 3, 3), None, rand(8, 2, 1, 1)),
        (rand(2, 4, 1, 1), rand(3, 2, 3, 3), rand(8, 3, 1, 1)),
    ):
        inner = nn.functional.conv2d(x, down)
        inner = inner if mid is None else nn.functional.conv2d(inner, mid)
        expected = layer(x) + nn.functional.conv2d(inner, up)
        injected = inject(modules, [(Place("net.1.weight"), LowRank(down, up, mid=mid))])
        assert torch.allclose(layer(x), expected, atol=1e-4)
        injected.eject()


def test_rows_of_a_joined_weight(modules: dict[str, nn.Module]) -> None:
    weight, adapter = modules["text"].in_proj_weight.detach().clone(), low_rank(8, 8)
    inject(modules, [(Place("text.in_proj_weight", 1, 3), adapter)])
    change = modules["text"].in_proj_weight - weight
    assert torch.allclose(change[8:16], adapter.delta(torch.Size([8, 8])), atol=1e-6)
    assert not change[:8].any() and not change[16:].any()


def test_a_transposed_weight(modules: dict[str, nn.Module]) -> None:
    weight, adapter = modules["net"][0].weight.detach().clone(), low_rank(6, 8)  # type: ignore[index]
    inject(modules, [(Place("net.0.weight", turned=True), adapter)])
    expected = weight + adapter.delta(torch.Size([6, 8])).T
    assert torch.allclose(modules["net"][0].weight, expected, atol=1e-6)  # type: ignore[index]


def test_magnitudes_are_the_norms_of_the_result(modules: dict[str, nn.Module]) -> None:
    rows, columns = rand(8, 1).abs(), rand(1, 6).abs()
    for magnitude, axis in ((rows, 1), (columns, 0)):
        adapter = LowRank(rand(2, 6), rand(8, 2), magnitude=magnitude)
        injected = inject(modules, [(Place("net.0.weight"), adapter)])
        norms = modules["net"][0].weight.norm(dim=axis, keepdim=True)  # type: ignore[index]
        assert torch.allclose(norms, magnitude, atol=1e-5)
        injected.eject()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_number_go_in_and_out_in_any_order(modules: dict[str, nn.Module], dtype: torch.dtype) -> None:
    net = modules["net"].to(dtype)
    before = {name: (value, value.detach().clone()) for name, value in net.named_parameters()}
    place = Place("net.0.weight")
    first = inject(modules, [(place, low_rank(seed=1))], 0.7)
    alone = net[0].weight.detach().clone()  # type: ignore[index]
    second = inject(modules, [(place, low_rank(seed=2)), (place, low_rank(seed=3))], -1.3)
    assert not torch.equal(net[0].weight, alone)  # type: ignore[index]
    first.eject()
    first.eject()
    third = inject(modules, [(place, low_rank(seed=1))], 0.7)
    second.eject()
    assert torch.equal(net[0].weight, alone)  # type: ignore[index]
    third.eject()
    for name, value in net.named_parameters():
        assert value is before[name][0] and torch.equal(value, before[name][1])


def test_what_is_fused_stays(modules: dict[str, nn.Module]) -> None:
    place, layer = Place("net.0.weight"), modules["net"][0]  # type: ignore[index]
    base = layer.weight.detach().clone()
    other = inject(modules, [(place, low_rank(seed=2))])
    fuse(modules, [(place, low_rank(seed=1))], 0.5)
    other.eject()
    assert torch.allclose(layer.weight, base + 0.5 * low_rank(seed=1).delta(base.shape), atol=1e-6)
    assert type(layer.weight) is nn.Parameter


def test_a_layer_that_keeps_its_weights_in_another_form_follows() -> None:
    """One adapter after another may lie at the same address."""
    torch.manual_seed(0)
    layer, x = Upsample(64).requires_grad_(False), rand(1, 64, 8, 8)
    plain, net = copy.deepcopy(layer), nn.Sequential(layer)
    layer.__class__ = Phased
    for seed in range(6):
        adapter = LowRank(rand(4, 64, 3, 3, seed=seed), rand(64, 4, seed=seed + 1))
        injected = inject({"net": net}, [(Place("net.0.conv.weight"), adapter)])
        plain.conv.weight = layer.conv.weight
        with torch.no_grad():
            assert torch.allclose(layer(x), plain(x), atol=1e-3)
        injected.eject()
    assert layer in _LAID_OUT


def test_memory_layout_stays(modules: dict[str, nn.Module]) -> None:
    modules["net"].to(memory_format=torch.channels_last)
    inject(modules, [(Place("net.1.weight"), LowRank(rand(2, 4, 3, 3), rand(8, 2)))])
    assert modules["net"][1].weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[index]


@pytest.mark.parametrize(
    "make",
    [low_rank, lambda: LowRank(rand(2, 6), torch.zeros(8, 2), magnitude=rand(8, 1).abs() + 0.5)],
    ids=["lora", "dora"],
)
def test_an_adapter_trains_and_the_weight_does_not(make: Callable[[], LowRank]) -> None:
    torch.manual_seed(0)
    layer, x, wanted = nn.Linear(6, 8).requires_grad_(False), rand(32, 6), rand(32, 8)
    base, adapter = layer.weight.detach().clone(), make()
    parametrize.register_parametrization(layer, "weight", adapter)
    optimiser = torch.optim.Adam(adapter.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        loss = (layer(x) - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0] and all(p.grad is not None for p in adapter.parameters())
    assert torch.equal(layer.parametrizations.weight.original, base)
