"""The exponential moving average of weights that is sampled from and exported (Polyak & Juditsky 1992)."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ldm.training.config import EmaConfig


class Ema:
    """An fp32 shadow of parameters: shadow += (1 - decay_t) (parameter - shadow)."""

    def __init__(self, parameters: Iterable[nn.Parameter], config: EmaConfig) -> None:
        self.parameters: Sequence[nn.Parameter] = list(parameters)
        self.shadow = [p.detach().clone().float() for p in self.parameters]
        self.config = config

    def decay(self, step: int) -> float:
        """Decay of update number `step`, the first being 0: short at first, so that the start is forgotten."""
        return min(self.config.decay, (1 + step) / (10 + step)) if self.config.warmup else self.config.decay

    @torch.no_grad()
    def update(self, step: int, alive: Tensor) -> None:
        """Move towards the parameters; `alive` is a scalar tensor, 0 where nothing may move."""
        difference = torch._foreach_sub([p.detach() for p in self.parameters], self.shadow)
        torch._foreach_mul_(difference, alive * (1 - self.decay(step)))
        torch._foreach_add_(self.shadow, difference)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the parameters hold the average; the memory of both is swapped, nothing is copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for index, parameter in enumerate(self.parameters):
            parameter.data, self.shadow[index] = self.shadow[index], parameter.data
