"""The networks that are measured: ours and diffusers', of one shape, on the same random weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ldm import pipeline
from ldm.checkpoints.native import ModelSpec, read_spec
from ldm.conditioning import Conditioning
from ldm.families import FAMILIES, family_of
from ldm.families.export import folder_configs
from ldm.models import speed, stripes
from ldm.models.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.unet import UNet, UNetConfig
from ldm.text.open_clip import open_clip

Call = tuple[Callable[..., Any], tuple[Tensor, ...]]
NETWORKS = ("sd1", "sdxl", "embedded")
VARIANTS = ["diffusers", "diffusers tuned", "ldm fp32", "ldm"]
POOL = 2**22


def spec_of(network: str, width: int = 320, blocks: int = 2, vae: int = 128) -> ModelSpec:
    """A whole model's shapes; width, vae: of the first level of Stable Diffusion's networks, whose others follow."""
    if network == "embedded":
        return read_spec(pipeline.find(network))
    family = FAMILIES[network]
    if network == "sd1":
        shape = UNetConfig(
            channels=(width, 2 * width, 4 * width, 4 * width), res_blocks=blocks, heads=(max(1, width // 40),) * 4
        )
    else:
        channels = (width, 2 * width, 4 * width)
        shape = UNetConfig(
            channels=channels, res_blocks=blocks, depth=(0, 2, 10), mid_depth=10, context_dim=2048, vector_dim=2816,
            heads=tuple(family.heads(each) for each in channels), linear_projection=True,
        )  # fmt: skip
    side = family.sides["eps"]
    auto = AutoencoderConfig(channels=(vae, 2 * vae, 4 * vae, 4 * vae), std=(1 / family.scale,))
    return ModelSpec(auto, side, shape, family.text)


class Networks:
    """The UNet of a variant and its autoencoder, or one of them: what each is called with, and on what."""

    def __init__(self, variant: str, spec: ModelSpec, unet: bool = True, vae: bool = True) -> None:
        assert spec.backbone is not None and spec.text is not None
        self.theirs, self.spec, self.vae_config = not variant.startswith("ldm"), spec, spec.autoencoder
        halves = variant in ("diffusers tuned", "ldm") and speed.native_bf16(torch.device("cpu"))
        self.dtype = torch.bfloat16 if halves else torch.float32
        if variant not in ("diffusers", "openvino"):
            speed.keep_memory()
        with torch.device("meta"):
            if self.theirs:
                open_clip()  # torchvision's operators, which diffusers asks for
                from diffusers import AutoencoderKL, UNet2DConditionModel

                configs = folder_configs(spec, family_of(spec.text))
                self.unet = UNet2DConditionModel.from_config(configs["unet"]) if unet else nn.Identity()
                self.vae = AutoencoderKL.from_config(configs["vae"]) if vae else nn.Identity()
            else:
                self.unet = UNet(spec.backbone) if unet else nn.Identity()
                self.vae = Autoencoder(spec.autoencoder) if vae else nn.Identity()
        self.rng = torch.Generator().manual_seed(0)
        pool = torch.randn(POOL, generator=self.rng)
        for network in (self.unet, self.vae):
            network.to(self.dtype).to_empty(device="cpu").eval().requires_grad_(False)
            for p in network.parameters():
                spread = max(p[0].numel(), 1) ** -0.5 if p.ndim > 1 else 0.1
                for part in p.detach().flatten().split(POOL):
                    part.copy_(pool[: len(part)]).mul_(spread)
            if variant == "diffusers tuned":
                network.to(memory_format=torch.channels_last)
            elif not self.theirs:
                speed.prepare(network)

    def drawn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.rng).to(self.dtype)

    def step(self, batch: int, side: int) -> Call:
        """The network on latents of side x side, with text and, where it knows them, sizes."""
        shape, text = self.spec.backbone, self.spec.text
        assert shape is not None and text is not None
        given = self.drawn(batch, shape.in_channels, side, side), torch.full((batch,), 500.0)
        given += (self.drawn(batch, text.context_length, shape.context_dim),)
        if not shape.vector_dim:
            return self.unet if self.theirs else lambda z, label, c: self.unet(z, label, Conditioning(c)), given
        if not self.theirs:
            given += (self.drawn(batch, shape.vector_dim),)
            return lambda z, label, c, vector: self.unet(z, label, Conditioning(c, vector=vector)), given
        pooled = shape.vector_dim - text.size_ids * text.id_width
        given += self.drawn(batch, pooled), torch.full((batch, text.size_ids), 1024.0)
        names = "text_embeds", "time_ids"
        return lambda z, t, c, *added: self.unet(z, t, c, added_cond_kwargs=dict(zip(names, added, strict=True))), given

    def decode(self, side: int, tiled: bool = False) -> Call:
        given = (self.drawn(1, self.vae_config.z_channels, side, side),)
        if self.theirs and tiled:
            self.vae.enable_tiling()
        return (lambda z: stripes.decode(self.vae, z)) if tiled and not self.theirs else self.vae.decode, given

    def encode(self, side: int) -> Call:
        """A picture whose latent has this side."""
        pixels = side * self.vae_config.factor
        return self.vae.encode, (self.drawn(1, 3, pixels, pixels),)
