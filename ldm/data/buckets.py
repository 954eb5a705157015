"""Aspect-ratio buckets: sizes of about one area, of which a picture takes the one whose shape is nearest to its own.

With side 1024 and step 64 these are the sizes of SDXL (Podell et al. 2023, appendix I).
"""

import math
from collections.abc import Sequence

from ldm.errors import UserError

Size = tuple[int, int]  # width, height
_LEAST_AREA = 0.9  # of the target: SDXL's list keeps to it


def bucket_list(side: int, step: int | None = None, max_aspect: float = 4.0) -> list[Size]:
    """All (width, height) in multiples of `step` with 0.9 to 1 times the area of side x side, tallest first.

    The step is side / 16 unless given, and at least 8. UserError where no size fits.
    """
    step = step or max(8, side // 16)
    sides = range(step, int(side * max_aspect**0.5) + 1, step)
    found = [
        (w, h)
        for w in sides
        for h in sides
        if _LEAST_AREA * side**2 < w * h <= side**2 and max(w, h) <= max_aspect * min(w, h)
    ]
    if not found:
        raise UserError(f"no bucket of about {side} x {side} pixels has sides in steps of {step}: give a smaller step")
    return sorted(found, key=lambda size: (size[0] / size[1], size))


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket of the nearest shape; of two of one shape, the larger."""
    shape = math.log(size[0] / size[1])
    return min(buckets, key=lambda b: (round(abs(math.log(b[0] / b[1]) - shape), 9), -b[0] * b[1]))


def cover(size: Size, target: Size) -> tuple[Size, Size]:
    """(size, (left, top)) of a picture that is scaled to cover the target, and of the target at its centre."""
    scale = max(target[0] / size[0], target[1] / size[1])
    scaled = max(target[0], round(size[0] * scale)), max(target[1], round(size[1] * scale))
    return scaled, ((scaled[0] - target[0]) // 2, (scaled[1] - target[1]) // 2)
