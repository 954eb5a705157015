"""FSDP: each process keeps its share of the weights, of their average and of the optimiser's memory.

A learner is one unit (torch's `fully_shard`): whole for a step and let go after it, its gradients summed into shares.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(module: nn.Module, device: torch.device, processes: int) -> Any:
    """Split the parameters of a module evenly; its modules are then called within its `forward` alone."""
    return fully_shard(module, mesh=init_device_mesh(device.type, (processes,)))


def whole(value: Tensor) -> Tensor:
    """A tensor with the shares of all processes, which must all ask for it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def split_as(like: Tensor, value: Tensor) -> Tensor:
    """The share of a whole tensor that this process has of another."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def copied(tensors: Mapping[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """The same values, whole, on the CPU, in memory of their own; nothing where they are not to be kept."""
    wholes = ((name, whole(value.detach())) for name, value in tensors.items())
    return {name: value.to("cpu", copy=True) for name, value in wholes if keep}


@contextmanager
def holding(networks: nn.ModuleDict, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it networks hold whole parameters, these where they are given by name, in memory that is theirs."""
    own = dict(networks.named_parameters())
    held = {n: nn.Parameter(whole(values.get(n, p).detach()), p.requires_grad) for n, p in own.items()}

    def put(parameters: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            path, _, leaf = name.rpartition(".")
            setattr(networks.get_submodule(path), leaf, parameter)

    put(held)
    try:
        yield
    finally:
        put(own)
