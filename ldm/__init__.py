"""ldm: a latent-diffusion text-to-image toolkit (Rombach et al. 2022, arXiv:2112.10752)."""

__version__ = "0.1.0"
