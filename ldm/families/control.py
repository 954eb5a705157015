"""Reading and writing what steers a UNet: ControlNets and T2I-Adapters of both layouts, from a file or a folder."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.checkpoints import control as names
from ldm.checkpoints import native
from ldm.checkpoints.files import SafeFile, Tensors, brief, save
from ldm.checkpoints.keymap import KeyMap, Shapes
from ldm.errors import UserError
from ldm.families.folder import read_json, unet_from, unet_to
from ldm.families.singlefile import count_from, misfits
from ldm.families.source import kind, weight_files
from ldm.files import write_json
from ldm.models.controlnet import ControlNet, T2IAdapter, T2IConfig
from ldm.models.unet import UNetConfig
from ldm.text.tower import TextConfig

# Settings of ControlNetModel's config that a UNet's has not.
_OWN = {"conditioning_channels", "conditioning_embedding_out_channels", "controlnet_conditioning_channel_order"}
_VOID = {"global_pool_conditions", "encoder_hid_dim", "encoder_hid_dim_type", "class_embed_type", "num_class_embeds"}
_UNET_ONLY = {"up_block_types", "sample_size", "out_channels", "mid_block_type", "conv_in_kernel", "conv_out_kernel"}
_UNET_ONLY |= {"resnet_out_scale_factor", "time_embedding_type", "attention_type"}
HINT = "controlnet_cond_embedding."
_SPARE = re.compile(r".*\.position_ids|lora_controlnet")


def load_control(
    path: Path, like: UNetConfig, device: torch.device | str = "cpu", dtype: torch.dtype | None = torch.float32
) -> ControlNet | T2IAdapter:
    """A network that steers a UNet of config `like`. UserError where the file holds none, or one for another family.

    path: a safetensors file, or diffusers' folder of one. dtype None: as stored.
    """
    folder = path.is_dir()
    with brief(path, " does not steer this model"):
        tensors = Tensors((SafeFile(file), "") for file in (weight_files(path) if folder else [path]))
        stated = read_json(path / "config.json") if folder else {}
        with misfits(), torch.device("meta"):
            network, keymap = _understand(tensors.shapes(), like, stated)
        tensors = tensors.without(name for name in tensors if _SPARE.fullmatch(name))
        native.fill({"control": network}, tensors, keymap.under("control.", ""), device, dtype)
    return network


def _understand(shapes: Shapes, like: UNetConfig, stated: Mapping[str, Any]) -> tuple[ControlNet | T2IAdapter, KeyMap]:
    """The network without weights, and where its tensors stand."""
    prefix = "control_model." if "control_model.input_hint_block.0.weight" in shapes else ""
    if f"{HINT}conv_in.weight" in shapes:
        steered = _config(stated) if stated else like
        mine, its = ((c.channels, c.res_blocks, c.context_dim, c.vector_dim) for c in (like, steered))
        if mine != its:
            raise UserError(f"it is for a UNet of widths {steered.channels} and contexts of {steered.context_dim}")
        widths, channels = [], shapes[f"{HINT}conv_in.weight"][1]
        name = f"{HINT}conv_in.weight"
        while name in shapes:
            widths.append(shapes[name][0])
            name = f"{HINT}blocks.{2 * len(widths) - 1}.weight"
        steered = replace(steered, in_channels=shapes["conv_in.weight"][1])
        network = ControlNet(steered, channels, tuple(widths))
        return network, names.controlnet(network, layout="diffusers")
    if f"{prefix}input_hint_block.0.weight" in shapes:
        hint = f"{prefix}input_hint_block."
        held = [n for n in range(0, 1000, 4) if {f"{hint}{n}.weight", f"{hint}{n + 2}.weight"} <= shapes.keys()]
        widths, channels = [shapes[f"{hint}{n}.weight"][0] for n in held], shapes[f"{hint}0.weight"][1]
        steered = replace(like, in_channels=shapes[f"{prefix}input_blocks.0.0.weight"][1])
        network = ControlNet(steered, channels, tuple(widths))
        return network, names.controlnet(network, layout="compvis").under("", prefix)
    for layout, start in (("diffusers", "adapter."), ("t2i", "")):
        block = "body.0.resnets.0" if layout == "diffusers" else "body.0"
        if {f"{start}conv_in.weight", f"{start}{block}.block1.weight"} <= shapes.keys():
            adapter = T2IAdapter(_t2i(shapes, start, layout, like))
            return adapter, names.t2i(adapter, layout=layout)
    raise UserError(f"it is {kind(shapes)}, neither a ControlNet nor a T2I-Adapter")


def _config(stated: Mapping[str, Any]) -> UNetConfig:
    """The config of the UNet that a ControlNetModel's config.json tells of."""
    if stated.get("_class_name", "ControlNetModel") != "ControlNetModel":
        raise UserError(f"its config.json is of a {stated['_class_name']!r}")
    if stated.get("controlnet_conditioning_channel_order", "rgb") != "rgb":
        raise UserError("its hint's channels are not in the order rgb")
    return unet_from({name: value for name, value in stated.items() if name not in _OWN | _VOID})


def _t2i(shapes: Shapes, start: str, layout: str, like: UNetConfig) -> T2IConfig:
    """The config of a T2I-Adapter: SDXL's halves once and sees 16 pixels as one, the others thrice and 8."""
    large = like.vector_dim > 0
    factor, hint = 16 if large else 8, shapes[f"{start}conv_in.weight"][1]
    if layout == "diffusers":
        blocks, places = count_from(shapes, f"{start}body.0.resnets."), f"{start}body.{{}}.resnets.0.block1.weight"
    else:
        blocks, places = 2, f"{start}body.{{}}.block1.weight"
    step = 1 if layout == "diffusers" else blocks  # the first code counts all blocks through
    there = takewhile(lambda place: place in shapes, (places.format(i * step) for i in count()))
    channels = tuple(shapes[place][0] for place in there)
    if channels[: len(like.channels)] != like.channels or hint % factor**2:
        raise UserError(f"it is for a UNet of widths {channels}, not {like.channels}")
    halves = tuple(i == 2 if large else i > 0 for i in range(len(channels)))
    return T2IConfig(channels, blocks, hint // factor**2, factor, halves)


def save_controlnet(folder: Path, network: ControlNet, side: int, metadata: Mapping[str, Any]) -> Path:
    """Write diffusers' folder of a ControlNet for latents of `side`; returns its file of weights.

    UserError where diffusers has no words for it.
    """
    stated = unet_to(network.config, side, TextConfig())
    convolutions = [layer.weight for layer in network.hint if isinstance(layer, nn.Conv2d)]
    data = {name: value for name, value in stated.items() if name not in _UNET_ONLY} | {
        "_class_name": "ControlNetModel",
        "conditioning_channels": convolutions[0].shape[1],
        "conditioning_embedding_out_channels": [convolutions[0].shape[0], *(w.shape[0] for w in convolutions[2:-1:2])],
    }
    tensors = names.controlnet(network, layout="diffusers").save(network.state_dict())
    path = folder / "diffusion_pytorch_model.safetensors"
    save(path, tensors, {"ldm.provenance": json.dumps(metadata)})
    write_json(folder / "config.json", data)
    return path
