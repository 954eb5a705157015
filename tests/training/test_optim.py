"""The learning rate in closed form, and which parameters decay."""

import math
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from ldm.errors import UserError
from ldm.training.config import OptimConfig
from ldm.training.learner import GROWTH, Learner, Objective
from ldm.training.optim import check_patterns, freeze, make_optimizer, rate, slots


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
    optimizer = make_optimizer(dict(net.named_parameters()), OptimConfig(lr=0.1, weight_decay=0.5))
    before = [p.clone() for p in net.parameters()]
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for old, new in zip(before, net.parameters(), strict=True):
        torch.testing.assert_close(new.data, old.data * (0.95 if old.ndim > 1 else 1.0))


# Apart, since diffusers and transformers would import it wherever it can be found.
OPTIONAL = Path(sys.prefix) / "optional"
KINDS = {"adamw": "", "adamw8bit": "bitsandbytes", "prodigy": "prodigyopt", "adafactor": "", "muon": ""}


@pytest.fixture(autouse=True)
def optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(OPTIONAL)


def learner(kind: str, precision: str = "no", **settings) -> Learner:
    """One that fits two layers, a table and a kernel to nothing."""
    if KINDS[kind]:
        pytest.importorskip(KINDS[kind])
    torch.manual_seed(0)
    net = nn.ModuleDict({"a": nn.Linear(80, 64), "norm": nn.LayerNorm(64), "conv": nn.Conv2d(2, 2, 3)})
    net["token_embedding"] = nn.Embedding(8, 64)
    scale = settings.pop("scale", 1.0)

    def loss(batch):
        return {"loss": scale * sum((p.float() - batch["step"]).square().mean() for p in net.parameters())}

    cpu = Mock(
        spec=Accelerator,
        device=torch.device("cpu"),
        mixed_precision=precision,
        prepare_model=lambda module, evaluation_mode: module,
    )
    config = OptimConfig(kind=kind, lr=1.0 if kind == "prodigy" else 0.05, **{"clip": 0.0} | settings)
    return Learner(Objective("fit", {"net": net}, loss), config, cpu, main=True)


def train(learner: Learner, steps: range) -> list[torch.Tensor]:
    """The parameters after some steps, each towards its own number."""
    for step in steps:
        learner.backward({"step": step % 3 * 0.1}, 1, last=True)
        learner.clip()
        learner.step(learner.config.lr, torch.zeros(()))
    return [p.detach().clone() for p in learner.parameters]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_and_goes_on_bit_for_bit(kind: str):
    whole, half, rest = learner(kind), learner(kind), learner(kind)
    first = whole.backward({"step": 0}, 1, last=True)["loss"]
    whole.optimizer.zero_grad()
    middle = train(half, range(8))
    kept = {name: value.clone() for name, value in half.state().items()}
    with torch.no_grad():
        for parameter, value in zip(rest.parameters, middle, strict=True):
            parameter.copy_(value)
    rest.fill(kept)
    assert {name: tuple(v.shape) for name, v in rest.state().items()} == {n: tuple(v.shape) for n, v in kept.items()}
    ended, again = train(whole, range(16)), train(rest, range(8, 16))
    assert all(torch.equal(a, b) for a, b in zip(ended, again, strict=True))
    assert kind == "prodigy" or whole.backward({"step": 0.1}, 1, last=True)["loss"] < 0.8 * first
    assert kind != "prodigy" or slots(whole.optimizer)["group0.d#"] > 1e-6  # it has begun to find its rate


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_left_out_moves_nothing(kind: str):
    one = learner(kind)
    before = train(one, range(2))
    kept = {name: value.clone() for name, value in one.state().items()}
    one.backward({"step": math.nan}, 1, last=True)
    one.step(0.1, torch.ones(()))
    assert all(torch.equal(a, b) for a, b in zip(before, one.parameters, strict=True))
    assert all(torch.equal(value, one.state()[name]) for name, value in kept.items())
    assert all(p.grad is None for p in one.parameters)


@pytest.mark.parametrize(("kind", "library"), [(kind, library) for kind, library in KINDS.items() if library])
def test_a_library_that_is_not_there_is_one_line(kind: str, library: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=f"optim.kind {kind} needs {library}: pip install {library}"):
        make_optimizer(dict(nn.Linear(2, 2).named_parameters()), OptimConfig(kind=kind))


def test_eight_bits_are_eight_bits():
    pytest.importorskip("bitsandbytes")
    one = learner("adamw8bit")
    train(one, range(1))
    assert one.optimizer.state[one.objective.networks["net"]["a"].weight]["state1"].dtype == torch.uint8


