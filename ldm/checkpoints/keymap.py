"""Other people's names for our tensors: templates, and numbering generated from the config.

A KeyMap is a one-to-one list of names; a foreign tensor may differ in shape where it holds the same numbers (a 1 x 1 convolution
for a linear layer), and one of ours may be several of theirs, stacked (query, key, value).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.unet import UNetConfig
from ldm.text.tower import TextConfig

Rules = list[tuple[str, str]]  # (ours, theirs): prefixes, the first that fits counts


@dataclass(frozen=True)
class KeyMap:
    """names: ours -> theirs, in a tuple of several where theirs are stacked along the first axis to give ours."""

    names: dict[str, tuple[str, ...]]

    def load(self, foreign: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
        """Foreign tensors under our names, in the shapes of `like`. UserError that names what is missing or left over."""
        wanted = {name for names in self.names.values() for name in names}
        faults = [
            f"{len(keys)} {fault} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"
            for fault, keys in (("missing", wanted - foreign.keys()), ("unexpected", foreign.keys() - wanted))
            if keys
        ]
        if faults:
            raise UserError(f"tensors do not fit: {'; '.join(faults)}")
        native = {}
        for ours, theirs in self.names.items():
            value = torch.cat([foreign[name] for name in theirs])
            if value.numel() != like[ours].numel():
                raise UserError(f"{theirs[0]} has shape {tuple(value.shape)}, needs {tuple(like[ours].shape)}")
            native[ours] = value.reshape(like[ours].shape)
        return native

    def save(self, native: dict[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors under foreign names."""
        return {
            name: part
            for ours, theirs in self.names.items()
            for name, part in zip(theirs, native[ours].chunk(len(theirs)), strict=True)
        }


def _keymap(module: nn.Module, places: Rules, leaves: Rules) -> KeyMap:
    """Name each tensor of a module: its place by the first prefix that fits, what follows by the leaf rules."""
    names = {}
    for ours in module.state_dict():
        place, foreign = next((p for p in places if ours.startswith(p[0] + ".")), ("", ""))
        rest = ours[len(place) :] if place else ours
        for pattern, replacement in leaves:
            rest = re.sub(pattern, replacement, rest)
        names[ours] = (foreign + rest,)
    return KeyMap(names)


_DIFFUSERS_LEAVES: Rules = [
    (r"\.time\.", ".time_emb_proj."),
    (r"\.skip\.", ".conv_shortcut."),
    (r"\.blocks\.", ".transformer_blocks."),
    (r"\.to_out\.", ".to_out.0."),
    (r"\.ff\.expand\.", ".ff.net.0.proj."),
    (r"\.ff\.reduce\.", ".ff.net.2."),
]


def diffusers_unet(module: nn.Module, config: UNetConfig) -> KeyMap:
    """Names of diffusers' UNet2DConditionModel."""
    places: Rules = [("time.0", "time_embedding.linear_1"), ("time.2", "time_embedding.linear_2")]
    places += [("vector.0", "add_embedding.linear_1"), ("vector.2", "add_embedding.linear_2")]
    places += [("norm_out", "conv_norm_out"), ("conv_in", "conv_in"), ("conv_out", "conv_out")]
    places += [(f"mid.{ours}", f"mid_block.{theirs}") for ours, theirs in _MIDDLE]
    for side, extra, resample in (("down", 0, "downsamplers.0"), ("up", 1, "upsamplers.0")):
        for level in range(len(config.channels)):
            places.append((f"{side}.{level}.resample", f"{side}_blocks.{level}.{resample}"))
            for block in range(config.res_blocks + extra):
                ours = f"{side}.{level}.blocks.{block}"
                places.append((f"{ours}.res", f"{side}_blocks.{level}.resnets.{block}"))
                places.append((f"{ours}.attn", f"{side}_blocks.{level}.attentions.{block}"))
    return _keymap(module, places, _DIFFUSERS_LEAVES)


_MIDDLE: Rules = [("res1", "resnets.0"), ("attn", "attentions.0"), ("res2", "resnets.1")]


def diffusers_autoencoder(module: nn.Module, config: AutoencoderConfig) -> KeyMap:
    """Names of diffusers' AutoencoderKL."""
    places: Rules = [("encoder.moments", "quant_conv"), ("decoder.expand", "post_quant_conv")]
    for half, side, extra, resample in (("encoder", "down", 0, "downsamplers.0"), ("decoder", "up", 1, "upsamplers.0")):
        places += [(f"{half}.{name}", f"{half}.{name}") for name in ("conv_in", "conv_out")]
        places += [(f"{half}.norm_out", f"{half}.conv_norm_out")]
        places += [(f"{half}.mid.attn.norm", f"{half}.mid_block.attentions.0.group_norm")]
        places += [(f"{half}.mid.attn.attn", f"{half}.mid_block.attentions.0")]
        places += [(f"{half}.mid.{ours}", f"{half}.mid_block.{theirs}") for ours, theirs in _MIDDLE]
        for level in range(len(config.channels)):
            places.append((f"{half}.{side}.{level}.resample", f"{half}.{side}_blocks.{level}.{resample}"))
            for block in range(config.res_blocks + extra):
                ours, theirs = f"{half}.{side}.{level}.blocks.{block}", f"{half}.{side}_blocks.{level}.resnets.{block}"
                places.append((ours, theirs))
    return _keymap(module, places, _DIFFUSERS_LEAVES)


def transformers_clip(module: nn.Module, config: TextConfig) -> KeyMap:
    """Names of transformers' CLIPTextModel (without its `text_model.` where `module` is our Conditioner)."""
    leaves: Rules = [
        (r"^tower\.positional_embedding$", "embeddings.position_embedding.weight"),
        (r"^tower\.token_embedding\.", "embeddings.token_embedding."),
        (r"^tower\.ln_final\.", "final_layer_norm."),
        (r"^tower\.transformer\.resblocks\.(\d+)\.", r"encoder.layers.\1."),
        (r"\.ln_(\d)\.", r".layer_norm\1."),
        (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
        (r"\.mlp\.c_fc\.", ".mlp.fc1."),
        (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    ]
    joined = re.compile(r"(.*)\.attn\.in_proj_(weight|bias)")
    names = {}
    for ours, theirs in _keymap(module, [], leaves).names.items():
        match = joined.fullmatch(theirs[0])
        names[ours] = _split(match[1], match[2], "qkv") if match else theirs
    return KeyMap(names)


def _split(place: str, kind: str, letters: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{place}.self_attn.{letter}_proj.{kind}" for letter in letters)
