"""The tensors of a run by name: networks, their averages, and learners; out to a checkpoint and back in place."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.training.ema import Ema
from ldm.training.learner import Learner
from ldm.training.sharding import split_as


def snapshot(networks: Mapping[str, nn.Module], ema: Ema, learners: Mapping[str, Learner]) -> dict[str, Tensor]:
    """Name -> tensor; the tensors are the live ones, not copies."""
    tensors = {f"networks.{name}.{key}": v for name, net in networks.items() for key, v in net.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in ema.tensors().items()}
    for name, learner in learners.items():
        tensors |= {f"learners.{name}.{key}": value for key, value in learner.state().items()}
    return tensors


@torch.no_grad()
def restore(
    tensors: Mapping[str, Tensor], networks: Mapping[str, nn.Module], ema: Ema, learners: Mapping[str, Learner]
) -> None:
    """Undo `snapshot`: fill the live tensors, strictly. UserError naming what is missing or left over."""
    for name, learner in learners.items():
        prefix = f"learners.{name}."
        learner.fill({key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)})
    live = snapshot(networks, ema, learners)
    if live.keys() != tensors.keys():
        differing = ", ".join(sorted(live.keys() ^ tensors.keys())[:4])
        raise UserError(
            f"the checkpoint does not fit the networks of this program: {differing}. Take another --run folder"
        )
    for name, value in tensors.items():
        live[name].copy_(split_as(live[name], value))
