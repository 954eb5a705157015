"""Names of the first latent-diffusion code (CompVis, then Stability's sgm) for the tensors of our networks.

The UNet's blocks are numbered through, levels and resampling alike; the numbers are computed from the config.
"""

from dataclasses import replace

from torch import nn

from ldm.checkpoints.keymap import KeyMap, Rules, renamed
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.unet import UNetConfig

_UNET: Rules = [
    (r"(\.res\d?)\.norm1\.", r"\1.in_layers.0."),
    (r"(\.res\d?)\.conv1\.", r"\1.in_layers.2."),
    (r"(\.res\d?)\.time\.", r"\1.emb_layers.1."),
    (r"(\.res\d?)\.norm2\.", r"\1.out_layers.0."),
    (r"(\.res\d?)\.conv2\.", r"\1.out_layers.3."),
    (r"(\.res\d?)\.skip\.", r"\1.skip_connection."),
    (r"\.attn\.blocks\.", ".attn.transformer_blocks."),
    (r"\.to_out\.", ".to_out.0."),
    (r"\.ff\.expand\.", ".ff.net.0.proj."),
    (r"\.ff\.reduce\.", ".ff.net.2."),
    (r"^time\.", "time_embed."),
    (r"^vector\.", "label_emb.0."),
    (r"^conv_in\.", "input_blocks.0.0."),
    (r"^norm_out\.", "out.0."),
    (r"^conv_out\.", "out.2."),
    (r"^mid\.res1\.", "middle_block.0."),
    (r"^mid\.attn\.", "middle_block.1."),
]


def unet(module: nn.Module, config: UNetConfig) -> KeyMap:
    """Names in UNetModel, without `model.diffusion_model.`."""
    blocks, each, last = config.res_blocks, config.res_blocks + 1, len(config.channels) - 1
    kinds, sides = {"res": 0, "attn": 1}, {"down": "input", "up": "output"}
    behind = [2 if config.depth[last - step] else 1 for step in range(last + 1)]  # of a level's last block, going up
    numbered: Rules = [
        (r"^mid\.res2\.", f"middle_block.{2 if config.mid_depth else 1}."),
        (r"^down\.(\d+)\.resample\.conv\.", lambda m: f"input_blocks.{(int(m[1]) + 1) * each}.0.op."),
        (
            r"^(down|up)\.(\d+)\.blocks\.(\d+)\.(\w+)\.",
            lambda m: f"{sides[m[1]]}_blocks.{(m[1] == 'down') + int(m[2]) * each + int(m[3])}.{kinds[m[4]]}.",
        ),
        (r"^up\.(\d+)\.resample\.", lambda m: f"output_blocks.{int(m[1]) * each + blocks}.{behind[int(m[1])]}."),
    ]
    return renamed(module, _UNET + numbered)


def autoencoder(module: nn.Module, config: AutoencoderConfig) -> KeyMap:
    """Names in AutoencoderKL, without `first_stage_model.`; its attention is made of 1 x 1 convolutions."""
    last = len(config.channels) - 1
    rules: Rules = [
        (r"\.mid\.res(\d)\.", r".mid.block_\1."),
        (r"\.mid\.attn\.norm\.", ".mid.attn_1.norm."),
        (r"\.mid\.attn\.attn\.to_([qkv])\.", r".mid.attn_1.\1."),
        (r"\.mid\.attn\.attn\.to_out\.", ".mid.attn_1.proj_out."),
        (r"\.skip\.", ".nin_shortcut."),
        (r"\.blocks\.", ".block."),
        (r"\.down\.(\d+)\.resample\.", r".down.\1.downsample."),
        (r"\.up\.(\d+)\.resample\.", r".up.\1.upsample."),
        (r"\.up\.(\d+)\.", lambda m: f".up.{last - int(m[1])}."),  # theirs counts from full resolution down here too
        (r"^encoder\.moments\.", "quant_conv."),
        (r"^decoder\.expand\.", "post_quant_conv."),
    ]
    matrices = {name for name, value in module.state_dict().items() if value.dim() == 2}
    pointwise = frozenset(name for name in matrices if ".mid.attn.attn." in name)
    return replace(renamed(module, rules), pointwise=pointwise)


def open_clip(module: nn.Module) -> KeyMap:
    """Names in open_clip's CLIP of one of our towers, which is the same module: nothing changes but the prefix."""
    return renamed(module, [(r"^(tower|second)\.", "")])
