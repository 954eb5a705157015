"""One training step of each kind of fine-tuning against the same in diffusers and peft: loss and gradients.

Tiny always; at the real widths of SD 1.5 and SDXL marked slow. Weights are in memory once, for both: 11 GB at most.
Where adapters make new weights of them, or half of them is there twice, two of its ten transformer blocks must do.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoints import control as control_names
from ldm.checkpoints import diffusers as names
from ldm.checkpoints.native import Model, ModelSpec
from ldm.conditioning import Conditioning
from ldm.diffusion.losses import diffusion_loss, find_weighting
from ldm.diffusion.predictions import PREDICTIONS
from ldm.diffusion.schedules import ScheduleConfig, make_schedule
from ldm.families import FAMILIES
from ldm.families.folder import unet_to
from ldm.models.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.controlnet import Controlled, ControlNet, Steering
from ldm.models.unet import UNet, UNetConfig
from ldm.text.open_clip import open_clip
from ldm.text.tower import Conditioner, TextConfig
from ldm.training.config import LoraConfig
from ldm.training.tasks import lora

open_clip()  # declares torchvision's operators, which transformers asks for too
WIDTHS = {
    "tiny": UNetConfig(channels=(32, 64), res_blocks=1, depth=(1, 1), heads=(2, 2), context_dim=64),
    "sd1": UNetConfig(),
    "sdxl": UNetConfig(
        channels=(320, 640, 1280), depth=(0, 2, 10), mid_depth=10, heads=(5, 10, 20), context_dim=2048,
        vector_dim=2816, linear_projection=True,
    ),
}  # fmt: skip
WIDTHS["sdxl-short"] = replace(WIDTHS["sdxl"], depth=(0, 2, 2), mid_depth=2)


def sizes(*real: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("size", ["tiny", *(pytest.param(size, marks=pytest.mark.slow) for size in real)])


SCHEDULE = make_schedule(ScheduleConfig())


class Pair:
    """diffusers' UNet of a size with random weights, ours over the same memory, and a batch for both."""

    def __init__(self, size: str, randomised: Callable[..., None]) -> None:
        from diffusers import UNet2DConditionModel

        self.config = config = WIDTHS[size]
        with torch.device("meta"):
            self.theirs = UNet2DConditionModel.from_config(unet_to(config, 8, FAMILIES["sdxl"].text))
        randomised(self.theirs.to_empty(device="cpu"), torch.Generator().manual_seed(0))
        self.theirs.requires_grad_(False)
        with torch.device("meta"):
            self.ours = UNet(config)
        state = names.unet(self.ours).load(self.theirs.state_dict(), self.ours.state_dict())
        self.ours.load_state_dict(state, assign=True)
        self.ours.requires_grad_(False)
        rng = torch.Generator().manual_seed(1)
        self.x0, self.noise = (torch.randn((2, 4, 16, 16), generator=rng) for _ in range(2))
        self.tokens = torch.randn((2, 7, config.context_dim), generator=rng)
        self.hint = torch.rand((2, 3, 128, 128), generator=rng)
        self.times = torch.tensor([37, 801])
        self.added, vector = None, None
        if config.vector_dim:
            pooled, ids = torch.randn((2, 1280), generator=rng), torch.tensor([[1024, 1024, 0, 0, 1024, 1024]] * 2)
            self.added = {"text_embeds": pooled, "time_ids": ids}
            vector = torch.cat([pooled, self.theirs.add_time_proj(ids.flatten()).reshape(2, -1)], dim=1)
        self.vector = vector

    def loss(self, network: nn.Module, tokens: Tensor | None = None) -> Tensor:
        """Ours, at the levels of whole timesteps."""
        sigma = SCHEDULE.at(self.times.double()).float()
        cond = Conditioning(self.tokens if tokens is None else tokens, vector=self.vector)
        weighting = find_weighting("uniform", None)
        return diffusion_loss(network, PREDICTIONS["eps"], SCHEDULE, self.x0, sigma, self.noise, cond, weighting).mean()

    def reference(self, tokens: Tensor | None = None, control: Any = None) -> Tensor:
        """As diffusers' training scripts compute it."""
        from diffusers import DDPMScheduler

        scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        noisy = scheduler.add_noise(self.x0, self.noise, self.times)
        tokens = self.tokens if tokens is None else tokens
        how: dict[str, Any] = dict(added_cond_kwargs=self.added)
        if control is not None:
            down, mid = control(noisy, self.times, tokens, self.hint, **how, return_dict=False)
            how |= dict(down_block_additional_residuals=down, mid_block_additional_residual=mid)
        return F.mse_loss(self.theirs(noisy, self.times, tokens, **how).sample, self.noise)


