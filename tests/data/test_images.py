"""Decoding: allowed formats only, alpha on white, upright; the square that is cut out."""

import numpy as np
import pytest
from PIL import Image

from ldm.data.images import decode, square


@pytest.mark.parametrize("kind, mode", [("PNG", "P"), ("PNG", "L"), ("JPEG", "L"), ("JPEG", "CMYK"), ("WEBP", "RGB")])
def test_allowed_formats_become_rgb(encoded, kind, mode):
    found = decode(encoded(Image.new("RGB", (9, 7), (204, 204, 204)).convert(mode), kind))
    assert (found.mode, found.size) == ("RGB", (9, 7))
    assert np.abs(np.asarray(found).astype(int) - 204).max() < 4


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_alpha_is_laid_on_white(encoded, mode):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    assert np.asarray(decode(encoded(image.convert(mode))))[0, :, 0].tolist() == [255, 0]


def test_pictures_stand_upright(encoded):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    assert decode(encoded(Image.new("RGB", (20, 10)), "JPEG", exif=exif)).size == (10, 20)


@pytest.mark.parametrize("data", [b"", b"plain text"])
def test_what_is_no_picture_is_refused(data):
    with pytest.raises(ValueError, match="not a PNG, JPEG or WebP"):
        decode(data)


@pytest.mark.parametrize(
    "kind, mode, cut, message",
    [
        ("GIF", "RGB", 0, "not a PNG, JPEG or WebP"),
        ("PNG", "RGB", 200, "broken image"),
        ("JPEG", "RGB", 500, "broken image"),
        ("WEBP", "RGB", 500, "broken image"),
        ("PNG", "I;16", 0, "colours of kind I;16"),
    ],
)
def test_broken_and_foreign_pictures_are_refused(encoded, kind, mode, cut, message):
    data = encoded(Image.effect_noise((64, 64), 50).convert(mode), kind)
    with pytest.raises(ValueError, match=message):
        decode(data[: len(data) - cut])


def test_a_bomb_is_refused(encoded, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match="more pixels than is safe"):
        decode(encoded(Image.new("RGB", (50, 50))))


def test_the_square_moves_and_shrinks():
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (100, 1, 3)))
    assert [np.asarray(square(ramp, 100, x))[0, 0, 0] for x in (0.0, 0.5, 1.0)] == [0, 50, 100]
    small = np.asarray(square(ramp, 10, 0.0, 0.0)).astype(int)
    assert small.shape == (10, 10, 3)
    assert np.abs(small[0, :, 0] - (np.arange(10) * 10 + 4.5)).max() < 2
