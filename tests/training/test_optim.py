"""The learning rate in closed form, and which parameters decay."""

import math

import pytest
import torch
from torch import nn

from ldm.errors import UserError
from ldm.training.config import OptimConfig
from ldm.training.optim import adamw, clipped, freeze, rate


def test_warmup_is_linear_and_reaches_the_rate():
    config = OptimConfig(lr=2.0, warmup=4)
    assert [rate(config, step, 100) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_cosine():
    config = OptimConfig(lr=1.0, warmup=10, schedule="cosine")
    for step in (10, 35, 60, 85, 109):
        assert rate(config, step, 110) == pytest.approx(0.5 * (1 + math.cos(math.pi * (step - 10) / 100)))
    assert rate(config, 110, 110) == 0


def test_constant():
    assert {rate(OptimConfig(lr=0.1), step, 10) for step in range(20)} == {0.1}


def test_only_matrices_decay():
    net = nn.Sequential(nn.Conv2d(2, 2, 3), nn.GroupNorm(1, 2))
    optimizer = adamw(net.parameters(), OptimConfig(lr=0.1, weight_decay=0.5))
    before = [p.clone() for p in net.parameters()]
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for old, new in zip(before, net.parameters(), strict=True):
        torch.testing.assert_close(new.data, old.data * (0.95 if old.ndim > 1 else 1.0))


def test_found_inf_leaves_everything_as_it_is():
    net = nn.Linear(3, 2)
    optimizer = adamw(net.parameters(), OptimConfig(lr=0.1))
    for bad in (0.0, 1.0):
        before = [p.clone() for p in net.parameters()]
        state = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, math.nan if bad else 1.0)
        optimizer.found_inf = torch.tensor(bad)
        optimizer.step()
        same = all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
        assert same == bool(bad)
    assert all(torch.equal(optimizer.state[p][k], v) for p, slots in state.items() for k, v in slots.items())


@pytest.mark.parametrize(("limit", "after"), [(1.0, 1.0), (100.0, 5.0), (0.0, 5.0)])
def test_clipping(limit, after):
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clipped([parameter], limit) == 5
    assert parameter.grad.norm().item() == pytest.approx(after, rel=1e-5)


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        ([], {"a.0.weight", "a.0.bias", "a.1.weight", "a.1.bias", "b.weight", "b.bias"}),
        (["0.*"], {"a.1.weight", "a.1.bias", "b.weight", "b.bias"}),
        (["*.bias", "b.weight"], {"a.0.weight", "a.1.weight"}),
        (["a.[01].weight", "b.*"], {"a.0.bias", "a.1.bias"}),
    ],
)
def test_freezing_by_name(patterns: list[str], left: set[str]):
    networks = {"a": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "b": nn.Linear(2, 2)}
    freeze(networks, patterns)
    named = {f"{name}.{key}": p for name, net in networks.items() for key, p in net.named_parameters()}
    assert {name for name, parameter in named.items() if parameter.requires_grad} == left


def test_freezing_nothing_or_everything_is_an_error():
    net = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"no parameter is named 'encodr\.\*' \(there are net\.\*"):
        freeze({"net": net}, ["weight", "encodr.*"])
    freeze({"net": net}, ["*"])
    with pytest.raises(UserError, match="nothing to train"):
        adamw(net.parameters(), OptimConfig())
