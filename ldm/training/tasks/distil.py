"""Students of few steps: they learn from a teacher, its guidance included, what takes it many.

Each method says, of a picture at one of the teacher's noise levels, which clean picture the student shall answer.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.adapters.lora import LowRank
from ldm.checkpoints.native import SamplingDefaults
from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import Denoise, bind, cfg
from ldm.shapes import Latent, Sigma
from ldm.training.config import DistilRun
from ldm.training.tasks import lora
from ldm.training.tasks.denoising import DenoisingTask

Column = Tensor  # (b, 1, 1, 1)


def _step(denoise: Denoise, x: Latent, sigma: Column, lower: Column) -> Latent:
    """One of DDIM's, which keeps lower / sigma of the noise."""
    return denoise(x, sigma.flatten()).lerp(x, lower / sigma)


def consistency(teacher: Denoise, student: Denoise, x: Latent, levels: list[Column]) -> Latent:
    """What the student itself says one step of the teacher further down (Song et al. 2023; Luo et al. 2023, LCM)."""
    sigma, lower = levels
    below = _step(teacher, x, sigma, lower)
    return torch.where(lower > 0, student(below, lower.clamp(min=1e-4).flatten()), below)


def progressive(teacher: Denoise, student: Denoise, x: Latent, levels: list[Column]) -> Latent:
    """The picture to which one step would lead where two of the teacher's led (Salimans & Ho 2022, Eq. 43)."""
    sigma, middle, lower = levels
    ratio = lower / sigma
    return (_step(teacher, _step(teacher, x, sigma, middle), middle, lower) - ratio * x) / (1 - ratio)


METHODS: dict[str, Callable[[Denoise, Denoise, Latent, list[Column]], Latent]] = {
    "consistency": consistency,
    "progressive": progressive,
}
SAMPLERS = {"consistency": "lcm", "progressive": "ddim", "reflow": "euler"}
SMOOTH = 0.03  # of the pseudo-Huber distance, a number of the latents' deviation (Song & Dhariwal 2024, Sec. 3.3)


class DistilTask(DenoisingTask):
    """The distance between the student's answer and what the method wants of it.

    `reflow` is the plain loss, of pictures that the teacher made of the very noise they are mixed with (Liu et al.
    2023, rectified flow): straight paths.
    """

    def __init__(self, config: DistilRun) -> None:
        super().__init__(config)
        if config.defaults == SamplingDefaults():  # as the student is sampled, where nothing else is said
            how = replace(self.config.defaults, sampler=SAMPLERS[config.distil.method], steps=4, cfg_scale=1.0)
            self.config = replace(self.config, defaults=how)
        self.distil, self.adapters = config.distil, dict[str, LowRank]()
        self.teacher = copy.deepcopy(self.backbone).requires_grad_(False)
        self.text.requires_grad_(False)
        self.trains_text, self.lora = False, config.lora
        self.networks = {"backbone": self.backbone}
        if self.lora is not None:
            self.backbone.requires_grad_(False)
            self.adapters = lora.wear(self.model(), self.lora, config.run.seed)
            self.networks = {"adapters": lora.as_network(self.adapters)}
        self.averaged = tuple(self.networks)
        self.fine = 2 if self.distil.method == "progressive" else 1  # the teacher's steps in one of the student's
        steps = self.schedule.steps(self.distil.steps * self.fine, self.config.defaults.schedule)
        self.grid = torch.as_tensor([float(level) for level in steps], dtype=torch.float32)

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.teacher.to(device)
        self.grid = self.grid.to(device)

    def levels(self, u: Tensor) -> Sigma:
        if self.distil.method == "reflow":
            return super().levels(u)
        return self.grid[self._place(u)]

    def _place(self, u: Tensor) -> Tensor:
        return (u * self.distil.steps).long().clamp(max=self.distil.steps - 1) * self.fine

    def losses(
        self, x0: Latent, sigma: Sigma, noise: Latent, cond: Conditioning, *, seen: Latent | None = None,
        network: nn.Module | None = None,
    ) -> Tensor:  # fmt: skip
        """The loss of each sample (b,)."""
        empty = self.encode_text(self.empty.expand(len(x0), -1))
        teacher = cfg(Denoiser(self.teacher, self.prediction, self.schedule), cond, empty, self.distil.guidance)
        student = bind(Denoiser(self.backbone, self.prediction, self.schedule), cond)
        if self.distil.method == "reflow":
            with torch.no_grad():
                x0 = self._made(teacher, noise)
            return super().losses(x0, sigma, noise, cond, seen=seen)
        place = (self.grid == sigma[:, None]).int().argmax(1)
        levels = [self.grid[place + i].reshape(-1, 1, 1, 1) for i in range(self.fine + 1)]
        x = x0 + levels[0] * noise
        with torch.no_grad():
            wanted = METHODS[self.distil.method](teacher, student, x, levels)
        away = (student(x, sigma) - wanted).square().flatten(1).mean(1)
        return (away + SMOOTH**2).sqrt() - SMOOTH

    def _made(self, teacher: Denoise, noise: Latent) -> Latent:
        """What the teacher makes of noise."""
        x = noise * self.schedule.start(float(self.grid[0]))
        for sigma, lower in zip(self.grid[:-1], self.grid[1:], strict=True):
            levels = (level.expand(len(x)).reshape(-1, 1, 1, 1) for level in (sigma, lower))
            x = _step(teacher, x, *levels)
        return x

    def export(self, path: Path, provenance: dict[str, Any]) -> None:
        """Write the student, or its adapters."""
        if self.lora is None:
            return super().export(path, provenance)
        facts = {"ss_base_model": str(self.config.weights), "ss_steps": str(provenance.get("steps", 0))}
        lora.write(path, self.model(), self.adapters, self.lora, facts)
