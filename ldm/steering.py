"""Pictures that steer a run: ControlNets and T2I-Adapters by hints, IP-Adapters by what is in a picture."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from PIL import Image as Pillow

from ldm.adapters import hints
from ldm.checkpoints.native import Model
from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.editing import by_step
from ldm.diffusion.guidance import Conditional
from ldm.errors import UserError
from ldm.families.control import load_control
from ldm.families.ip_adapter import load_image_tower, load_ip_adapter
from ldm.images import read_picture, to_image
from ldm.models.controlnet import Controlled, ControlNet, Steering, T2IAdapter
from ldm.shapes import Sigmas


@dataclass(frozen=True)
class Control:
    """A network, the picture whose hint it is shown, and the share of the run, from start to end, that it steers."""

    path: Path
    network: ControlNet | T2IAdapter
    picture: Pillow.Image
    hint: str = "none"
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def steps(self, n: int) -> list[int]:
        """Those of a run of n that it steers; UserError where there are none."""
        steered = [i for i in range(n) if i >= self.start * n and i + 1 <= self.end * n]
        if not steered:
            raise UserError(f"control from {self.start:g} to {self.end:g} holds none of the {n} steps: widen it")
        return steered

    def steering(self, size: tuple[int, int]) -> Steering:
        """For pictures of size (height, width)."""
        weight = next(self.network.parameters())
        scaled = to_image(self.picture.resize(size[::-1], Pillow.Resampling.LANCZOS))
        drawn = hints.draw(self.hint, scaled).to(weight)[:, : self.network.hint_channels]
        return Steering(self.network, drawn, self.weight)


def controlled(
    denoiser: Conditional, controls: Sequence[Control], sigmas: Sigmas, size: tuple[int, int]
) -> Conditional:
    """The denoiser of one run, its network under controls. size: (height, width) of its pictures."""
    if not controls:
        return denoiser
    assert isinstance(denoiser, Denoiser)
    n = len(sigmas) - 1
    steps, steerings = [c.steps(n) for c in controls], [c.steering(size) for c in controls]

    @cache
    def under(*active: bool) -> Denoiser:
        network = Controlled(denoiser.backbone, list(compress(steerings, active)))  # type: ignore[arg-type]
        return Denoiser(network, denoiser.prediction, denoiser.schedule)

    return by_step(sigmas, [under(*(i in steered for steered in steps)) for i in range(n)])


def read_controls(
    model: Model, specs: Sequence[str], pictures: Sequence[Path], drawn: Sequence[str] = ()
) -> list[Control]:
    """specs: FILE, FILE:WEIGHT or FILE:WEIGHT:START-END each; a picture and a hint for each, or one for all.

    UserError where they differ in number, cannot be read, or are for another model.
    """
    assert model.backbone is not None
    weight = model.backbone.conv_in.weight
    controls, factor = [], model.autoencoder.factor
    shown, hinted = _each("control-image", pictures, specs), _each("control-hint", drawn or ["none"], specs)
    for spec, picture, hint in zip(specs, shown, hinted, strict=True):
        path, strength, start, end = parse(spec)
        network = load_control(path, model.backbone.config, weight.device, weight.dtype)
        if isinstance(network, ControlNet) and network.factor != factor:
            what = f"{network.factor} times as large as latents, this model's are {factor} times"
            raise UserError(f"{str(path)!r} reads hints {what}")
        if hint != "none" and hint not in hints.HINTS:
            hints.draw(hint, torch.zeros(1, 3, 8, 8))  # which says what is known
        controls.append(Control(path, network, read_picture(picture), hint, strength, start, end))
    return controls


def parse(spec: str) -> tuple[Path, float, float, float]:
    """The file, weight, start and end of FILE[:WEIGHT[:START-END]]. UserError for what is not that."""
    head, *rest = spec.rsplit(":", 2) if spec.count(":") > 1 else spec.rsplit(":", 1)
    try:
        weight = float(rest[0]) if rest else 1.0
        start, end = (float(x) for x in rest[1].split("-")) if len(rest) > 1 else (0.0, 1.0)
    except ValueError:
        raise UserError(f"cannot read {spec!r}: write FILE, FILE:0.8 or FILE:0.8:0-0.5") from None
    if not math.isfinite(weight) or not 0 <= start < end <= 1:
        raise UserError(f"{spec!r}: needs a finite weight, and a range within 0-1 that is not empty")
    return Path(head), weight, start, end


def _each(flag: str, given: Sequence[Any], specs: Sequence[str]) -> list[Any]:
    """One of `given` for each spec."""
    if len(given) not in (1, len(specs)):
        what = f"--{flag} has {len(given)} values for {len(specs)} controls"
        raise UserError(f"{what}: give one for each, or one for all")
    return [*given] if len(given) == len(specs) else [given[0]] * len(specs)


Show = Callable[[Conditioning, Conditioning], tuple[Conditioning, Conditioning]]


def read_picture_prompt(model: Model, path: Path, weight: float, picture: Path, tower: Path) -> Show:
    """Put an IP-Adapter into a model, seeing a picture through CLIP's image tower in a folder.

    Returned is what lays the picture behind what is wanted, and none behind the rest.
    """
    assert model.backbone is not None
    device = model.backbone.conv_in.weight.device
    adapter = load_ip_adapter(path, model.backbone, device)
    eye = load_image_tower(tower, device)
    if (seen := eye.config.projection) != (wide := adapter.projection.proj.in_features):
        raise UserError(f"{str(path)!r} reads embeddings of {wide} numbers, {str(tower)!r} gives {seen}: another tower")
    adapter.inject(model.backbone, weight)
    with torch.no_grad():
        embedding = eye(to_image(read_picture(picture)).to(device))
    return lambda cond, uncond: (adapter.show(cond, embedding), adapter.show(uncond, torch.zeros_like(embedding)))
