"""Each stage of a preparation on one picture: what it drops, what it changes, what it tells."""

import collections
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile

from ldm.data.options import PrepareConfig
from ldm.data.stages import Record, choosing, making, run


def make(data: bytes, columns=None, **options) -> tuple[Record, str]:
    """The record after all stages, and why it was dropped, if it was."""
    config = PrepareConfig("", **{"size": 20, **options})
    columns = {"captions": ["a cat"], **(columns or {})}
    stages = {**choosing(config, ["photos"]), **making(config)}
    record, dropped = run(stages, Record("photos", "1", data, columns, (0, 0)), collections.Counter())
    return record, str(dropped or "")


def pixels(record: Record) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(record.data)).convert("RGB")).astype(int)


def sizes(record: Record) -> dict[str, int]:
    return dict(record.sizes)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_bytes_that_fit_are_kept(picture, kind):
    data = picture(0, (20, 25), kind)
    kept, _ = make(data)
    assert (kept.suffix, kept.data, kept.notes) == (kind.lower().replace("jpeg", "jpg"), data, ("bytes kept",))
    forced, _ = make(data, format="webp", quality=80)
    assert (forced.suffix, forced.data != data, forced.notes) == ("webp", True, ("encoded",))


@pytest.mark.parametrize("form, kind", [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), (None, "WEBP")])
def test_others_are_resized_to_the_shorter_side(picture, form, kind):
    record, _ = make(picture(0, (50, 80)), format=form)
    image = Image.open(io.BytesIO(record.data))
    assert (record.suffix, image.format, image.size) == (form or "webp", kind, (32, 20))
    assert sizes(record) == {
        "original_width": 80, "original_height": 50, "width": 32, "height": 20, "crop_top": 0, "crop_left": 0
    }  # fmt: skip
    assert make(picture(0, (10, 10)))[0].notes == ("enlarged", "encoded")


@pytest.mark.parametrize(
    "resize, shape, size, crop, left",
    [
        ("square", (40, 80), (20, 20), (0, 10), 0.25),
        ("square", (80, 40), (20, 20), (10, 0), 0.0),
        ("none", (40, 80), (80, 40), (0, 0), 0.0),
    ],
)
def test_where_a_picture_is_cut(encoded, resize, shape, size, crop, left):
    """A ramp from left to right shows by its first column what was cut off."""
    ramp = np.tile(np.linspace(0, 255, shape[1]).astype(np.uint8)[None, :, None], (shape[0], 1, 3))
    record, _ = make(encoded(Image.fromarray(ramp)), resize=resize, format="png")
    assert Image.open(io.BytesIO(record.data)).size == size == (record.sizes["width"], record.sizes["height"])
    assert (record.sizes["crop_top"], record.sizes["crop_left"]) == crop
    assert abs(pixels(record)[0, 0, 0] - 255 * left) < 8


def test_a_picture_goes_to_the_bucket_of_its_shape(encoded):
    record, _ = make(encoded(Image.new("RGB", (1200, 800))), resize="buckets", size=1024)
    assert (record.bucket, sizes(record)) == (
        "1216x832",
        {"original_width": 1200, "original_height": 800, "width": 1216, "height": 832, "crop_top": 0, "crop_left": 16},
    )
    fits, _ = make(encoded(Image.new("RGB", (1216, 832))), resize="buckets", size=1024)
    assert (fits.notes, fits.bucket) == (("bytes kept",), "1216x832")
    coarse, _ = make(encoded(Image.new("RGB", (1200, 800))), resize="buckets", size=512, bucket_step=128)
    assert coarse.bucket == "640x384"


def test_the_size_before_an_earlier_preparation_is_kept(picture):
    record, _ = make(picture(0, (50, 80)), {"original_width": 4000, "original_height": 2500})
    assert (record.sizes["original_width"], record.sizes["original_height"], record.sizes["width"]) == (4000, 2500, 32)
    odd, _ = make(picture(0, (50, 80)), {"original_width": "4000", "original_height": 2500})
    assert odd.sizes["original_width"] == 80


def test_quality_is_a_choice(picture):
    low, high = (len(make(picture(0, (64, 64)), quality=q)[0].data) for q in (20, 95))
    assert low < high / 2


@pytest.mark.parametrize("background, expected", [("white", [255] * 3), ("#102030", [16, 32, 48])])
def test_alpha_is_laid_on_a_colour(encoded, background, expected):
    record, _ = make(encoded(Image.new("RGBA", (20, 20), (0, 0, 0, 0))), background=background, format="png")
    assert pixels(record)[0, 0].tolist() == expected
    assert record.notes == ("alpha laid on the background", "encoded")


def test_turned_pictures_stand_upright_in_every_number(encoded):
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = np.zeros((40, 60, 3), np.uint8)
    wide[:, :10] = 255  # the left side, which comes to lie on top
    record, _ = make(encoded(Image.fromarray(wide), "JPEG", exif=exif), format="png")
    assert sizes(record) == {
        "original_width": 40, "original_height": 60, "width": 20, "height": 30, "crop_top": 0, "crop_left": 0
    }  # fmt: skip
    assert pixels(record)[0].min() > 200 and pixels(record)[-1].max() < 50
    assert "turned upright" in record.notes
    large, _ = make(encoded(Image.fromarray(np.repeat(np.repeat(wide, 8, 0), 8, 1)), "JPEG", exif=exif), format="png")
    assert pixels(large).shape == (30, 20, 3) and pixels(large)[0].min() > 200


