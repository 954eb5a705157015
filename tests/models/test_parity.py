"""Our networks against diffusers and transformers on the same random weights."""

import pytest
import torch
from torch import Tensor, nn

from ldm.checkpoints import diffusers as names
from ldm.checkpoints.keymap import KeyMap
from ldm.conditioning import Conditioning
from ldm.models.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.unet import UNet, UNetConfig
from ldm.text.open_clip import open_clip
from ldm.text.tower import Conditioner, TextConfig

open_clip()  # declares torchvision's operators, which transformers asks for too

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}

UNETS = {
    "sd1": UNetConfig(channels=(32, 64, 64), res_blocks=2, depth=(1, 1, 0), heads=(4, 4, 4), context_dim=24, groups=8),
    "sd2": UNetConfig(
        channels=(32, 64), depth=(1, 2), heads=(2, 4), context_dim=24, groups=8, linear_projection=True, mid_depth=2
    ),
    "sdxl": UNetConfig(
        channels=(32, 64, 64),
        depth=(0, 1, 2),
        mid_depth=2,
        heads=(1, 2, 2),
        context_dim=24,
        vector_dim=16 + 6 * 8,
        linear_projection=True,
        groups=8,
    ),
    "inpainting": UNetConfig(
        in_channels=9, channels=(32, 32), res_blocks=1, depth=(1, 0), heads=(2, 2), context_dim=8, groups=8
    ),
}


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Fresh values for every tensor, norms and zero-initialised layers too, so that no branch hides behind a zero."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=rng)
        fan = parameter[0].numel() if parameter.dim() > 1 else 4.0
        parameter.data = (noise / fan**0.5 + (1.0 if parameter.dim() == 1 else 0.0)).to(parameter.dtype)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def share(ours: nn.Module, theirs: nn.Module, keymap: KeyMap, dtype: torch.dtype) -> None:
    randomise(theirs)
    ours.to(dtype).load_state_dict(keymap.load(theirs.to(dtype).state_dict(), ours.state_dict()))
    ours.eval(), theirs.eval()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", UNETS)
def test_unet_equals_diffusers(family: str, dtype: torch.dtype) -> None:
    from diffusers import UNet2DConditionModel

    config = UNETS[family]
    depths = [d or 1 for d in config.depth]
    theirs = UNet2DConditionModel(
        in_channels=config.in_channels,
        block_out_channels=config.channels,
        layers_per_block=config.res_blocks,
        down_block_types=["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in config.depth],
        up_block_types=["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in config.depth[::-1]],
        transformer_layers_per_block=[*depths[:-1], config.mid_depth] if config.depth[-1] else depths,
        attention_head_dim=config.heads,
        cross_attention_dim=config.context_dim,
        use_linear_projection=config.linear_projection,
        norm_num_groups=config.groups,
        addition_embed_type="text_time" if config.vector_dim else None,
        addition_time_embed_dim=8 if config.vector_dim else None,
        projection_class_embeddings_input_dim=config.vector_dim or None,
    )
    ours = UNet(config)
    share(ours, theirs, names.unet(ours), dtype)

    z, label = torch.randn(2, config.in_channels, 16, 16, dtype=dtype), torch.tensor([3.0, 801.0], dtype=dtype)
    tokens, vector, extra = torch.randn(2, 7, config.context_dim, dtype=dtype), None, None
    if config.vector_dim:
        pooled, ids = torch.randn(2, 16, dtype=dtype), torch.randint(0, 64, (2, 6))
        extra = {"text_embeds": pooled, "time_ids": ids}
        times = theirs.add_time_proj(ids.flatten()).reshape(2, -1).to(dtype)
        vector = torch.cat([pooled, times], dim=1)
    with torch.no_grad():
        expected = theirs(z, label, tokens, added_cond_kwargs=extra).sample
        got = ours(z, label, Conditioning(tokens, vector=vector))
    assert relative(got, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_autoencoder_equals_diffusers(dtype: torch.dtype) -> None:
    from diffusers import AutoencoderKL

    config = AutoencoderConfig(channels=(16, 32, 32), res_blocks=1, groups=8, mean=(0.3,), std=(2.5,))
    theirs = AutoencoderKL(
        block_out_channels=config.channels,
        layers_per_block=config.res_blocks,
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        norm_num_groups=config.groups,
    )
    ours = Autoencoder(config)
    share(ours, theirs, names.autoencoder(ours), dtype)
    image, noise = torch.randn(2, 3, 32, 48, dtype=dtype), torch.randn(2, 4, 8, 12, dtype=dtype)
    with torch.no_grad():
        moments = theirs.encode(image).latent_dist
        ours_moments = ours.encode(image)
        expected = (moments.mean + moments.std * noise - 0.3) / 2.5
        assert relative(ours_moments.sample(noise), expected) < TOLERANCE[dtype]
        assert relative(ours.decode(expected), theirs.decode(expected * 2.5 + 0.3).sample) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("quickgelu", [True, False])
@pytest.mark.parametrize("layer", [1, 2])
def test_text_tower_equals_transformers(quickgelu: bool, layer: int, dtype: torch.dtype) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = TextConfig(
        width=32, heads=4, layers=3, context_length=20, vocab_size=600, quickgelu=quickgelu, layer=layer
    )
    theirs = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=600,
            hidden_size=32,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=20,
            hidden_act="quick_gelu" if quickgelu else "gelu",
            eos_token_id=599,
        )
    )
    ours = Conditioner(config)
    randomise(theirs)
    inner = getattr(theirs, "text_model", theirs).to(dtype)
    ours.to(dtype).load_state_dict(names.clip(ours, config, prefix="").load(inner.state_dict(), ours.state_dict()))
    ids = ours.tokenize(["a red apple", "two blue sofas and one very long description of a living room beyond the end"])
    with torch.no_grad():
        states = theirs(ids, output_hidden_states=True)
        expected = inner.final_layer_norm(states.hidden_states[-layer])
        assert relative(ours.encode(ids).tokens, expected) < TOLERANCE[dtype]


def test_keymap_is_one_to_one_and_back() -> None:
    ours = UNet(UNETS["sd1"])
    keymap = names.unet(ours)
    there = keymap.save(ours.state_dict())
    assert len(there) == len(ours.state_dict())
    back = keymap.load(there, ours.state_dict())
    assert all(torch.equal(back[name], value) for name, value in ours.state_dict().items())
