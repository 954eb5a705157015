"""What fine-tuning writes, other programs read: LoRAs trained here paint the same in diffusers."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from ldm import config
from ldm.checkpoints import lora
from ldm.conditioning import Conditioning
from ldm.errors import UserError
from ldm.families.load import load
from ldm.training.config import LoraRun
from ldm.training.loop import train
from ldm.training.tasks.lora import LoraTask

SHARDS = Path(__file__).parents[1] / "assets/shards/{00000..00001}.tar"
LORA = f"""
data: {{shards: '{SHARDS}', size: 32, workers: 0}}
optim: {{lr: 5e-2}}
run: {{steps: 2, batch_size: 2, trackers: [], log_every: 1, sample_every: 0, validate_on: 2, ema: {{decay: 0}}}}
samples: {{prompts: [a red apple]}}
defaults: {{sampler: euler, steps: 1, cfg_scale: 1.0}}
lora: {{rank: 3, alpha: 2}}
"""


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """accelerate keeps the precision of the process's first run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., LoraRun]:
    (tmp_path / "lora.yaml").write_text(LORA)
    return lambda model, *overrides: config.load(LoraRun, tmp_path / "lora.yaml", ["--weights", str(model), *overrides])


def answer(backbone: Any, tokens: torch.Tensor) -> torch.Tensor:
    z = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return backbone(z, torch.tensor([500.0]), Conditioning(tokens))


CASES = {
    "kohya": ["--lora.layout", "kohya"],
    "diffusers": ["--lora.layout", "diffusers"],
    "convolutions": ["--lora.targets", "[unet.*.to_q, unet.*conv1]"],
    "text": ["--lora.targets", "[unet.*.to_k, text_encoder.*_proj, text_encoder.*.fc1]"],
    "dora": ["--lora.dora", "true", "--lora.layout", "diffusers"],
}


@pytest.mark.parametrize("case", CASES)
def test_a_trained_lora_works_alike_here_and_in_diffusers(
    case: str, settings: Callable[..., LoraRun], folders: dict[str, Path], tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    task = LoraTask(settings(folders["sd1"], *CASES[case]))
    base = load(folders["sd1"])
    train(task, settings(folders["sd1"], *CASES[case]), tmp_path / "run")
    frozen = {
        n.replace(".parametrizations", "").replace(".original", ""): v for n, v in task.backbone.state_dict().items()
    }
    assert base.backbone is not None and base.conditioner is not None
    assert all(torch.equal(frozen[name], value) for name, value in base.backbone.state_dict().items())

    ids = base.conditioner.tokenize(["a red apple"])
    with torch.no_grad():
        plain, tuned = (answer(net, text.encode(ids).tokens) for net, text in
                        ((base.backbone, base.conditioner), (task.backbone, task.text)))  # fmt: skip
    assert ((tuned - plain).norm() / plain.norm()).item() > 1e-3, "training must have moved something"
    injected = lora.inject(base, lora.read(tmp_path / "run/model.safetensors"))
    assert not injected.unmatched
    with torch.no_grad():
        tokens = base.conditioner.encode(ids).tokens
    again = answer(base.backbone, tokens)
    assert ((again - tuned).norm() / tuned.norm()).item() < 1e-5

    index = json.loads((folders["sd1"] / "model_index.json").read_text())
    assert index  # the folder's own index names no classes: the parts are given
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = folders["sd1"]
    pipe = StableDiffusionPipeline(
        vae=None, text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"), scheduler=None, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.load_lora_weights(tmp_path / "run/model.safetensors")
    with torch.no_grad():
        theirs = pipe.text_encoder(ids).last_hidden_state
    assert ((tokens - theirs).norm() / theirs.norm()).item() < 1e-5
    expected = answer(lambda z, label, cond: pipe.unet(z, label, cond.tokens).sample, theirs)
    assert ((tuned - expected).norm() / expected.norm()).item() < 1e-5


def test_a_pattern_that_fits_nothing_is_refused(settings: Callable[..., LoraRun], folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="'unet.nothing' fits no weight of this model"):
        LoraTask(settings(folders["sd1"], "--lora.targets", "[unet.*.to_q, unet.nothing]"))
    with pytest.raises(UserError, match="rank 0 needs 1"):
        settings(folders["sd1"], "--lora.rank", "0")
