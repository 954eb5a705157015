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
from ldm.shapes import Image

PerImage = Float[Tensor, " b"]
AnyImages = Float[Tensor, "_ 3 _ _"]  # batches may differ in size
_RANGE = 2.0  # pictures are in [-1, 1]


def psnr(image: Image, target: Image) -> PerImage:
    """Peak signal to noise in dB, inf for equal pictures."""
    error = (image.float() - target.float()).square().mean((1, 2, 3))
    return 10 * torch.log10(_RANGE**2 / error)


def ssim(image: Image, target: Image) -> PerImage:
    """Structural similarity, at most 1: 11 x 11 Gaussian window, sigma 1.5, mean of the channels and of whole windows.

    ValueError for pictures smaller than the window.
    """
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
def reconstruction_report(
    autoencoder: Autoencoder,
    batches: Iterable[AnyImages],
    lpips: Callable[[Image, Image], PerImage] | None = None,
    features: Callable[[UInt8[Tensor, "_ 3 h w"]], Float[Tensor, "_ d"]] | None = None,
) -> dict[str, float]:
    """Means over all pictures of `batches`: psnr (dB), ssim, and lpips where a distance is given.

    features: of pixels, Inception's, say; with them rfid, the Frechet distance of reconstructions from originals. A
    picture is decoded from the mode of its latent and clamped to [-1, 1]. ValueError where there is no picture.
    """
    device = next(autoencoder.parameters()).device
    metrics: dict[str, Callable[[Image, Image], PerImage]] = {"psnr": psnr, "ssim": ssim}
    if lpips is not None:
        metrics["lpips"] = lpips
    sums, images = dict.fromkeys(metrics, 0.0), 0
    rows: tuple[list[Tensor], list[Tensor]] = ([], [])
    for batch in batches:
        target = batch.to(device)
        again = autoencoder.decode(autoencoder.encode(target).mode).clamp(-1, 1)
        images += len(target)
        for name, metric in metrics.items():
            sums[name] += metric(again, target).sum().item()
        for row, pictures in zip(rows, (again, target), strict=True):
            row.extend(
                []
                if features is None
                else [features(rearrange(to_pixels(pictures), "b h w c -> b c h w").to(device)).cpu()]
            )
    if not images:
        raise ValueError("no picture to reconstruct")
    report = {name: total / images for name, total in sums.items()}
    return report if features is None else report | {"rfid": frechet(torch.cat(rows[0]), torch.cat(rows[1]))}
