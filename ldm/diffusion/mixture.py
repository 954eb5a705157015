"""Gaussian mixtures, whose denoiser is known in closed form: what solvers are proven and drawn on."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """Isotropic Gaussians in d dimensions: means (k, d), deviations (k,), weights (k,)."""

    means: Float[Tensor, "k d"]
    deviations: Float[Tensor, " k"]
    weights: Float[Tensor, " k"]

    def __call__(self, x: Float[Tensor, "b d"], sigma: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """E[x0 | x] at x = x0 + sigma * eps: each component's posterior mean, weighted by its share in x."""
        spread = self.deviations**2 + sigma[:, None] ** 2  # (b, k)
        apart = x[:, None] - self.means  # (b, k, d)
        log_share = self.weights.log() - spread.log() * self.means.shape[1] / 2 - apart.square().sum(2) / (2 * spread)
        pull = self.deviations**2 / spread
        return (log_share.softmax(1)[..., None] * (self.means + pull[..., None] * apart)).sum(1)

    def sample(self, n: int, rng: torch.Generator) -> Float[Tensor, "n d"]:
        """n clean samples."""
        which = torch.multinomial(self.weights, n, replacement=True, generator=rng)
        noise = torch.randn((n, self.means.shape[1]), generator=rng, dtype=self.means.dtype)
        return self.means[which] + self.deviations[which, None] * noise


def ring(k: int = 6, radius: float = 1.5, deviation: float = 0.2) -> Mixture:
    """k equal Gaussians on a circle in the plane, float64."""
    angle = torch.arange(k, dtype=torch.float64) * (2 * torch.pi / k)
    ones = torch.ones(k, dtype=torch.float64)
    return Mixture(torch.stack([angle.cos(), angle.sin()], 1) * radius, ones * deviation, ones / k)
