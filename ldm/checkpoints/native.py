"""Our own checkpoint: one safetensors file that says everything about itself and needs no other file.

Tensors stand under `autoencoder.`, `backbone.` and `text.`; the metadata holds a format version and the whole ModelSpec as JSON.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm import config
from ldm.checkpoints.files import SafeFile, atomic_write, open_safetensors
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.predictions import PREDICTIONS
from ldm.diffusion.schedules import Schedule, ScheduleConfig, make_schedule
from ldm.errors import UserError
from ldm.models.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.unet import UNet, UNetConfig
from ldm.text.tower import Conditioner, TextConfig

FORMAT, VERSION = "ldm", "1"
Storage = Literal["fp32", "fp16", "bf16", "int8"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float16}
SCALE = ".int8_scale"


@dataclass(frozen=True)
class SamplingDefaults:
    """What txt2img uses where nothing is said."""

    sampler: str = "dpmpp_2m"
    schedule: str = "trailing"
    steps: int = 25
    cfg_scale: float = 5.0


@dataclass(frozen=True)
class ModelSpec:
    """Everything about a model but its weights. An autoencoder alone has no backbone and no text."""

    autoencoder: AutoencoderConfig
    image_size: int
    backbone: UNetConfig | None = None
    text: TextConfig | None = None
    prediction: str = "eps"
    schedule: ScheduleConfig = ScheduleConfig()
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
    autoencoder: Autoencoder
    backbone: UNet | None
    conditioner: Conditioner | None

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The networks by the prefix their tensors have in a file."""
        networks = {"autoencoder": self.autoencoder, "backbone": self.backbone, "text": self.conditioner}
        return {name: network for name, network in networks.items() if network is not None}

    @property
    def schedule(self) -> Schedule:
        return make_schedule(self.spec.schedule)

    def denoiser(self) -> Denoiser:
        """D(x, sigma, cond) -> x0. UserError for an autoencoder alone."""
        if self.backbone is None:
            raise UserError("this file holds an autoencoder alone, which cannot sample: give a model made by train_ldm")
        return Denoiser(self.backbone, PREDICTIONS[self.spec.prediction], self.schedule)


def build(spec: ModelSpec) -> Model:
    """The networks of a spec with fresh weights (on the meta device inside `torch.device("meta")`)."""
    return Model(
        spec,
        Autoencoder(spec.autoencoder),
        UNet(spec.backbone) if spec.backbone else None,
        Conditioner(spec.text) if spec.text else None,
    )


def save(path: Path | str, spec: ModelSpec, modules: dict[str, nn.Module], storage: Storage = "fp32") -> None:
    """Write a model: whole or not at all.

    int8 keeps the large matrices as int8 with one fp32 scale a row (1/4 of fp32) and the rest in fp16.
    """
    tensors: dict[str, Tensor] = {}
    for prefix, module in modules.items():
        for name, value in module.state_dict().items():
            tensors |= _pack(f"{prefix}.{name}", value.detach().cpu(), storage)
    metadata = {"format": FORMAT, "version": VERSION, "spec": json.dumps(config.to_dict(spec))}
    atomic_write(Path(path), lambda temporary: save_file(tensors, temporary, metadata))


def read_spec(path: Path | str) -> ModelSpec:
    """The spec in a file, without its weights. UserError where the file is not one of ours."""
    with open_safetensors(Path(path)) as file:
        return _spec(file)


def load(path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """Read a model, strictly: UserError that names missing, unexpected and misshapen tensors.

    Weights go from the mapped file to the device once; nothing is initialised at random before.
    """
    with open_safetensors(Path(path)) as file:
        return _fill(file, _spec(file), device, dtype)


def load_autoencoder(path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """The autoencoder of any model file, alone, read as strictly; the rest of the file is not touched."""
    with open_safetensors(Path(path)) as file:
        file.names = {name for name in file.names if name.startswith("autoencoder.")}
        return _fill(file, replace(_spec(file), backbone=None, text=None), device, dtype)


def _fill(file: SafeFile, spec: ModelSpec, device: torch.device | str, dtype: torch.dtype) -> Model:
    with torch.device("meta"):
        model = build(spec)
    states = {prefix: module.state_dict() for prefix, module in model.modules.items()}
    _compare(file, {f"{prefix}.{name}": v.shape for prefix, state in states.items() for name, v in state.items()})
    for prefix, module in model.modules.items():
        state = {name: _unpack(file, f"{prefix}.{name}").to(device, dtype) for name in states[prefix]}
        module.load_state_dict(state, strict=True, assign=True)
        module.to(device).eval().requires_grad_(False)  # type: ignore[arg-type]
    return model


def _pack(name: str, value: Tensor, storage: Storage) -> dict[str, Tensor]:
    if storage != "int8" or value.dim() < 2 or value.numel() < 1024:
        return {name: value.to(DTYPES[storage]).contiguous()}
    scale = (value.float().flatten(1).abs().amax(dim=1) / 127).clamp(min=1e-12)
    rows = value.float().flatten(1) / scale[:, None]
    return {name: rows.round().clamp(-127, 127).to(torch.int8).reshape(value.shape), name + SCALE: scale}


def _unpack(file: SafeFile, name: str) -> Tensor:
    value = file.tensor(name)
    if value.dtype != torch.int8:
        return value
    return value.float() * file.tensor(name + SCALE).reshape(-1, *[1] * (value.dim() - 1))


def _spec(file: SafeFile) -> ModelSpec:
    path = str(file.path)
    if file.metadata.get("format") != FORMAT:
        raise UserError(f"{path!r} is a safetensors file but not an ldm model (its metadata does not say so)")
    if file.metadata.get("version") != VERSION:
        raise UserError(f"{path!r} has format version {file.metadata.get('version')}, this program reads {VERSION}")
    try:
        data = json.loads(file.metadata["spec"])
        return config.from_dict(ModelSpec, data)
    except (KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{path!r} has no readable spec in its metadata: {error}") from None
    except UserError as error:
        raise UserError(f"{path!r}: {error}") from None


def _compare(file: SafeFile, wanted: dict[str, torch.Size]) -> None:
    present = {name for name in file.names if not name.endswith(SCALE)}
    missing, unexpected = sorted(wanted.keys() - present), sorted(present - wanted.keys())
    shapes = [n for n in sorted(wanted.keys() & present) if file.shape(n) != wanted[n]]
    faults = [
        f"{len(names)} {fault} tensors ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for fault, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", shapes))
        if names
    ]
    if faults:
        raise UserError(f"{str(file.path)!r} does not fit its own spec: {'; '.join(faults)}")
