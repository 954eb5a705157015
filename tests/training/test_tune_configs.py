"""The configs of fine-tuning: each is read, and fits the embedded model."""

from pathlib import Path

import pytest

from ldm import config
from ldm.errors import UserError
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
