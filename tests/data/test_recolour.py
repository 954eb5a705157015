"""Recolouring: what a preparation paints has the colour that its captions say, and nothing else of it changes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ldm.data.options import PrepareConfig
from ldm.data.prepare import prepare
from ldm.data.recolour import PAINTS, another, painted
from ldm.data.shards import Shards
from ldm.errors import UserError


def disc(colour: str) -> Image.Image:
    """A disc of a colour on white, with a black middle."""
    image = Image.new("RGB", (32, 32), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((4, 4, 27, 27), colour)
    draw.ellipse((13, 13, 18, 18), "black")
    return image


@pytest.mark.parametrize("colour", ["#d02026", "#2040c0", "#808080", "#402000"])
@pytest.mark.parametrize("paint", PAINTS)
def test_most_of_a_thing_gets_the_paint_and_black_and_white_stay(colour: str, paint: str):
    pixels = np.asarray(painted(disc(colour), paint)).astype(int)
    assert abs(pixels[8, 16] - PAINTS[paint]).max() <= 1
    assert (pixels[0, 0] == 255).all() and (pixels[15, 15] == 0).all()


def test_shades_stay_in_their_order():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None, :, None].repeat(8, 0).repeat(3, 2))
    shades = np.asarray(painted(ramp, "blue")).astype(int).sum(2)[0]
    assert (np.diff(shades) >= 0).all() and shades[0] == 0 and shades[-1] == 3 * 255


def test_the_colour_is_another_one_and_follows_from_the_key():
    names = [another("red", str(n)) for n in range(200)]
    assert set(names) == PAINTS.keys() - {"red"}
    assert names == [another("red", str(n)) for n in range(200)]


@pytest.fixture
def things(tmp_path: Path) -> Path:
    folder = tmp_path / "things"
    folder.mkdir()
    rows = [("apple", "red"), ("car", "grey"), ("cloud", "white"), ("flag", ""), ("green heart", "blue")]
    about = [{"file_name": f"{n}.png", "text": f"my {n}", "name": n, "colour": c} for n, c in rows]
    for name, colour in rows:
        disc(colour or "teal").save(folder / f"{name}.png")
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, about)))
    return folder


def run(things: Path, out: Path, **options: object) -> dict[str, dict]:
    settings = {"size": 32, "format": "png", "templates": ("a {name}", "a {colour} {name}"), **options}
    prepare([str(things)], PrepareConfig(str(out), **settings), lambda done, total: None)
    shards = Shards(str(out))
    found = [shards.sample(0, n) for n in range(shards.counts[0])]
    return {one.about()["name"]: {**one.about(), "image": one.image} for one in found}


def test_a_preparation_paints_what_it_says(things: Path, tmp_path: Path):
    seen = set()
    for seed in range(4):
        found = run(things, tmp_path / str(seed), recolour=seed)
        assert found.keys() == {"apple", "car"}  # white, none, and a name that is itself a colour are left out
        for name, before in (("apple", "red"), ("car", "grey")):
            about = found[name]
            assert about["colour"] in PAINTS and about["colour"] != before
            article = "an" if about["colour"] == "orange" else "a"
            assert about["captions"] == [f"{article} {about['colour']} {name}"]
            (tmp_path / "one.png").write_bytes(about["image"])
            assert np.asarray(Image.open(tmp_path / "one.png"))[8, 16] == pytest.approx(PAINTS[about["colour"]], abs=1)
            seen.add((name, about["colour"]))
    assert len(seen) > 4  # a seed paints in its own way


def test_recolouring_needs_a_caption_that_says_the_colour(things: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"recolour 1 needs a caption template with \{colour\}"):
        run(things, tmp_path / "out", recolour=1, templates=("a {name}",))
