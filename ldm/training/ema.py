"""The moving averages of weights, of which the first is sampled from and exported.

Exponential (Polyak & Juditsky 1992), or by powers of time (Karras et al. 2024, arXiv:2312.02696, Sec. 3): an average by
the power g of time t, over training until T, weighs the weights of t by p(t) = (g + 1) t^g / T^(g + 1). The combination
of kept ones whose profile is nearest to one more gives an average of any width after training.
"""

from collections.abc import Mapping
from itertools import accumulate, groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ldm.checkpoints.files import SafeFile, save
from ldm.errors import UserError
from ldm.training.config import EmaConfig
from ldm.training.sharding import copied

Profile = tuple[float, float]  # (T, g)
PART = 2**24  # numbers that an update on a GPU takes at once: their differences need memory


class Ema:
    """fp32 shadows of parameters: shadow += (1 - decay_t) (parameter - shadow), one for each width or one in all."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: EmaConfig) -> None:
        self.names, self.config = list(parameters), config
        self.parameters: list[Tensor] = list(parameters.values())
        self.exponents = [exponent(width) for width in config.widths]
        self.shadows = [[p.detach().clone().float() for p in self.parameters] for _ in config.widths or (0,)]
        parts = enumerate(end // PART for end in accumulate(p.numel() for p in self.parameters))
        self.parts = [[i for i, _ in part] for _, part in groupby(parts, key=lambda pair: pair[1])]

    def decays(self, step: int) -> list[float]:
        """The decay of each shadow at update `step`, the first being 0: short at first, to forget the start."""
        if self.exponents:
            return [(1 - 1 / (step + 1)) ** (power + 1) for power in self.exponents]
        return [min(self.config.decay, (1 + step) / (10 + step)) if self.config.warmup else self.config.decay]

    @torch.no_grad()
    def update(self, step: int, alive: Tensor) -> None:
        """Move towards the parameters; `alive` is a scalar tensor, 0 where nothing may move."""
        for shadow, decay in zip(self.shadows, self.decays(step), strict=True):
            weight = alive * (1 - decay)
            if weight.device.type == "cpu":  # a number costs no wait here, and takes one pass
                torch._foreach_lerp_(shadow, self.parameters, float(weight))
            else:
                self.move(shadow, weight)

    def move(self, shadow: list[Tensor], weight: Tensor) -> None:
        """Move one by a weight that stays on its device, in parts: the differences are nowhere all at once."""
        for part in self.parts:
            own = [shadow[i] for i in part]
            difference = torch._foreach_sub([self.parameters[i].detach() for i in part], own)
            torch._foreach_mul_(difference, weight)
            torch._foreach_add_(own, difference)
            del difference

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{index}.{name}": value
            for index, shadow in enumerate(self.shadows)
            for name, value in zip(self.names, shadow, strict=True)
        }

    def write(self, folder: Path, step: int, *, keep: bool = True) -> None:
        """Keep the averages as they are after `step` updates, in fp16, for `reconstruct`; see `copied`."""
        tensors = {name: value.half() for name, value in copied(self.tensors(), keep=keep).items()}
        if keep:
            save(folder / f"{step:08d}.safetensors", tensors, {"widths": " ".join(map(str, self.config.widths))})


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
    opened = {number: SafeFile(path) for number, path in files.items()}
    kept = [(n, i, width) for n, file in opened.items() for i, width in enumerate(file.metadata["widths"].split())]
    profiles: list[Profile] = [(number, exponent(float(text))) for number, _, text in kept]
    shares = coefficients(profiles, (last, exponent(width)))
    average: dict[str, Tensor] = {}
    for number, file in opened.items():
        own = {str(i): share for (at, i, _), share in zip(kept, shares, strict=True) if at == number}
        for entry in file.entries:
            index, name = entry.split(".", 1)
            part = own[index] * file.tensor(entry).float()
            average[name] = average[name] + part if name in average else part
    return average, last
