"""The configs that can be run: each is whole, builds at full width, and takes a step when made small."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldm import config
from ldm.models.autoencoder import Autoencoder
from ldm.training.arguments import _fields
from ldm.training.config import LdmRun, VaeRun
from ldm.training.tasks.autoencoder import AutoencoderTask

ROOT = Path(__file__).parents[2]
SHARDS = str(ROOT / "tests/assets/shards/{00000..00001}.tar")


@pytest.mark.parametrize("channels", [4, 8, 16])
@pytest.mark.parametrize("factor", [4, 8, 16])
def test_every_autoencoder_builds_and_takes_a_step(factor: int, channels: int) -> None:
    chosen = ["--data.shards", SHARDS, "--data.size", "64", "--model.z_channels", str(channels)]
    settings = config.load(VaeRun, ROOT / f"configs/vae/f{factor}.yaml", chosen)
    assert settings.loss.lpips > 0 and settings.loss.adversarial_start > 0 and settings.model.factor == factor
    with torch.device("meta"):
        whole = Autoencoder(settings.model)
        assert whole.encode(torch.empty(1, 3, 256, 256)).mean.shape == (1, channels, 256 // factor, 256 // factor)
    small = replace(settings.model, channels=tuple(width // 16 for width in settings.model.channels), groups=8)
    loss = replace(settings.loss, lpips=0.0, lpips_weights="", adversarial_start=0)
    judge = replace(settings.discriminator, channels=16, layers=1)
    task = AutoencoderTask(replace(settings, model=small, loss=loss, discriminator=judge))
    task.to(torch.device("cpu"))
    batch = {"step": 0} | task.dataset.__getitems__(range(2))
    for objective in task.objectives():
        objective.loss(batch)["loss"].backward()
    assert all(p.grad is not None for p in (*task.autoencoder.parameters(), *task.discriminator.parameters()))


def test_the_page_of_methods_names_fields_that_are_there() -> None:
    fields = {name for kind in (LdmRun, VaeRun) for name, _ in _fields(kind)}
    sections = "loss|run|optim|model|schedule|backbone|discriminator"
    page = (ROOT / "docs/methods.md").read_text()
    named = set(re.findall(rf"`((?:{sections})\.[a-z_0-9.]+?)[`:]", page))
    assert len(named) > 20
    assert {name for name in named if not any(f"{field}.".startswith(f"{name}.") for field in fields)} == set()
