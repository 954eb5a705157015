"""The networks of each family at their real widths against diffusers and transformers, on one set of random weights."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.checkpoints import diffusers as names
from ldm.checkpoints.keymap import KeyMap
from ldm.conditioning import Conditioning
from ldm.families import FAMILIES
from ldm.models.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.unet import UNet, UNetConfig
from ldm.text.tower import Conditioner, TextConfig

pytestmark = pytest.mark.slow  # from one to ten GB of memory each

SDXL = {
    "channels": (320, 640, 1280),
    "depth": (0, 2, 10),
    "mid_depth": 10,
    "heads": (5, 10, 20),
    "context_dim": 2048,
    "vector_dim": 2816,
}
UNETS = {
    "sd1": UNetConfig(),
    "sd2": UNetConfig(heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True),
    "sdxl": UNetConfig(**SDXL, linear_projection=True),  # type: ignore[arg-type]
}


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def filled(build: Callable[[], nn.Module]) -> Any:
    """A module whose every tensor is random, norms and zero-initialised layers too, held once."""
    with torch.device("meta"):
        module = build()
    module = module.to_empty(device="cpu").eval().requires_grad_(False)
    rng = torch.Generator().manual_seed(0)
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if name.endswith("position_ids"):
            value.copy_(torch.arange(value.numel()).reshape(value.shape))
        else:
            spread = 1 / math.sqrt(value[0].numel()) if value.dim() > 1 else 0.1
            value.normal_(0, spread, generator=rng)
            value.add_(1.0 if value.dim() == 1 and name.endswith("weight") else 0.0)
    return module


def share(build: Callable[[], nn.Module], keymap: Callable[[nn.Module], KeyMap], state: dict[str, Tensor]) -> Any:
    """Our module over the very same memory, but for what is stacked."""
    with torch.device("meta"):
        module = build()
    module.load_state_dict(keymap(module).load(state, module.state_dict()), assign=True)
    return module.eval()


@pytest.mark.parametrize("family", UNETS)
def test_unet(family: str) -> None:
    from diffusers import UNet2DConditionModel

    from ldm.families.folder import unet_to

    config = UNETS[family]
    data = unet_to(config, 64, FAMILIES[family].text)
    theirs = filled(lambda: UNet2DConditionModel.from_config(data))
    ours = share(lambda: UNet(config), names.unet, theirs.state_dict())
    z, label, tokens = torch.randn(1, 4, 8, 8), torch.tensor([801.0]), torch.randn(1, 77, config.context_dim)
    vector, extra = None, None
    if config.vector_dim:
        pooled, ids = torch.randn(1, 1280), torch.tensor([[1024, 1024, 0, 0, 1024, 1024]])
        extra = {"text_embeds": pooled, "time_ids": ids}
        vector = torch.cat([pooled, theirs.add_time_proj(ids.flatten()).reshape(1, -1)], dim=1)
    with torch.no_grad():
        expected = theirs(z, label, tokens, added_cond_kwargs=extra).sample
        assert relative(ours(z, label, Conditioning(tokens, vector=vector)), expected) < 1e-5


def test_autoencoder() -> None:
    from diffusers import AutoencoderKL

    from ldm.families.folder import vae_to

    config = AutoencoderConfig(std=(1 / 0.18215,))
    theirs = filled(lambda: AutoencoderKL.from_config(vae_to(config, 64, upcast=False)))
    ours = share(lambda: Autoencoder(config), names.autoencoder, theirs.state_dict())
    image, latent = torch.randn(1, 3, 64, 64), torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        assert relative(ours.encode(image).mode, theirs.encode(image).latent_dist.mode() * 0.18215) < 1e-5
        assert relative(ours.decode(latent), theirs.decode(latent / 0.18215).sample) < 1e-5


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
def test_text_tower(family: str) -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    from ldm.families.folder import text_to

    config = FAMILIES[family].text
    config = config.second or config  # SDXL's first tower is SD 1's
    data = text_to(config, config.layers)
    theirs = filled(lambda: CLIPTextModelWithProjection(CLIPTextConfig(**data)))
    state = theirs.state_dict()
    if not config.projection:
        state.pop("text_projection.weight")
    alone = TextConfig(**{**vars(config), "size_ids": 0, "second": None})
    ours = share(lambda: Conditioner(alone), lambda module: names.clip(module, alone), state)
    ids = ours.tokenize(["a red apple on a wooden table"])
    with torch.no_grad():
        out = theirs(ids, output_hidden_states=True)
        expected = out.hidden_states[-config.layer]
        if config.final_norm:
            expected = theirs.text_model.final_layer_norm(expected)
        cond = ours.encode(ids)
        assert relative(cond.tokens, expected) < 1e-5
        if config.projection:
            assert relative(cond.vector, out.text_embeds) < 1e-5
