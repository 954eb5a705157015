"""What a model can paint: requests with its defaults filled in, and a clear refusal of what cannot be."""

import math
from dataclasses import dataclass, fields, replace

from ldm.checkpoints.native import ModelSpec
from ldm.diffusion.samplers import find_sampler
from ldm.diffusion.schedules import Schedule
from ldm.errors import UserError
from ldm.request import Request
from ldm.restore import parse
from ldm.shapes import Sigmas
from ldm.text.reader import Reader

MAX_SIDE, MAX_STEPS, MAX_SEED = 8192, 1000, 2**63 - 1


@dataclass
class Limits:
    """multiple: of which width and height must be."""

    spec: ModelSpec
    schedule: Schedule
    reader: Reader
    multiple: int

    def complete(self, request: Request) -> Request:
        """Fill in the model's defaults. UserError, with the value and a remedy, for what the model cannot paint."""
        spec = self.spec
        size = {"width": spec.image_size, "height": spec.image_size}
        defaults = size | {f.name: getattr(spec.defaults, f.name) for f in fields(spec.defaults)}
        defaults |= {"sampler": "ddim"} if request.invert else {}
        r = replace(request, **{name: value for name, value in defaults.items() if getattr(request, name) is None})
        assert r.steps is not None and r.cfg_scale is not None and r.width is not None and r.height is not None
        if not r.prompt.strip():
            raise UserError("the prompt is empty: say what to paint")
        self.reader.parsed(r)
        find_sampler(str(r.sampler))
        _between("steps", r.steps, 1, MAX_STEPS)
        self.schedule.steps(r.steps, str(r.schedule))
        _between("seed", r.seed, 0, MAX_SEED)
        _between("variation seed", r.variation_seed, 0, MAX_SEED)
        if not 0 <= r.variation <= 1:
            raise UserError(f"variation is {r.variation:g}: choose between 0, this seed's noise, and 1, the other's")
        if not math.isfinite(r.cfg_scale):
            raise UserError(f"cfg scale is {r.cfg_scale}: give a number such as {spec.defaults.cfg_scale:g}")
        if r.clip_skip is not None:
            text = self.reader.conditioner.config
            _between("clip skip", r.clip_skip, 1, min(t.layers for t in (text, text.second or text)))
        self.levels(r)
        self._edits(r)
        for name, side in (("width", r.width), ("height", r.height)):
            _between(name, side, self.multiple if r.strength is None else 1, MAX_SIDE)
            if r.strength is None and side % self.multiple:
                low = side // self.multiple * self.multiple
                raise UserError(
                    f"{name} {side} is not a multiple of {self.multiple}, which this model needs: "
                    f"try {low} or {low + self.multiple}"
                )
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
        if not 1 <= r.upscale <= 8:
            raise UserError(f"upscale is {r.upscale:g}: choose between 1 and 8")
        if r.upscale > 1:
            if r.strength is not None:
                raise UserError("--upscale is of pictures from text: scale --init-image by --width and --height")
            _between("the larger side", round(max(r.width, r.height) * r.upscale), self.multiple, MAX_SIDE)
            self.levels(self.larger(r))
        if r.tile and (r.tile % self.multiple or r.tile < 2 * self.multiple):
            raise UserError(f"tile is {r.tile}: give a multiple of {self.multiple}, and twice that or more")


def _between(what: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise UserError(f"{what} is {value}: choose between {least} and {most}")
