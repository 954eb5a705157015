"""Gradient checkpointing: less memory for one more forward pass (Chen et al. 2016, arXiv:1604.06174)."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from ldm.models import autoencoder, layers, unet

BLOCKS = (unet.Block, layers.Middle, autoencoder.Stage)


def recompute(network: nn.Module) -> None:
    """Keep what goes into each block of a network, and compute the inside again when the gradient comes back."""
    for block in network.modules():
        if isinstance(block, BLOCKS):
            again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
            block.forward = again  # type: ignore[method-assign]
