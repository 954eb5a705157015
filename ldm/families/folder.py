"""diffusers' folders: their config.json files read into ours, strictly, and ours written as theirs.

What is read must be written the same: a setting that says anything else, or that our networks do not have, is refused
by name unless it means the same as its absence. Nothing that a config names is imported.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from ldm.config import from_dict
from ldm.errors import UserError
from ldm.files import read_text
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.unet import UNetConfig
from ldm.text.tower import TextConfig

Json = dict[str, Any]
MAX_JSON = 2**24
# Ours and theirs, with what is meant where they say nothing: settings that are the same number in both.
_UNET = {
    "in_channels": ("in_channels", 4),
    "out_channels": ("out_channels", 4),
    "linear_projection": ("use_linear_projection", False),
    "groups": ("norm_num_groups", 32),
}
_VAE = {"z_channels": ("latent_channels", 4), "groups": ("norm_num_groups", 32)}
_TEXT = {
    "width": ("hidden_size", 512),
    "heads": ("num_attention_heads", 8),
    "layers": ("num_hidden_layers", 12),
    "context_length": ("max_position_embeddings", 77),
    "vocab_size": ("vocab_size", 49408),
}
# What our networks always are.
_UNET_FIXED = {"act_fn": "silu", "norm_eps": 1e-5, "flip_sin_to_cos": True, "downsample_padding": 1}
_UNET_FIXED |= {"mid_block_scale_factor": 1, "conv_in_kernel": 3, "conv_out_kernel": 3, "resnet_out_scale_factor": 1.0}
_UNET_FIXED |= {"resnet_time_scale_shift": "default", "time_embedding_type": "positional", "attention_type": "default"}
_VAE_FIXED = {"act_fn": "silu", "in_channels": 3, "out_channels": 3}
# What is read in another way, or says nothing of the numbers.
_UNET_OTHER = """
sample_size transformer_layers_per_block attention_head_dim num_attention_heads addition_time_embed_dim
projection_class_embeddings_input_dim dropout upcast_attention addition_embed_type_num_heads use_attention_mask
"""
_VAE_OTHER = """
block_out_channels scaling_factor shift_factor latents_mean latents_std sample_size force_upcast
down_block_out_channels up_block_out_channels layers_per_down_block layers_per_up_block
"""
_VOID = list(product((None, False, 0), repeat=2))


def read_json(path: Path) -> Json:
    """A JSON file that holds fields. UserError, one line, for anything else."""
    if path.is_file() and path.stat().st_size > MAX_JSON:
        raise UserError(f"{str(path)!r} is too long for a config")
    text = read_text(path)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{str(path)!r} holds no fields")
    return data


def unet_from(data: Json) -> UNetConfig:
    """UNet2DConditionModel's config."""
    channels = _numbers(data, "block_out_channels", (320, 640, 1280, 1280))
    levels = len(channels)
    types = data.get("down_block_types", ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"])
    if not isinstance(types, list) or len(types) != levels:
        raise UserError(f"unet: down_block_types {types!r} are not those of {levels} levels")
    attends = [kind == "CrossAttnDownBlock2D" for kind in types]
    depth = _per_level(data, "transformer_layers_per_block", 1, levels)
    # Its name says dimension and its value is the number of heads; a mistake that became the format.
    heads = "num_attention_heads" if data.get("num_attention_heads") else "attention_head_dim"
    same = _read(_UNET, data)
    own = {
        "linear_projection": bool(same["linear_projection"]),
        "channels": channels,
        "res_blocks": _numbers(data, "layers_per_block", (2,))[0],
        "depth": [n if attend else 0 for n, attend in zip(depth, attends, strict=True)],
        "mid_depth": depth[-1],
        "heads": _per_level(data, heads, 8, levels),
        "context_dim": _numbers(data, "cross_attention_dim", (1280,))[0],
        "vector_dim": (data.get("addition_embed_type") and data.get("projection_class_embeddings_input_dim")) or 0,
    }
    config = from_dict(UNetConfig, same | own, "unet")
    _agree(data, unet_to(config, 0, TextConfig()), "unet", _UNET_OTHER)
    return config


def unet_to(config: UNetConfig, side: int, text: TextConfig) -> Json:
    """UNet2DConditionModel's config for latents of `side`. UserError where it has no words for ours."""
    depth = [d or 1 for d in config.depth]
    if config.mid_depth != (config.depth[-1] or config.mid_depth):
        said = f"mid_depth {config.mid_depth} must be the lowest level's depth {config.depth[-1]}"
        raise UserError(f"{said} in diffusers' layout")
    depth[-1] = config.mid_depth
    data: Json = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": side,
        "block_out_channels": list(config.channels),
        "layers_per_block": config.res_blocks,
        "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in config.depth],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in config.depth[::-1]],
        "transformer_layers_per_block": depth,
        "attention_head_dim": list(config.heads),
        "cross_attention_dim": config.context_dim,
    }
    if config.vector_dim:
        data |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": text.id_width,
            "projection_class_embeddings_input_dim": config.vector_dim,
        }
    return data | _written(_UNET, config, _UNET_FIXED)


