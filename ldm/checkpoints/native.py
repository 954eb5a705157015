"""Our own checkpoint: one safetensors file that says everything about itself and needs no other file.

Tensors stand under `autoencoder.`, `backbone.` and `text.`; the metadata holds a format version and the ModelSpec.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm import config
from ldm.checkpoints import files
from ldm.checkpoints.files import SafeFile, Tensors, brief
from ldm.checkpoints.integrity import FLOATS, Entry, read_header
from ldm.checkpoints.keymap import KeyMap, Shapes, refuse
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.predictions import PREDICTIONS
from ldm.diffusion.schedules import Schedule, ScheduleConfig, make_schedule
from ldm.errors import UserError
from ldm.models.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.taesd import TinyAutoencoder
from ldm.models.unet import UNet, UNetConfig
from ldm.text.tower import Conditioner, TextConfig

FORMAT, VERSION, SPEC = "ldm", "1", "spec"
Storage = Literal["fp32", "fp16", "bf16", "int8"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float16}
SCALE = ".int8_scale"
PART = 2**18  # numbers that a cast takes at once
EXTRA = "extra."  # tensors of other layouts that a conversion keeps and no network reads
# No published model comes near these; beyond them a spec of a few bytes could ask for hours or for all the memory.
MAX_WIDTH, MAX_LEVELS = 2**17, 64
MAY_BE_ZERO = {"codebook", "depth", "mid_depth", "vector_dim", "mlp", "projection", "size_ids", "id_width"}
LIMITS = dict.fromkeys(("layers", "layer", "depth", "mid_depth", "res_blocks"), 128)
LIMITS |= {"context_length": 2048, "patch": 64}


@dataclass(frozen=True)
class SamplingDefaults:
    """What txt2img uses where nothing is said."""

    sampler: str = "dpmpp_2m"
    schedule: str = "trailing"
    steps: int = 25
    cfg_scale: float = 5.0
    guidance: str = ""


@dataclass(frozen=True)
class ModelSpec:
    """Everything about a model but its weights. An autoencoder alone has no backbone and no text."""

    autoencoder: AutoencoderConfig
    image_size: int
    backbone: UNetConfig | None = None
    text: TextConfig | None = None
    prediction: str = "eps"
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    defaults: SamplingDefaults = SamplingDefaults()
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction {self.prediction!r} is not one of {', '.join(PREDICTIONS)}")
        if (self.backbone is None) != (self.text is None):
            raise ValueError("a model has both a backbone and a text tower, or neither")


@dataclass
class Model:
    """A spec with its networks. backbone and conditioner are None for an autoencoder alone."""

    spec: ModelSpec
    autoencoder: Autoencoder | TinyAutoencoder
    backbone: UNet | None
    conditioner: Conditioner | None

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The networks by the prefix their tensors have in a file."""
        networks = {"autoencoder": self.autoencoder, "backbone": self.backbone, "text": self.conditioner}
        return {name: network for name, network in networks.items() if network is not None}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the networks by its name in a file."""
        return {name: tuple(value.shape) for name, value in named(self.modules).items()}

    def own_names(self) -> KeyMap:
        """The names in a file of ours."""
        return KeyMap({name: (name,) for name in self.shapes()})

    def whole(self) -> tuple[UNet, Conditioner, TextConfig]:
        """The backbone, the text side and its settings. UserError for an autoencoder alone."""
        if self.backbone is None or self.conditioner is None:
            raise UserError("this file holds an autoencoder alone: give a whole model, such as train_ldm makes")
        return self.backbone, self.conditioner, self.conditioner.config

    @property
    def schedule(self) -> Schedule:
        return make_schedule(self.spec.schedule)

    def denoiser(self) -> Denoiser:
        """D(x, sigma, cond) -> x0. UserError for an autoencoder alone."""
        return Denoiser(self.whole()[0], PREDICTIONS[self.spec.prediction], self.schedule)


def named(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of networks, each behind its network's prefix."""
    return {f"{prefix}.{name}": value for prefix, m in modules.items() for name, value in m.state_dict().items()}


