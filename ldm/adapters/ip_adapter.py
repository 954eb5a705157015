"""IP-Adapter (Ye et al. 2023, arXiv:2308.06721): a picture as a prompt, through keys and values of its own.

The picture's tokens stand behind the text's in `Conditioning.tokens`; each attention to the text splits them off.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.models.attention import Attention, TransformerBlock
from ldm.models.unet import UNet
from ldm.shapes import Tokens, Vector


class Projection(nn.Module):
    """The embedding of a picture as `tokens` tokens of the text's width."""

    def __init__(self, embedding: int, context_dim: int, tokens: int = 4) -> None:
        super().__init__()
        self.tokens = tokens
        self.proj = nn.Linear(embedding, tokens * context_dim)
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, embedding: Vector) -> Tokens:
        return self.norm(self.proj(embedding).unflatten(1, (self.tokens, -1)))


class Reader(nn.Module):
    """In place of an attention to the text: attends to the picture too, with its own keys and values (Eq. 5)."""

    def __init__(self, attn: Attention, keys: nn.Linear, values: nn.Linear, tokens: int, weight: float) -> None:
        super().__init__()
        self.attn, self.keys, self.values = attn, keys, values
        self.tokens, self.weight = tokens, weight

    def forward(
        self, x: Float[Tensor, "b l d"], context: Float[Tensor, "b m e"], mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b l d"]:
        """context: the text's tokens and then the picture's; mask: of the text's alone."""
        text, picture = context[:, : -self.tokens], context[:, -self.tokens :]

        def split(y: Tensor) -> Tensor:
            return y.unflatten(2, (self.attn.heads, -1)).transpose(1, 2)

        attend, q = self.attn.attend, split(self.attn.to_q(x))
        visible = None if mask is None else mask[:, None, None, : text.shape[1]]
        read = attend(q, split(self.attn.to_k(text)), split(self.attn.to_v(text)), visible)
        read = read + self.weight * attend(q, split(self.keys(picture)), split(self.values(picture)))
        return self.attn.to_out(read.transpose(1, 2).flatten(2))


class IPAdapter(nn.Module):
    """A projection and, for each attention to the text in the order down, up, middle, keys and values."""

    def __init__(self, unet: UNet, embedding: int, tokens: int = 4) -> None:
        super().__init__()
        context_dim = unet.config.context_dim
        self.projection = Projection(embedding, context_dim, tokens)
        widths = [block.attn2.to_q.out_features for block in _places(unet)]
        self.keys = nn.ModuleList(nn.Linear(context_dim, width, bias=False) for width in widths)
        self.values = nn.ModuleList(nn.Linear(context_dim, width, bias=False) for width in widths)

    def inject(self, unet: UNet, weight: float = 1.0) -> "Worn":
        """Let a UNet see pictures, until `eject`; from then on every condition must be `show`n one."""
        places = _places(unet)
        own = [block.attn2 for block in places]
        for block, keys, values in zip(places, self.keys, self.values, strict=True):
            block.attn2 = Reader(block.attn2, keys, values, self.projection.tokens, weight)  # type: ignore[assignment, arg-type]
        return Worn(places, own)

    def show(self, cond: Conditioning, embedding: Vector) -> Conditioning:
        """A condition with a picture's embedding (b, embedding) behind its text; of zeros for none, as in training."""
        tokens = self.projection(embedding.to(self.projection.proj.weight.dtype)).to(cond.tokens.dtype)
        return replace(cond, tokens=torch.cat([cond.tokens, tokens.expand(len(cond), -1, -1)], dim=1))


class Worn(NamedTuple):
    """An adapter in a UNet: the blocks that it is in, and what stood there."""

    places: Sequence[TransformerBlock]
    own: Sequence[Attention]

    def eject(self) -> None:
        """Give the UNet its own attention back, the very same."""
        for block, attn in zip(self.places, self.own, strict=True):
            block.attn2 = attn


def _places(unet: UNet) -> list[TransformerBlock]:
    parts = nn.ModuleList([*unet.down, *unet.up, unet.mid])
    return [module for module in parts.modules() if isinstance(module, TransformerBlock)]