def vae_from(data: Json) -> AutoencoderConfig:
    """The config of AutoencoderKL, or of AsymmetricAutoencoderKL, whose halves differ in width."""
    halves = data.get("_class_name") == "AsymmetricAutoencoderKL"
    channels = _numbers(data, "down_block_out_channels" if halves else "block_out_channels", (64,))
    decoder = _numbers(data, "up_block_out_channels", (64,)) if halves else channels
    blocks = data.get("layers_per_down_block" if halves else "layers_per_block", 1)
    if halves and data.get("layers_per_up_block", 1) != blocks:
        raise UserError("vae: layers_per_down_block and layers_per_up_block must be the same")
    scale, shift = data.get("scaling_factor", 0.18215), data.get("shift_factor") or 0.0
    means, stds = data.get("latents_mean") or [0.0], data.get("latents_std") or [1.0]
    if not _reals([scale, shift]) or scale <= 0 or not _reals(means) or not _reals(stds):
        said = f"scaling_factor {scale!r}, shift_factor {shift!r}"
        raise UserError(f"vae: {said} and the latents' statistics must be numbers")
    own = {
        "channels": channels,
        "decoder_channels": decoder if list(decoder) != list(channels) else (),
        "res_blocks": blocks,
        "mid_attention": data.get("mid_block_add_attention", True),
        "quant_convs": data.get("use_quant_conv", True),
        "mean": [shift + mean for mean in means],
        "std": [std / scale for std in stds],
    }
    config = from_dict(AutoencoderConfig, _read(_VAE, data) | own, "vae")
    _agree(data, vae_to(config, 0, upcast=False), "vae", _VAE_OTHER)
    return config


def vae_to(config: AutoencoderConfig, side: int, *, upcast: bool) -> Json:
    """The config of an autoencoder whose latents have one scale (`fold` sees to that)."""
    levels = len(config.channels)
    if config.patch != 1:
        raise UserError(f"diffusers' autoencoders see single pixels, this one patches of {config.patch}")
    if config.decoder_channels:
        if not (config.mid_attention and config.quant_convs):
            raise UserError(
                "an autoencoder of unequal halves has middle attention and both 1 x 1 convolutions in diffusers"
            )
        widths: Json = {
            "_class_name": "AsymmetricAutoencoderKL",
            "down_block_out_channels": list(config.channels),
            "up_block_out_channels": list(config.decoder_channels),
            "layers_per_down_block": config.res_blocks,
            "layers_per_up_block": config.res_blocks,
        }
    else:
        widths = {
            "_class_name": "AutoencoderKL",
            "block_out_channels": list(config.channels),
            "layers_per_block": config.res_blocks,
            "mid_block_add_attention": config.mid_attention,
            "use_quant_conv": config.quant_convs,
            "use_post_quant_conv": config.quant_convs,
            "force_upcast": upcast,
        }
    widths |= {
        "sample_size": side,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "scaling_factor": 1 / config.std[0],
    }
    return widths | _written(_VAE, config, _VAE_FIXED)


