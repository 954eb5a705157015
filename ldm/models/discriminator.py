"""The patch discriminator of Isola et al. 2017 (arXiv:1611.07004), hinge losses, and the adaptive weight of VQGAN."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.shapes import Image

Logits = Float[Tensor, "b 1 h w"]
_GROUPS = 32


@dataclass(frozen=True)
class DiscriminatorConfig:
    """`layers` halvings, each doubling `channels` (up to 8 times); 3 of them judge patches of 70 x 70 pixels.

    No batch norm, whose statistics differ between ranks and shift with small batches: group norm knows one picture
    only; `spectral` keeps the slope of each layer at 1 (Miyato et al. 2018).
    """

    channels: int = 64
    layers: int = 3
    norm: Literal["group", "spectral", "none"] = "group"

    def __post_init__(self) -> None:
        if self.layers < 1 or self.channels < 1:
            raise UserError(f"discriminator layers {self.layers}, channels {self.channels}: give 1 or more of each")
        if self.norm == "group" and self.channels * 2 % _GROUPS:
            raise UserError(f"discriminator channels {self.channels}: group norm needs a multiple of {_GROUPS // 2}")


class PatchDiscriminator(nn.Sequential):
    """`(b, 3, h, w)` in [-1, 1] -> `(b, 1, h', w')` logits, one for each patch, high for real."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        widths = [3] + [config.channels * min(2**i, 8) for i in range(config.layers + 1)]
        modules: list[nn.Module] = []
        for index in range(config.layers + 1):
            stride = 2 if index < config.layers else 1
            modules.append(nn.Conv2d(widths[index], widths[index + 1], 4, stride, 1))
            if config.norm == "group" and index:  # the first layer sees colours, which a norm would take away
                modules.append(nn.GroupNorm(_GROUPS, widths[index + 1]))
            modules.append(nn.LeakyReLU(0.2))
        super().__init__(*modules, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for module in list(self.modules()):
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
                if config.norm == "spectral":
                    nn.utils.parametrizations.spectral_norm(module)

    def forward(self, image: Image) -> Logits:
        return super().forward(image)


def hinge_d(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss, a scalar: real logits above 1, fake ones below -1 cost nothing (arXiv:1705.02894)."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def hinge_g(fake: Tensor) -> Tensor:
    """The generator's loss, a scalar: the higher the logits of its pictures, the lower."""
    return -fake.float().mean()


def r1(discriminator: Callable[[Image], Logits], image: Image) -> tuple[Logits, Tensor]:
    """Logits of real pictures, and the mean square of their sum's gradient at each (Mescheder et al. 2018, Eq. 9)."""
    image = image.detach().requires_grad_()
    logits = discriminator(image)
    (slope,) = torch.autograd.grad(logits.float().sum(), image, create_graph=True)
    return logits, slope.square().sum((1, 2, 3)).mean()


def adaptive_weight(rec: Tensor, gan: Tensor, *, limit: float = 1e4) -> Tensor:
    """Weight of the adversarial loss that makes both alike: gradients of the two losses at the decoder's last layer.

    Eq. 7 of Esser et al. 2021 (arXiv:2012.09841): a scalar, at most `limit`; 0 where there is no such gradient.
    """
    strength = gan.norm()
    return torch.where(strength > 0, (rec.norm() / (strength + 1e-6)).clamp(max=limit), 0.0)
