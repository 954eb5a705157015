"""Stripes of an autoencoder equal the whole."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm.models import stripes
from ldm.models.autoencoder import Autoencoder, AutoencoderConfig

ROOT = Path(__file__).parents[2]
CONFIGS = {
    "sd": AutoencoderConfig(channels=(8, 16, 16), res_blocks=2, groups=4, mean=(0.3,), std=(1.7,)),
    "patches": AutoencoderConfig(channels=(8, 16), decoder_channels=(16, 24), res_blocks=1, patch=4, groups=8),
    "plain": AutoencoderConfig(channels=(8, 8), res_blocks=1, groups=4, mid_attention=False, quant_convs=False),
}


def network(config: AutoencoderConfig) -> Autoencoder:
    rng = torch.Generator().manual_seed(0)
    autoencoder = Autoencoder(config)
    for parameter in autoencoder.parameters():
        fan = parameter[0].numel() if parameter.dim() > 1 else 4.0
        noise = torch.randn(parameter.shape, generator=rng) / fan**0.5
        parameter.data = noise + (1.0 if parameter.dim() == 1 else 0.0)
    return autoencoder.requires_grad_(False)


@pytest.mark.parametrize("rows", [1, 3, 8, 1000])
@pytest.mark.parametrize("name", CONFIGS)
def test_stripes_equal_the_whole(name: str, rows: int) -> None:
    autoencoder, rng = network(CONFIGS[name]), torch.Generator().manual_seed(1)
    image = torch.rand(2, 3, 5 * 8, 6 * 8, generator=rng) * 2 - 1
    whole, parts = autoencoder.encode(image), stripes.encode(autoencoder, image, rows)
    torch.testing.assert_close(parts.mean, whole.mean, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(parts.logvar, whole.logvar, atol=2e-5, rtol=1e-5)
    latent = torch.randn(whole.mean.shape, generator=rng)
    torch.testing.assert_close(
        stripes.decode(autoencoder, latent, rows), autoencoder.decode(latent), atol=5e-5, rtol=1e-5
    )


PEAK = """
import resource, sys, torch
sys.path[:0] = ["{root}", "{root}/tests/models"]
from test_stripes import network, AutoencoderConfig
from ldm.models import stripes
net = network(AutoencoderConfig(channels=(16, 32, 64, 64), res_blocks=1, groups=8, mid_attention=False, std=(2.0,)))
latent = torch.randn(1, 4, {side} // 8, {side} // 8)
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
image = {call}
print(image.shape[-1], (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) // 1024)
"""


@pytest.mark.slow
def test_stripes_need_less_memory() -> None:
    """In processes of their own, whose largest size is told; both paint 2048 x 2048."""
    peaks = {}
    for call in ("stripes.decode(net, latent)", "net.decode(latent)"):
        code = PEAK.format(root=ROOT, side=2048, call=call)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
        side, peaks[call] = map(int, done.stdout.split())
        assert side == 2048
    striped, whole = peaks.values()
    assert striped < 0.6 * whole, peaks
