"""The part of the corpus that may be passed on, made again from packages of npm and Debian.

A row is a picture: id, image (WebP), name, captions, colour, licence, attribution. Emoji come as pictures and as SVG,
with names from Unicode's lists; clip art with the titles in its SVG metadata; 3D models are drawn from 8 sides.
"""

import hashlib
import html
import io
import itertools
import json
import re
import shutil
import subprocess
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from corpus.renders import pose, read_mesh, views
from ldm.data.images import laid_on
from ldm.errors import UserError

SIZE = 128
_ABSTRACT = {"buttons", "computer", "logos", "shapes", "signs_and_symbols", "special", "unsorted"}  # subjects left out
_PARTS = 2  # the group of skin tones and hair styles in Unicode's list; letters of flags have none
_UNTITLED = re.compile(r"symbol signs|road signs|cliparts|sibmission|^people\b|^\W*$")  # titles that say nothing
# word, condition on hue in degrees, saturation and value in [0, 1]; the first that holds
_COLOURS: tuple[tuple[str, Callable[[Any, Any, Any], Any]], ...] = (
    ("black", lambda h, s, v: v < 0.17),
    ("white", lambda h, s, v: (s < 0.15) & (v > 0.85)),
    ("grey", lambda h, s, v: s < 0.15),
    ("red", lambda h, s, v: (h < 15) | (h >= 345)),
    ("brown", lambda h, s, v: (h < 40) & (v < 0.6)),
    ("orange", lambda h, s, v: h < 40),
    ("yellow", lambda h, s, v: h < 70),
    ("green", lambda h, s, v: h < 165),
    ("teal", lambda h, s, v: h < 192),
    ("blue", lambda h, s, v: h < 260),
    ("purple", lambda h, s, v: h < 300),
    ("pink", lambda h, s, v: h < 345),
)


class Item(NamedTuple):
    """One thing to draw, and what is said of it. `draw` gives RGBA pictures by the end of their id: "", or "/0", .."""

    id: str
    draw: Callable[[], dict[str, Image.Image]]
    name: str
    captions: list[str]
    licence: str
    attribution: str


class Source(NamedTuple):
    """Packages, and the items in them once unpacked in a folder."""

    npm: tuple[str, ...]
    deb: tuple[str, ...]
    items: Callable[[Path], Iterator[Item]]


def fetch(name: str, folder: Path) -> None:
    """Download the packages of a source and unpack each in `folder`; those already there are kept.

    UserError where npm, apt-get or dpkg-deb is missing or fails.
    """
    for package in SOURCES[name].npm:
        _unpack(folder / package.rpartition("@")[0], ["npm", "pack", "--silent", package])
    for package in SOURCES[name].deb:
        _unpack(folder / package, ["apt-get", "download", "--quiet", package])


def build(name: str, folder: Path, workers: int) -> Iterator[dict[str, Any]]:
    """The rows of a source whose packages lie in `folder`, drawn by `workers` processes, in a fixed order.

    A picture that is broken or shows next to nothing is left out.
    """
    items, again = itertools.tee(SOURCES[name].items(folder))
    with ProcessPoolExecutor(workers) as pool:
        for item, pictures in zip(again, pool.map(encode, (item.draw for item in items), chunksize=4), strict=True):
            for end, (image, colour) in pictures.items():
                row = {"id": f"{name}/{item.id}{end}", "image": image, "name": item.name, "captions": item.captions}
                yield row | {"colour": colour, "licence": item.licence, "attribution": item.attribution}


