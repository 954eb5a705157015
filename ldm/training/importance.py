"""Noise levels drawn as often as their losses vary (Nichol & Dhariwal 2021, Sec. 3.3).

Bins of the unit interval (`Schedule.quantile`) are drawn in proportion to the root of their mean squared loss; dividing
a loss by its density keeps the expectation what it was.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.training.learner import summed

MEMORY = 10  # losses that a bin remembers, and must have seen before anything is drawn by them
FLOOR = 0.001  # share of draws that stays uniform, so that no density is 0


class Importance(nn.Module):
    """The memory of the losses: buffers, so that checkpoints hold it. The same on all processes, however many."""

    square: Tensor  # mean squared loss of each bin
    seen: Tensor  # how many losses that was
    pending: Tensor  # sums of squares and counts of the step in hand: a step is drawn by those before it alone

    def __init__(self, bins: int = 100) -> None:
        super().__init__()
        self.step = -1
        for name, shape in (("square", (bins,)), ("seen", (bins,)), ("pending", (2, bins))):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))

    def draw(self, u: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Even numbers in (0, 1) as numbers of the density learned before `step`, and that density at them."""
        if step != self.step:
            self.step = step
            self._remember()
        shares = self.shares()
        ends = shares.cumsum(0)
        bin = torch.searchsorted(ends, u.double()).clamp(max=len(shares) - 1)
        inside = ((u.double() - ends[bin]) / shares[bin] + 1).clamp(0, 1 - 1e-9)
        return ((bin + inside) / len(shares)).to(u.dtype), (shares[bin] * len(shares)).to(u.dtype)

    def shares(self) -> Tensor:
        even = torch.full_like(self.square, 1 / len(self.square))
        root = self.square.sqrt()
        learned = (1 - FLOOR) * root / root.sum().clamp(min=1e-30) + FLOOR * even
        return torch.where((self.seen >= MEMORY).all() & (root.sum() > 0), learned, even)

    @torch.no_grad()
    def see(self, u: Tensor, losses: Tensor) -> None:
        """Note the losses of samples at `u`, of all processes; those that are not finite do not count."""
        bins, good = len(self.square), losses.isfinite()
        member = F.one_hot((u.double() * bins).long().clamp(max=bins - 1), bins).double()
        squares = torch.where(good, losses, 0).double() ** 2
        self.pending += summed(torch.stack([squares, good.double()]) @ member)

    def _remember(self) -> None:
        squares, counts = self.pending
        self.seen += counts
        rate = (counts / self.seen.clamp(1, MEMORY)).clamp(max=1)
        self.square += rate * (squares / counts.clamp(min=1) - self.square)
        self.pending.zero_()
