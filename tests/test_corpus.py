"""The corpus from packages, on made-up ones: names, captions, colours, pictures; and the drawing of 3D models."""

import hashlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from corpus.packages import SOURCES, build, colour_word, fetch
from corpus.renders import Mesh, pose, read_mesh, views
from ldm.data.images import laid_on
from ldm.errors import UserError

CUBE = """mtllib m.mtl
v -1 -1 -1\nv 1 -1 -1\nv 1 1 -1\nv -1 1 -1\nv -1 -1 1\nv 1 -1 1\nv 1 1 1\nv -1 1 1
vt 0 0\nvt 1 0\nvt 1 1\nvt 0 1
usemtl front
f 5/1 6/2 7/3 8/4
usemtl back
f -8 -7 -6 -5
usemtl side
f 1 5 8 4\nf 2 6 7 3\nf 4 3 7 8\nf 1 2 6 5
"""
MATERIALS = "newmtl front\nKd 1 1 1\nmap_Kd t.png\nnewmtl back\nKd 0 0 1\nnewmtl side\nKd 0 1 0\n"


def disc(colour: str, size: int = 64, margin: int = 4) -> Image.Image:
    image = Image.new("RGBA", (size, size))
    ImageDraw.Draw(image).ellipse((margin, margin, size - margin, size - margin), colour)
    return image


