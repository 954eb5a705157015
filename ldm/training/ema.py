"""The moving averages of weights, of which the first is sampled from and exported.

Exponential (Polyak & Juditsky 1992), or by powers of time (Karras et al. 2024, arXiv:2312.02696, Sec. 3).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.files import replacing
from ldm.training.config import EmaConfig
from ldm.training.posthoc import exponent
from ldm.training.sharding import copied


class Ema:
    """fp32 shadows of parameters: shadow += (1 - decay_t) (parameter - shadow), one for each width or one in all."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: EmaConfig) -> None:
        self.names, self.config = list(parameters), config
        self.parameters: list[Tensor] = list(parameters.values())
        self.exponents = [exponent(width) for width in config.widths]
        self.shadows = [[p.detach().clone().float() for p in self.parameters] for _ in config.widths or (0,)]

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
                continue
            difference = torch._foreach_sub([p.detach() for p in self.parameters], shadow)
            torch._foreach_mul_(difference, weight)
            torch._foreach_add_(shadow, difference)

    def tensors(self) -> dict[str, Tensor]:
        """The shadows by name, to be saved and to be filled."""
        return {
            f"{index}.{name}": value
            for index, shadow in enumerate(self.shadows)
            for name, value in zip(self.names, shadow, strict=True)
        }

    def write(self, folder: Path, step: int, *, keep: bool = True) -> None:
        """Keep the averages as they are after `step` updates, in fp16, for `posthoc.reconstruct`; see `copied`."""
        tensors = {name: value.half().contiguous() for name, value in copied(self.tensors(), keep=keep).items()}
        if not keep:
            return
        folder.mkdir(exist_ok=True)
        with replacing(folder / f"{step:08d}.safetensors") as temporary:
            save_file(tensors, temporary, {"widths": " ".join(map(str, self.config.widths))})

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the parameters hold the first average; the memory of both is swapped, nothing is copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        shadow = self.shadows[0]
        for index, parameter in enumerate(self.parameters):
            parameter.data, shadow[index] = shadow[index], parameter.data
