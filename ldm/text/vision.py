"""The image side of CLIP (Radford et al. 2021), open_clip's VisionTransformer: what an IP-Adapter sees of a picture."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.shapes import Image, Vector
from ldm.text.open_clip import part

# The statistics of CLIP's training pictures.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VisionConfig:
    """An image tower; the defaults are CLIP ViT-H/14's, through which IP-Adapters for SD 1 look. mlp 0: 4 x width."""

    image_size: int = 224
    patch: int = 14
    width: int = 1280
    heads: int = 16
    layers: int = 32
    projection: int = 1024
    quickgelu: bool = False
    mlp: int = 0


class ImageTower(nn.Module):
    """Pictures (b, 3, h, w) in [-1, 1] -> embeddings (b, projection): the middle square, at the tower's own size."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        transformer: Any = part("transformer")
        self.tower: Any = transformer.VisionTransformer(
            image_size=config.image_size,
            patch_size=config.patch,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            mlp_ratio=(config.mlp or 4 * config.width) / config.width,
            output_dim=config.projection,
            act_layer=transformer.QuickGELU if config.quickgelu else nn.GELU,
        )

    def forward(self, image: Image) -> Vector:
        side = min(image.shape[-2:])
        top, left = (image.shape[-2] - side) // 2, (image.shape[-1] - side) // 2
        square = image[..., top : top + side, left : left + side].float()
        size = (self.config.image_size,) * 2
        seen = F.interpolate(square, size, mode="bicubic", antialias=True).clamp(-1, 1) / 2 + 0.5
        mean, std = (torch.tensor(values, device=seen.device)[:, None, None] for values in (MEAN, STD))
        found: Tensor = self.tower(((seen - mean) / std).to(self.tower.proj.dtype))
        return found
