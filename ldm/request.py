"""One picture to be made, as plain data, and its fields as the flags of a command. Imports no torch."""

import argparse
import typing
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any

from ldm.errors import UserError, whole


def _told(help: str, default: Any = None, *, least: int | None = None, group: bool = False) -> Any:
    """A field that is a flag too; least: of a whole number; group: of flags that exclude each other."""
    return field(default=default, metadata={"help": help, "least": least, "group": group})


@dataclass(frozen=True)
class Request:
    """One picture to be made. What is None is the model's own default (`Pipeline.complete` fills it in).

    seed: of all the noise of this picture. strength: of a picture to start from, the share of the steps that is done;
    None: it starts from noise alone. width and height are then those of that picture, not of a multiple.
    """

    prompt: str
    negative: str = _told("what to keep away from", "")
    seed: int = _told("seed of the first picture; the next one has the next (random)", 0)
    sampler: str | None = _told("such as euler, euler_a, dpmpp_2m; a wrong name lists all (the model's own)")
    schedule: str | None = _told("such as trailing, karras; a wrong name lists all (the model's own)")
    steps: int | None = _told("steps a picture; Heun and DPM2 evaluate the network twice in each (the model's own)")
    cfg_scale: float | None = _told("how strongly to follow the prompt (the model's own)")
    width: int | None = _told("pixels (the model's own, or the first picture's)")
    height: int | None = _told("pixels (the model's own, or the first picture's)")
    clip_skip: int | None = _told("read the text tower's n-th layer from the end (the model's own)")
    guidance: str | None = _told("rescale:0.7, apg, cfgpp, interval:0.3-5, threshold:0.995-3, with + (the model's own)")
    plain_prompt: bool = _told("take prompts as they stand, without (weights:1.2), [from:to:0.5], AND, BREAK", False)
    variation: float = _told("how far to go towards the noise of --variation-seed, 0 to 1", 0.0)
    variation_seed: int = _told("another seed, of the first picture; the next one has the next", 0)
    strength: float | None = _told("how much of --init-image to change, above 0 to 1 (0.75; 1 under a mask)")
    invert: str = _told("what --init-image shows: start from the noise that leads to it, to change it by --prompt", "")
    restore: str = _told("undo the damage of --init-image: blur:2, small:4 or grey", "")
    upscale: float = _told("paint again at so many times the size", 1.0)
    upscale_strength: float = _told("how much to change at the larger size, above 0 to 1 (0.4)", 0.4)
    tile: int = _told("paint in windows of so many pixels that overlap, for sizes that the model does not know", 0)
    refiner_start: float | None = _told("share of the way from noise after which --refiner takes over (0.8)")

    def unguided(self) -> "Request":
        """What an inversion paints on the way up: what the picture shows, towards nothing else."""
        return replace(self, prompt=self.invert, negative="", cfg_scale=1.0, guidance="")


