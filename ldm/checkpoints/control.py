"""Names of other programs for the tensors of ControlNets and T2I-Adapters."""

from torch import nn

from ldm.checkpoints import compvis, diffusers
from ldm.checkpoints.keymap import KeyMap
from ldm.models.controlnet import ControlNet, T2IAdapter


def controlnet(module: ControlNet, *, layout: str) -> KeyMap:
    """Names in diffusers' ControlNetModel (`diffusers`), or in the first code, without `control_model.` (`compvis`)."""
    last = len(module.hint) - 1
    if layout == "diffusers":
        names = diffusers.unet(module, module.config).names
        hint = {i: f"controlnet_cond_embedding.blocks.{i - 1}" for i in range(1, last)}
        hint |= {0: "controlnet_cond_embedding.conv_in", last: "controlnet_cond_embedding.conv_out"}
        zero, middle = "controlnet_down_blocks.{}", "controlnet_mid_block"
    else:
        names = compvis.unet(module, module.config).names
        hint = {i: f"input_hint_block.{2 * i}" for i in range(last + 1)}
        zero, middle = "zero_convs.{}.0", "middle_block_out.0"
    places = {f"hint.{i}": place for i, place in hint.items()}
    places |= {f"zero.{i}": zero.format(i) for i in range(len(module.zero))} | {"zero_middle": middle}
    return KeyMap(names | {f"{our}.{kind}": (f"{their}.{kind}",) for our, their in places.items() for kind in _KINDS})


def t2i(module: T2IAdapter, *, layout: str) -> KeyMap:
    """Names in diffusers' T2IAdapter (`diffusers`), or in the first code, which counts all blocks through (`t2i`)."""
    places = {"conv_in": "conv_in"}
    for i in range(len(module.config.channels)):
        for j in range(module.config.blocks):
            place = f"body.{i}.resnets.{j}" if layout == "diffusers" else f"body.{i * module.config.blocks + j}"
            places |= {f"body.{i}.{j}.{part}": f"{place}.{part}" for part in ("block1", "block2")}
        if isinstance(module.fits[i], nn.Conv2d):
            places[f"fits.{i}"] = f"body.{i if layout == 'diffusers' else i * module.config.blocks}.in_conv"
    prefix = "adapter." if layout == "diffusers" else ""
    return KeyMap({f"{our}.{kind}": (f"{prefix}{their}.{kind}",) for our, their in places.items() for kind in _KINDS})


_KINDS = ("weight", "bias")
