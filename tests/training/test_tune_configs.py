"""The configs of fine-tuning: each is read, and fits the embedded model; and what came of one of them is packaged."""

from pathlib import Path

import pytest
import torch

from ldm import config, pipeline
from ldm.checkpoints import lora
from ldm.errors import UserError
from ldm.request import Request
from ldm.training.config import ControlRun, DistilRun, InversionRun, LoraRun
from ldm.training.tasks.controlnet import ControlTask
from ldm.training.tasks.distil import DistilTask
from ldm.training.tasks.inversion import InversionTask
from ldm.training.tasks.lora import LoraTask

ROOT = Path(__file__).parents[2]
SHARDS = str(ROOT / "tests/assets/shards/{00000..00001}.tar")
KINDS = {
    "lora": (LoraRun, LoraTask),
    "controlnet": (ControlRun, ControlTask),
    "distil": (DistilRun, DistilTask),
    "inversion": (InversionRun, InversionTask),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_config_fits_the_embedded_model(name: str) -> None:
    kind, task = KINDS[name]
    settings = config.load(kind, ROOT / f"configs/tune/{name}.yaml", ["--data.shards", SHARDS])
    if name == "inversion":  # the committed shards hold no new word
        with pytest.raises(UserError, match="no caption holds"):
            task(settings)
    else:
        assert task(settings).networks


def test_every_config_is_tested() -> None:
    assert {path.stem for path in (ROOT / "configs/tune").glob("*.yaml")} == set(KINDS)


def test_the_packaged_adapters_paint_in_4_steps_what_the_model_paints_in_25() -> None:
    file = pipeline.ASSETS / "lora/four_steps.safetensors"
    assert file.stat().st_size < 2_000_000
    painter = pipeline.load("embedded", "cpu", "fp32")
    few = Request("a red apple", seed=23, steps=4, sampler="ddim", cfg_scale=1.0)
    wanted, without = painter.txt2img(Request("a red apple", seed=23)), painter.txt2img(few)
    assert not lora.inject(painter.model, lora.read(file)).unmatched
    near, far = ((image - wanted).square().mean() for image in (painter.txt2img(few), without))
    assert near < far / 2
    assert torch.isfinite(near)