def close(ours: Tensor | None, theirs: Tensor | None) -> None:
    assert ours is not None and theirs is not None and theirs.abs().max() > 0
    assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-4


@sizes("sd1", "sdxl")
def test_full_fine_tuning(size: str, randomised: Callable[..., None]) -> None:
    pair = Pair(size, randomised)
    picked = ("conv_in.weight", "mid.res1.conv1.weight", "up.0.blocks.0.res.norm1.weight")
    theirs = dict(pair.theirs.named_parameters())
    keymap = names.unet(pair.ours)
    foreign = [theirs[keymap.names[name][0]].requires_grad_(True) for name in picked]
    expected = pair.reference()
    grads = torch.autograd.grad(expected, foreign)
    own = [dict(pair.ours.named_parameters())[name].requires_grad_(True) for name in picked]
    loss = pair.loss(pair.ours)
    close(loss, expected)
    for mine, other in zip(torch.autograd.grad(loss, own), grads, strict=True):
        close(mine, other)


@sizes("sd1", "sdxl-short")
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_lora(size: str, dora: bool, randomised: Callable[..., None]) -> None:
    from peft import LoraConfig as Theirs

    pair = Pair(size, randomised)
    text = TextConfig(width=64, heads=1, layers=1, context_length=8, vocab_size=800)
    spec = ModelSpec(AutoencoderConfig(channels=(32,)), 64, pair.config, text)
    model = Model(spec, Autoencoder(spec.autoencoder), pair.ours, Conditioner(text))
    adapters = lora.wear(model, LoraConfig(rank=4, alpha=2, dora=dora), seed=0)
    rng = torch.Generator().manual_seed(2)
    for adapter in adapters.values():
        adapter.up.data = torch.randn(adapter.up.shape, generator=rng) * 0.1
    pair.theirs.add_adapter(
        Theirs(r=4, lora_alpha=2, use_dora=dora, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    )
    modules = {f"unet.{name}": m for name, m in pair.theirs.named_modules() if f"unet.{name}" in adapters}
    assert modules.keys() == adapters.keys()
    for name, module in modules.items():
        module.lora_A.default.weight.data = adapters[name].down.data.clone()
        module.lora_B.default.weight.data = adapters[name].up.data.clone()
    expected = pair.reference()
    expected.backward()
    loss = pair.loss(pair.ours)
    close(loss, expected)
    loss.backward()
    for name, module in modules.items():
        close(adapters[name].down.grad, module.lora_A.default.weight.grad)
        close(adapters[name].up.grad, module.lora_B.default.weight.grad)
        if dora:
            theirs = module.lora_magnitude_vector.default.weight.grad
            assert adapters[name].magnitude is not None
            close(adapters[name].magnitude.grad.flatten(), theirs)


@sizes("sd1", "sdxl-short")
def test_controlnet(size: str, randomised: Callable[..., None]) -> None:
    from diffusers import ControlNetModel

    pair = Pair(size, randomised)
    theirs = ControlNetModel.from_unet(pair.theirs)
    randomised(theirs, torch.Generator().manual_seed(3))
    with torch.device("meta"):
        ours = ControlNet(pair.config)
    state = control_names.controlnet(ours, layout="diffusers").load(theirs.state_dict(), ours.state_dict())
    ours.load_state_dict(state, assign=True)
    expected = pair.reference(control=theirs.requires_grad_(True))
    picked = theirs.controlnet_cond_embedding.conv_in.weight, theirs.controlnet_mid_block.weight
    grads = torch.autograd.grad(expected, picked)
    loss = pair.loss(Controlled(pair.ours, [Steering(ours.requires_grad_(True), pair.hint)]))
    close(loss, expected)
    own = ours.hint[0].weight, ours.zero_middle.weight
    for mine, other in zip(torch.autograd.grad(loss, own), grads, strict=True):
        close(mine, other)


@sizes("sd1", "sdxl")
def test_what_reaches_the_words(size: str, randomised: Callable[..., None]) -> None:
    """Textual inversion moves what the UNet attends to: the gradient there."""
    pair = Pair(size, randomised)
    tokens = pair.tokens.clone().requires_grad_(True)
    expected, loss = pair.reference(tokens), partial(pair.loss, pair.ours)(tokens)
    close(loss, expected)
    (theirs,), (ours,) = torch.autograd.grad(expected, tokens), torch.autograd.grad(loss, tokens)
    close(ours, theirs)
