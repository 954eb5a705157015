"""Reading LoRA files of every trainer in use, and finding the weights of a model that their names mean.

kohya's and LyCORIS's names (underscores, alpha), diffusers' and peft's of every age (dots, `lora_A`, `.lora.down`), and
cloneofsimo's, which are numbers. Those of the UNet may be diffusers' or CompVis's.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ldm.adapters import lora as adapters
from ldm.adapters.lora import LowRank, Place
from ldm.checkpoints import compvis, diffusers
from ldm.checkpoints.files import SafeFile, brief
from ldm.checkpoints.integrity import FLOATS
from ldm.checkpoints.keymap import KeyMap, refuse, some
from ldm.checkpoints.native import Model, finite
from ldm.errors import UserError, reason

Role = Literal["down", "up", "mid", "alpha", "dora", "magnitude"]
_NAME = re.compile(
    r"(?P<place>.+?)(?:[._]lora(?:_linear_layer)?[._](?P<half>down|up|mid|A|B)(?:\.\w+)?\.weight"
    r"|\.(?P<other>alpha|dora_scale)|\.(?P<peft>lora_magnitude_vector)(?:\.\w+)*)"
)
_NUMBER = re.compile(r"(unet|text_encoder|lora):(\d+)")
_NUMBERED = re.compile(r"(?P<place>(?:unet|text_encoder|lora):\d+):(?P<half>down|up)")
_ROLES: dict[str, Role] = {"A": "down", "B": "up", "dora_scale": "dora", "lora_magnitude_vector": "magnitude"}
# How a name begins, without dots, and the network that it means; the first that fits and is known counts.
_PARTS = {
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
    "text_encoder_2_": "text_encoder_2",
    "text_encoder_": "text_encoder",
    "unet_": "unet",
    "model_diffusion_model_": "unet",
    "diffusion_model_": "unet",
}
FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
PEFT = "adapter_config.json"


@dataclass(frozen=True)
class Lora:
    """A LoRA file. pairs: for each place, in the file's words, its tensors by role; spare: tensors of no adapter.

    settings: peft's own, by the part of the model that they are for ("" for all): alpha, rank and their exceptions.
    """

    name: str
    pairs: dict[str, dict[str, Tensor]]
    spare: tuple[str, ...]
    settings: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Injected:
    """A LoRA in a model: the places that it found there, those of the file that it did not, and the way out."""

    name: str
    weight: float
    matched: tuple[str, ...]
    unmatched: tuple[str, ...]
    eject: Callable[[], None]  # takes it out; without other LoRAs the model is bit for bit what it was

    def __str__(self) -> str:
        """One line for a person."""
        left = f"; {len(self.unmatched)} have no place in this model: {some(self.unmatched)}" if self.unmatched else ""
        return f"lora {self.name} at {self.weight:g}: {len(self.matched)} weights changed{left}"


def parse(text: str) -> tuple[Path, float]:
    """FILE or FILE:WEIGHT. UserError for a weight that is not finite."""
    file, colon, number = text.rpartition(":")
    try:
        weight = float(number) if colon and file else 1.0
    except ValueError:
        return Path(text), 1.0
    if not math.isfinite(weight):
        raise UserError(f"the weight of {text!r} is not a finite number: write FILE:0.8")
    return Path(file if colon and file else text), weight


def read(path: Path) -> Lora:
    """Read a LoRA file, or the folder that diffusers or peft writes. UserError where it is none, or is broken."""
    folder = path if path.is_dir() else None
    if folder:
        found = [folder / name for name in FILES if (folder / name).is_file()]
        if not found:
            raise UserError(f"{str(path)!r} is a folder without {' or '.join(FILES)}")
        path = found[0]
    with brief(path):
        file = SafeFile(path)
        pairs, spare = _tensors(file)
        settings = _settings(file.metadata, path.with_name(PEFT) if path.name == FILES[1] else None)
    return Lora(folder.name if folder else path.stem, pairs, spare, settings)


def inject(model: Model, lora: Lora, weight: float = 1.0) -> Injected:
    """Put a LoRA into a model. UserError where nothing in it fits, or something of the right name has another shape."""
    found = find(model, lora)
    handle = adapters.inject(model.modules, found.values(), weight)
    unmatched = tuple(name for name in lora.pairs if name not in found) + lora.spare
    return Injected(lora.name, weight, tuple(found), unmatched, handle.eject)


def fuse(model: Model, lora: Lora, weight: float = 1.0) -> tuple[str, ...]:
    """Make a LoRA part of a model's weights for good; the places that matched. UserError as `inject`."""
    found = find(model, lora)
    adapters.fuse(model.modules, found.values(), weight)
    return tuple(found)