def text_from(data: Json, where: str, template: TextConfig) -> TextConfig:
    """CLIPTextModel's config; what it leaves unsaid (padding, which layer) is the template's."""
    if data.get("layer_norm_eps", 1e-5) != 1e-5:
        raise UserError(f"{where}: layer_norm_eps {data['layer_norm_eps']!r} must be 1e-05")
    same, wide = _read(_TEXT, data), data.get("intermediate_size", 2048)
    width, layers = same["width"], same["layers"]
    # Where the final norm follows it, a folder's pipelines read the last state: no unused layer is in the files.
    layer = 1 if template.final_norm or not isinstance(layers, int) else min(template.layer, max(layers, 1))
    own = {
        "quickgelu": quickgelu(data, f"{where}: "),
        "layer": layer,
        "final_norm": template.final_norm,
        "pad": template.pad,
        "mlp": 0 if isinstance(width, int) and wide == 4 * width else wide,
        "projection": data.get("projection_dim", 512) if template.projection else 0,
    }
    return from_dict(TextConfig, same | own, where)


def quickgelu(data: Json, where: str = "") -> bool:
    """Whether CLIP's config means QuickGELU."""
    activation = data.get("hidden_act", "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
        raise UserError(f"{where}hidden_act {activation!r} is not known here (quick_gelu, gelu)")
    return bool(activation == "quick_gelu")


def text_to(config: TextConfig, layers: int) -> Json:
    """CLIPTextModel's config for the first layers of a tower."""
    end = config.end
    return _written(_TEXT, config, {}) | {
        "architectures": ["CLIPTextModelWithProjection" if config.projection else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "intermediate_size": config.mlp or 4 * config.width,
        "num_hidden_layers": layers,
        "hidden_act": "quick_gelu" if config.quickgelu else "gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": config.projection or config.width,
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "pad_token_id": end if config.pad == "end" else 0,
    }


def single_scale(config: AutoencoderConfig) -> bool:
    """Whether one factor normalises the latents, as diffusers' pipelines have it."""
    return set(config.mean) == {0.0} and len(set(config.std)) == 1


def one_scale(config: AutoencoderConfig) -> AutoencoderConfig:
    """The same autoencoder with its latents' statistics inside its weights."""
    return config if single_scale(config) else replace(config, mean=(0.0,), std=(1.0,))


def _agree(data: Json, written: Json, where: str, other: str) -> None:
    """UserError for the first setting that is neither what is written of the config that was read, nor void as that.

    other: names that are not looked at.
    """
    for name, value in data.items():
        if not name.startswith("_") and name not in other.split():
            wanted = written.get(name)
            if not _same(value, wanted) and (name, value) != ("act_fn", "swish") and (value, wanted) not in _VOID:
                raise UserError(f"{where}: {name} {value!r} is not known here ({wanted!r})")


def _same(value: Any, wanted: Any) -> bool:
    """Whether two settings are equal; one value may stand for a list of it."""
    if isinstance(value, list) == isinstance(wanted, list):
        return bool(value == wanted)
    several, one = (value, wanted) if isinstance(value, list) else (wanted, value)
    return bool(several) and all(each == one for each in several)


def _read(same: Mapping[str, tuple[str, Any]], data: Json) -> Json:
    return {ours: data.get(theirs, default) for ours, (theirs, default) in same.items()}


def _written(same: Mapping[str, tuple[str, Any]], config: Any, fixed: Json) -> Json:
    return {theirs: getattr(config, ours) for ours, (theirs, _) in same.items()} | fixed


def _numbers(data: Json, key: str, default: tuple[int, ...]) -> list[Any]:
    value = data.get(key, default)
    values = [value] if isinstance(value, int) else value
    if not isinstance(values, (list, tuple)) or not values or not all(type(v) is int and v > 0 for v in values):
        raise UserError(f"{key} is {value!r}: needs numbers above 0")
    return list(values)


def _per_level(data: Json, key: str, default: int, levels: int) -> list[Any]:
    values = _numbers(data, key, (default,))
    values = values * levels if len(values) == 1 else values
    if len(values) != levels:
        raise UserError(f"{key} has {len(values)} values for {levels} levels")
    return values


def _reals(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) in (int, float) and abs(v) < 1e30 for v in values)
