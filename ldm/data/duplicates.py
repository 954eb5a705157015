"""Which pictures are there twice: by their bytes, or by their looks. Of each kind the first in source order stays.

Looks are a perceptual hash (the signs of 64 low DCT frequencies of the brightness, Zauner 2010) and the mean colours of
the four quarters, which the hash does not see: a red heart is no duplicate of a blue one. The decision is a pure
function of all the pictures' prints in source order, so that no split of the work changes it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm.data.order import Ints

PRINT = np.dtype([("source", "i8"), ("row", "i8"), ("digest", "S32"), ("hash", "u8"), ("colours", "u1", 12)])
SIDE = 64  # pixels that are enough to tell looks by
_COLOURS_APART = 24  # of 255: quarters that differ more are other pictures
_BITS = 64
_ROWS = 512  # of pairs compared at a time


def look(image: Image.Image) -> tuple[int, list[int]]:
    """The perceptual hash and the colours of an RGB picture."""
    from imagehash import phash

    small = image.resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=2.0)
    bits = np.packbits(phash(small).hash)
    return int.from_bytes(bits.tobytes(), "big"), list(small.resize((2, 2), Image.Resampling.BOX).tobytes())


def judged(prints: NDArray[Any], distance: int | None) -> tuple[Ints, NDArray[Any]]:
    """For each of n PRINTs the first that it is one of, which stays, and what they share, "" where it stays itself.

    distance: in bits of their hashes, of those that look alike; None: only the same bytes count.
    """
    _, earliest, which = np.unique(prints["digest"], return_index=True, return_inverse=True)
    first = earliest[which].astype(np.int64)
    kinds = np.where(first == np.arange(len(first)), "", "same bytes").astype(object)
    if distance is not None:
        kept = np.flatnonzero(kinds == "")
        similar = kept[_alike(prints["hash"][kept], prints["colours"][kept], distance)]
        first[kept] = similar
        kinds[kept[similar != kept]] = "looks alike"
    return first, kinds


def _alike(hashes: NDArray[np.uint64], colours: NDArray[np.uint8], distance: int) -> Ints:
    """For each picture, in order, the first earlier one that stays and looks alike, or its own number: it stays.

    Hashes at most `distance` bits apart agree on one of distance + 1 bands whole, so that only those of one band are
    compared. Those that look quite the same are one to begin with, so that a million blank pages cost nothing.
    """
    prints = np.concatenate([hashes[:, None].view(np.uint8).reshape(len(hashes), 8), colours], axis=1)
    _, first, which = np.unique(prints, axis=0, return_index=True, return_inverse=True)
    kept = np.sort(first)
    near: dict[int, int] = {}
    for later, earlier in _pairs(hashes[kept], colours[kept].astype(np.int16), distance):
        if earlier not in near:
            near.setdefault(later, earlier)
    stays = np.arange(len(kept))
    stays[list(near)] = list(near.values())
    return kept[stays[np.searchsorted(kept, first[which.reshape(-1)])]]


def _pairs(hashes: NDArray[np.uint64], colours: NDArray[np.int16], distance: int) -> Sequence[tuple[int, int]]:
    """All (later, earlier) that look alike, in rising order."""
    edges = np.linspace(0, _BITS, distance + 2).astype(int)
    found = [np.empty((0, 2), np.int64)]
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        band = (hashes >> np.uint64(low)) & np.uint64(2 ** (high - low) - 1)
        order = np.argsort(band, kind="stable")
        ends = np.flatnonzero(np.diff(band[order])) + 1
        for group in np.split(order, ends):
            for start in range(0, len(group) if len(group) > 1 else 0, _ROWS):
                some = group[start : start + _ROWS]
                bits = np.bitwise_count(hashes[some][:, None] ^ hashes[group][None])
                later, earlier = np.nonzero((bits <= distance) & (some[:, None] > group[None]))
                pairs = np.stack([some[later], group[earlier]], 1)
                apart = np.abs(colours[pairs[:, 0]] - colours[pairs[:, 1]]).max(1, initial=0)
                found.append(pairs[apart <= _COLOURS_APART])
    return [(later, earlier) for later, earlier in np.unique(np.concatenate(found), axis=0).tolist()]
