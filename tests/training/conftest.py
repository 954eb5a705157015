"""Runs of seconds: settings as small as they go, over the committed shards."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from ldm import config
from ldm.training.config import LdmRun, VaeRun
from ldm.training.loop import Outcome, train
from ldm.training.tasks.autoencoder import AutoencoderTask
from ldm.training.tasks.denoising import DenoisingTask

SHARDS = Path(__file__).parents[1] / "assets/shards/{00000..00001}.tar"

VAE = f"""
data: {{shards: '{SHARDS}', size: 32, workers: 0}}
model: {{z_channels: 2, channels: [8, 16], res_blocks: 1, mid_attention: false, groups: 4}}
discriminator: {{channels: 16, layers: 1}}
loss: {{lpips: 0, lpips_weights: "", adversarial_start: 0}}
optim: {{lr: 5e-3}}
run: {{steps: 4, batch_size: 4, trackers: [], log_every: 1, ema: {{decay: 0.9}}}}
statistics: 8
"""
LDM = f"""
data: {{shards: '{SHARDS}', size: 32, workers: 0}}
backbone: {{channels: [8, 16], res_blocks: 1, depth: [0, 1], heads: [1, 2], context_dim: 16, groups: 4}}
text: {{tower: {{width: 16, heads: 2, layers: 1, context_length: 12, vocab_size: 1024}}}}
prediction: v
optim: {{lr: 5e-3}}
run: {{steps: 4, batch_size: 4, trackers: [], log_every: 1, validate_on: 8, ema: {{decay: 0.9}}}}
samples: {{prompts: [a red apple, a sofa]}}
defaults: {{sampler: euler, steps: 2, cfg_scale: 2.0}}
"""


@pytest.fixture(autouse=True)
def each_alone(fresh_accelerator: None) -> None:
    """Every test here trains."""


@pytest.fixture
def texts() -> dict[str, str]:
    """The settings as YAML."""
    return {"vae": VAE, "ldm": LDM}


@pytest.fixture
def vae(tmp_path: Path) -> Callable[..., VaeRun]:
    """The settings of a tiny autoencoder's run: vae("--optim.lr", "1e-3")."""
    path = tmp_path / "vae.yaml"
    path.write_text(VAE)
    return lambda *overrides: config.load(VaeRun, path, overrides)


@pytest.fixture
def ldm(tmp_path: Path, tiny_model: Path) -> Callable[..., LdmRun]:
    """The settings of a tiny latent-diffusion run, in the latents of a model with random weights."""
    path = tmp_path / "ldm.yaml"
    path.write_text(LDM)
    return lambda *overrides: config.load(LdmRun, path, ["--autoencoder", str(tiny_model), *overrides])


@pytest.fixture
def run() -> Callable[[VaeRun | LdmRun, Path], Outcome]:
    """Train from fresh weights of the run's seed, as the scripts do."""

    def start(settings: VaeRun | LdmRun, folder: Path) -> Outcome:
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.manual_seed(settings.run.seed)
        task = AutoencoderTask(settings) if isinstance(settings, VaeRun) else DenoisingTask(settings)
        return train(task, settings, folder)

    return start
