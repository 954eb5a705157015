"""Names of diffusers' and transformers' modules for the tensors of our networks."""

import re

from torch import nn

from ldm.checkpoints.keymap import KeyMap, Rules, by_rules
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.unet import UNetConfig
from ldm.text.tower import TextConfig

_LEAVES: Rules = [
    (r"\.time\.", ".time_emb_proj."),
    (r"\.skip\.", ".conv_shortcut."),
    (r"\.blocks\.", ".transformer_blocks."),
    (r"\.to_out\.", ".to_out.0."),
    (r"\.ff\.expand\.", ".ff.net.0.proj."),
    (r"\.ff\.reduce\.", ".ff.net.2."),
]
_MIDDLE: Rules = [("res1", "resnets.0"), ("attn", "attentions.0"), ("res2", "resnets.1")]


def unet(module: nn.Module, config: UNetConfig) -> KeyMap:
    """Names in UNet2DConditionModel."""
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
    return KeyMap(by_rules(module, places, _LEAVES))


def autoencoder(module: nn.Module, config: AutoencoderConfig, *, legacy: bool = False) -> KeyMap:
    """Names in AutoencoderKL; legacy: its attention's older ones, which the files of SD 1 and 2 still carry."""
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
    older: Rules = [(r"\.to_q\.", ".query."), (r"\.to_k\.", ".key."), (r"\.to_v\.", ".value.")]
    older += [(r"\.to_out\.", ".proj_attn.")]
    return KeyMap(by_rules(module, places, (older if legacy else []) + _LEAVES))


_CLIP_LEAVES: Rules = [
    (r"^(tower|second)\.", ""),
    (r"^token_embedding\.weight", "embeddings.token_embedding.weight"),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^ln_final\.", "final_layer_norm."),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
]
_VISION_LEAVES: Rules = [
    (r"^tower\.", ""),
    (r"^class_embedding$", "embeddings.class_embedding"),
    (r"^conv1\.", "embeddings.patch_embedding."),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^ln_pre\.", "pre_layrnorm."),  # their spelling
    (r"^ln_post\.", "post_layernorm."),
]
_JOINED = re.compile(r"(.*)\.attn\.in_proj_(weight|bias)")


def clip(module: nn.Module, config: TextConfig, *, prefix: str = "text_model.", layers: int | None = None) -> KeyMap:
    """Names in transformers' CLIPTextModel[WithProjection] of one tower, or of its first `layers`."""
    names: dict[str, tuple[str, ...]] = {}
    for ours, (theirs,) in by_rules(module, [], _CLIP_LEAVES).items():
        block = re.search(r"encoder\.layers\.(\d+)\.", theirs)
        if not block or int(block[1]) < (layers or config.layers):
            names[ours] = ("text_projection.weight",) if theirs == "text_projection" else _parts(prefix, theirs)
    return KeyMap(names, turned=frozenset(n for n in names if n.endswith("text_projection")))


def vision(module: nn.Module) -> KeyMap:
    """Names in transformers' CLIPVisionModelWithProjection of an image tower."""
    names = {
        ours: ("visual_projection.weight",) if theirs == "proj" else _parts("vision_model.", theirs)
        for ours, (theirs,) in by_rules(module, [], _VISION_LEAVES + _CLIP_LEAVES[4:]).items()
    }
    return KeyMap(names, turned=frozenset(n for n, theirs in names.items() if theirs == ("visual_projection.weight",)))


def _parts(prefix: str, theirs: str) -> tuple[str, ...]:
    """What is one tensor in open_clip: in transformers queries, keys and values stand apart."""
    joined = _JOINED.fullmatch(theirs)
    if joined is None:
        return (prefix + theirs,)
    place, kind = joined.groups()
    return tuple(f"{prefix}{place}.self_attn.{letter}_proj.{kind}" for letter in "qkv")
