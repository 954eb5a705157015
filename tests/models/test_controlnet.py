"""ControlNet and T2I-Adapter against diffusers on the same random weights, alone and steering a UNet."""

import pytest
import torch
from torch import nn

from ldm.checkpoints import control as names
from ldm.checkpoints import diffusers as unet_names
from ldm.conditioning import Conditioning
from ldm.models.controlnet import Controlled, ControlNet, Steering, T2IAdapter, T2IConfig
from ldm.models.unet import UNet, UNetConfig
from ldm.text.open_clip import open_clip

open_clip()  # declares torchvision's operators, which transformers asks for too
SD1 = UNetConfig(channels=(32, 64, 64, 64), res_blocks=1, depth=(1, 1, 1, 0), heads=(2,) * 4, context_dim=24, groups=8)
XL = UNetConfig(
    channels=(32, 64, 64), res_blocks=2, depth=(0, 1, 2), mid_depth=2, heads=(1, 2, 2), context_dim=24, groups=8,
    vector_dim=16 + 6 * 8, linear_projection=True,
)  # fmt: skip
CONFIGS = {"sd1": SD1, "sdxl": XL}


def randomise(module: nn.Module, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=rng)
        fan = parameter[0].numel() if parameter.dim() > 1 else 4.0
        parameter.data = noise / fan**0.5 + (1.0 if parameter.dim() == 1 else 0.0)


def shared(config: UNetConfig) -> dict:
    depths = [d or 1 for d in config.depth]
    return dict(
        block_out_channels=config.channels,
        layers_per_block=config.res_blocks,
        down_block_types=["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in config.depth],
        transformer_layers_per_block=[*depths[:-1], config.mid_depth] if config.depth[-1] else depths,
        attention_head_dim=config.heads,
        cross_attention_dim=config.context_dim,
        use_linear_projection=config.linear_projection,
        norm_num_groups=config.groups,
        addition_embed_type="text_time" if config.vector_dim else None,
        addition_time_embed_dim=8 if config.vector_dim else None,
        projection_class_embeddings_input_dim=config.vector_dim or None,
    )


class Pair:
    """Ours and diffusers' UNet of a config, and the arguments of both."""

    def __init__(self, config: UNetConfig) -> None:
        from diffusers import UNet2DConditionModel

        up = ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in config.depth[::-1]]
        self.theirs = UNet2DConditionModel(**shared(config), up_block_types=up).eval()
        randomise(self.theirs, 0)
        self.ours = UNet(config).eval()
        keymap = unet_names.unet(self.ours)
        self.ours.load_state_dict(keymap.load(self.theirs.state_dict(), self.ours.state_dict()))
        rng = torch.Generator().manual_seed(1)
        self.z, tokens = torch.randn(2, 4, 8, 8, generator=rng), torch.randn(2, 5, 24, generator=rng)
        self.hint = torch.rand(2, 3, 64, 64, generator=rng)
        self.label = torch.tensor([500.0, 500.0])
        self.added = None
        vector = None
        if config.vector_dim:
            pooled, ids = torch.randn(2, 16, generator=rng), torch.rand(2, 6, generator=rng) * 100
            self.added = {"text_embeds": pooled, "time_ids": ids}
            features = self.theirs.add_time_proj(ids.flatten()).reshape(2, -1)
            vector = torch.cat([pooled, features], dim=1)
        self.cond = Conditioning(tokens, vector=vector)

    def reference(self, **more: object) -> torch.Tensor:
        return self.theirs(self.z, self.label, self.cond.tokens, added_cond_kwargs=self.added, **more).sample


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_a_unet_under_two_controlnets_equals_diffusers(family: str) -> None:
    from diffusers import ControlNetModel

    config, pair, weights = CONFIGS[family], Pair(CONFIGS[family]), (1.0, 0.4)
    steerings, down, middle = [], None, 0.0
    for seed, weight in enumerate(weights, 1):
        theirs = ControlNetModel(**shared(config), conditioning_embedding_out_channels=(8, 8, 16, 16)).eval()
        randomise(theirs, seed)
        ours = ControlNet(config, 3, (8, 8, 16, 16)).eval()
        ours.load_state_dict(names.controlnet(ours, layout="diffusers").load(theirs.state_dict(), ours.state_dict()))
        steerings.append(Steering(ours, pair.hint[:1], weight))
        hint = pair.hint[:1].repeat(2, 1, 1, 1)
        more, mid = theirs(
            pair.z, pair.label, pair.cond.tokens, hint, conditioning_scale=weight, added_cond_kwargs=pair.added,
            return_dict=False,
        )  # fmt: skip
        down = more if down is None else [a + b for a, b in zip(down, more, strict=True)]
        middle = middle + mid
    reference = pair.reference(down_block_additional_residuals=down, mid_block_additional_residual=middle)
    steered = Controlled(pair.ours, steerings)(pair.z, pair.label, pair.cond)
    assert relative(steered, reference) < 1e-5
    assert relative(steered, pair.reference()) > 0.1, "the control must be felt"


@pytest.mark.parametrize(
    "family,kind,channels",
    [("sd1", "full_adapter", SD1.channels), ("sdxl", "full_adapter_xl", (*XL.channels, XL.channels[-1]))],
)
@torch.no_grad()
def test_a_unet_under_a_t2i_adapter_equals_diffusers(family: str, kind: str, channels: tuple[int, ...]) -> None:
    from diffusers import T2IAdapter as Theirs

    pair = Pair(CONFIGS[family])
    large = family == "sdxl"
    factor = 16 if large else 8
    theirs = Theirs(
        in_channels=1, channels=list(channels), num_res_blocks=2, downscale_factor=factor, adapter_type=kind
    )
    randomise(theirs.eval(), 3)
    halves = tuple(i == 2 for i in range(4)) if large else (False, True, True, True)
    ours = T2IAdapter(T2IConfig(tuple(channels), 2, 1, factor, halves)).eval()
    ours.load_state_dict(names.t2i(ours, layout="diffusers").load(theirs.state_dict(), ours.state_dict()))
    hint = pair.hint[:, :1]
    reference = pair.reference(down_intrablock_additional_residuals=[0.7 * f for f in theirs(hint)])
    steered = Controlled(pair.ours, [Steering(ours, hint, 0.7)])(pair.z, pair.label, pair.cond)
    assert relative(steered, reference) < 1e-5
    assert relative(steered, pair.reference()) > 0.1


@torch.no_grad()
def test_a_fresh_controlnet_changes_nothing_and_starts_as_its_unet() -> None:
    pair = Pair(SD1)
    network = ControlNet(SD1, unet=pair.ours)
    assert torch.equal(network.conv_in.weight, pair.ours.conv_in.weight)
    assert network.conv_in.weight.data_ptr() != pair.ours.conv_in.weight.data_ptr()
    alone = pair.ours(pair.z, pair.label, pair.cond)
    steered = Controlled(pair.ours, [Steering(network, pair.hint)])
    assert torch.equal(steered(pair.z, pair.label, pair.cond), alone)
    randomise(network, 4)
    assert not torch.equal(steered(pair.z, pair.label, pair.cond), alone)
