"""The shapes that public signatures speak of: b batch, c channels, h w pixels or latents, l tokens, d width."""

from jaxtyping import Bool, Float, Int
from torch import Tensor

Image = Float[Tensor, "b 3 H W"]  # in [-1, 1]; H = h * factor
Latent = Float[Tensor, "b c h w"]  # normalised: about zero mean and unit deviation
Sigma = Float[Tensor, " b"]  # noise level of each sample, x = x0 + sigma * eps
Sigmas = Float[Tensor, " n"]  # falling noise levels of one run
Tokens = Float[Tensor, "b l d"]  # hidden states of the text
TokenMask = Bool[Tensor, "b l"]  # True where attention may look
TokenIds = Int[Tensor, "b l"]
Vector = Float[Tensor, "b v"]