def test_muon_moves_matrices_by_an_orthogonal_step_and_the_rest_by_adamw():
    one = learner("muon", weight_decay=0.0)
    matrix, before = (
        one.objective.networks["net"]["a"].weight,
        one.objective.networks["net"]["a"].weight.detach().clone(),
    )
    train(one, range(1))
    values = torch.linalg.svdvals(before - matrix.detach())
    assert values.max() < 2 * values.min()  # five iterations of Newton-Schulz come near to one
    slots_of = {name: set(one.optimizer.state[p]) for name, p in one.objective.networks["net"].named_parameters()}
    assert slots_of.pop("a.weight") == {"momentum_buffer"}
    assert all("exp_avg_sq" in names for names in slots_of.values()) and "token_embedding.weight" in slots_of
    with pytest.raises(UserError, match="nothing that is trained is a matrix"):
        make_optimizer(dict(nn.Conv2d(2, 2, 3).named_parameters()), OptimConfig(kind="muon"))


def test_adafactor_keeps_rows_and_columns():
    one = learner("adafactor")
    train(one, range(1))
    shapes = {n: tuple(v.shape) for n, v in one.optimizer.state[one.parameters[0]].items()}
    assert shapes["row_var"] == (64, 1) and shapes["col_var"] == (1, 80)


def test_rates_by_name():
    one = learner("adamw", rates={"a.*": 0.5, "net.a.bias": 0.0}, weight_decay=0.0)
    before = [p.detach().clone() for p in one.parameters]
    train(one, range(1, 2))
    moved = [(b - a.detach()).abs().max().item() for a, b in zip(one.parameters, before, strict=True)]
    names = [name for name, _ in one.objective.networks["net"].named_parameters()]
    expected = [{"a.weight": 0.025, "a.bias": 0.0}.get(name, 0.05) for name in names]
    assert moved == pytest.approx(expected, rel=1e-3)
    check_patterns(one.objective.networks, one.config.rates, "optim.rates")
    with pytest.raises(UserError, match="optim.rates: no parameter is named 'txt"):
        check_patterns(one.objective.networks, ["txt.*"], "optim.rates")
    with pytest.raises(UserError, match="no meaning for prodigy"):
        learner("prodigy", rates={"a.*": 0.5})


def test_a_scaled_loss_takes_the_same_steps_and_leaves_out_those_that_overflow():
    plain, scaled = learner("adamw"), learner("adamw", "fp16")
    for a, b in zip(train(plain, range(3)), train(scaled, range(3)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert scaled.state()["scale"] == 2**16 and scaled.state()["streak"] == 3
    before = [p.detach().clone() for p in scaled.parameters]
    scaled.backward({"step": 1.0}, 1, last=True)
    scaled.parameters[0].grad[0, 0] = math.inf
    assert scaled.clip() == 0  # not the watch's business
    scaled.step(0.1, torch.zeros(()))
    assert all(torch.equal(a, b) for a, b in zip(before, scaled.parameters, strict=True))
    assert scaled.state()["scale"] == 2**15 and scaled.state()["streak"] == 0
    scaled.state()["streak"].fill_(GROWTH - 1)
    kept = {name: value.clone() for name, value in scaled.state().items()}
    train(scaled, range(1))
    assert scaled.state()["scale"] == 2**16 and scaled.state()["streak"] == 0
    scaled.fill(kept)
    assert scaled.state()["scale"] == 2**15


def test_a_gradient_that_overflows_under_any_scale_is_the_watchs_business():
    one, norms = learner("adamw", "fp16"), []
    for _ in range(20):
        one.backward({"step": 1.0}, 1, last=True)
        one.parameters[0].grad[0, 0] = math.inf
        norms.append(one.clip().item())
        one.step(0.1, torch.zeros(()))
    assert norms == [0.0] * 16 + [math.inf] * 4


def test_found_inf_leaves_everything_as_it_is():
    net = nn.Linear(3, 2)
    optimizer = make_optimizer(dict(net.named_parameters()), OptimConfig(lr=0.1))
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


@pytest.mark.parametrize("precision", ["no", "fp16"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize(("limit", "after"), [(1.0, 1.0), (100.0, 5.0), (0.0, 5.0)])
def test_clipping(limit: float, after: float, kind: str, precision: str):
    one = learner(kind, precision, clip=limit)
    for parameter in one.parameters:
        parameter.grad = torch.zeros_like(parameter)
    scale = 2.0**16 if precision == "fp16" else 1.0
    one.parameters[1].grad[:2] = torch.tensor([3.0, 4.0]) * scale  # a vector, which both kinds move by AdamW
    assert one.clip() == 5
    one.step(0.1, torch.zeros(()))
    seen = one.optimizer.state[one.parameters[1]]["exp_avg"] / (1 - one.config.betas[0])
    assert seen.norm().item() == pytest.approx(after, rel=1e-5)


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
        make_optimizer(dict(net.named_parameters()), OptimConfig())
