"""Averages of weights of any width, put together after training from those that were kept.

After Karras et al. 2024 (arXiv:2312.02696), Sec. 3.2: an average by the power g of time t, over training until T,
weighs the weights of t by p(t) = (g + 1) t^g / T^(g + 1). The combination of such profiles that is nearest to one more,
in least squares over t, combines the averages.
"""

from pathlib import Path

import numpy as np
from torch import Tensor

from ldm.checkpoints.files import SafeFile
from ldm.errors import UserError

Profile = tuple[float, float]  # (T, g)


def exponent(width: float) -> float:
    """The power of time whose profile has this deviation as a share of T: the root of Eq. 3 of the paper."""
    share = width**-2
    return float(np.roots([1, 7, 16 - share, 12 - share]).real.max())


def inner(a: Profile, b: Profile) -> float:
    """The integral over t of the product of two profiles."""
    (first, g), (second, h) = a, b
    early = min(first, second)
    return (g + 1) * (h + 1) / (g + h + 1) * (early / first) ** (g + 1) * (early / second) ** (h + 1) / early


def coefficients(kept: list[Profile], wanted: Profile) -> list[float]:
    """How much of each profile makes up the wanted one, in least squares."""
    products = np.array([[inner(a, b) for b in kept] for a in kept])
    found: list[float] = np.linalg.lstsq(products, np.array([inner(a, wanted) for a in kept]), rcond=1e-13)[0].tolist()
    return found


def reconstruct(folder: Path, width: float, step: int = 0) -> tuple[dict[str, Tensor], int]:
    """The average of a width after `step` updates (0: the last kept), fp32 by name, and the step.

    UserError where the folder holds no averages, or none so early.
    """
    if not 0 < width < 0.28:
        raise UserError(f"the width is {width}: needs a share of the training between 0 and 0.28")
    files = {int(path.stem): path for path in sorted(folder.glob("[0-9]*.safetensors"))}
    last = step or max(files, default=0)
    files = {number: path for number, path in files.items() if number <= last}
    if not files:
        raise UserError(
            f"{str(folder)!r} holds no averages until step {last}: train with --run.ema.widths and snapshot_every"
        )
    kept = [
        (number, index, exponent(float(text)))
        for number, path in files.items()
        for index, text in enumerate(_widths(path))
    ]
    shares = coefficients([(number, power) for number, _, power in kept], (last, exponent(width)))
    average: dict[str, Tensor] = {}
    for number, path in files.items():
        own = {str(i): share for (at, i, _), share in zip(kept, shares, strict=True) if at == number}
        file = SafeFile(path)
        for entry in file.entries:
            index, name = entry.split(".", 1)
            part = own[index] * file.tensor(entry).float()
            average[name] = average[name] + part if name in average else part
    return average, last


def _widths(path: Path) -> list[str]:
    return SafeFile(path).metadata.get("widths", "").split()
