"""Students of few steps: they learn from a teacher, its guidance included, what takes it many.

Each method says, of a picture at one of the teacher's noise levels, which clean picture the student shall answer.
"""

import copy
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.checkpoints.files import save
from ldm.checkpoints.native import SamplingDefaults
from ldm.conditioning import Conditioning
from ldm.data.loader import Dataset
from ldm.data.order import Order
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import Denoise, bind, cfg
from ldm.diffusion.samplers import SAMPLERS as SOLVERS
from ldm.errors import UserError
from ldm.files import digest
from ldm.shapes import Latent, Sigma
from ldm.training import keyed
from ldm.training.config import DistilRun
from ldm.training.learner import Batch, Losses
from ldm.training.meter import binned
from ldm.training.processes import precision
from ldm.training.progress import Bar
from ldm.training.tasks import lora
from ldm.training.tasks.denoising import EMBEDDED, DenoisingTask

Column = Tensor  # (b, 1, 1, 1)


def consistency(student: Denoise, x: Latent, below: Latent, sigma: Column, lower: Column) -> Latent:
    """What the student itself says further down the teacher's path (Song et al. 2023; Luo et al. 2023, LCM)."""
    return torch.where(lower > 0, student(below, lower.clamp(min=1e-4).flatten()), below)


def progressive(student: Denoise, x: Latent, below: Latent, sigma: Column, lower: Column) -> Latent:
    """The picture to which one step would lead where several of the teacher's led (Salimans & Ho 2022, Eq. 43)."""
    ratio = lower / sigma
    return (below - ratio * x) / (1 - ratio)


METHODS: dict[str, Callable[[Denoise, Latent, Latent, Column, Column], Latent]]
METHODS = {"consistency": consistency, "progressive": progressive}
SAMPLERS = {"consistency": "lcm", "progressive": "ddim", "reflow": "euler"}
PART = 64  # paths in a file
SMOOTH = 0.03  # of the pseudo-Huber distance, a number of the latents' deviation (Song & Dhariwal 2024, Sec. 3.3)


