"""Editing as guidance: wrappers of a denoiser that hold a picture to what is known of it (see guidance)."""

import torch
from torch import Tensor

from ldm.diffusion.guidance import Denoise


def keep(denoise: Denoise, known: Tensor, mask: Tensor) -> Denoise:
    """Paint where the mask is 1, and answer `known` where it is 0; between them a mixture (RePaint's blending, 2022).

    A state that began as known + sigma * noise outside the mask then stays on that line at each noise level: the first-
    order step from s to t leaves it at known + t * noise, whatever the sampler's history says.
    """
    return lambda x, sigma: torch.lerp(known, denoise(x, sigma), mask)
