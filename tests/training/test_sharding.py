"""What each of two processes keeps: half. (That the steps are the same: test_resume.py.)"""

from collections.abc import Iterator
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from ldm.training.config import EmaConfig, OptimConfig
from ldm.training.ema import Ema
from ldm.training.learner import Learner, Objective
from ldm.training.optim import named


@pytest.fixture
def two() -> Iterator[None]:
    """This process is the first of two, of which the other says nothing."""
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("two")
def test_a_process_keeps_its_share_of_weights_average_and_optimiser():
    net = nn.Linear(64, 32)

    def loss(batch: dict[str, float]) -> dict[str, torch.Tensor]:
        assert net.weight.shape == (32, 64) and type(net.weight) is nn.Parameter  # whole within a step
        return {"loss": net.weight.square().mean() + net.bias.mean()}

    accelerator = Mock(spec=Accelerator, device=torch.device("cpu"), num_processes=2, mixed_precision="no")
    accelerator.prepare_model = lambda module, **_: module
    learner = Learner(Objective("fit", {"net": net}, loss), OptimConfig(), accelerator, main=True, split=True)
    ema = Ema(named({"net": net}), EmaConfig())
    learner.backward({"step": 0}, 1, last=True)
    learner.clip()
    learner.step(0.1, torch.zeros(()))
    ema.update(0, torch.ones(()))
    half = (32 * 64 + 32) // 2
    moments = [[state[name] for state in learner.optimizer.state.values()] for name in ("exp_avg", "exp_avg_sq")]
    for kept in (learner.parameters, ema.shadows[0], *moments):
        assert sum(value.to_local().numel() for value in kept) == half
    assert learner.state()["0.exp_avg"].shape == (32, 64)
