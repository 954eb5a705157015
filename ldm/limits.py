"""What a model can paint: requests with its defaults filled in, and a clear refusal of what cannot be."""

import math
from dataclasses import dataclass, fields, replace

import torch

from ldm.checkpoints.native import ModelSpec
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.samplers import find_sampler
from ldm.diffusion.schedules import Schedule
from ldm.diffusion.spacings import TRAIN_STEPS
from ldm.errors import UserError
from ldm.request import Request
from ldm.restore import parse
from ldm.shapes import Sigmas
from ldm.text.reader import Reader

MAX_SIDE, MAX_STEPS, MAX_SEED, MAX_SCALE = 8192, 1000, 2**63 - 1, 1e6
REFINER_START = 0.8  # SDXL's makers'


@dataclass
class Limits:
    """multiple: of which width and height must be; refined: whether a second model takes over (see `joined`)."""

    spec: ModelSpec
    schedule: Schedule
    reader: Reader
    multiple: int
    refined: bool = False

    def joined(self, refiner: "Limits") -> "Limits":
        """Of this model with another that goes on with its latents. UserError where that one cannot."""

        def latents(spec: ModelSpec) -> str:
            a = spec.autoencoder
            mean, std = (", ".join(f"{x:.4g}" for x in values) for values in (a.mean, a.std))
            return f"latents of {a.z_channels} channels, {a.factor} pixels a cell, mean {mean}, deviation {std}"

        ours, theirs = latents(self.spec), latents(refiner.spec)
        if ours != theirs:
            raise UserError(f"the refiner reads {theirs}; the model makes {ours}: give one of the same")
        assert refiner.spec.backbone
        if refiner.spec.backbone.in_channels > refiner.spec.backbone.out_channels:
            raise UserError("the refiner is an inpainting model, which would have to be shown a mask: give another")
        return replace(self, multiple=math.lcm(self.multiple, refiner.multiple), refined=True)

    def complete(self, request: Request) -> Request:
        """Fill in the model's defaults. UserError, with the value and a remedy, for what the model cannot paint."""
        spec = self.spec
        size = {"width": spec.image_size, "height": spec.image_size}
        defaults = size | {f.name: getattr(spec.defaults, f.name) for f in fields(spec.defaults)}
        defaults |= {"sampler": "ddim"} if request.invert else {}
        defaults |= {"refiner_start": REFINER_START} if self.refined else {}
        r = replace(request, **{name: value for name, value in defaults.items() if getattr(request, name) is None})
        assert r.steps is not None and r.cfg_scale is not None and r.width is not None and r.height is not None
        if not r.prompt.strip():
            raise UserError("the prompt is empty: say what to paint")
        self.reader.parsed(r)
        find_sampler(str(r.sampler))
        _between("steps", r.steps, 1, MAX_STEPS)
        _between("seed", r.seed, 0, MAX_SEED)
        _between("variation seed", r.variation_seed, 0, MAX_SEED)
        _between("variation", r.variation, 0, 1)
        _between("cfg scale", r.cfg_scale, -MAX_SCALE, MAX_SCALE)
        if r.clip_skip is not None:
            _between("clip skip", r.clip_skip, 1, min(t.layers for t in self.reader.conditioner.config.towers))
        Guidance(r.guidance or "", r.cfg_scale, self.levels(r))
        self._edits(r)
        for name, side in (("width", r.width), ("height", r.height)):
            _between(name, side, self.multiple if r.strength is None else 1, MAX_SIDE)
            if r.strength is None and side % self.multiple:
                low = side // self.multiple * self.multiple
                wanted = f"a multiple of {self.multiple}, which this model needs: try {low} or {low + self.multiple}"
                raise UserError(f"{name} {side} is not {wanted}")
        return r

    def levels(self, r: Request) -> Sigmas:
        """The noise levels of a run: all, or the last ones where it starts from a picture. UserError where none are."""
        assert r.steps and r.schedule
        sigmas = self.schedule.steps(r.steps, r.schedule)
        if r.strength is None:
            return sigmas
        if not 0 < r.strength <= 1:
            raise UserError(f"strength is {r.strength:g}: choose above 0, little changes, to 1, all does")
        count = int(r.steps * r.strength)
        if count == 0:
            raise UserError(f"strength {r.strength:g} of {r.steps} steps leaves none to do: give more steps")
        return sigmas[r.steps - count :]

    def larger(self, r: Request) -> Request:
        """The second pass of a request that wants an upscale: from the first one's picture, at the larger size."""
        assert r.width and r.height
        width, height = (round(side * r.upscale / self.multiple) * self.multiple for side in (r.width, r.height))
        return replace(r, width=width, height=height, upscale=1.0, strength=r.upscale_strength)

    def _edits(self, r: Request) -> None:
        """UserError for edits that cannot be, or not together."""
        assert r.width and r.height
        if r.restore:
            parse(r.restore)
        if r.invert and (r.sampler not in ("ddim", "euler") or r.restore):
            raise UserError(f"an inversion goes back by ddim or euler, not {r.sampler}: give --sampler ddim alone")
        _between("upscale", r.upscale, 1, 8)
        if r.upscale > 1:
            if r.strength is not None:
                raise UserError("--upscale is of pictures from text: scale --init-image by --width and --height")
            _between("the larger side", round(max(r.width, r.height) * r.upscale), self.multiple, MAX_SIDE)
            self.levels(self.larger(r))
        if r.refiner_start is not None:
            self._refiner(r, r.refiner_start)
        if r.tile and (r.tile % self.multiple or r.tile < 2 * self.multiple):
            raise UserError(f"tile is {r.tile}: give a multiple of {self.multiple}, and twice that or more")

    def handover(self, r: Request) -> float:
        """The noise level below which the second model works: as diffusers counts, by the training's steps."""
        assert r.refiner_start is not None
        step = torch.tensor(round(TRAIN_STEPS - TRAIN_STEPS * r.refiner_start), dtype=torch.float64)
        return float(self.schedule.at(step)) * (1 - 1e-6)  # levels are fp32 where they are compared

    def _refiner(self, r: Request, start: float) -> None:
        if not self.refined:
            raise UserError(f"refiner start is {start:g}: give the model that then takes over as --refiner")
        if not 0 < start < 1:
            raise UserError(f"refiner start is {start:g}: choose between 0 and 1, such as {REFINER_START:g}")
        if r.invert:
            raise UserError("an inversion goes back by one model: leave --refiner out")
        if float(self.levels(r)[-2]) > self.handover(r):
            what = f"refiner start {start:g} leaves none of {r.steps} steps to the refiner"
            raise UserError(f"{what}: give more steps, or an earlier start")


def _between(what: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise UserError(f"{what} is {value}: choose between {least} and {most}")
