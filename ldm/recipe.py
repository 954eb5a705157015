"""What a picture was made from, and how it is written into the picture's own file."""

import json
import platform
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

import ldm
from ldm import config, images
from ldm.errors import UserError, reason
from ldm.foreign import A1111_SAMPLERS, a1111, comfyui, fields_of
from ldm.request import Request as Request

CHUNK = "ldm"  # the PNG text chunk that holds a Recipe as JSON
FORMAT = 1
MAX_BATCH = 256


@dataclass(frozen=True)
class Made:
    """By what a picture was made: together with the Request this decides every bit of it on one machine.

    model: a name and never a path, for a picture should not tell of the disk it was made on; model_hash: the file's
    sha256. batch, row: its place among those made at once, as the last bits of arithmetic differ with the batch's size.
    vae: the name of another autoencoder than the model's own. inputs: sha256 of what else went in, by kind.
    unfinished: how far it had come where it was stopped. program: another than this, whose settings were understood.
    """

    model: str = ""
    model_hash: str = ""
    device: str = "auto"
    precision: str = "auto"
    versions: dict[str, str] = field(default_factory=dict)
    threads: int = 0
    batch: int = 1
    row: int = 0
    vae: str = ""
    inputs: dict[str, str] = field(default_factory=dict)
    unfinished: str = ""
    program: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.row < self.batch <= MAX_BATCH:
            raise ValueError(f"row {self.row} of a batch of {self.batch} is not a place in at most {MAX_BATCH}")

    def check(self, made: "Made") -> list[str]:
        """UserError where a picture was made by other means than these; a note where another program made it."""
        if made.program:
            model = made.model or "unknown"
            return [f"the picture is {made.program}'s, of the model {model!r}: it will be another one"]
        if made.model_hash != self.model_hash:
            theirs, ours = (f"{m.model!r} ({m.model_hash[:10]})" for m in (made, self))
            raise UserError(f"the picture was made with the model {theirs}, not {ours}: give that file as --model")
        canvas = {("canvas", made.inputs.get("canvas", ""))}
        if missing := sorted(set(made.inputs.items()) - set(self.inputs.items()) - canvas):
            raise UserError(f"the picture was made with the {missing[0][0]} ({missing[0][1][:10]}): give that file too")
        if made.vae != self.vae:
            vae = made.vae or "of the model"
            raise UserError(f"the picture was decoded by the autoencoder {vae!r}: give that as --vae")
        return []


def versions() -> dict[str, str]:
    """Versions of what computes."""
    return {"ldm": ldm.__version__, "torch": torch.__version__, "python": platform.python_version()}


@dataclass(frozen=True)
class Recipe:
    """A complete Request and its Made: everything to make the picture again."""

    request: Request
    made: Made
    format: int = FORMAT

    def text(self) -> dict[str, str]:
        """The PNG text chunks: A1111's `parameters`, and our own with everything."""
        data = config.to_dict(self)
        usual = {f.name: f.default for f in fields(Request)}  # left out, so that older versions read what they can make
        data["request"] = {name: value for name, value in data["request"].items() if value != usual[name]}
        return {"parameters": self.parameters(), CHUNK: json.dumps(data, ensure_ascii=False)}

    def parameters(self) -> str:
        """The recipe as AUTOMATIC1111's web UI writes it."""
        r, made = self.request, self.made
        sampler = A1111_SAMPLERS.get(r.sampler or "", r.sampler)
        larger = r.upscale > 1
        said: dict[str, Any] = {
            "Steps": r.steps,
            "Sampler": f"{sampler} Karras" if r.schedule == "karras" else sampler,
            "CFG scale": r.cfg_scale,
            "Seed": r.seed,
            "Size": f"{r.width}x{r.height}",
            "Model hash": made.model_hash[:10],
            "Model": made.model,
            "Clip skip": r.clip_skip,
            "VAE": made.vae,
            "Denoising strength": r.upscale_strength if larger else r.strength,
            "Hires upscale": r.upscale if larger else None,
            "Refiner": next((f"{k[8:]} [{v[:10]}]" for k, v in made.inputs.items() if k.startswith("refiner ")), None),
            "Refiner switch at": r.refiner_start,
            "Variation seed": r.variation_seed if r.variation else None,
            "Variation seed strength": r.variation or None,
            "Unfinished": made.unfinished,
        }
        listed = ", ".join(f"{key}: {_quote(value)}" for key, value in said.items() if value not in (None, ""))
        return "\n".join([r.prompt, *([f"Negative prompt: {r.negative}"] if r.negative else []), listed])


def _quote(value: Any) -> str:
    """Text as it is, or as a JSON string where it holds what separates the fields."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:\n"') else text


def fresh(seed: int) -> Recipe:
    """A recipe in which nothing is decided but the seed."""
    return Recipe(Request("", seed=seed), Made())


def read(path: str | Path) -> Recipe:
    """The recipe in a picture of ours, read strictly, or what A1111 or ComfyUI wrote of theirs, as far as it is known.

    The file may come from anybody. UserError where there is none.
    """
    text = images.read_text(path)
    if CHUNK not in text:
        return _foreign(path, text)
    try:
        data = json.loads(text[CHUNK])
        if isinstance(data, dict) and data.get("format") != FORMAT:
            raise UserError(f"its format is {data.get('format')!r}, this version reads {FORMAT}")
        return config.from_dict(Recipe, data)
    except (ValueError, RecursionError) as error:  # UserError and JSONDecodeError are ValueErrors
        raise UserError(f"the recipe in {str(path)!r} cannot be read: {reason(error)}") from None


def _foreign(path: str | Path, text: dict[str, str]) -> Recipe:
    if "Steps: " in (parameters := text.get("parameters", "")):
        said = fields_of(parameters)
        made = Made(said.get("Model", ""), said.get("Model hash", ""), program="AUTOMATIC1111")
        return Recipe(a1111(parameters), made)
    request = comfyui(text.get("prompt", ""))
    if request is None:
        raise UserError(f"{str(path)!r} holds no recipe that is known here: ldm's own, AUTOMATIC1111's or ComfyUI's")
    return Recipe(request, Made(program="ComfyUI"))


def read_prompts(path: str | Path) -> list[str]:
    """The prompts in a text file, one a line; UserError where there is none."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"cannot read prompts from {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{str(path)!r} is not a text file in UTF-8: {error}") from None
    if not any(lines):
        raise UserError(f"{str(path)!r} holds no prompt: write one a line")
    return [line for line in lines if line]
