"""Pictures to start from: what a mask keeps is kept to the byte, and what cannot be used is refused in one line."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from ldm import images, pipeline
from ldm.canvas import read_canvas
from ldm.diffusion.noise import SeededNoise
from ldm.errors import UserError
from ldm.pipeline import Pipeline
from ldm.recipe import Request
from ldm.start import encode

APPLE = Request("a red apple", seed=5, cfg_scale=1.0)


@pytest.fixture(scope="module")
def painter(tiny_model: Path) -> Pipeline:
    return pipeline.load(str(tiny_model), "cpu")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A picture of 29 x 22 pixels, no multiple of anything, and masks of it."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (22, 29, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    pixels[3:9, 5:20, 3] = 0
    mask = np.zeros((22, 29), np.uint8)
    mask[3:9, 5:20] = 255
    soft = mask.copy()
    soft[9, 5:20] = 100
    made = {
        "rgba": Pillow.fromarray(pixels),
        "picture": Pillow.fromarray(pixels[..., :3]),
        "mask": Pillow.fromarray(mask),
        "soft": Pillow.fromarray(soft),
        "empty": Pillow.fromarray(mask * 0),
        "other": Pillow.fromarray(mask[:8, :8]),
    }
    for name, picture in made.items():
        picture.save(tmp_path / f"{name}.png")
    return {name: tmp_path / f"{name}.png" for name in made}


def pixels_of(image: torch.Tensor) -> np.ndarray:
    return images.to_pixels(image)[0].numpy()


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_a", "heun", "ddim"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_what_a_mask_keeps_is_kept_to_the_byte(
    painter: Pipeline, files: dict[str, Path], sampler: str, strength: float
) -> None:
    start = read_canvas(files["picture"], files["mask"])
    request = replace(APPLE, strength=strength, sampler=sampler)
    out = pixels_of(painter.paint(request, canvas=start))
    before = np.asarray(Pillow.open(files["picture"]))
    inside = np.asarray(Pillow.open(files["mask"])) > 0
    assert out.shape == before.shape
    assert (out[~inside] == before[~inside]).all()
    assert np.abs(out[inside].astype(int) - before[inside]).mean() > 5


def test_a_soft_mask_mixes(painter: Pipeline, files: dict[str, Path]) -> None:
    start = read_canvas(files["picture"], files["soft"])
    latent = torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(0))
    fresh, before = painter.decode(latent).clamp(-1, 1)[:, :, :22, :29], start.image
    mixed = painter.finish(latent, start)
    torch.testing.assert_close(mixed[..., 9, 5:20], before[..., 9, 5:20].lerp(fresh[..., 9, 5:20], 100 / 255))
    torch.testing.assert_close(mixed[..., 4, 6], fresh[..., 4, 6])


def test_alpha_is_a_mask(files: dict[str, Path]) -> None:
    a, b = read_canvas(files["rgba"], "alpha"), read_canvas(files["picture"], files["mask"])
    assert a.mask is not None and b.mask is not None and torch.equal(a.mask, b.mask)
    assert torch.equal(a.image[..., 12, :], b.image[..., 12, :])
    assert (a.image[..., 5, 10] == 1).all()  # what is transparent is white


def test_expanding_paints_around(painter: Pipeline, files: dict[str, Path]) -> None:
    grown = read_canvas(files["picture"], expand="3,0,0,6")
    before = np.asarray(Pillow.open(files["picture"]))
    out = pixels_of(painter.paint(APPLE, canvas=grown))
    assert out.shape == (28, 32, 3)
    assert (out[:22, 3:] == before).all()
    assert read_canvas(files["picture"], expand="4").image.shape == (1, 3, 30, 37)
    both = read_canvas(files["picture"], files["mask"], "4").mask
    assert both is not None and both[0, 0, 8, 10] == 1 and both[0, 0, 20, 30] == 0 and both[0, 0, 0, 0] == 1


def test_strength_is_how_many_steps_and_how_much_noise(painter: Pipeline, files: dict[str, Path]) -> None:
    """The first state is the picture's latent with noise of the level at which the run begins."""
    start, watched, seen = read_canvas(files["picture"]), copy.copy(painter), []

    def spy(x: torch.Tensor, sigma: torch.Tensor, cond: object) -> torch.Tensor:
        seen.append((x, float(sigma[0])))
        return painter.denoiser(x, sigma, cond)

    watched.denoiser = spy  # type: ignore[assignment]
    spy.schedule = painter.denoiser.schedule  # type: ignore[attr-defined]
    noise = SeededNoise([5])
    known = encode(painter.model.autoencoder, start.padded(24, 32).image).sample(noise(torch.empty(1, 4, 12, 16)))
    eps = noise(known)
    for strength, count in ((0.3, 3), (0.99, 9), (1.0, 10)):
        seen.clear()
        request = start.request(replace(APPLE, steps=10, strength=strength, sampler="ddim"))
        list(watched.sample([request], start))
        x, sigma = seen[0]
        assert len(seen) == count == painter.steps(request)
        assert sigma == pytest.approx(float(painter.denoiser.schedule.steps(10, "trailing")[10 - count]), rel=1e-5)
        torch.testing.assert_close(x, known + sigma * eps)


