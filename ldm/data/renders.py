"""Pictures of 3D models (Wavefront OBJ in a zip catalogue) from all sides: a z-buffer over points, in numpy.

Every triangle is sown with points that lie closer than pixels, and the nearest point of each pixel is kept. That is slower
than a real rasteriser and a tenth of its code.
"""

import posixpath
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
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
            at = [_index(corner[0], len(points), 1) for corner in face]
            on = [_index(corner[1] or "0", len(uv), 0) for corner in face]
            corners += [(at[0], at[i], at[i + 1]) for i in range(1, len(at) - 1)]  # a fan
            coordinates += [(on[0], on[i], on[i + 1]) for i in range(1, len(on) - 1)]
            used += [current] * (len(at) - 2)
    if not corners:
        raise ValueError(f"{path} holds no faces")
    materials = [named.get(name, Material()) for name in order]
    return Mesh(np.array(points)[corners], np.array(uv)[coordinates], np.array(used), materials)


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
    triangle, weights = _sow(pixels)
    point = np.einsum("nk,nkd->nd", weights, pixels[triangle])
    x, y = point[:, :2].clip(0, size - 1).astype(int).T
    opacity = np.array([m.opacity for m in mesh.materials])[mesh.material[triangle]]
    shown = (opacity > 0.6) | ((opacity > 0.1) & ((x + y) % 2 == 0))  # glass: every other point
    # Nearest point of each pixel: depth in the high bits, the point's number in the low ones
    near = ((point[:, 2] - point[:, 2].min()) * 1024).astype(np.int64) << 32 | np.arange(len(point))
    nearest = np.full(size * size, -1)
    np.maximum.at(nearest, (y * size + x)[shown], near[shown])
    hit = nearest >= 0
    winner = nearest[hit] & 0xFFFFFFFF
    out = np.zeros((size * size, 4), np.uint8)
    out[hit, :3] = 255 * _colours(mesh, triangle[winner], weights[winner]) * _shade(corners)[triangle[winner], None]
    out[hit, 3] = 255
    return Image.fromarray(out.reshape(size, size, 4))


def _sow(triangles: Float[np.ndarray, "t 3 3"]) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n 3"]]:
    """Points less than a pixel apart: the triangle of each, and its weights of the three corners."""
    flat = triangles[..., :2]
    longest = np.linalg.norm(flat - np.roll(flat, 1, axis=1), axis=-1).max(1)
    steps = 2 ** np.ceil(np.log2(1 + 1.5 * longest)).astype(int)
    which, weights = [], []
    for step in np.unique(steps):
        i, j = np.mgrid[: step + 1, : step + 1].reshape(2, -1)
        grid = np.stack([i, j, step - i - j], 1)[i + j <= step] / step
        index = np.flatnonzero(steps == step)
        which.append(np.repeat(index, len(grid)))
        weights.append(np.tile(grid, (len(index), 1)))
    return np.concatenate(which), np.concatenate(weights)


def _shade(corners: np.ndarray) -> np.ndarray:
    """Brightness of each triangle, of whichever side is seen."""
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normal *= np.where(normal[:, 2:] < 0, -1, 1) / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
    return 0.4 + 0.6 * (normal @ _LIGHT).clip(0)


def _colours(mesh: Mesh, triangle: np.ndarray, weights: np.ndarray) -> np.ndarray:
    colour = np.array([m.colour for m in mesh.materials])[mesh.material[triangle]]
    uv = np.einsum("nk,nkd->nd", weights, mesh.uv[triangle])
    for index, material in enumerate(mesh.materials):
        if (texture := material.texture) is not None:
            mine = mesh.material[triangle] == index
            u, v = (uv[mine] % 1).T
            height, width = texture.shape[:2]
            colour[mine] = texture[((1 - v) * (height - 1)).astype(int), (u * (width - 1)).astype(int)]
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
    """An OBJ index, which may count from the end, as one into our list whose entry 1 stands at 1 - first."""
    number = int(text)
    return count + number if number < 0 else number - first