def saved(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def unicode_lists(tmp_path: Path) -> Path:
    listed = [
        {"hexcode": "1F34E", "label": "apple", "group": 4},
        {"hexcode": "2764-FE0F", "label": "red heart", "group": 0},
        {"hexcode": "1F1E6", "label": "regional indicator A"},
        {"hexcode": "1F3FB", "label": "light skin tone", "group": 2},
    ]
    for name, data in (
        ("emojibase-data/package/en/data.json", listed),
        ("emojilib/package/dist/emoji-en-US.json", {"\U0001f34e": ["apple", "red_apple", "fruit"]}),
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(json.dumps(data))
    return tmp_path


def catalogue(folder: Path, obj: str = CUBE) -> Path:
    path = folder / "sweethome3d-furniture/usr/share/sweethome3d/furniture/Test-CC-0.sh3f"
    path.parent.mkdir(parents=True)
    texture = Image.new("RGB", (2, 2), "red")
    texture.putpixel((0, 0), (255, 255, 0))  # the upper left corner is yellow
    entry = "name#1=D\\u00e9 90\\u00b0\nmodel#1=/d/c.obj\ncategory#1=Toy\ncreator#1=Ann\n"
    entry += "width#1=2\nheight#1=2\ndepth#1=2\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("PluginFurnitureCatalog.properties", entry)
        archive.writestr("d/c.obj", obj)
        archive.writestr("d/m.mtl", MATERIALS)
        archive.writestr("d/t.png", png(texture))
    return path


def cube(folder: Path) -> Mesh:
    with zipfile.ZipFile(catalogue(folder)) as archive:
        return read_mesh(archive, "d/c.obj")


def test_emoji_have_unicodes_names(unicode_lists: Path) -> None:
    assets = unicode_lists / "@lobehub/fluent-emoji-3d/package/assets"
    for code in ("1f34e", "2764", "1f1e6", "1f3fb", "1f34e-1f3fb"):
        saved(disc("red"), assets / f"{code}.webp")
    rows = list(build("fluent_emoji", unicode_lists, 1))
    assert [row["id"] for row in rows] == ["fluent_emoji/1f34e", "fluent_emoji/2764"]
    apple = rows[0]
    assert apple["captions"] == ["apple", "an apple, 3d emoji", "3d emoji of apple", "red apple", "fruit"]
    assert (apple["colour"], apple["licence"], apple["attribution"]) == ("red", "MIT", "Microsoft")
    image = Image.open(io.BytesIO(apple["image"]))
    assert (image.format, image.mode, image.size) == ("WEBP", "RGB", (128, 128))
    assert np.asarray(image)[0, 0].min() > 250  # on white


def test_svg_is_drawn(unicode_lists: Path) -> None:
    pytest.importorskip("resvg_py")
    folder = unicode_lists / "@twemoji/svg/package"
    folder.mkdir(parents=True)
    drawing = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 36 36"><circle cx="18" cy="18" r="18" fill="#00f"/></svg>'
    )
    (folder / "1f34e.svg").write_text(drawing)
    (row,) = build("twemoji", unicode_lists, 1)
    assert row["colour"] == "blue" and row["captions"][1] == "an apple, flat emoji" and row["licence"] == "CC-BY-4.0"


def test_clipart_is_named_cut_and_kept_once(tmp_path: Path) -> None:
    root, drawings = (tmp_path / f"openclipart-{kind}/usr/share/openclipart/{kind}" for kind in ("png", "svg"))
    saved(disc("green", size=300, margin=100), root / "plants/tree_01.png")
    saved(disc("green", size=300, margin=100), root / "plants/trees/tree_01.png")
    saved(disc("blue"), root / "food/red-plum_2.png")
    saved(disc("blue", size=200, margin=90), root / "food/tiny.png")
    saved(disc("blue", size=100), root / "computer/screen.png")
    (root / "food/broken.png").write_bytes(b"no picture")
    saved(Image.new("1", (30_000, 3_000)), root / "food/vast.png")
    (drawings / "plants").mkdir(parents=True)
    title = "<dc:title>Clipart by A B - Old  Oak &amp; leaf</dc:title><rdf:li>Tree</rdf:li><rdf:li>HASH(0x8)</rdf:li>"
    (drawings / "plants/tree_01.svg").write_text(f"<svg>{title}</svg>")
    plum, oak = build("clipart", tmp_path, 1)
    assert (plum["id"], plum["name"]) == ("clipart/food/red-plum_2", "red plum")
    assert oak["captions"] == ["old oak & leaf", "clipart of old oak & leaf", "tree"]
    assert (np.asarray(Image.open(io.BytesIO(oak["image"]))).min(-1) < 200).mean() > 0.7  # cut to the disc: pi / 4


def test_models_are_drawn_from_eight_sides(tmp_path: Path) -> None:
    catalogue(tmp_path)
    rows = list(build("renders", tmp_path, 2))
    assert [row["id"] for row in rows] == [f"renders/Test-CC-0/1/{k}" for k in range(8)]
    assert rows[0]["captions"] == ["dé", "a 3d render of a dé", "toy"]
    assert (rows[0]["licence"], rows[0]["attribution"]) == ("CC0-1.0", "Ann")
    assert [rows[k]["colour"] for k in (2, 4)] == ["green", "blue"]


def test_front_texture_and_frame(tmp_path: Path) -> None:
    front = np.asarray(next(views(cube(tmp_path))))
    assert front.shape == (128, 128, 4)
    rows, columns = np.nonzero(front[..., 3])
    assert max(np.ptp(rows), np.ptp(columns)) in range(120, 128)
    upper_left, lower_right = front[45, 20], front[110, 105]
    assert upper_left[1] > 100 and lower_right[1] < 20 and lower_right[0] > 100  # yellow, red
    assert (front[45:120, 20:108, 3] == 255).all()  # no holes


def test_pose_turns_then_stretches(tmp_path: Path) -> None:
    turn = np.array([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])
    mesh = pose(cube(tmp_path), turn, (4.0, 2.0, 1.0))
    assert np.ptp(mesh.corners.reshape(-1, 3), axis=0) == pytest.approx([4, 2, 1])
    first = np.asarray(next(views(mesh)))[90, 64]
    assert first[1] > 100 and first[0] < 20  # the green side is in front now


def test_a_broken_model_is_left_out(tmp_path: Path) -> None:
    catalogue(tmp_path, "v 0 0 0\n")
    assert list(build("renders", tmp_path, 1)) == []


def test_glass_lets_half_through(tmp_path: Path) -> None:
    solid = cube(tmp_path)
    glass = [type(m)(m.colour, 0.5, m.texture) for m in solid.materials]
    picture = np.asarray(next(views(Mesh(solid.corners, solid.uv, solid.material, glass))))
    assert 0.4 < picture[60:120, 20:108, 3].mean() / 255 < 0.6


@pytest.mark.parametrize(
    ("colour", "word"),
    [
        *[("#d01010", "red"), ("#ff9010", "orange"), ("#ffcc4d", "yellow"), ("#20a030", "green"), ("#1040d0", "blue")],
        *[("#8020c0", "purple"), ("#f080b0", "pink"), ("#6b4020", "brown"), ("#109a9a", "teal")],
        *[("#101010", "black"), ("#808080", "grey"), ("#e8e8e8", "white")],
    ],
)
def test_colour_words(colour: str, word: str) -> None:
    assert colour_word(laid_on(disc(colour), "white")) == word


def test_no_word_where_no_colour_is_clear() -> None:
    half = disc("red")
    half.paste(disc("blue").crop((0, 0, 32, 64)), (0, 0))
    assert colour_word(laid_on(half, "white")) == ""
    assert colour_word(Image.new("RGB", (8, 8), "white")) == ""
    assert colour_word(laid_on(disc("red", margin=30), "white")) == ""  # under 1 % of the picture


def test_order_and_rows_do_not_depend_on_workers(unicode_lists: Path) -> None:
    for code in ("1f34e", "2764"):
        saved(disc("red"), unicode_lists / f"@lobehub/fluent-emoji-3d/package/assets/{code}.webp")
    digests = [hashlib.sha256(repr(list(build("fluent_emoji", unicode_lists, n))).encode()).digest() for n in (1, 2)]
    assert digests[0] == digests[1]


def test_fetch_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm is not there"):
        fetch("twemoji", tmp_path)
    with pytest.raises(UserError, match="apt-get is not there"):
        fetch("renders", tmp_path)


def test_fetch_unpacks_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools, packages = tmp_path / "tools", tmp_path / "packages"
    tools.mkdir()
    npm = '#!/bin/sh\nmkdir package; echo "$3" > package/name; tar -czf p.tgz package; rm -r package\n'
    (tools / "npm").write_text(npm)
    (tools / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    fetch("twemoji", packages)
    assert (packages / "@twemoji/svg/package/name").read_text() == SOURCES["twemoji"].npm[0] + "\n"
    assert not list(packages.rglob("*.partial")) and not list(packages.rglob("*.tgz"))
    (tools / "npm").write_text("#!/bin/sh\necho no network >&2; exit 1\n")
    fetch("twemoji", packages)  # all is there
    with pytest.raises(UserError, match=r"@lobehub/fluent-emoji-3d@1\.1\.0` failed: no network"):
        fetch("fluent_emoji", packages)
    assert not (packages / "@lobehub/fluent-emoji-3d").exists()
