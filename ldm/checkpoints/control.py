"""Names of other programs for the tensors of ControlNets and T2I-Adapters."""

from ldm.checkpoints import compvis, diffusers
from ldm.checkpoints.keymap import KeyMap, Rules, renamed
from ldm.models.controlnet import ControlNet, T2IAdapter


def controlnet(module: ControlNet, *, layout: str) -> KeyMap:
    """Names in diffusers' ControlNetModel (`diffusers`), or in the first code, without `control_model.` (`compvis`)."""
    if layout == "diffusers":
        names, last = diffusers.unet(module).names, len(module.hint) - 1
        own: Rules = [
            (r"^hint\.0\.", "controlnet_cond_embedding.conv_in."),
            (rf"^hint\.{last}\.", "controlnet_cond_embedding.conv_out."),
            (r"^hint\.(\d+)\.", lambda m: f"controlnet_cond_embedding.blocks.{int(m[1]) - 1}."),
            (r"^zero\.", "controlnet_down_blocks."),
            (r"^zero_middle\.", "controlnet_mid_block."),
        ]
    else:
        names = compvis.unet(module, module.config).names
        own = [
            (r"^hint\.(\d+)\.", lambda m: f"input_hint_block.{2 * int(m[1])}."),
            (r"^zero\.(\d+)\.", r"zero_convs.\1.0."),
            (r"^zero_middle\.", "middle_block_out.0."),
        ]
    return KeyMap(names | {n: to for n, to in renamed(module, own).names.items() if n.startswith(("hint.", "zero"))})


def t2i(module: T2IAdapter, *, layout: str) -> KeyMap:
    """Names in diffusers' T2IAdapter (`diffusers`), or in the first code, which counts all blocks through (`t2i`)."""
    if layout == "diffusers":
        return renamed(
            module,
            [(r"^body\.(\d+)\.", r"body.\1.resnets."), (r"^fits\.(\d+)\.", r"body.\1.in_conv."), ("^", "adapter.")],
        )
    blocks = module.config.blocks
    return renamed(
        module,
        [
            (r"^body\.(\d+)\.(\d+)\.", lambda m: f"body.{int(m[1]) * blocks + int(m[2])}."),
            (r"^fits\.(\d+)\.", lambda m: f"body.{int(m[1]) * blocks}.in_conv."),
        ],
    )
