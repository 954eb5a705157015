"""Loading any model: opened, checked, its weights put on the device once."""

from dataclasses import replace
from pathlib import Path

import torch

from ldm.checkpoints import native
from ldm.checkpoints.files import brief
from ldm.checkpoints.native import Model
from ldm.conditioning import Conditioning
from ldm.diffusion.schedules import Schedule
from ldm.families.source import open_model
from ldm.families.vae import load_vae
from ldm.models.unet import UNet


def load(
    path: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    vae: Path | None = None,
    *,
    layout: torch.memory_format = torch.preserve_format,
) -> Model:
    """A model of any layout, strictly; dtype None: as most of the file is. vae: in place of its own.

    layout: of convolutions; copied once into it, they cost no more memory than the file. Where the file does not say
    what the network predicts, the network is asked. UserError where a file is broken or holds something else.
    """
    with open_model(path) as source, brief(path):
        model = source.model
        native.fill(model.modules, source.needed, source.keymap, device, dtype, layout=layout)
    if source.guessed and model.backbone is not None and predicts_noise(model.backbone, model.schedule):
        side = min(512, model.spec.image_size)
        model.spec = replace(model.spec, prediction="eps", image_size=side)
    return model if vae is None else replace(model, autoencoder=load_vae(vae, model.spec.autoencoder, device, dtype))


@torch.no_grad()
def predicts_noise(backbone: UNet, schedule: Schedule) -> bool:
    """Whether a network returns its own input at the noisiest level, as one that predicts the noise must.

    One that predicts v returns the picture there, which is not to be seen in the noise.
    """
    config, parameter = backbone.config, next(backbone.parameters())
    z = torch.randn((1, config.in_channels, 16, 16), generator=torch.Generator().manual_seed(0)).to(parameter)
    label = schedule.label(torch.tensor([schedule.sigma_max], device=parameter.device))
    tokens = parameter.new_zeros((1, 77, config.context_dim))
    vector = parameter.new_zeros((1, config.vector_dim)) if config.vector_dim else None
    out = backbone(z, label, Conditioning(tokens, vector=vector))
    pair = torch.stack([part.float().flatten() for part in (out, z[:, : config.out_channels])])
    return bool(torch.corrcoef(pair)[0, 1] > 0.5)
