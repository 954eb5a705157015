"""Training a LoRA (Hu et al. 2021) or DoRA (Liu et al. 2024): small adapters on the weights of a model that stays.

With instance pictures and the model's own pictures of the class it is DreamBooth (Ruiz et al. 2022, arXiv:2208.12242).
"""

import copy
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ldm.adapters.lora import LowRank, Place
from ldm.checkpoints import lora_out
from ldm.checkpoints.native import Model
from ldm.errors import UserError
from ldm.training.config import LoraConfig, LoraRun
from ldm.training.tasks.denoising import DenoisingTask

Adapters = Mapping[str, LowRank]  # by the names of `lora_out.targets`


class Slices(nn.Module):
    """A parametrization of a weight by adapters of its parts: each changes its own rows, or their transpose."""

    def __init__(self, adapters: Sequence[tuple[Place, LowRank]]) -> None:
        super().__init__()
        self.places = [place for place, _ in adapters]
        self.adapters = nn.ModuleList(adapter for _, adapter in adapters)

    def forward(self, weight: Tensor) -> Tensor:
        rows = list(weight.chunk(self.places[0].parts))
        for place, adapter in zip(self.places, self.adapters, strict=True):
            own = rows[place.part]
            rows[place.part] = adapter(own.T).T if place.turned else adapter(own)
        return rows[0] if len(rows) == 1 else torch.cat(rows)


class LoraTask(DenoisingTask):
    """The denoising loss, moved by adapters alone. UserError where a pattern of targets fits no weight."""

    config: LoraRun

    def trained(self) -> dict[str, nn.Module]:
        self.freeze()
        if self.config.run.precision == "bf16":
            for network in (self.backbone, self.text):
                network.to(torch.bfloat16)  # only what trains needs more
        self.adapters = wear(self.model(), self.config.lora, self.config.run.seed)
        self.trains_text = any(name.startswith("text_encoder") for name in self.adapters)
        return as_network(self.adapters)

    def export(self, path: Path, provenance: dict[str, Any]) -> None:
        write(path, self, self.adapters, self.config.lora, provenance.get("steps", 0))


def wear(model: Model, config: LoraConfig, seed: int) -> dict[str, LowRank]:
    """Fresh adapters, which train with a model as parametrizations, on those of its weights that the targets name."""
    weights = {f"{p}.{name}": value for p, m in model.modules.items() for name, value in m.state_dict().items()}
    rng = torch.Generator().manual_seed(seed)
    places = _chosen(lora_out.targets(model), config.targets)
    adapters = {name: _fresh(place.view(weights[place.name]), config, rng) for name, place in places.items()}
    worn: dict[str, list[tuple[Place, LowRank]]] = {}
    for name, place in places.items():
        worn.setdefault(place.name, []).append((place, adapters[name]))
    for name, group in worn.items():
        network, _, inner = name.partition(".")
        path, _, leaf = inner.rpartition(".")
        owner = model.modules[network].get_submodule(path)
        parametrize.register_parametrization(owner, leaf, Slices(group), unsafe=True)
    return adapters


def as_network(adapters: Adapters) -> dict[str, nn.Module]:
    return {"adapters": nn.ModuleDict({name.replace(".", "/"): adapter for name, adapter in adapters.items()})}


def write(path: Path, task: DenoisingTask, adapters: Adapters, config: LoraConfig, steps: int) -> None:
    if config.half:
        adapters = {name: copy.deepcopy(adapter).half() for name, adapter in adapters.items()}
    about = {"ss_base_model": str(task.config.weights), "ss_steps": str(steps)}
    metadata = lora_out.kohya_metadata(config.rank, config.alpha or config.rank, **about)
    lora_out.write(path, adapters, metadata, config.layout, towers=len(task.text.config.towers))


def _chosen(known: Mapping[str, Place], patterns: Sequence[str]) -> dict[str, Place]:
    found = {name: place for name, place in known.items() if any(fnmatchcase(name, p) for p in patterns)}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in found):
            some = ", ".join(sorted(known)[:2])
            raise UserError(f"lora.targets {pattern!r} fits no weight of this model: they are named as {some}")
    return found


def _fresh(rows: Tensor, config: LoraConfig, rng: torch.Generator) -> LowRank:
    """An adapter of a weight that changes nothing yet: up is zero (Sec. 4.1)."""
    rank = min(config.rank, rows.shape[0], rows[0].numel())
    down = torch.randn((rank, *rows.shape[1:]), generator=rng) / rows[0].numel() ** 0.5
    up = torch.zeros(rows.shape[0], rank, *[1] * (rows.dim() - 2))
    over = tuple(range(1, rows.dim()))
    magnitude = torch.linalg.vector_norm(rows.float(), dim=over, keepdim=True) if config.dora else None
    return LowRank(down, up, magnitude=magnitude, scale=(config.alpha or config.rank) / config.rank)