class DistilTask(DenoisingTask):
    """The distance between the student's answer and what the method wants of it.

    The teacher goes from `x` to `below` it from noised pictures of the data, or went before: with `distil.paths`, from
    noise to picture, guided, by DPM-Solver++(2M). `reflow` is the plain loss, of pictures that the teacher made of the
    very noise they are mixed with (Liu et al. 2023).
    """

    config: DistilRun

    def __init__(self, config: DistilRun) -> None:
        if config.distil.paths and not config.cache:
            raise UserError(f"distil.paths {config.distil.paths} needs a folder to keep them in: give cache one")
        super().__init__(config)
        self.distil = config.distil
        alone = self.distil.method == "progressive"  # its steps are the student's, each some of the teacher's
        self.stride = self.distil.stride if alone else 1
        if config.defaults == SamplingDefaults():  # as the student is sampled, where nothing else is said
            count, sampler = self.distil.steps if alone else 4, SAMPLERS[self.distil.method]
            defaults = replace(self.config.defaults, sampler=sampler, steps=count, cfg_scale=1.0)
            self.config = replace(self.config, defaults=defaults)
        steps = self.schedule.steps(self.distil.steps * self.stride, self.config.defaults.schedule)
        self.grid = torch.as_tensor([float(level) for level in steps], dtype=torch.float32)
        self.steps: list[float] = self.grid.tolist()

    def trained(self) -> dict[str, nn.Module]:
        self.teacher = copy.deepcopy(self.backbone).requires_grad_(False)
        self.freeze()
        if self.config.lora is None:
            return {"backbone": self.backbone.requires_grad_(True)}
        self.adapters = lora.wear(self.model(), self.config.lora, self.config.run.seed)
        return lora.as_network(self.adapters)

    def to(self, device: torch.device) -> None:
        self.teacher.to(device)
        self.grid = self.grid.to(device)
        super().to(device)

    def levels(self, u: Tensor) -> Sigma:
        return super().levels(u) if self.distil.method == "reflow" else self.grid[self._place(u)]

    def _place(self, u: Tensor) -> Tensor:
        return (u * self.distil.steps).long().clamp(max=self.distil.steps - 1) * self.stride

    def _level(self, place: Tensor) -> Column:
        return self.grid[place].reshape(-1, 1, 1, 1)

    def _guided(self, cond: Conditioning) -> Denoise:
        empty = self.encode_text(self.empty.expand(len(cond), -1))
        return cfg(Denoiser(self.teacher, self.prediction, self.schedule), cond, empty, self.distil.guidance)

    def losses(
        self, x0: Latent, sigma: Sigma, noise: Latent, cond: Conditioning, *, seen: Latent | None = None,
        network: nn.Module | None = None,
    ) -> Tensor:  # fmt: skip
        teacher = self._guided(cond)
        if self.distil.method == "reflow":
            with torch.no_grad():
                *_, (_, x0) = self._path(teacher, noise)
            return super().losses(x0, sigma, noise, cond, seen=seen)
        place = (self.grid == sigma[:, None]).int().argmax(1)
        below = x = x0 + self._level(place) * noise
        with torch.no_grad():
            for i in range(self.stride):
                sigma, lower = self._level(place + i), self._level(place + i + 1)
                below = teacher(below, sigma.flatten()).lerp(below, lower / sigma)  # a step of DDIM
        return self._distance(cond, place, x, below)

    def _distance(self, cond: Conditioning, place: Tensor, x: Latent, below: Latent) -> Tensor:
        student = bind(Denoiser(self.backbone, self.prediction, self.schedule), cond)
        sigma, lower = self._level(place), self._level(place + self.stride)
        with torch.no_grad():
            wanted = METHODS[self.distil.method](student, x, below, sigma, lower)
        away = (student(x, sigma.flatten()) - wanted).square().flatten(1).mean(1)
        return (away + SMOOTH**2).sqrt() - SMOOTH

    def denoising_loss(self, batch: Batch) -> Losses:
        if "path" not in batch:
            return super().denoising_loss(batch)
        path, u = batch["path"], keyed.uniform(self.seed, "sigma", batch["position"])
        cond = self.encode_text(batch["tokens"], batch.get("size_ids"))
        if self.distil.method == "reflow":
            losses = super().losses(path[:, -1].float(), self.levels(u), path[:, 0].float(), cond)
        else:
            each, place = torch.arange(len(u), device=u.device), self._place(u)
            two = (path[each, at].float() * (1 + self._level(at) ** 2).sqrt() for at in (place, place + self.stride))
            losses = self._distance(cond, place, *two)
        return {"loss": losses.mean(), "loss_by_sigma": binned(losses.detach(), u)}

    def _encoded(self, folder: str) -> Dataset:
        """With `distil.paths`, these in place of the pictures' latents: painted now, or read where they are."""
        if not self.distil.paths:
            return super()._encoded(folder)
        config, data = self.config, self.config.data
        named = (config.weights, config.text.weights)
        files = [digest(EMBEDDED if name == "embedded" else Path(name)) for name in named if name]
        order = (data.shards, data.captions, data.size, data.seed, data.readers, data.window)
        made = (asdict(config.schedule), config.prediction, self.distil.guidance, config.run.precision, config.run.seed)
        about = [files, [e.sha256 for e in self.pictures.shards.entries], order, made, self.steps]
        mark = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        paths, count = list[Path](), self.distil.paths
        with Bar(count) as bar:
            for first in range(0, count, PART):
                part = range(first, min(first + PART, count))
                paths.append(Path(folder) / f"paths-{mark}-{first:06d}-{len(part)}.safetensors")
                if not paths[-1].is_file():
                    bar.reach(first, "paths painted")
                    save(paths[-1], self._paint(part), {})
        return Paths(paths, count, data.seed)

    @torch.no_grad()
    def _paint(self, positions: range) -> dict[str, Tensor]:
        """Paths of the captions at some positions of the data: each x by its deviation, sqrt(1 + sigma^2)."""
        read = self.pictures.__getitems__(positions)
        batch = {name: read[name].to(self.device) for name in ("tokens", "size_ids", "position")}
        side = self.config.data.size // self.autoencoder.factor
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision(self.config.run))
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            cond = self.encode_text(batch["tokens"], batch["size_ids"])
            noise = self.normal(batch, "path", (self.autoencoder.config.z_channels, side, side))
            path = [x.float() / (1 + sigma**2) ** 0.5 for sigma, x in self._path(self._guided(cond), noise)]
        return {"path": torch.stack(path, 1).half(), "tokens": read["tokens"], "size_ids": read["size_ids"]}

    def _path(self, teacher: Denoise, noise: Latent) -> Iterator[tuple[float, Latent]]:
        """Each level and what the teacher has there, from noise of deviation 1 to a picture."""
        x = noise * self.schedule.start(self.steps[0])
        yield self.steps[0], x
        for step in SOLVERS["dpmpp_2m"](teacher, x, self.steps, torch.zeros_like):
            yield step.sigma, step.x

    def export(self, path: Path, provenance: dict[str, Any]) -> None:
        if self.config.lora is None:
            return super().export(path, provenance)
        lora.write(path, self, self.adapters, self.config.lora, provenance.get("steps", 0))


class Paths:
    """A teacher's paths in files as a stream, shuffled in each epoch: `path` (b, levels, c, h, w), fp16, and texts."""

    def __init__(self, files: Sequence[Path], count: int, seed: int) -> None:
        self.files, self.count = files, count
        self._order = Order([count], seed, readers=1, window=count)

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, positions: Sequence[int]) -> Any:
        rows = self._order.rows(np.asarray(positions, np.int64)).tolist()
        records = [(_mapped(self.files[row // PART]), row % PART) for row in rows]
        batch: Any = {n: torch.stack([tensors[n][place] for tensors, place in records]) for n in records[0][0]}
        batch |= {"key": [f"path {row}" for row in rows], "position": torch.tensor(positions)}
        return batch


@functools.lru_cache(1024)
def _mapped(path: Path) -> dict[str, Tensor]:
    return load_file(path)