def build(spec: ModelSpec) -> Model:
    """The networks of a spec with fresh weights (on the meta device inside `torch.device("meta")`)."""
    backbone = UNet(spec.backbone) if spec.backbone else None
    return Model(spec, Autoencoder(spec.autoencoder), backbone, Conditioner(spec.text) if spec.text else None)


def save(path: Path | str, spec: ModelSpec, modules: dict[str, nn.Module], storage: Storage = "fp32") -> None:
    """Write a model, whole or not at all. int8: the large matrices, with an fp32 scale a row; the rest in fp16."""
    write(path, spec, pack(named(modules), storage))


def pack(weights: Mapping[str, Tensor], storage: Storage) -> dict[str, Tensor]:
    """Weights as they are stored: on the CPU and in the type asked for, int8 with its scales beside it."""
    return {n: v for name, value in weights.items() for n, v in _pack(name, value.detach().cpu(), storage).items()}


def write(path: Path | str, spec: ModelSpec, tensors: Mapping[str, Tensor]) -> None:
    """Write a model's tensors as they are, under a spec."""
    files.save(Path(path), tensors, {"format": FORMAT, "version": VERSION, SPEC: spec_text(spec)})


def spec_text(spec: ModelSpec) -> str:
    """A spec as JSON; `read_spec_json` is its inverse."""
    return json.dumps(config.to_dict(spec))


def read_spec(path: Path | str) -> ModelSpec:
    """The spec in a file, without its weights. UserError where the file is not one of ours."""
    with brief(Path(path)):
        return spec_of(read_header(Path(path)).metadata)


def load(path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = torch.float32) -> Model:
    """Read a file of ours: see `fill`. dtype None: as most of the file is."""
    with brief(Path(path)):
        file = SafeFile(Path(path))
        model, tensors = skeleton(spec_of(file.metadata)), Packed([(file, "")])
        needed = tensors.without(name for name in tensors if name.startswith(EXTRA))
        fill(model.modules, needed, model.own_names(), device, dtype)
    return model


class _Unfilled(TorchFunctionMode):
    """Networks are built without initial values: on the meta device the random ones import half of torch's compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def skeleton(spec: ModelSpec) -> Model:
    """A spec's networks without weights, on the meta device. UserError where such networks cannot be."""
    _check_size(config.to_dict(spec))
    try:
        with torch.device("meta"), _Unfilled():
            return build(spec)
    except (ValueError, ArithmeticError, RuntimeError, AssertionError, IndexError) as error:
        raise UserError(f"it describes a model that cannot be: {error}") from None


def _check_size(part: dict[str, Any], where: str = "") -> None:
    """UserError for a number beyond the LIMITS."""
    for name, value in part.items():
        if name in ("provenance", "schedule", "defaults"):
            continue
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, dict):
                _check_size(number, f"{where}{name}.")
            least, most = int(name not in MAY_BE_ZERO), LIMITS.get(name, MAX_WIDTH)
            if type(number) is int and not least <= number <= most:
                raise UserError(f"{where}{name} is {number}: a model has from {least} to {most}")
        if isinstance(value, list) and len(value) > MAX_LEVELS:
            raise UserError(f"{where}{name} has {len(value)} values: a model has at most {MAX_LEVELS}")


def check(like: Shapes, tensors: Tensors, keymap: KeyMap) -> None:
    """UserError unless these are the tensors asked for: all and no other, each of its shape, and floats."""
    keymap.compare(tensors.shapes(), {name: like[name] for name in keymap.names if name in like})
    refuse(missing=like.keys() - keymap.names.keys(), unexpected=keymap.names.keys() - like.keys())
    refuse(**{"not of floating point": {name for name in tensors if tensors.entry(name).dtype not in FLOATS}})


