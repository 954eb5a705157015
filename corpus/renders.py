"""Pictures of 3D models (Wavefront OBJ in a zip catalogue) from all sides: a z-buffer over points, in numpy.

Every triangle is sown with points that lie closer than pixels, and the nearest point of each pixel is kept: slower than
a rasteriser of scan lines, and far shorter.
"""

import posixpath
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

_LIGHT = np.array([-0.4, 0.6, 0.7]) / np.linalg.norm([-0.4, 0.6, 0.7])  # from the left, above and before the picture
_TILT = np.radians(20)  # the camera looks down by this
_GREY = (0.8, 0.8, 0.8)


@dataclass(frozen=True)
class Material:
    """Colour in [0, 1], opacity, and a texture (h, w, 3) that replaces the colour where there is one."""

    colour: tuple[float, ...] = _GREY
    opacity: float = 1.0
    texture: Float[np.ndarray, "h w 3"] | None = None


@dataclass(frozen=True)
class Mesh:
    """Triangles: x right, y up, z towards the viewer; texture coordinates; the material of each."""

    corners: Float[np.ndarray, "t 3 3"]
    uv: Float[np.ndarray, "t 3 2"]
    material: Int[np.ndarray, " t"]
    materials: list[Material]


def read_mesh(archive: zipfile.ZipFile, path: str) -> Mesh:
    """Read `path`.obj with its materials. KeyError or ValueError where the file is not there or broken."""
    points: list[list[float]] = []
    uv: list[list[float]] = [[0.0, 0.0]]  # 0 is "no coordinate": OBJ counts from 1
    named: dict[str, Material] = {}
    order = {"": 0}
    corners: list[tuple[int, int, int]] = []
    coordinates: list[tuple[int, int, int]] = []
    used: list[int] = []
    current = 0
    for line in archive.read(path).decode("latin-1").replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "v":
            points.append([float(x) for x in rest.split()[:3]])
        elif word == "vt":
            uv.append([float(x) for x in rest.split()[:2]])
        elif word == "mtllib":
            named |= _materials(archive, posixpath.join(posixpath.dirname(path), rest.strip()))
        elif word == "usemtl":
            current = order.setdefault(rest.strip(), len(order))
        elif word == "f":
            face = [f"{corner}/".split("/") for corner in rest.split()]
            at = [_index(corner[0], len(points), 0) for corner in face]
            on = [_index(corner[1] or "0", len(uv), 1) for corner in face]
            corners += [(at[0], at[i], at[i + 1]) for i in range(1, len(at) - 1)]  # a fan
            coordinates += [(on[0], on[i], on[i + 1]) for i in range(1, len(on) - 1)]
            used += [current] * (len(at) - 2)
    if not corners:
        raise ValueError(f"{path} holds no faces")
    materials = [named.get(name, Material()) for name in order]
    return Mesh(np.array(points)[corners], np.array(uv)[coordinates], np.array(used), materials)


def pose(mesh: Mesh, rotation: Float[np.ndarray, "3 3"], box: tuple[float, float, float]) -> Mesh:
    """Turn a mesh, then stretch it to `box`: width, height, depth."""
    corners = mesh.corners @ rotation.T
    extent = corners.max((0, 1)) - corners.min((0, 1))
    return replace(mesh, corners=corners * (np.array(box) / np.maximum(extent, 1e-9)))


def views(mesh: Mesh, count: int = 8, size: int = 128) -> Iterator[Image.Image]:
    """RGBA pictures from `count` sides, the first from the front, each filling its frame; parallel projection."""
    for k in range(count):
        turn, c, s = 2 * np.pi * k / count, np.cos(_TILT), np.sin(_TILT)
        around = np.array([[np.cos(turn), 0, np.sin(turn)], [0, 1, 0], [-np.sin(turn), 0, np.cos(turn)]])
        tilt = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
        yield _draw(mesh, mesh.corners @ (tilt @ around).T, 2 * size).resize((size, size), Image.Resampling.BOX)