def encode(draw: Callable[[], dict[str, Image.Image]]) -> dict[str, tuple[bytes, str]]:
    """WebP on white and colour word of each picture; those under 6 % ink, or that cannot be drawn, are left out."""
    found = {}
    try:
        for end, picture in draw().items():
            if np.asarray(picture.getchannel("A")).mean() > 0.06 * 255:
                flat, file = laid_on(picture, "white"), io.BytesIO()
                flat.save(file, "WEBP", quality=90, method=6)
                found[end] = (file.getvalue(), colour_word(flat))
    except UserError:
        raise
    except (OSError, KeyError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return {}
    return found


def colour_word(image: Image.Image) -> str:
    """The colour of at least 60 % of what is not white ground, or "" where there is no such colour."""
    rgb = np.asarray(image.convert("RGB"))
    seen = rgb.min(-1) < 245
    h, s, v = np.moveaxis(np.asarray(image.convert("RGB").convert("HSV"))[seen] / 255.0, -1, 0)
    words = np.select([holds(h * 360, s, v) for _, holds in _COLOURS], [word for word, _ in _COLOURS], "")
    names, counts = np.unique(words, return_counts=True)
    enough = len(counts) and counts.max() >= max(0.6 * len(words), 0.01 * seen.size)
    return str(names[counts.argmax()]) if enough else ""


def draw_picture(file: Path) -> dict[str, Image.Image]:
    """A PNG or WebP as it is."""
    return {"": _fit(_open(file))}


def draw_cut(file: Path) -> dict[str, Image.Image]:
    """A PNG or WebP cut to what is not transparent; ValueError where that is under a third of SIZE."""
    whole = _open(file)
    return {"": _fit(whole.crop(whole.getchannel("A").getbbox()), SIZE // 3)}


def draw_svg(file: Path) -> dict[str, Image.Image]:
    """An SVG, by resvg (an optional dependency)."""
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        raise UserError("SVG needs resvg: pip install resvg-py==0.5.0") from None
    return {"": _fit(Image.open(io.BytesIO(svg_to_bytes(svg_path=str(file), width=SIZE))).convert("RGBA"))}


def draw_views(archive: Path, entry: dict[str, str]) -> dict[str, Image.Image]:
    """A model of a furniture catalogue from 8 sides."""
    with zipfile.ZipFile(archive) as catalogue:
        mesh = read_mesh(catalogue, entry["model"].lstrip("/"))
    rotation = np.array(entry.get("modelRotation", "1 0 0 0 1 0 0 0 1").split(), float).reshape(3, 3)
    box = (float(entry["width"]), float(entry["height"]), float(entry["depth"]))
    return {f"/{k}": view for k, view in enumerate(views(pose(mesh, rotation, box), size=SIZE))}


def fluent_items(folder: Path) -> Iterator[Item]:
    """Microsoft's emoji as WebP."""
    for file, code, name, captions in _emoji(folder, "@lobehub/fluent-emoji-3d/package/assets/*.webp", "3d emoji"):
        yield Item(code, partial(draw_picture, file), name, captions, "MIT", "Microsoft")


def twemoji_items(folder: Path) -> Iterator[Item]:
    """Twitter's emoji as SVG."""
    for file, code, name, captions in _emoji(folder, "@twemoji/svg/package/*.svg", "flat emoji"):
        yield Item(code, partial(draw_svg, file), name, captions, "CC-BY-4.0", "Twitter, Inc and other contributors")


def clipart_items(folder: Path) -> Iterator[Item]:
    """Clip art of subjects that show things. Each picture once: the package holds some under several subjects."""
    root = folder / "openclipart-png/usr/share/openclipart/png"
    drawings = folder / "openclipart-svg/usr/share/openclipart/svg"
    seen: set[bytes] = set()
    for file in sorted(root.rglob("*.png")):
        place, digest = file.relative_to(root).with_suffix(""), hashlib.sha256(file.read_bytes()).digest()
        if place.parts[0] in _ABSTRACT or digest in seen:
            continue
        seen.add(digest)
        drawing = drawings / f"{place}.svg"
        text = drawing.read_text(errors="replace") if drawing.is_file() else ""
        title = re.search(r"<dc:title[^>]*>([^<]*)<", text)
        name = _plain(title[1]) if title else ""
        if not name or _UNTITLED.search(name):
            name = _plain(file.stem.replace("-", " "))
        tags = [tag for tag in map(_plain, re.findall(r"<rdf:li[^>]*>([^<]+)<", text)) if not tag.startswith("hash")]
        captions = _unique([name, f"clipart of {name}", *tags])[:8]
        yield Item(str(place), partial(draw_cut, file), name, captions, "public domain", "Open Clip Art Library")


def render_items(folder: Path) -> Iterator[Item]:
    """The models of Sweet Home 3D's catalogues, with the author that each entry names."""
    for catalogue in sorted((folder / "sweethome3d-furniture/usr/share/sweethome3d/furniture").glob("*.sh3f")):
        with zipfile.ZipFile(catalogue) as archive:
            text = archive.read("PluginFurnitureCatalog.properties").decode("unicode_escape")
        licence = "CC0-1.0" if catalogue.stem.endswith("CC-0") else "CC-BY-3.0"
        entries: dict[str, dict[str, str]] = {}
        for key, number, value in re.findall(r"^(\w+)#(\d+)=(.*)$", text, re.MULTILINE):
            entries.setdefault(number, {})[key] = value.strip()
        for number, entry in entries.items():
            name = _plain(entry["name"])
            captions = _unique([name, f"a 3d render of {_article(name)}", entry["category"].lower()])
            draw = partial(draw_views, catalogue, entry)
            yield Item(f"{catalogue.stem}/{number}", draw, name, captions, licence, entry["creator"])


_UNICODE = ("emojibase-data@17.0.0", "emojilib@4.0.3")
SOURCES = {
    "fluent_emoji": Source(("@lobehub/fluent-emoji-3d@1.1.0", *_UNICODE), (), fluent_items),
    "twemoji": Source(("@twemoji/svg@15.0.0", *_UNICODE), (), twemoji_items),
    "renders": Source((), ("sweethome3d-furniture",), render_items),
    "clipart": Source((), ("openclipart-png", "openclipart-svg"), clipart_items),
}


def _emoji(folder: Path, pattern: str, style: str) -> Iterator[tuple[Path, str, str, list[str]]]:
    """File, code points, name and captions of emoji; those with a skin tone or without a name are left out."""
    listed = json.loads((folder / "emojibase-data/package/en/data.json").read_text())
    names = {_code(entry["hexcode"]): entry["label"] for entry in listed if entry.get("group", _PARTS) != _PARTS}
    keywords = json.loads((folder / "emojilib/package/dist/emoji-en-US.json").read_text())
    words = {_code("-".join(f"{ord(c):x}" for c in emoji)): tags for emoji, tags in keywords.items()}
    for file in sorted(folder.glob(pattern)):
        code = _code(file.stem)
        if code in names:
            name = names[code]
            tags = [tag.replace("_", " ") for tag in words.get(code, [])[:10]]
            yield file, code, name, _unique([name, f"{_article(name)}, {style}", f"{style} of {name}", *tags])


def _code(text: str) -> str:
    """Code points in one spelling: lower case, no zeros in front, without the selector of coloured form."""
    return "-".join(p.lstrip("0") for p in text.lower().replace("_", "-").split("-") if p != "fe0f")


def _plain(text: str) -> str:
    """A title in lower case, without who made it and without what is not a word."""
    text = re.sub(r"^clipart by [^-]*- *", "", html.unescape(text).lower())
    return " ".join(re.sub(r"[_#°\d]+|\( *\)|\s-+\s", " ", text).split())


def _article(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _unique(texts: list[str]) -> list[str]:
    return list(dict.fromkeys(text for text in texts if text))


def _open(file: Path) -> Image.Image:
    """RGBA. Pillow's warning for one of the few that would fill the memory is an error here."""
    with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning), Image.open(file) as image:
        return image.convert("RGBA")


def _fit(image: Image.Image, least: int = 1) -> Image.Image:
    """A picture as large as a square of SIZE holds; ValueError where its longer side is under `least` pixels."""
    if max(image.size) < least:
        raise ValueError(f"a picture of {image.size} pixels")
    inside = ImageOps.contain(image, (SIZE, SIZE), Image.Resampling.LANCZOS)
    return ImageOps.pad(inside, (SIZE, SIZE), color=(0, 0, 0, 0))


def _unpack(target: Path, download: list[str]) -> None:
    """Run `download` in a folder beside `target` and unpack what came; the folder is renamed once it is whole."""
    if target.exists():
        return
    begun = target.with_name(target.name + ".partial")
    shutil.rmtree(begun, ignore_errors=True)
    begun.mkdir(parents=True)
    _run(download, begun)
    (archive,) = begun.iterdir()
    if archive.suffix == ".deb":
        _run(["dpkg-deb", "--extract", archive.name, "."], begun)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(begun, filter="data")
    archive.unlink()
    begun.rename(target)


def _run(command: list[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise UserError(f"{command[0]} is not there: install it, or leave out the sources that need it (--sources)")
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no message"]
        raise UserError(f"`{' '.join(command)}` failed: {lines[-1]}")
