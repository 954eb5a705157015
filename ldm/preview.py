"""A picture of a run on its way, cheap enough for every few steps, to a file or the terminal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor

from ldm import images
from ldm.errors import UserError
from ldm.files import replacing
from ldm.models.autoencoder import Autoencoder
from ldm.models.taesd import TinyAutoencoder
from ldm.shapes import Image, Latent

Look = Callable[[Latent], Image]


@torch.no_grad()
def projection(autoencoder: Autoencoder | TinyAutoencoder, cells: int = 16, samples: int = 8) -> Look:
    """The linear map from a latent cell to its colour, by least squares on what the decoder makes of smooth noise.

    Pictures are of a pixel for each cell.
    """
    rng, weight = torch.Generator().manual_seed(0), next(autoencoder.parameters())
    z = autoencoder.config.z_channels
    coarse = [torch.randn((samples, z, side, side), generator=rng) for side in (2, 4, cells)]
    grown = [F.interpolate(part, (cells, cells), mode="bilinear") for part in coarse]
    latent = torch.stack(grown).sum(0) / len(grown) ** 0.5
    colours = F.avg_pool2d(autoencoder.decode(latent.to(weight)).float().cpu().clamp(-1, 1), autoencoder.factor)
    rows = latent.movedim(1, -1).reshape(-1, z)
    known = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
    fitted = torch.linalg.lstsq(known.double(), colours.movedim(1, -1).reshape(-1, 3).double()).solution.float()

    def look(latents: Latent) -> Image:
        mixed = torch.einsum("bchw,cd->bdhw", latents.float(), fitted[:-1].to(latents.device))
        return mixed + fitted[-1].to(latents.device).view(1, 3, 1, 1)

    return look


class Preview:
    """Shows every `every`-th step of a run: in a PNG that is replaced each time, or on the terminal ("-")."""

    def __init__(self, look: Look, file: str, every: int, console: Any) -> None:
        self.look, self.file, self.every, self.console = look, file, every, console

    def __call__(self, number: int, x0: Latent) -> None:
        if number % self.every:
            return
        sheet = images.grid(images.to_pixels(self.look(x0)))[0]
        if self.file == "-":
            self.console.print(blocks(sheet))
            return
        scale = max(1, 256 // max(sheet.shape[:2]))
        large = sheet.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
        try:
            with replacing(Path(self.file)) as temporary:
                temporary.write_bytes(images.png(large))
        except OSError as error:
            raise UserError(f"cannot write a preview to {self.file!r}: {error.strerror}") from None


def blocks(pixels: UInt8[Tensor, "h w 3"], width: int = 64) -> Any:
    """A picture for a terminal: two pixels, one above the other, in each letter's place."""
    from rich.text import Text

    step = max(1, -(-pixels.shape[1] // width))
    rows = pixels[::step, ::step].tolist()
    rows += [rows[-1]] * (len(rows) % 2)
    text = Text()
    for top, bottom in zip(rows[::2], rows[1::2], strict=True):
        for (r, g, b), (s, h, c) in zip(top, bottom, strict=True):
            text.append("▀", style=f"#{r:02x}{g:02x}{b:02x} on #{s:02x}{h:02x}{c:02x}")
        text.append("\n")
    return text