def fill(
    modules: Mapping[str, nn.Module],
    tensors: Tensors,
    keymap: KeyMap,
    device: torch.device | str,
    dtype: torch.dtype | None,
    *,
    layout: torch.memory_format = torch.preserve_format,
) -> None:
    """Give networks on the meta device their weights, each from the file to the device once.

    modules: by the prefix of their names in the keymap. dtype None: as most of the file is. layout: of convolutions.
    UserError as `check`, and for what is not finite.
    """
    check({name: tuple(value.shape) for name, value in named(modules).items()}, tensors, keymap)
    dtype = dtype or tensors.main_dtype()
    for prefix, module in modules.items():
        state, broken = {}, set()
        for name, empty in module.state_dict().items():
            ours = f"{prefix}.{name}"
            value = keymap.tensor(ours, tensors, tuple(empty.shape))
            value = cast(value, device, dtype, layout if value.dim() == 4 else torch.preserve_format)
            if not finite(value):
                broken.add(ours)
            for theirs in keymap.names[ours]:
                tensors.forget(theirs, value)
            state[name] = value
        refuse(**{f"not finite in {str(dtype).removeprefix('torch.')}": broken})
        module.load_state_dict(state, strict=True, assign=True)
        module.to(device).eval().requires_grad_(False)


def cast(value: Tensor, device: torch.device | str, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    """A tensor on a device, in a type and a layout.

    On a CPU fp16 goes to bf16 by way of fp32, in parts that stay in its cache: the same numbers, four times as fast.
    """
    slow = (value.dtype, dtype) == (torch.float16, torch.bfloat16) and torch.device(device).type == "cpu"
    if not slow or not value.numel() or not value.dim():
        return value.to(device, dtype, memory_format=layout)
    out = torch.empty_like(value, dtype=dtype, memory_format=layout)
    rows = max(1, PART // value[0].numel())
    for to, part in zip(out.split(rows), value.split(rows), strict=True):
        to.copy_(part.to(torch.float32, memory_format=layout))
    return out


def finite(value: Tensor) -> bool:
    """Whether every number is finite. Their sum is, unless one is not or it overflows; only then are they asked."""
    value = value.float() if value.itemsize == 1 else value
    return bool(value.sum().isfinite() or value.isfinite().all())


def _pack(name: str, value: Tensor, storage: Storage) -> dict[str, Tensor]:
    if storage != "int8" or value.dim() < 2 or value.numel() < 1024:
        return {name: value.to(DTYPES[storage]).contiguous()}
    scale = (value.float().flatten(1).abs().amax(dim=1) / 127).clamp(min=1e-12)
    rows = value.float().flatten(1) / scale[:, None]
    return {name: rows.round().clamp(-127, 127).to(torch.int8).reshape(value.shape), name + SCALE: scale}


class Packed(Tensors):
    """The tensors of a file of ours: matrices kept as int8 appear as what they stand for."""

    def __getitem__(self, name: str) -> Tensor:
        value = super().__getitem__(name)
        if value.dtype != torch.int8:
            return value
        scale = super().__getitem__(name + SCALE)
        return value.float() * scale.reshape(-1, *[1] * (value.dim() - 1))

    def __iter__(self) -> Iterator[str]:
        return (name for name in super().__iter__() if not name.endswith(SCALE))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def entry(self, name: str) -> Entry:
        """As unpacked; UserError where an int8 matrix has no scale for each of its rows."""
        entry = super().entry(name)
        if entry.dtype != "I8":
            return entry
        scale = self._places.get(name + SCALE)
        if scale is None or super().entry(name + SCALE).shape != entry.shape[:1]:
            raise UserError(f"{name} is int8 without a scale for each of its {entry.shape[:1]} rows")
        return replace(entry, dtype="F16")


def spec_of(metadata: Mapping[str, str]) -> ModelSpec:
    """The spec in a file's metadata. UserError where it is not ours, of another version or unreadable."""
    if metadata.get("format") != FORMAT:
        raise UserError("it is a safetensors file but not an ldm model (its metadata does not say so)")
    if metadata.get("version") != VERSION:
        raise UserError(f"it has format version {metadata.get('version')}, this program reads {VERSION}")
    return read_spec_json(metadata.get(SPEC, ""))


def read_spec_json(text: str) -> ModelSpec:
    """A spec from its JSON. UserError where it is none."""
    try:
        return config.from_dict(ModelSpec, json.loads(text))
    except (json.JSONDecodeError, RecursionError, TypeError) as error:
        raise UserError(f"no readable spec in its metadata: {error}") from None
