"""Where a run begins: the first noisy state, from noise alone or from a picture, and what holds it to that picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ldm.canvas import Canvas
from ldm.checkpoints.native import Model
from ldm.diffusion.editing import keep, slerp
from ldm.diffusion.guidance import Denoise
from ldm.diffusion.noise import SeededNoise
from ldm.models import stripes
from ldm.models.autoencoder import Autoencoder, Gaussian
from ldm.models.taesd import TinyAutoencoder
from ldm.request import Request
from ldm.shapes import Image, Latent

LARGE = 1536**2  # pixels beyond which the autoencoder works in stripes


@dataclass(frozen=True)
class Start:
    """The first state of a run; concat: what an inpainting model sees beside it; known, mask: see `keep`."""

    x: Latent
    concat: Float[Tensor, "b _ h w"] | None = None
    known: Float[Tensor, "b c h w"] | None = None
    mask: Float[Tensor, "1 1 h w"] | None = None

    def hold(self, denoise: Denoise) -> Denoise:
        """The denoiser, held to the picture where there is one to keep."""
        return denoise if self.known is None or self.mask is None else keep(denoise, self.known, self.mask)


def encode(autoencoder: Autoencoder | TinyAutoencoder, image: Image) -> Gaussian:
    """Latents of pictures, in fp32; of large ones in stripes."""
    image = image.to(next(autoencoder.parameters()))
    large = isinstance(autoencoder, Autoencoder) and image[0, 0].numel() > LARGE
    latents = stripes.encode(autoencoder, image) if large else autoencoder.encode(image)  # type: ignore[arg-type]
    return Gaussian(*(part.float() for part in latents))


def decode(autoencoder: Autoencoder | TinyAutoencoder, latent: Latent) -> Image:
    """Pictures of latents; large ones in stripes."""
    if isinstance(autoencoder, Autoencoder) and latent[0, 0].numel() * autoencoder.factor**2 > LARGE:
        return stripes.decode(autoencoder, latent)
    return autoencoder.decode(latent)


def begin(
    model: Model, requests: Sequence[Request], noise: SeededNoise, sigma: float, *, multiple: int, canvas: Canvas | None
) -> Start:
    """The start of a batch of complete requests at level sigma; draws noise in the order of diffusers' pipelines.

    multiple: of which the padded sides are. To invert, the start is the picture's latent itself, without noise.
    """
    r, backbone, autoencoder = requests[0], model.backbone, model.autoencoder
    assert backbone and r.height and r.width
    height, width = (math.ceil(side / multiple) * multiple for side in (r.height, r.width))
    cells = (height // autoencoder.factor, width // autoencoder.factor)
    n, device = len(noise.generators), next(autoencoder.parameters()).device
    empty = torch.empty((n, autoencoder.config.z_channels, *cells), device=device)
    scale, inpaints = model.schedule.start(sigma), backbone.config.in_channels > backbone.config.out_channels
    canvas = None if canvas is None or (r.restore and r.strength == 1) else canvas.padded(height, width)
    mask = None if canvas is None else canvas.mask
    anew = mask is not None and r.strength == 1  # under the mask nothing is left of what was there
    known = None
    if canvas is not None and not (anew and inpaints):
        latents = encode(autoencoder, canvas.image)
        known = latents.mode.expand_as(empty) if r.invert else latents.sample(noise(empty))
    eps = noise(empty)
    if r.variation:
        other = SeededNoise([o.variation_seed for o in requests])(empty)
        eps = slerp(eps, other, r.variation)
    if r.invert and known is not None:
        eps = torch.zeros_like(eps)
    x = eps * scale if known is None else known.add(eps, alpha=sigma)
    painted = None if mask is None else F.adaptive_max_pool2d(mask, cells).to(x)
    if inpaints:
        if canvas is None or mask is None or painted is None:  # a mask that is full, and a picture that is empty
            painted, rest = torch.ones_like(empty[:, :1]), encode(autoencoder, torch.zeros((1, 3, height, width))).mode
        else:
            painted, rest = painted.round(), encode(autoencoder, canvas.image * (mask < 0.5)).sample(noise(empty))
        return Start(x, concat=torch.cat([painted.expand(n, -1, -1, -1), rest.expand(n, -1, -1, -1)], dim=1))
    if known is None or painted is None:
        return Start(x)
    return Start(x.lerp(eps * scale, painted) if anew and not r.invert else x, known=known, mask=painted)
