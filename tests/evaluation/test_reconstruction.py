"""PSNR and SSIM agree with scikit-image; the report is a mean over pictures, not over batches."""

import numpy as np
import pytest
import torch
from einops import rearrange
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from ldm.evaluation.reconstruction import psnr, reconstruction_report, ssim
from ldm.evaluation.statistics import frechet
from ldm.models.autoencoder import Autoencoder, AutoencoderConfig


def pair(noise: float, size: tuple[int, int] = (24, 31)) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    target = torch.nn.functional.interpolate(torch.rand(3, 3, 4, 4, generator=rng) * 2 - 1, size, mode="bicubic")
    target = target.clamp(-1, 1)
    return (target + noise * torch.randn(target.shape, generator=rng)).clamp(-1, 1), target


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.5])
def test_agrees_with_scikit_image(noise: float) -> None:
    x, y = pair(noise)
    theirs = []
    for a, b in zip(x, y, strict=True):
        left, right = (rearrange(t, "c h w -> h w c").double().numpy() for t in (a, b))
        similarity = structural_similarity(
            *(left, right),
            data_range=2,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        theirs.append((peak_signal_noise_ratio(right, left, data_range=2), similarity))
    expected = torch.from_numpy(np.array(theirs)).float()
    torch.testing.assert_close(torch.stack([psnr(x, y), ssim(x, y)], 1), expected, rtol=1e-4, atol=1e-5)


def test_equal_pictures() -> None:
    _, x = pair(0)
    assert psnr(x, x).isinf().all()
    torch.testing.assert_close(ssim(x, x), torch.ones(3))


def test_autocast_changes_nothing() -> None:
    x, y = pair(0.1)
    exact = ssim(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ssim(x, y), exact)


def test_small_pictures_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"11 x 11"):
        ssim(*pair(0.1, (10, 20)))


def test_report_is_a_mean_over_pictures() -> None:
    torch.manual_seed(0)
    model = Autoencoder(AutoencoderConfig(channels=(8, 8), groups=4, res_blocks=1, mid_attention=False))
    pictures = torch.cat([pair(0.1, (16, 16))[0], torch.full((2, 3, 16, 16), 0.5)])

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return (x - y).abs().mean((1, 2, 3))

    report = reconstruction_report(model, [pictures[:4], pictures[4:]], distance)
    again = model.decode(model.encode(pictures).mode).clamp(-1, 1)
    assert not any(p.grad is not None for p in model.parameters())
    for name, metric in {"psnr": psnr, "ssim": ssim, "lpips": distance}.items():
        assert report[name] == pytest.approx(metric(again, pictures).mean().item(), rel=1e-4, abs=1e-6)
    assert set(reconstruction_report(model, [pictures])) == {"psnr", "ssim"}
    with pytest.raises(ValueError, match="no picture"):
        reconstruction_report(model, [])


def test_rfid_is_the_distance_of_the_features_of_both() -> None:
    torch.manual_seed(0)
    model = Autoencoder(AutoencoderConfig(channels=(8, 8), groups=4, res_blocks=1, mid_attention=False))
    pictures, seen = torch.rand(6, 3, 16, 16) * 2 - 1, []

    def features(pixels: Tensor) -> Tensor:
        assert pixels.dtype == torch.uint8
        seen.append(pixels)
        return pixels.float().mean((2, 3))

    report = reconstruction_report(model, [pictures[:4], pictures[4:]], features=features)
    again = model.decode(model.encode(pictures).mode).clamp(-1, 1).detach()
    rows = [((x + 1) * 127.5).round().mean((2, 3)) for x in (again, pictures)]
    assert report["rfid"] == pytest.approx(frechet(*rows), rel=1e-4) and report["rfid"] > 0
    assert torch.equal(torch.cat(seen[1::2]), ((pictures + 1) * 127.5).round().to(torch.uint8))
