"""LPIPS: a distance between pictures that agrees with people's (Zhang et al. 2018, arXiv:1801.03924).

Channel-normalised features of a frozen classifier, squared differences weighted by learned heads, averaged over space.
The two networks of the paper, AlexNet and VGG16, differ by a table of layers; a file says by its keys which it is.
"""

from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.errors import UserError, reason
from ldm.shapes import Image

Layer = tuple[int, int, int, int] | int  # a convolution's width, kernel, stride, padding; a pool's kernel, of stride 2

# The layers up to the last feature that is compared; a ReLU follows each convolution, as in torchvision's `features`.
_ALEX: tuple[Layer, ...] = ((64, 11, 4, 2), 3, (192, 5, 1, 2), 3, (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1))
_C128, _C256, _C512 = (128, 3, 1, 1), (256, 3, 1, 1), (512, 3, 1, 1)
_DEEP: tuple[Layer, ...] = (2, _C256, _C256, _C256, 2, _C512, _C512, _C512, 2, _C512, _C512, _C512)
_VGG: tuple[Layer, ...] = ((64, 3, 1, 1), (64, 3, 1, 1), 2, _C128, _C128, *_DEEP)
# name: (layers, indices in `features` of the five ReLUs whose output is compared, the key that only this network has)
NETS = {
    "alex": (_ALEX, (1, 4, 7, 9, 11), "features.10.weight"),
    "vgg": (_VGG, (3, 8, 15, 22, 29), "features.28.weight"),
}


class LPIPS(nn.Module):
    """`LPIPS(net)(image, target)`: frozen; gradients reach the pictures. Sides of 32 pixels or more."""

    shift: Tensor
    scale: Tensor

    def __init__(self, net: str) -> None:
        super().__init__()
        layers, self.taps, _ = NETS[net]
        self.features = nn.Sequential(*_modules(layers))
        compared = [self.features[tap - 1] for tap in self.taps]
        self.heads = nn.ParameterList([torch.zeros(cast(nn.Conv2d, layer).out_channels) for layer in compared])
        # ImageNet's statistics for pictures in [-1, 1], with the roundings of the published weights
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)
        self.requires_grad_(False)

    @classmethod
    def load(cls, path: str | Path) -> "LPIPS":
        """Read a safetensors file with torchvision's `features.N.*` and the heads `linN.model.1.weight`.

        UserError where it is not there, is not safetensors, or holds other keys or shapes than either network's.
        """
        try:
            state = load_file(path)
        except (OSError, SafetensorError) as error:
            what = f"cannot read LPIPS weights {str(path)!r}, get them by `make weights`: {reason(error)}"
            raise UserError(what) from None
        net = next((name for name, (*_, key) in reversed(NETS.items()) if key in state), "alex")
        model = cls(net)
        for index in range(len(model.heads)):
            head = state.pop(f"lin{index}.model.1.weight", None)
            if head is not None:
                state[f"heads.{index}"] = head.flatten()
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(f"{str(path)!r} does not hold LPIPS weights: {error}") from None
        return model

    def forward(self, image: Image, target: Image) -> Float[Tensor, " b"]:
        """Distance of each pair, 0 for equal ones; fp32. The features follow autocast, else the module's own dtype."""
        pairs = zip(self.compared(image), self.compared(target), self.heads, strict=True)
        # bf16 features are precise enough to compare; the sums over channels and space are not
        with torch.autocast(image.device.type, enabled=False):
            return torch.stack([_distance(x.float(), y.float(), head.float()) for x, y, head in pairs]).sum(0)

    def compared(self, image: Image) -> list[Tensor]:
        """The five features (b, c, h, w) of a picture that are compared, finest first."""
        x = ((image - self.shift) / self.scale).to(self.heads[0].dtype)
        found = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.taps:
                found.append(x)
        return found


def _modules(layers: tuple[Layer, ...]) -> list[nn.Module]:
    modules: list[nn.Module] = []
    width = 3
    for layer in layers:
        if isinstance(layer, int):
            modules.append(nn.MaxPool2d(layer, 2))
        else:
            modules += [nn.Conv2d(width, *layer), nn.ReLU(inplace=True)]
            width = layer[0]
    return modules


def _distance(x: Tensor, y: Tensor, head: Tensor) -> Tensor:
    """Eq. 1: mean over space of the weighted squared difference of unit features."""
    return (F.normalize(x, eps=1e-10) - F.normalize(y, eps=1e-10)).square().mean((2, 3)) @ head
