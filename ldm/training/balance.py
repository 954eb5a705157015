"""The weight of the adversarial loss, from the gradients of a whole step."""

import torch
from torch import Tensor, nn

from ldm.models.discriminator import adaptive_weight
from ldm.training.learner import summed


class Balance(nn.Module):
    """VQGAN's adaptive weight of the step before: the same in all parts of a batch and on all processes.

    Buffers, so that checkpoints hold it. In the first step the weight is 0.
    """

    weight: Tensor
    pending: Tensor  # sums over the parts and processes of the step in hand, of both gradients

    def __init__(self, last_layer: Tensor) -> None:
        super().__init__()
        self.step = -1
        self.register_buffer("weight", torch.zeros(()))
        self.register_buffer("pending", torch.zeros(2, *last_layer.shape))

    def at(self, step: int) -> Tensor:
        """The weight of a step, a scalar without gradient."""
        if step != self.step:
            self.step = step
            self.weight.copy_(adaptive_weight(*self.pending))
            self.pending.zero_()
        return self.weight

    def see(self, rec: Tensor, gan: Tensor) -> None:
        """Note the gradients of both losses at the last layer; those that are not finite do not count."""
        both = torch.stack([rec, gan]).detach().float()
        self.pending += summed(torch.where(both.isfinite().all(), both, 0.0))