def find(model: Model, lora: Lora) -> dict[str, tuple[Place, LowRank]]:
    """The places of a LoRA that a model has, each with its adapter. UserError as `inject`."""
    known, shapes = places(model), model.shapes()
    numbers = _numbered(lora.pairs, known)
    found, misfits = {}, []
    for name, tensors in lora.pairs.items():
        place = numbers.get(name) or _lookup(name, known)
        if place is None:
            continue
        shape = place.view(torch.empty(shapes[place.name], device="meta")).shape
        try:
            found[name] = place, _adapter(tensors, shape, _scale(name, tensors, lora.settings))
        except ValueError as error:
            misfits.append(f"{name} {error}")
    its = f"of its {len(lora.pairs)} places"
    if misfits:
        wrong = f"{len(misfits)} {its} do not fit ({some(misfits)})"
        raise UserError(f"the LoRA {lora.name!r} is for a model of other shapes: {wrong}")
    if not found:
        wrong = f"none {its} is known here ({some([*lora.pairs, *lora.spare])})"
        raise UserError(f"the LoRA {lora.name!r} changes nothing in this model: {wrong}")
    return found


def places(model: Model) -> dict[str, Place]:
    """Every weight that a LoRA can change, by part and foreign name without dots: `unet/down_blocks_0_..._to_q`."""
    backbone, *_ = model.whole()
    named = [*parts(model), ("unet", "backbone.", compvis.unet(backbone, backbone.config))]
    if len(named) == 3:  # a single tower is asked for by either name: SDXL's refiner has the second alone
        named.append(("text_encoder_2", *named[1][1:]))
    found = {f"{part}/{name.replace('.', '_')}": p for part, ours, keymap in named for name, p in layers(keymap, ours)}
    return found | {name.replace("/text_model_", "/"): place for name, place in found.items()}


def parts(model: Model) -> list[tuple[str, str, KeyMap]]:
    """The networks that a LoRA changes, as diffusers calls them: a part, the prefix of our names, and its own names.

    UserError for an autoencoder alone.
    """
    backbone, text, config = model.whole()
    found = [("unet", "backbone.", diffusers.unet(backbone))]
    names = (("text_encoder", "tower"), ("text_encoder_2", "second"))
    for (part, module), tower in zip(names, config.towers, strict=False):
        found.append((part, f"text.{module}.", diffusers.clip(getattr(text, module), tower)))
    return found


def layers(keymap: KeyMap, prefix: str) -> Iterable[tuple[str, Place]]:
    """The layers that a LoRA can change, by their foreign names; prefix: of ours."""
    for ours, theirs in keymap.names.items():
        for part, name in enumerate(theirs):
            if name.endswith(".weight") and not re.search(r"norm|embedding", name.split(".")[-2]):
                place = Place(prefix + ours, part, len(theirs), ours in keymap.turned)
                yield name.removesuffix(".weight"), place


def _lookup(name: str, known: Mapping[str, Place]) -> Place | None:
    flat = name.replace(".", "_").removeprefix("base_model_model_").replace("_processor_", "_")
    flat = re.sub(r"self_attn_to_(q|k|v|out)$", r"self_attn_\1_proj", flat)  # diffusers' first text LoRAs
    flat = re.sub(r"_to_out$", "_to_out_0", flat)
    spelt = [f"{part}/{flat[len(start) :]}" for start, part in _PARTS.items() if flat.startswith(start)]
    spelt += [f"unet/{flat}", f"text_encoder/{flat}"]
    return next((known[name] for name in spelt if name in known), None)


def _numbered(names: Iterable[str], known: Mapping[str, Place]) -> dict[str, Place]:
    """cloneofsimo's numbers: the linear layers that its trainer met, in the order of diffusers' modules of its day.

    A list that does not say of what (`lora:`) is the UNet's where it is as long.
    """
    met_in = [re.fullmatch(r"(unet/(down|up|mid)_block.*)_attn1_to_q", name) for name in known]
    found = sorted((m for m in met_in if m), key=lambda m: ("down", "up", "mid").index(m[2]))
    blocks = [match[1] for match in found]
    attention = ("to_q", "to_k", "to_v", "to_out_0")
    first, second = ([f"_{kind}_{leaf}" for leaf in attention] for kind in ("attn1", "attn2"))
    unet = {
        len(blocks) * len(leaves): [block + leaf for block in blocks for leaf in leaves]
        for leaves in (first + second, [*first, "_ff_net_0_proj", *second])
    }
    text = [
        f"text_encoder/encoder_layers_{layer}_self_attn_{letter}_proj"
        for layer in range(sum(name.endswith("_k_proj") for name in known if name.startswith("text_encoder/encoder")))
        for letter in ("k", "v", "q", "out")
    ]
    numbered = [(match[1], int(match[2])) for name in names if (match := _NUMBER.fullmatch(name))]
    counts = Counter(kind for kind, _ in numbered)
    places = {}
    for kind, number in numbered:
        met = text if kind == "text_encoder" else unet.get(counts[kind], text if kind == "lora" else [])
        if number < len(met):
            places[f"{kind}:{number}"] = known[met[number]]
    return places