def _draw(mesh: Mesh, corners: np.ndarray, size: int) -> Image.Image:
    low, high = corners.min((0, 1)), corners.max((0, 1))
    scale = 0.96 * size / max((high - low)[:2].max(), 1e-9)
    pixels = (corners - (low + high) / 2) * scale * (1, -1, 1) + (size / 2, size / 2, 0)
    # The shortest edge of a triangle goes last: slivers, which models are full of, then need few points
    edges = np.linalg.norm((np.roll(pixels, 1, 1) - np.roll(pixels, -1, 1))[..., :2], axis=-1)
    order = (edges.argmin(1)[:, None] + np.arange(3))[..., None] % 3
    triangle, weights, point = _sow(np.take_along_axis(pixels, order, 1), edges.max(1), edges.min(1))
    x, y = point[:, :2].clip(0, size - 1).astype(int).T
    opacity = np.array([m.opacity for m in mesh.materials])[mesh.material[triangle]]
    shown = (opacity > 0.6) | ((opacity > 0.1) & ((x + y) % 2 == 0))  # glass: every other point
    # Nearest point of each pixel: depth in the high bits, the point's number in the low ones
    near = ((point[:, 2] - pixels[..., 2].min() + 1) * 1024).astype(np.int64) << 32 | np.arange(len(point))
    nearest = np.zeros(size * size, np.int64)
    np.maximum.at(nearest, (y * size + x)[shown], near[shown])
    hit = nearest > 0
    winner = nearest[hit] & 0xFFFFFFFF
    uv = np.einsum("nk,nkd->nd", weights[winner], np.take_along_axis(mesh.uv, order, 1)[triangle[winner]])
    out = np.zeros((size * size, 4), np.uint8)
    out[hit, :3] = 255 * _colours(mesh, triangle[winner], uv) * _shade(corners)[triangle[winner], None]
    out[hit, 3] = 255
    return Image.fromarray(out.reshape(size, size, 4))


def _sow(corners: np.ndarray, long: np.ndarray, short: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points less than a pixel apart: the triangle of each (n,), its weights of the corners (n, 3), itself (n, 3)."""
    lengths = 1 + 1.3 * np.stack([long, short], 1)
    steps = (2 ** (np.ceil(2 * np.log2(lengths)) / 2)).astype(int)  # few sizes, so that equal ones are done at once
    which, weights, points = [], [], []
    for across, along in np.unique(steps, axis=0):
        s, t = np.mgrid[0 : 1 : (across + 1) * 1j, 0 : 1 : (along + 1) * 1j].reshape(2, -1)
        grid = np.stack([1 - s, s - s * t, s * t], 1)
        index = np.flatnonzero((steps == (across, along)).all(1))
        which.append(np.repeat(index, len(grid)))
        weights.append(np.tile(grid, (len(index), 1)))
        points.append((grid @ corners[index]).reshape(-1, 3))
    return np.concatenate(which), np.concatenate(weights), np.concatenate(points)


def _shade(corners: np.ndarray) -> np.ndarray:
    """Brightness of each triangle, of whichever side is seen."""
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normal *= np.where(normal[:, 2:] < 0, -1, 1) / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
    return (0.5 + 0.65 * (normal @ _LIGHT).clip(0)).clip(max=1)  # the front of a white thing stays white


def _colours(mesh: Mesh, triangle: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """Colour (n, 3) at texture coordinates (n, 2) of triangles (n,)."""
    colour = np.array([m.colour for m in mesh.materials])[mesh.material[triangle]]
    for index, material in enumerate(mesh.materials):
        if (texture := material.texture) is not None:
            mine = mesh.material[triangle] == index
            u, v = (uv[mine] % 1).T
            height, width = texture.shape[:2]
            rows, columns = ((1 - v) * height).astype(int).clip(max=height - 1), (u * width).astype(int)
            colour[mine] = texture[rows, columns]
    return colour


def _materials(archive: zipfile.ZipFile, path: str) -> dict[str, Material]:
    """The materials of an MTL file: Kd, d, map_Kd. A file or texture that is not there is left out."""
    found: dict[str, dict] = {}
    last: dict = {}
    text = archive.read(path).decode("latin-1") if path in archive.namelist() else ""
    for line in text.splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "newmtl":
            last = found[rest.strip()] = {}
        elif word == "Kd":
            last["colour"] = tuple(min(float(x), 1.0) for x in rest.split()[:3])
        elif word == "d":
            last["opacity"] = float(rest.split()[-1])
        elif word == "map_Kd":
            name = posixpath.join(posixpath.dirname(path), rest.strip())
            if name in archive.namelist():
                with Image.open(BytesIO(archive.read(name))) as image:
                    image.thumbnail((256, 256))
                    last["texture"] = np.asarray(image.convert("RGB")) / 255
    return {name: Material(**fields) for name, fields in found.items()}


def _index(text: str, count: int, first: int) -> int:
    """Place in a list of `count` entries, of which OBJ calls `first` number 1, or number -1 the last."""
    number = int(text)
    return count + number if number < 0 else number - 1 + first
