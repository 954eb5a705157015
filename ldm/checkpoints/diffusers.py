"""Names of diffusers' and transformers' modules for the tensors of our networks."""

import re

from torch import nn

from ldm.checkpoints.keymap import KeyMap, Rules, renamed
from ldm.text.tower import TextConfig

_BLOCKS: Rules = [
    (r"\.time\.", ".time_emb_proj."),
    (r"\.skip\.", ".conv_shortcut."),
    (r"\bmid\.res1\.", "mid_block.resnets.0."),
    (r"\bmid\.res2\.", "mid_block.resnets.1."),
    (r"\bdown\.(\d+)\.resample\.", r"down_blocks.\1.downsamplers.0."),
    (r"\bup\.(\d+)\.resample\.", r"up_blocks.\1.upsamplers.0."),
]
_UNET: Rules = [
    (r"\.attn\.blocks\.", ".attn.transformer_blocks."),
    (r"\.to_out\.", ".to_out.0."),
    (r"\.ff\.expand\.", ".ff.net.0.proj."),
    (r"\.ff\.reduce\.", ".ff.net.2."),
    (r"^(down|up)\.(\d+)\.blocks\.(\d+)\.res\.", r"\1_blocks.\2.resnets.\3."),
    (r"^(down|up)\.(\d+)\.blocks\.(\d+)\.attn\.", r"\1_blocks.\2.attentions.\3."),
    (r"^mid\.attn\.", "mid_block.attentions.0."),
    (r"^time\.0\.", "time_embedding.linear_1."),
    (r"^time\.2\.", "time_embedding.linear_2."),
    (r"^vector\.0\.", "add_embedding.linear_1."),
    (r"^vector\.2\.", "add_embedding.linear_2."),
    (r"^norm_out\.", "conv_norm_out."),
]
_AUTOENCODER: Rules = [
    (r"\.mid\.attn\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn\.attn\.", ".mid_block.attentions.0."),
    (r"\.(down|up)\.(\d+)\.blocks\.(\d+)\.", r".\1_blocks.\2.resnets.\3."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"^encoder\.moments\.", "quant_conv."),
    (r"^decoder\.expand\.", "post_quant_conv."),
]
_OLDER: Rules = [
    (r"\.to_q\.", ".query."),
    (r"\.to_k\.", ".key."),
    (r"\.to_v\.", ".value."),
    (r"\.to_out\.", ".proj_attn."),
]


def unet(module: nn.Module) -> KeyMap:
    """Names in UNet2DConditionModel."""
    return renamed(module, _BLOCKS + _UNET)


def autoencoder(module: nn.Module, *, legacy: bool = False) -> KeyMap:
    """Names in AutoencoderKL; legacy: its attention's older ones, which the files of SD 1 and 2 still carry."""
    return renamed(module, _BLOCKS + _AUTOENCODER + (_OLDER if legacy else [(r"\.to_out\.", ".to_out.0.")]))


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


def clip(module: nn.Module, config: TextConfig, *, prefix: str = "text_model.", layers: int | None = None) -> KeyMap:
    """Names in transformers' CLIPTextModel[WithProjection] of one tower, or of its first `layers`."""
    found = _transformers(renamed(module, _CLIP_LEAVES), prefix, "text_projection")
    beyond = [rf"encoder.layers.{layer}." for layer in range(layers or config.layers, config.layers)]
    kept = {ours: theirs for ours, theirs in found.names.items() if not any(part in theirs[0] for part in beyond)}
    return KeyMap(kept, found.turned)


def vision(module: nn.Module) -> KeyMap:
    """Names in transformers' CLIPVisionModelWithProjection of an image tower."""
    return _transformers(renamed(module, _VISION_LEAVES + _CLIP_LEAVES[4:]), "vision_model.", "visual_projection")


def _transformers(keymap: KeyMap, prefix: str, projection: str) -> KeyMap:
    """What is one tensor in open_clip: in transformers queries, keys and values stand apart; and what it turns."""
    names: dict[str, tuple[str, ...]] = {}
    for ours, (theirs,) in keymap.names.items():
        joined = re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", theirs)
        if joined:
            names[ours] = tuple(f"{prefix}{joined[1]}.self_attn.{letter}_proj.{joined[2]}" for letter in "qkv")
        else:
            names[ours] = (f"{projection}.weight" if theirs in ("proj", "text_projection") else prefix + theirs,)
    return KeyMap(names, turned=frozenset(n for n, theirs in names.items() if theirs == (f"{projection}.weight",)))
