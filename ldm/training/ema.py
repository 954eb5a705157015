"""The moving averages of weights, of which the first is sampled from and exported.

Exponential (Polyak & Juditsky 1992), or by powers of time (Karras et al. 2024, arXiv:2312.02696, Sec. 3).
"""

from collections.abc import Mapping
from itertools import accumulate, groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.checkpoints.files import save
from ldm.training.config import EmaConfig
from ldm.training.posthoc import exponent
from ldm.training.sharding import copied

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
        """The shadows by name, to be saved and to be filled."""
        return {
            f"{index}.{name}": value
            for index, shadow in enumerate(self.shadows)
            for name, value in zip(self.names, shadow, strict=True)
        }

    def write(self, folder: Path, step: int, *, keep: bool = True) -> None:
        """Keep the averages as they are after `step` updates, in fp16, for `posthoc.reconstruct`; see `copied`."""
        tensors = {name: value.half() for name, value in copied(self.tensors(), keep=keep).items()}
        if keep:
            save(folder / f"{step:08d}.safetensors", tensors, {"widths": " ".join(map(str, self.config.widths))})
