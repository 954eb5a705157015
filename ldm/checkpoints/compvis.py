"""Names of the first latent-diffusion code (CompVis, then Stability's sgm) for the tensors of our networks.

The UNet's blocks are numbered through, levels and resampling alike; the numbers are generated from the config.
"""

import re

from torch import nn

from ldm.checkpoints.keymap import KeyMap, Rules, by_rules, linear
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.unet import UNetConfig

_LEAVES: Rules = [
    (r"\.norm1\.(?=(weight|bias)$)", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.time\.", ".emb_layers.1."),
    (r"\.norm2\.(?=(weight|bias)$)", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.skip\.", ".skip_connection."),
]
_TRANSFORMER: Rules = [
    (r"\.blocks\.", ".transformer_blocks."),
    (r"\.to_out\.", ".to_out.0."),
    (r"\.ff\.expand\.", ".ff.net.0.proj."),
    (r"\.ff\.reduce\.", ".ff.net.2."),
]


def unet(module: nn.Module, config: UNetConfig) -> KeyMap:
    """Names in UNetModel, without `model.diffusion_model.`."""
    last = len(config.channels) - 1
    places: Rules = [("time", "time_embed"), ("vector", "label_emb.0"), ("conv_in", "input_blocks.0.0")]
    places += [("norm_out", "out.0"), ("conv_out", "out.2")]
    residual: Rules = [("mid.res1", "middle_block.0")]
    residual += [("mid.res2", "middle_block.2" if config.mid_depth else "middle_block.1")]
    attention: Rules = [("mid.attn", "middle_block.1")]
    number = 1
    for level in range(last + 1):
        for block in range(config.res_blocks):
            residual.append((f"down.{level}.blocks.{block}.res", f"input_blocks.{number}.0"))
            attention.append((f"down.{level}.blocks.{block}.attn", f"input_blocks.{number}.1"))
            number += 1
        if level < last:
            places.append((f"down.{level}.resample.conv", f"input_blocks.{number}.0.op"))
            number += 1
    number = 0
    for step, level in enumerate(range(last, -1, -1)):
        for block in range(config.res_blocks + 1):
            residual.append((f"up.{step}.blocks.{block}.res", f"output_blocks.{number}.0"))
            attention.append((f"up.{step}.blocks.{block}.attn", f"output_blocks.{number}.1"))
            number += 1
        behind = 2 if config.depth[level] else 1
        places.append((f"up.{step}.resample", f"output_blocks.{number - 1}.{behind}"))
    names = by_rules(module, places + residual + attention, [])
    in_residual = re.compile(r"(down|up)\.\d+\.blocks\.\d+\.res\.|mid\.res\d\.")
    in_attention = re.compile(r"(down|up)\.\d+\.blocks\.\d+\.attn\.|mid\.attn\.")
    for part, leaves in ((in_residual, _LEAVES), (in_attention, _TRANSFORMER)):
        for ours in filter(part.match, names):
            for pattern, replacement in leaves:
                names[ours] = (re.sub(pattern, replacement, names[ours][0]),)
    return KeyMap(names)


def autoencoder(module: nn.Module, config: AutoencoderConfig) -> KeyMap:
    """Names in AutoencoderKL, without `first_stage_model.`; its attention is made of 1 x 1 convolutions."""
    last = len(config.channels) - 1
    places: Rules = [("encoder.moments", "quant_conv"), ("decoder.expand", "post_quant_conv")]
    for half, ours, theirs, extra in (("encoder", "down", "downsample", 0), ("decoder", "up", "upsample", 1)):
        places += [(f"{half}.{name}", f"{half}.{name}") for name in ("conv_in", "conv_out", "norm_out")]
        places += [(f"{half}.mid.res{n}", f"{half}.mid.block_{n}") for n in (1, 2)]
        places += [
            (f"{half}.mid.attn.norm", f"{half}.mid.attn_1.norm"),
            (f"{half}.mid.attn.attn", f"{half}.mid.attn_1"),
        ]
        for step in range(last + 1):
            level = step if half == "encoder" else last - step  # theirs counts both halves from full resolution down
            places.append((f"{half}.{ours}.{step}.resample", f"{half}.{ours}.{level}.{theirs}"))
            for block in range(config.res_blocks + extra):
                places.append((f"{half}.{ours}.{step}.blocks.{block}", f"{half}.{ours}.{level}.block.{block}"))
    leaves: Rules = [(r"^\.to_([qkv])\.", r".\1."), (r"^\.to_out\.", ".proj_out."), (r"\.skip\.", ".nin_shortcut.")]
    return KeyMap(by_rules(module, places, leaves), pointwise=linear(module, lambda name: ".mid.attn.attn." in name))


def open_clip(module: nn.Module) -> KeyMap:
    """Names in open_clip's CLIP of one of our towers, which is the same module: nothing changes but the prefix."""
    return KeyMap(by_rules(module, [], [(r"^(tower|second)\.", "")]))
