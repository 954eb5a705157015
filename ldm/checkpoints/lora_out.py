"""Writing LoRA files that others read: kohya's names with `ss_` metadata, or diffusers' and peft's."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ldm.adapters.lora import LowRank, Place
from ldm.checkpoints.files import save
from ldm.checkpoints.lora import layers, parts
from ldm.checkpoints.native import Model

Layout = Literal["kohya", "diffusers"]


def targets(model: Model) -> dict[str, Place]:
    """Every weight that a LoRA can change, by diffusers' name with dots, without `.weight`: `unet.mid_block...to_q`.

    UserError for an autoencoder alone.
    """
    return {f"{part}.{name}": place for part, ours, keymap in parts(model) for name, place in layers(keymap, ours)}


def write(
    path: Path, adapters: Mapping[str, LowRank], metadata: Mapping[str, str], layout: Layout, *, towers: int
) -> None:
    """Write adapters, by the names of `targets`, whole or not at all. towers: the texts', which kohya counts."""
    spell = _kohya if layout == "kohya" else _peft
    tensors: dict[str, Tensor] = {}
    for name, adapter in adapters.items():
        tensors |= spell(name, adapter, towers)
    save(path, tensors, metadata)


def _kohya(name: str, adapter: LowRank, towers: int) -> dict[str, Tensor]:
    part, _, rest = name.partition(".")
    text = "lora_te" if towers == 1 else "lora_te1"
    key = {"unet": "lora_unet", "text_encoder": text, "text_encoder_2": "lora_te2"}[part] + "_" + rest.replace(".", "_")
    tensors: dict[str, Tensor] = {f"{key}.lora_down.weight": adapter.down, f"{key}.lora_up.weight": adapter.up}
    tensors[f"{key}.alpha"] = torch.tensor(adapter.scale * len(adapter.down))
    if adapter.magnitude is not None:
        tensors[f"{key}.dora_scale"] = adapter.magnitude
    return tensors


def _peft(name: str, adapter: LowRank, towers: int) -> dict[str, Tensor]:
    # without settings beside it a file means a scale of 1
    tensors: dict[str, Tensor] = {
        f"{name}.lora_A.weight": adapter.down,
        f"{name}.lora_B.weight": adapter.up * adapter.scale,
    }
    if adapter.magnitude is not None:
        tensors[f"{name}.lora_magnitude_vector"] = adapter.magnitude.flatten()
    return tensors


def kohya_metadata(rank: int, alpha: float, **facts: object) -> dict[str, str]:
    """What kohya's programs look for in a file's metadata; numbers become text."""
    known = {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": alpha} | facts
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in known.items()}
