"""The tensors of a run by name: networks, their average, and optimisers; out to a checkpoint and back in place."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.training.ema import Ema


def snapshot(
    networks: Mapping[str, nn.Module], ema: Ema, optimizers: Mapping[str, torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """Name -> tensor; the tensors are the live ones, not copies."""
    tensors = {f"networks.{name}.{key}": v for name, net in networks.items() for key, v in net.state_dict().items()}
    tensors |= {f"ema.{index}": value for index, value in enumerate(ema.shadow)}
    for name, optimizer in optimizers.items():
        for index, parameter in enumerate(_parameters(optimizer)):
            slots = optimizer.state.get(parameter, {})
            tensors |= {f"optimizers.{name}.{index}.{slot}": value for slot, value in slots.items()}
    return tensors


@torch.no_grad()
def restore(
    tensors: Mapping[str, Tensor],
    networks: Mapping[str, nn.Module],
    ema: Ema,
    optimizers: Mapping[str, torch.optim.Optimizer],
) -> None:
    """Undo `snapshot`: fill the live tensors, strictly. UserError naming what is missing or left over."""
    for name, optimizer in optimizers.items():
        for index, parameter in enumerate(_parameters(optimizer)):
            prefix = f"optimizers.{name}.{index}."
            slots = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            # like the parameter in memory too: the fused kernel walks over both by address
            optimizer.state[parameter] = {
                slot: torch.empty_like(parameter)
                if value.shape == parameter.shape
                else value.to(parameter.device, copy=True)
                for slot, value in slots.items()
            }
    live = snapshot(networks, ema, optimizers)
    if live.keys() != tensors.keys():
        differing = ", ".join(sorted(live.keys() ^ tensors.keys())[:4])
        raise UserError(
            f"the checkpoint does not fit the networks of this program: {differing}. Take another --run folder"
        )
    for name, value in tensors.items():
        live[name].copy_(value)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