def _tensors(file: SafeFile) -> tuple[dict[str, dict[str, Tensor]], tuple[str, ...]]:
    pairs: dict[str, dict[str, Tensor]] = {}
    spare, broken = [], set()
    for name, entry in file.entries.items():
        match = _NUMBERED.fullmatch(name) or _NAME.fullmatch(name)
        place, said = (match["place"], next(word for word in match.groups()[1:] if word)) if match else ("", "")
        if not match or (entry.dtype not in FLOATS and said != "alpha"):  # which some write as a whole number
            spare.append(name)
            continue
        value = file.tensor(name).float()
        if not finite(value):
            broken.add(name)
        pairs.setdefault(place, {})[_ROLES.get(said, said)] = value
    if not pairs:
        raise UserError(f"this is no LoRA: none of its {len(spare)} tensors belongs to one ({some(spare)})")
    least = {"down": 2, "up": 2, "mid": 4}
    halves = {name for name, held in pairs.items() if not {"down", "up"} <= held.keys()}
    misshapen = {
        f"{name} ({role})"
        for name, held in pairs.items()
        for role, value in held.items()
        if not value.numel() or value.dim() < least.get(role, 0) or (role == "alpha" and value.numel() > 1)
    }
    refuse(**{"without both of down and up": halves, "misshapen": misshapen, "not finite": broken})
    return pairs, tuple(spare)


def _settings(metadata: Mapping[str, str], beside: Path | None) -> dict[str, dict[str, Any]]:
    """peft's settings: in a file of its own, or as diffusers puts them into the metadata."""
    said: dict[str, Any] = {}
    try:
        if beside is not None and beside.is_file():
            said = {f".{key}": value for key, value in json.loads(beside.read_text()).items()}
        elif "lora_adapter_metadata" in metadata:
            said = {str(key): value for key, value in dict(json.loads(metadata["lora_adapter_metadata"])).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"its settings cannot be read: {reason(error)}") from None
    settings: dict[str, dict[str, Any]] = {}
    for key, value in said.items():
        part, _, field = key.partition(".")
        settings.setdefault(part, {})[field] = value
    return settings


def _scale(name: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Mapping[str, Any]]) -> float:
    """alpha / rank; 1 where a file says nothing."""
    rank = len(tensors["down"])
    if "alpha" in tensors:
        return tensors["alpha"].item() / rank
    part = max((part for part in settings if name.startswith(part)), key=len, default=None)
    if part is None:
        return 1.0
    mine = settings[part]
    exceptions = mine.get("alpha_pattern")
    alpha = mine.get("lora_alpha", rank)
    for pattern, value in exceptions.items() if isinstance(exceptions, dict) else ():
        if name == pattern or name.endswith(f".{pattern}"):
            alpha = value
    if type(alpha) not in (int, float) or not abs(alpha) < 1e30:
        raise UserError(f"its settings have the alpha {alpha!r}: needs a number")
    return alpha / (math.sqrt(rank) if mine.get("use_rslora") else rank)


def _adapter(tensors: Mapping[str, Tensor], shape: torch.Size, scale: float) -> LowRank:
    """An adapter of a weight's shape. ValueError, in words that follow its name, where it cannot be."""
    down, up, mid = tensors["down"], tensors["up"], tensors.get("mid")
    kernel = 1 if mid is None else math.prod(mid.shape[2:])
    inner = (len(down), len(down)) if mid is None else tuple(mid.shape[:2])
    outer = (len(up), down[0].numel() * kernel)
    if outer != (shape[0], shape[1:].numel()) or (up[0].numel(), len(down)) != inner:
        raise ValueError(f"is {[len(up), *down.shape[1:]]}, the model's {list(shape)}")
    magnitude = tensors.get("magnitude", tensors.get("dora"))
    if magnitude is not None:
        if "magnitude" in tensors or magnitude.dim() == 1:  # peft's is of each row, in whatever shape
            magnitude = magnitude.reshape(-1, *[1] * (len(shape) - 1))
        sides = list(magnitude.shape)
        if len(sides) != len(shape) or any(m not in (1, s) for m, s in zip(sides, shape, strict=True)):
            raise ValueError(f"has a magnitude of {sides} for {list(shape)}")
    return LowRank(down, up, mid=mid, magnitude=magnitude, scale=scale).requires_grad_(False)
