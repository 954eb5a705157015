"""Training a LoRA (Hu et al. 2021) or DoRA (Liu et al. 2024): small adapters on the weights of a model that stays.

With instance pictures and the model's own pictures of the class it is DreamBooth (Ruiz et al. 2022, arXiv:2208.12242).
"""

import copy
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import groupby
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
    """The denoising loss, moved by adapters alone; what it writes is a LoRA file.

    UserError where a pattern of targets fits no weight of the model.
    """

    def __init__(self, config: LoraRun) -> None:
        super().__init__(config)
        self.lora = config.lora
        for network in (self.backbone, self.text):
            network.requires_grad_(False)
            if config.run.precision == "bf16":
                network.to(torch.bfloat16)  # only what trains needs more
        self.adapters = wear(self.model(), self.lora, config.run.seed)
        self.trains_text = any(name.startswith("text_encoder") for name in self.adapters)
        self.networks = {"adapters": as_network(self.adapters)}
        self.averaged = ("adapters",)

    def export(self, path: Path, provenance: dict[str, Any]) -> None:
        """Write the adapters, as other programs read them."""
        facts = {"ss_base_model": str(self.config.weights), "ss_steps": str(provenance.get("steps", 0))}
        write(path, self.model(), self.adapters, self.lora, facts)


def wear(model: Model, config: LoraConfig, seed: int) -> dict[str, LowRank]:
    """Fresh adapters, which train with a model as parametrizations, on those of its weights that the targets name."""
    weights = {f"{p}.{name}": value for p, m in model.modules.items() for name, value in m.state_dict().items()}
    rng = torch.Generator().manual_seed(seed)
    places = _chosen(lora_out.targets(model), config.targets)
    adapters = {name: _fresh(weights[place.name], place, config, rng) for name, place in places.items()}
    worn = sorted(((place, adapters[name]) for name, place in places.items()), key=lambda pair: pair[0].name)
    for name, group in groupby(worn, key=lambda pair: pair[0].name):
        network, _, inner = name.partition(".")
        path, _, leaf = inner.rpartition(".")
        owner = model.modules[network].get_submodule(path)
        parametrize.register_parametrization(owner, leaf, Slices(list(group)), unsafe=True)
    return adapters


def as_network(adapters: Mapping[str, LowRank]) -> nn.ModuleDict:
    """Adapters as one module: what trains, and is averaged and saved."""
    return nn.ModuleDict({name.replace(".", "/"): adapter for name, adapter in adapters.items()})


def write(
    path: Path, model: Model, adapters: Mapping[str, LowRank], config: LoraConfig, facts: Mapping[str, str]
) -> None:
    """The file of a model's trained adapters."""
    if config.half:
        adapters = {name: copy.deepcopy(adapter).half() for name, adapter in adapters.items()}
    towers = 2 if model.spec.text is not None and model.spec.text.second is not None else 1
    metadata = lora_out.kohya_metadata(config.rank, config.alpha or config.rank, **facts)
    lora_out.write(path, adapters, metadata, config.layout, towers=towers)


def _chosen(known: Mapping[str, Place], patterns: Sequence[str]) -> dict[str, Place]:
    found = {name: place for name, place in known.items() if any(fnmatchcase(name, p) for p in patterns)}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in found):
            some = ", ".join(sorted(known)[:2])
            raise UserError(f"lora.targets {pattern!r} fits no weight of this model: they are named as {some}")
    return found


def _fresh(weight: Tensor, place: Place, config: LoraConfig, rng: torch.Generator) -> LowRank:
    """An adapter that changes nothing yet: up is zero (Sec. 4.1)."""
    rows = place.view(weight)
    rank = min(config.rank, rows.shape[0], rows[0].numel())
    down = torch.randn((rank, *rows.shape[1:]), generator=rng) / rows[0].numel() ** 0.5
    up = torch.zeros(rows.shape[0], rank, *[1] * (rows.dim() - 2))
    magnitude = None
    if config.dora:
        over = tuple(range(1, rows.dim()))
        magnitude = torch.linalg.vector_norm(rows.float(), dim=over, keepdim=True)
    alpha = config.alpha or config.rank
    return LowRank(down, up, magnitude=magnitude, scale=alpha / config.rank)