def swapped() -> bytes:
    """A profile in which green stands where red stands in sRGB: read right, pure red turns green."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    table = {bytes(profile[at : at + 4]): at for at in range(132, 132 + 12 * profile[131], 12)}
    red, green = table[b"rXYZ"], table[b"gXYZ"]
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile).replace(b"s\0R\0G\0B", b"t\0e\0s\0t")


@pytest.mark.parametrize(
    "mode, kind", [("RGB", "JPEG"), ("RGB", "PNG"), ("RGBA", "PNG"), ("RGB", "WEBP"), ("P", "PNG")]
)
def test_colours_are_brought_to_srgb(encoded, mode, kind):
    red = Image.new("RGB", (20, 20), (255, 0, 0)).convert(mode)
    record, _ = make(encoded(red, kind, icc_profile=swapped()), format="png")
    r, g, b = pixels(record)[10, 10]
    assert g > 240 and r < 40 and b < 40
    assert "colours brought to sRGB" in record.notes


@pytest.mark.parametrize("profile", [ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), b"broken"])
def test_other_profiles_change_nothing(encoded, profile):
    data = encoded(Image.new("RGB", (20, 20), (255, 0, 0)), "PNG", icc_profile=profile)
    assert make(data)[0].notes == ("bytes kept",)


def test_large_jpegs_are_decoded_small_and_look_the_same(encoded):
    x, y = np.meshgrid(np.linspace(0, 6, 640), np.linspace(0, 4, 400))
    smooth = np.stack([127 + 120 * np.sin(x + c) * np.cos(y * c) for c in range(3)], -1).astype(np.uint8)
    seen = []
    for kind in ("JPEG", "PNG"):
        record, _ = make(encoded(Image.fromarray(smooth), kind, quality=95), format="png", size=40)
        seen.append(pixels(record))
        seen_size = record.pixels.size
    assert seen[0].shape == (40, 64, 3) and seen_size == (64, 40)
    assert np.abs(seen[0] - seen[1]).max() < 8


@pytest.mark.parametrize(
    "shape, options, why",
    [
        ((10, 41), {}, "longer than 4:1: 41 x 10"),
        ((10, 41), {"max_aspect": 5.0}, ""),
        ((10, 20), {"max_aspect": 1.5}, "longer than 1.5:1: 20 x 10"),
        ((31, 40), {"min_size": 32}, "smaller than 32: 40 x 31"),
        ((32, 40), {"min_size": 32}, ""),
        ((50, 41), {"max_megapixels": 0.002}, "more than 0.002 megapixels: 41 x 50"),
        ((50, 40), {"max_megapixels": 0.002}, ""),
    ],
)
def test_limits(picture, shape, options, why):
    assert make(picture(0, shape), **options)[1] == why


def test_a_bomb_is_never_decoded(encoded, monkeypatch):
    data = bytearray(encoded(Image.new("1", (8, 8))))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    data[16:24] = struct.pack(">II", 10_000, 10_000)  # what the header says
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    assert make(bytes(data))[1] == "more than 89 megapixels: 10000 x 10000"


def test_formats_are_a_choice(picture, encoded):
    gif = encoded(Image.new("RGB", (30, 30), "red"), "GIF")
    assert make(gif)[1] == "not a PNG, JPEG or WebP image"
    record, _ = make(gif, formats=("GIF",))
    assert (record.suffix, pixels(record).shape) == ("webp", (20, 20, 3))
    assert make(picture(0, (30, 30)), formats=("GIF", "JPEG"))[1] == "not a GIF or JPEG image"
    assert make(encoded(Image.new("RGB", (20, 20)), "GIF"), formats=("GIF",))[0].notes == ("encoded",)


def test_broken_pictures_are_dropped(picture):
    data = picture(0, (64, 64), "JPEG")
    assert make(data[:-500])[1].startswith("broken image: ")
    assert make(b"no picture")[1] == "not a PNG, JPEG or WebP image"


LEFT_OUT = ("captions left out for their length",)


@pytest.mark.parametrize(
    "given, options, texts, notes",
    [
        (["a &lt;b&gt;cat&lt;/b&gt; &amp; dog"], {}, ("a cat & dog",), ("captions cleaned",)),
        (["<p>a cat</p>"], {"raw_captions": True}, ("<p>a cat</p>",), ()),
        (["cafe\u0301", "caf\u00e9"], {}, ("caf\u00e9",), ("captions cleaned",)),
        (["a", "a cat", "a very long cat"], {"min_caption": 3, "max_caption": 6}, ("a cat",), LEFT_OUT),
        (
            ["a very long cat"] * 2 + ["a cat", "cats"],
            {"max_caption": 6, "max_captions": {"": 1}},
            ("a cat",),
            LEFT_OUT,
        ),
    ],
)
def test_captions(picture, given, options, texts, notes):
    record, _ = make(picture(0, (20, 20)), {"captions": given}, **options)
    assert (record.captions, record.notes[:-1]) == (texts, notes)


@pytest.mark.parametrize(
    "given, options, why",
    [
        ([" ", "<br>"], {}, "no caption"),
        (["a very long cat"], {"max_caption": 6}, "no caption of an allowed length"),
        (["a dog"], {"match": "cat$"}, "no caption that matches"),
    ],
)
def test_captions_that_drop_a_picture(picture, given, options, why):
    assert make(picture(0), {"captions": given}, **options)[1] == why
