"""Training a ControlNet (Zhang et al. 2023): a copy of the UNet's half learns from hints to steer the frozen UNet."""

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.adapters import hints
from ldm.data.dataset import to_image
from ldm.errors import UserError
from ldm.families.control import save_controlnet
from ldm.files import replacing
from ldm.models.controlnet import Controlled, ControlNet, Hint, Steering
from ldm.shapes import Image
from ldm.training.config import ControlRun
from ldm.training.learner import Batch
from ldm.training.tasks.denoising import DenoisingTask

WIDTHS = (16, 32, 96, 256)  # of the hint's convolutions, as in the paper's code
SHOWN = 4  # held-back pictures of a sample sheet


class ControlTask(DenoisingTask):
    """The denoising loss, moved by the ControlNet alone. UserError where latents are cached: hints need pictures."""

    config: ControlRun

    def __init__(self, config: ControlRun) -> None:
        if config.cache:
            raise UserError(f"cache {config.cache!r}: hints are drawn from the pictures themselves, leave it empty")
        super().__init__(config)

    def trained(self) -> dict[str, nn.Module]:
        self.freeze()
        halvings = int(math.log2(self.autoencoder.factor))
        widths = (WIDTHS + (WIDTHS[-1],) * halvings)[: halvings + 1]
        self.control = ControlNet(self.backbone.config, 3, widths, unet=self.backbone).requires_grad_(True)
        self.hint: str = self.config.hint
        return {"control": self.control}

    def network(self, batch: Batch) -> nn.Module:
        return self._under(hints.draw(self.hint, to_image(batch["image"])))

    def _under(self, hint: Hint) -> nn.Module:
        return Controlled(self.backbone, [Steering(self.control, hint.to(self.device))])

    def sample(self) -> tuple[Image, int]:
        captions = self.held_back.batch["caption"][:SHOWN]
        drawn = hints.draw(self.hint, self.held_back.images(0, len(captions))).to(self.device)
        return torch.cat([drawn * 2 - 1, self.paint(self._under(drawn), captions)]), len(captions)

    def export(self, path: Path, provenance: dict[str, Any]) -> None:
        """Write the ControlNet as one file, and beside it diffusers' folder of it."""
        side = self.config.data.size // self.autoencoder.factor
        facts = {"base": str(self.config.weights), "hint": self.hint, "steps": provenance.get("steps", 0)}
        weights = save_controlnet(path.with_name("controlnet"), self.control, side, facts)
        with replacing(path) as temporary:
            shutil.copyfile(weights, temporary)
