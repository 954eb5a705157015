"""What every test shares: shapes checked at run time, no network where asked for, a tiny model to paint with."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook("ldm", "typechecker.check")  # before the first import of ldm

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cpu_without_bf16() -> Iterator[None]:
    """What is painted with no precision given is fp32 on every machine: the tests' tolerances are for that."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            patch.setattr(torch.cpu, name, lambda: False)
        yield


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """accelerate keeps the precision of the process's first run."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to connect a socket or to resolve a name raises."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("the network was asked for")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model in a file, with random weights: 32 x 32 pictures, a latent cell of 2 pixels, multiples of 4."""
    from ldm.checkpoints import native
    from ldm.models.autoencoder import AutoencoderConfig
    from ldm.models.unet import UNetConfig
    from ldm.text.tower import TextConfig

    spec = native.ModelSpec(
        autoencoder=AutoencoderConfig(
            z_channels=4, channels=(8, 16), res_blocks=1, groups=4, mean=(0.1,) * 4, std=(0.9,) * 4
        ),
        backbone=UNetConfig(
            channels=(16, 32),
            res_blocks=1,
            depth=(1, 1),
            heads=(2, 2),
            context_dim=16,
            groups=4,
            linear_projection=True,
        ),
        text=TextConfig(width=16, heads=2, layers=2, context_length=12, vocab_size=1024),
        image_size=32,
        prediction="v",
        defaults=native.SamplingDefaults(sampler="dpmpp_2m", schedule="trailing", steps=4, cfg_scale=3.0),
    )
    model = native.build(spec)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules.values():
            for parameter in module.parameters():  # fresh networks end in zeros, which would paint nothing
                fan = parameter[0].numel() if parameter.dim() > 1 else 100
                noise = torch.randn(parameter.shape, generator=rng) * fan**-0.5
                parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    native.save(path, spec, model.modules)
    return path
