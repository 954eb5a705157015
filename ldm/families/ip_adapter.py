"""Reading IP-Adapters, and the image towers that they look through."""

from pathlib import Path
from typing import Any

import torch

from ldm.adapters.ip_adapter import IPAdapter
from ldm.checkpoints import diffusers, native
from ldm.checkpoints.files import SafeFile, Tensors, brief
from ldm.checkpoints.keymap import Rules, renamed
from ldm.config import from_dict
from ldm.errors import UserError
from ldm.families.folder import quickgelu, read_json
from ldm.families.source import kind, weight_files
from ldm.models.unet import UNet
from ldm.text.vision import ImageTower, VisionConfig

# Ours and theirs, with what is meant where they say nothing.
_VISION = {
    "image_size": ("image_size", 224),
    "patch": ("patch_size", 32),
    "width": ("hidden_size", 768),
    "heads": ("num_attention_heads", 12),
    "layers": ("num_hidden_layers", 12),
    "projection": ("projection_dim", 512),
    "mlp": ("intermediate_size", 3072),
}
_FIXED = {"layer_norm_eps": 1e-5, "num_channels": 3, "attention_dropout": 0.0}


def load_ip_adapter(path: Path, unet: UNet, device: torch.device | str = "cpu") -> IPAdapter:
    """An IP-Adapter for a UNet, in the UNet's dtype. UserError where the file holds none, or one for another family."""
    with brief(path, " is no picture prompt for this model"):
        tensors = Tensors([(SafeFile(path), "")])
        shapes = tensors.shapes()
        if not any(name.startswith("ip_adapter.") for name in shapes):
            raise UserError(f"it is {kind(shapes)}, not an IP-Adapter")
        if "image_proj.proj.weight" not in shapes:
            raise UserError("it is an IP-Adapter Plus or FaceID, whose resampler is not known here")
        wide, embedding = shapes["image_proj.proj.weight"]
        context_dim = unet.config.context_dim
        if wide % context_dim:
            raise UserError(f"its tokens are not of width {context_dim}")
        with torch.device("meta"):
            adapter = IPAdapter(unet, embedding, wide // context_dim)
        rules: Rules = [
            (r"^projection\.", "image_proj."),
            # numbered with the attentions to the picture itself, which have none
            (r"^(k|v)\w+\.(\d+)\.", lambda m: f"ip_adapter.{2 * int(m[2]) + 1}.to_{m[1]}_ip."),
        ]
        keymap = renamed(adapter, rules).under("adapter.", "")
        native.fill({"adapter": adapter}, tensors, keymap, device, unet.conv_in.weight.dtype)
    return adapter


def load_image_tower(
    path: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = torch.float32
) -> ImageTower:
    """transformers' folder of a CLIPVisionModelWithProjection. UserError where it is none."""
    with brief(path, " is no image tower of CLIP"):
        tensors = Tensors((SafeFile(file), "") for file in weight_files(path))
        config = _vision(read_json(path / "config.json"))
        with torch.device("meta"):
            tower = ImageTower(config)
        tensors = tensors.without(name for name in tensors if name.endswith("position_ids"))
        native.fill({"tower": tower}, tensors, diffusers.vision(tower).under("tower.", ""), device, dtype)
    return tower


def _vision(data: dict[str, Any]) -> VisionConfig:
    data = data.get("vision_config") or data
    for name, value in _FIXED.items():
        if data.get(name, value) != value:
            raise UserError(f"{name} {data[name]!r} must be {value}")
    same = {ours: data.get(theirs, default) for ours, (theirs, default) in _VISION.items()}
    return from_dict(VisionConfig, same | {"quickgelu": quickgelu(data)})
