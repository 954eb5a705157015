"""How near a reconstruction is to its picture: PSNR, SSIM (Wang et al. 2004), and their means over many, with LPIPS."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from ldm.evaluation.statistics import frechet
from ldm.images import to_pixels
from ldm.models.autoencoder import Autoencoder
from ldm.models.taesd import TinyAutoencoder
from ldm.shapes import Image

PerImage = Float[Tensor, " b"]
Codec = Autoencoder | TinyAutoencoder
Distance = Callable[[Image, Image], PerImage]
AnyImages = Float[Tensor, "_ 3 _ _"]  # batches may differ in size
_RANGE = 2.0  # pictures are in [-1, 1]


def psnr(image: Image, target: Image) -> PerImage:
    """Peak signal to noise in dB, inf for equal pictures."""
    error = (image.float() - target.float()).square().mean((1, 2, 3))
    return 10 * torch.log10(_RANGE**2 / error)


def ssim(image: Image, target: Image) -> PerImage:
    """Structural similarity, at most 1: 11 x 11 Gaussian window, sigma 1.5. ValueError for smaller pictures than it."""
    x, y = image.float(), target.float()
    if min(x.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs pictures of 11 x 11 pixels or more, not {tuple(x.shape[-2:])}")
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    cov = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * _RANGE) ** 2, (0.03 * _RANGE) ** 2
    top = (2 * mean_x * mean_y + c1) * (2 * cov + c2)  # Eq. 13
    bottom = (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return (top / bottom).mean((1, 2, 3))


def _blur(x: Tensor) -> Tensor:
    offset = torch.arange(-5, 6, device=x.device)
    weight = torch.softmax(-(offset**2) / (2 * 1.5**2), 0)
    planes = rearrange(x, "b c h w -> (b c) 1 h w")
    # autocast would take the convolution to bf16, and variances are differences of near numbers
    with torch.autocast(x.device.type, enabled=False):
        blurred = F.conv2d(F.conv2d(planes, weight.view(1, 1, 11, 1)), weight.view(1, 1, 1, 11))
    return rearrange(blurred, "(b c) 1 h w -> b c h w", b=len(x))


@torch.no_grad()
def compare(model: Codec, target: Image, lpips: Distance | None) -> tuple[Image, dict[str, PerImage]]:
    """Pictures decoded from the modes of their latents and clamped to [-1, 1]; psnr (dB), ssim and lpips of each."""
    latent = model.encode(target.to(next(model.parameters()).dtype)).mode
    again = model.decode(latent).float().clamp(-1, 1)
    lost = {"psnr": psnr(again, target), "ssim": ssim(again, target)}
    return again, lost if lpips is None else lost | {"lpips": lpips(again, target)}


@torch.no_grad()
def reconstruction_report(
    autoencoder: Codec,
    batches: Iterable[AnyImages],
    lpips: Distance | None = None,
    features: Callable[[UInt8[Tensor, "_ 3 h w"]], Float[Tensor, "_ d"]] | None = None,
) -> dict[str, float]:
    """Means over all pictures of `batches`, as of `compare`. ValueError where there is no picture.

    features: of pixels, Inception's, say; with them rfid, the Frechet distance of reconstructions from originals.
    """
    device = next(autoencoder.parameters()).device
    lost: dict[str, list[Tensor]] = {}
    rows: tuple[list[Tensor], list[Tensor]] = ([], [])
    for batch in batches:
        target = batch.to(device)
        again, found = compare(autoencoder, target, lpips)
        for name, values in found.items():
            lost.setdefault(name, []).append(values)
        if features is not None:
            for row, pictures in zip(rows, (again, target), strict=True):
                row.append(features(rearrange(to_pixels(pictures), "b h w c -> b c h w").to(device)).cpu())
    if not lost:
        raise ValueError("no picture to reconstruct")
    report = {name: float(torch.cat(values).double().mean()) for name, values in lost.items()}
    return report if features is None else report | {"rfid": frechet(torch.cat(rows[0]), torch.cat(rows[1]))}