@dataclass(frozen=True)
class Run:
    """What a command says beside the request: which pictures, with what, and where they go."""

    prompt: tuple[str, ...] = _told("what to paint; several paint several", (), group=True)
    prompts_file: Path | None = _told("a text file, one prompt a line; with --seed, done ones are left", group=True)
    jobs: Path | None = _told("CSV or JSONL, a picture a row; done ones are left, so the command can go on", group=True)
    from_image: Path | None = _told("paint a picture again, of ours or A1111's or ComfyUI's; flags change its recipe")
    init_image: Path | None = _told("a picture to start from (PNG, JPEG, WebP)")
    mask: str | None = _told("paint only where this picture is white; `alpha`: where --init-image is transparent")
    expand: str | None = _told("pixels to paint around --init-image: 32, or LEFT,TOP,RIGHT,BOTTOM")
    model: str | None = _told("a packaged model's name, or a path (embedded)")
    vae: str = _told("another autoencoder: a file or folder, TAESD's too (the model's own)", "")
    refiner: str = _told("a second model of the same latents, such as SDXL's, that ends what the first began", "")
    lora: tuple[str, ...] = _told("adapters, each FILE or FILE:0.8", ())
    embedding: tuple[Path, ...] = _told("textual inversions; prompts name them as their files are named", ())
    control: tuple[str, ...] = _told("ControlNets and T2I-Adapters, each FILE, FILE:0.8 or FILE:0.8:0-0.5", ())
    control_image: tuple[Path, ...] = _told("the picture that steers, one for each control or one for all", ())
    control_hint: tuple[str, ...] = _told("what to draw of it first, such as canny; a wrong name lists all (none)", ())
    ip_adapter: str | None = _told("IP-Adapter, FILE or FILE:0.8, that shows --ip-image beside the prompt")
    ip_image: Path | None = _told("the picture that the result shall resemble")
    image_tower: Path | None = _told("folder of the CLIP image tower that the IP-Adapter sees by")
    wildcards: Path | None = _told("folder whose name.txt holds lines for __name__ in prompts")
    n: int = _told("pictures a prompt (1)", 1, least=1)
    batch_size: int = _told("pictures made at once (4)", 4, least=1)
    out: Path = _told("folder for the pictures (outputs)", Path("outputs"))
    grid: bool = _told("write all pictures on one sheet as well", False)
    preview: str | None = _told("file that shows the run on its way; - for the terminal")
    preview_every: int = _told("steps from one preview to the next (5)", 5, least=1)
    preview_vae: Path | None = _told("TAESD for previews (a linear map, fitted to the model)")
    device: str | None = _told("auto, cpu, cuda, cuda:1 (auto)")
    precision: str | None = _told("auto, fp32, bf16, fp16 (auto: bf16 where the device computes in it)")
    attention: str = _told("how it is computed: auto, sdpa, xformers, or sliced, for little memory (auto)", "auto")
    compile: bool = _told("compile the networks' blocks first: faster steps after a minute or two", False)
    offload: bool = _told("keep on the device only the network that works: slower, less memory", False)


def kinds(of: type) -> dict[str, type]:
    """The one type of each field's value, or of its members, beside None."""
    hints = typing.get_type_hints(of)
    return {
        name: next(k for k in typing.get_args(hint) or (hint,) if k not in (NoneType, Ellipsis))
        for name, hint in hints.items()
    }


def add_flags(parser: argparse.ArgumentParser, of: type) -> None:
    """A flag for each field of a dataclass that tells what it is; one that is not given is None."""
    told, types = [f for f in fields(of) if "help" in f.metadata], kinds(of)
    group = parser.add_mutually_exclusive_group() if any(f.metadata["group"] for f in told) else parser
    for f in told:
        kind, least = types[f.name], f.metadata["least"]
        how: dict[str, Any] = {"type": kind if least is None else whole(least)}
        if kind is bool:
            how = {"action": "store_true", "default": None}
        elif f.default == ():
            how |= {"nargs": "+", "action": "extend"}
        place = group if f.metadata["group"] else parser
        place.add_argument(f"--{f.name.replace('_', '-')}", help=f.metadata["help"], **how)


def given(flags: argparse.Namespace, of: type) -> dict[str, Any]:
    """The fields that a command line gives a value."""
    values = {f.name: getattr(flags, f.name, None) for f in fields(of) if "help" in f.metadata}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if v is not None}


def checked(run: Run) -> Run:
    """The same run. UserError where it asks for nothing, or for what does not go together."""
    if not (run.prompt or run.prompts_file or run.jobs or run.from_image):
        raise UserError('nothing to paint: give --prompt "a red apple", --prompts-file, --jobs or --from-image')
    if (run.mask or run.expand) and not run.init_image:
        raise UserError("--mask and --expand change a picture: give it as --init-image")
    if bool(run.control) != bool(run.control_image):
        raise UserError("--control and --control-image go together: the network, and the picture that it is shown")
    if len({run.ip_adapter is None, run.ip_image is None, run.image_tower is None}) > 1:
        raise UserError("--ip-adapter, --ip-image and --image-tower go together: give all three")
    if run.offload and (run.control or run.ip_adapter):
        raise UserError("--offload does not go with --control or --ip-adapter: their networks stay where they are")
    if run.offload and run.compile:
        raise UserError("--offload does not go with --compile, which is made for where a network stays: leave one out")
    if run.jobs and (run.from_image or run.grid or run.n > 1):
        raise UserError("--jobs says itself what each picture is: give it without --from-image, --n and --grid")
    return run