def test_defaults_of_strength(files: dict[str, Path]) -> None:
    assert read_canvas(files["picture"]).request(APPLE).strength == 0.75
    masked = read_canvas(files["picture"], files["mask"])
    assert masked.request(APPLE).strength == 1.0
    assert masked.request(replace(APPLE, strength=0.2)).strength == 0.2
    assert (masked.request(APPLE).width, masked.request(APPLE).height) == (29, 22)


def test_a_size_scales_the_picture_and_its_mask(files: dict[str, Path]) -> None:
    scaled = read_canvas(files["picture"], files["mask"], size=(58, None))
    assert scaled.image.shape == (1, 3, 22, 58) and scaled.mask is not None and scaled.mask.shape == (1, 1, 22, 58)


def test_a_digest_tells_pictures_and_masks_apart(files: dict[str, Path]) -> None:
    kinds = [(files["picture"],), (files["picture"], files["mask"]), (files["picture"], files["soft"])]
    assert len({read_canvas(*kind).digest for kind in kinds}) == 3


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.1, float("nan")])
def test_strengths_that_are_none(painter: Pipeline, strength: float) -> None:
    with pytest.raises(UserError, match="strength is"):
        painter.complete(replace(APPLE, strength=strength))
    with pytest.raises(UserError, match="leaves none to do"):
        painter.complete(replace(APPLE, strength=0.1, steps=5))


def test_a_recipe_that_started_from_a_picture_needs_it(painter: Pipeline) -> None:
    with pytest.raises(UserError, match="give that as --init-image"):
        painter.requests(replace(APPLE, strength=0.5), ["a"])


def test_files_that_are_no_use(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "cut.png").write_bytes(files["picture"].read_bytes()[:200])
    Pillow.new("1", (images.MAX_SIDE + 1, 1)).save(tmp_path / "wide.png")
    Pillow.new("1", (8192, 1)).save(tmp_path / "ok.png")
    bomb = tmp_path / "bomb.png"
    Pillow.new("1", (30_000, 30_000)).save(bomb)
    cases = [
        ((tmp_path / "absent.png",), "cannot read .*absent.png.* as a picture"),
        ((tmp_path / "text",), "cannot read .*text.* as a picture"),
        ((tmp_path / "cut.png",), "cannot read .*cut.png.* as a picture"),
        ((tmp_path / "wide.png",), "is 8193x1: at most 8192"),
        ((bomb,), "cannot read .*bomb.*exceeds limit|at most 8192"),
        ((files["picture"], files["other"]), "other.png' is 8x8, the picture 29x22"),
        ((files["picture"], files["empty"]), "is empty, so nothing would change"),
        ((files["picture"], "alpha"), "has nothing transparent"),
        ((files["picture"], tmp_path / "text"), "cannot read .*text"),
        ((files["picture"], None, "x"), "expand is 'x'"),
        ((files["picture"], None, "1,2"), "expand is '1,2'"),
        ((files["picture"], None, "-1"), "expand is '-1'"),
        ((files["picture"], None, "0"), "expand is '0'"),
    ]
    for arguments, says in cases:
        with pytest.raises(UserError, match=says):
            read_canvas(*arguments)
    assert read_canvas(tmp_path / "ok.png").image.shape == (1, 3, 1, 8192)


def test_pictures_of_every_mode(tmp_path: Path) -> None:
    """Greys, palettes, 16 bits and what a camera turned: each as it is seen."""
    grey16 = Pillow.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    grey16.save(tmp_path / "grey16.png")
    assert pixels_of(read_canvas(tmp_path / "grey16.png").image)[0, :, 0].tolist() == [0, 100, 255]
    palette = Pillow.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png")
    assert pixels_of(read_canvas(tmp_path / "palette.png").image)[0].tolist() == [[255, 0, 0], [0, 255, 0]]
    exif = Pillow.Exif()
    exif[0x0112] = 6  # a quarter turn
    Pillow.new("RGB", (16, 8)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_canvas(tmp_path / "turned.jpg").image.shape == (1, 3, 16, 8)
