"""Recorded UNets on a stand-in for CUDA's graphs: it replays what was recorded, operation by operation, in place."""

import copy
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldm.adapters.ip_adapter import IPAdapter
from ldm.adapters.lora import LowRank, Place, fuse, inject
from ldm.conditioning import Conditioning
from ldm.models import graphs
from ldm.models.controlnet import Controlled, ControlNet, Steering
from ldm.models.unet import Control, UNet, UNetConfig

CONFIG = UNetConfig(channels=(8, 16), res_blocks=1, depth=(1, 1), heads=(2, 2), context_dim=6, vector_dim=5, groups=4)


class Tape(TorchDispatchMode):
    """Notes each operation with its arguments and results themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    def spoil(self) -> None:
        """On a GPU nothing is computed while it is recorded."""
        mine: set[int] = set()
        for _, args, kwargs, result in self.operations:
            given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))} - mine
            for tensor in _tensors(result):
                if tensor.untyped_storage().data_ptr() not in given:
                    mine.add(tensor.untyped_storage().data_ptr())
                    tensor.fill_(torch.nan if tensor.is_floating_point() else 0)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class Graph:
    """As torch.cuda.CUDAGraph: a replay computes again, from and into the memory of the recording."""

    made: ClassVar[list["Graph"]] = []

    def __init__(self) -> None:
        self.tape, self.replays, self.pool = Tape(), 0, None
        Graph.made.append(self)

    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, result in self.tape.operations:
            for old, new in zip(_tensors(result), _tensors(function(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Device(SimpleNamespace):
    """What a test may look at: forwards in full, and waits for the device."""

    forwards: int = 0
    waits: int = 0
    pools: int = 0


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    seen, plain = Device(), UNet.forward

    @contextmanager
    def record(graph: Graph, *, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        graph.pool = pool
        with graph.tape:
            yield
        graph.tape.spoil()

    def forward(self: UNet, *inputs: Any) -> Tensor:
        seen.forwards += 1
        return plain(self, *inputs)

    def handle() -> int:
        seen.pools += 1
        return seen.pools

    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes: dict[str, Any] = {"CUDAGraph": Graph, "graph": record, "graph_pool_handle": handle}
    fakes |= {"Stream": lambda: stream, "current_stream": lambda: stream, "stream": lambda s: nullcontext()}
    fakes |= {"synchronize": lambda: setattr(seen, "waits", seen.waits + 1)}
    fakes |= {"is_current_stream_capturing": lambda: False}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(graphs, "DEVICE", "cpu")
    monkeypatch.setattr(UNet, "forward", forward)
    Graph.made.clear()
    yield seen
    Graph.made.clear()


def nets() -> tuple[UNet, UNet]:
    """One, and its like that records itself."""
    plain, rng = UNet(CONFIG), torch.Generator().manual_seed(0)
    for p in plain.parameters():
        p.requires_grad_(False).normal_(0, p[0].numel() ** -0.5 if p.ndim > 1 else 0.3, generator=rng)
    mine = copy.deepcopy(plain)
    graphs.install(mine)
    return plain, mine


def given(seed: int, b: int = 2, size: int = 8, **other: Any) -> tuple[Tensor, Tensor, Conditioning]:
    rng = torch.Generator().manual_seed(seed)
    z, label = torch.randn(b, 4, size, size, generator=rng), torch.rand(b, generator=rng) * 999
    cond = Conditioning(torch.randn(b, 7, 6, generator=rng), vector=torch.randn(b, 5, generator=rng))
    return z, label, replace(cond, **other)


def same(plain: nn.Module, mine: nn.Module, *inputs: Any) -> None:
    torch.testing.assert_close(mine(*inputs), plain(*inputs), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_from_the_third_step_on_nothing_but_a_replay(device: Device) -> None:
    plain, mine = nets()
    wanted = [plain(*given(seed)) for seed in range(5)]
    device.forwards = 0
    got, counts = [], []
    for seed in range(5):
        got.append(mine(*given(seed)))
        counts.append(device.forwards)
    assert counts == [1, *[2 + graphs.WARM_UPS] * 4]  # in full; warm-ups and the recording; replays
    assert [graph.replays for graph in Graph.made] == [4]
    for answer, right in zip(got, wanted, strict=True):  # kept all the while, and not overwritten
        torch.testing.assert_close(answer, right, rtol=1e-5, atol=1e-6)
    assert float(got[0].std()) > 0.1 and not torch.equal(got[1], got[2])


@torch.no_grad()
def test_every_form_has_its_own_in_one_pool(device: Device) -> None:
    plain, mine = nets()
    mask = torch.arange(7)[None] < torch.tensor([[4], [7]])
    z = given(0)[0]
    skips = [h.clone() for h in plain_skips(plain)]
    forms: list[tuple[Any, ...]] = [
        given(1),
        given(2, b=1),
        given(3, size=16),
        given(4, mask=mask),
        (*given(5), Control(skips, torch.randn(2, 16, 4, 4))),
        (*given(6), Control(skips)),
        (*given(7), Control(skips, 0.5)),
        (z.expand(2, -1, -1, -1) if len(z) == 1 else z.mT, *given(8)[1:]),
    ]
    for _ in range(3):
        for form in forms:
            same(plain, mine, *form)
    assert len(Graph.made) == 7  # the last is of the first's form: only its layout differs
    assert {graph.pool for graph in Graph.made} == {1}
    again = Control([h + 1 for h in skips], torch.randn(2, 16, 4, 4))
    same(plain, mine, *given(9), again)
    assert len(Graph.made) == 7


def plain_skips(net: UNet) -> list[Tensor]:
    return [torch.randn(2, c, s, s) for c, s in ((8, 8), (8, 8), (8, 4), (16, 4))]


@torch.no_grad()
def test_only_so_many_are_kept(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "KEPT", 2)
    plain, mine = nets()
    for b in (1, 2, 3):
        for _ in range(3):
            same(plain, mine, *given(b, b=b))
    kept = graphs._RECORDINGS[mine]._made
    assert len(Graph.made) == 3 and [r.graph for r in kept.values()] == Graph.made[1:] and device.waits == 1
    same(plain, mine, *given(4, b=2))  # used again, so now the third is the oldest
    same(plain, mine, *given(5, b=1))
    assert [r.graph for r in kept.values()] == [Graph.made[1], Graph.made[3]]


@torch.no_grad()
def test_weights_may_change_in_place_and_what_moves_is_recorded_anew(device: Device) -> None:
    plain, mine = nets()

    def settled() -> int:
        for seed in range(3):
            same(plain, mine, *given(seed))
        return len(Graph.made)

    assert settled() == 1
    for net in (plain, mine):
        net.conv_in.weight.mul_(1.5)
        net.mid.res1.conv1.weight.data.add_(0.1)
    assert settled() == 1
    adapters = [(Place("backbone.mid.res1.conv2.weight"), LowRank(torch.randn(2, 16, 3, 3), torch.randn(16, 2, 1, 1)))]
    both = [inject({"backbone": net}, adapters, 0.5) for net in (plain, mine)]
    assert settled() == 2
    for worn in both:
        worn.eject()
    assert settled() == 3
    for net in (plain, mine):
        fuse({"backbone": net}, adapters)
    assert settled() == 4
    adapter = IPAdapter(plain, 5, tokens=2).requires_grad_(False)
    for number, weight in enumerate((0.3, 0.9), 5):
        worn = [adapter.inject(net, weight) for net in (plain, mine)]
        assert settled() == number
        for each in worn:
            each.eject()
        del worn, each
        gc.collect()
    mine.double()
    plain.double()
    for _ in range(2):
        z, label, cond = given(1)
        same(plain, mine, z.double(), label, cond.to("cpu", torch.float64))


@torch.no_grad()
def test_under_a_control(device: Device) -> None:
    plain, mine = nets()
    control = ControlNet(CONFIG, hint_widths=(4, 4), unet=plain).requires_grad_(False)
    for p in control.parameters():
        p.normal_(0, 0.1)
    hint = torch.rand(1, 3, 16, 16)
    for label in (900.0, 500.0, 300.0, 100.0, 50.0):
        z, _, cond = given(int(label))
        steered = [Controlled(net, [Steering(control, hint, 0.7)] * (label > 200)) for net in (plain, mine)]
        same(*steered, z, torch.full((2,), label), cond)
    assert [graph.replays for graph in Graph.made] == [2, 1]


def test_gradients_and_what_cannot_be_recorded_go_the_plain_way(
    device: Device, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, mine = nets()
    for _ in range(3):
        z, label, cond = given(0)
        mine(z.requires_grad_(), label, cond).sum().backward()
        assert z.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            mine(*given(0))
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        for _ in range(3):
            mine(*given(0))
    assert not Graph.made

    class Asking(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float(x.new_ones(()))

    with torch.no_grad():
        for seed in range(3):
            same(plain, mine, *given(seed, b=1))
        mine.conv_in.__class__ = Asking
        for seed in range(4):
            same(plain, mine, *given(seed))
        assert (
            len(Graph.made) == 2 and "not replayed as a CUDA graph: operation not permitted" in capsys.readouterr().err
        )
        mine.conv_in.__class__ = nn.Conv2d
        assert not graphs._RECORDINGS[mine]._made
        same(plain, mine, *given(5, b=1))
        assert len(Graph.made) == 3 and device.pools == 2


@torch.no_grad()
def test_inference_mode_leaves_no_trace(device: Device) -> None:
    plain, mine = nets()
    with torch.inference_mode():
        for seed in range(3):
            same(plain, mine, *given(seed))
    same(plain, mine, *given(3))
    assert [graph.replays for graph in Graph.made] == [3]


@torch.no_grad()
def test_a_copy_has_its_own_and_nothing_outlives_the_network(device: Device) -> None:
    plain, mine = nets()
    for _ in range(3):
        same(plain, mine, *given(0))
    other = copy.deepcopy(mine)
    assert other not in graphs._RECORDINGS
    other.conv_out.bias.add_(1)
    for _ in range(3):
        torch.testing.assert_close(other(*given(0)), plain(*given(0)) + 1, rtol=1e-5, atol=1e-5)
    graphs.install(mine)
    assert mine not in graphs._RECORDINGS and isinstance(mine, UNet)
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None
