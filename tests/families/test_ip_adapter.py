"""IP-Adapters against diffusers, image towers against transformers, on the same random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ldm.adapters.ip_adapter import IPAdapter
from ldm.checkpoints import diffusers as names
from ldm.conditioning import Conditioning
from ldm.errors import UserError
from ldm.families.ip_adapter import load_image_tower, load_ip_adapter
from ldm.families.load import load
from ldm.models import attention
from ldm.models.unet import UNet
from ldm.text.vision import MEAN, STD


@pytest.fixture
def unet(folders: dict[str, Path]) -> UNet:
    backbone = load(folders["sd1"]).backbone
    assert backbone is not None
    return backbone


def adapter_file(path: Path, unet: UNet, **changes: Any) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(3)
    adapter = IPAdapter(unet, 24)
    tensors = {
        f"image_proj.{name}": torch.randn(v.shape, generator=rng) for name, v in adapter.projection.state_dict().items()
    }
    for i, (keys, values) in enumerate(zip(adapter.keys, adapter.values, strict=True)):
        for letter, layer in (("k", keys), ("v", values)):
            tensors[f"ip_adapter.{2 * i + 1}.to_{letter}_ip.weight"] = (
                torch.randn(layer.weight.shape, generator=rng) * 0.3
            )
    save_file(tensors | changes, path)
    return tensors


@torch.no_grad()
def test_a_unet_that_sees_a_picture_equals_diffusers(folders: dict[str, Path], unet: UNet, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    tensors = adapter_file(tmp_path / "ip.safetensors", unet)
    theirs = UNet2DConditionModel.from_pretrained(folders["sd1"] / "unet")
    rng = torch.Generator().manual_seed(0)
    z, text, picture = (torch.randn(shape, generator=rng) for shape in ((2, 4, 8, 8), (2, 16, 64), (2, 24)))
    label, cond = torch.tensor([300.0, 300.0]), Conditioning(text)
    before = unet(z, label, cond)
    halves: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, value in tensors.items():
        half, _, rest = name.partition(".")
        halves[half][rest] = value
    theirs._load_ip_adapter_weights([halves], low_cpu_mem_usage=False)
    for processor in theirs.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [0.6]
    expected = theirs(z, label, text, added_cond_kwargs={"image_embeds": [picture[:, None]]}).sample
    adapter = load_ip_adapter(tmp_path / "ip.safetensors", unet)
    worn = adapter.inject(unet, 0.6)
    got = unet(z, label, adapter.show(cond, picture))
    assert ((got - expected).norm() / expected.norm()).item() < 1e-5
    assert ((got - before).norm() / before.norm()).item() > 0.01, "the picture must be felt"
    worn.eject()
    assert torch.equal(unet(z, label, cond), before)


@pytest.mark.parametrize("worn_first", [True, False])
@torch.no_grad()
def test_the_attention_that_is_chosen_sees_the_picture_too(
    unet: UNet, monkeypatch: pytest.MonkeyPatch, worn_first: bool
) -> None:
    """Chosen before or after the adapter is put on."""
    lengths = []

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        lengths.append(k.shape[2])
        return attention.fused(q, k, v, mask)

    monkeypatch.setitem(attention.ATTENTIONS, "sdpa", spy)
    adapter, z, label = IPAdapter(unet, 24), torch.randn(1, 4, 8, 8), torch.tensor([300.0])
    cond = adapter.show(Conditioning(torch.randn(1, 13, 64)), torch.randn(1, 24))
    if worn_first:
        adapter.inject(unet)
    attention.use_attention(unet, "sdpa")
    if not worn_first:
        adapter.inject(unet)
    unet(z, label, cond)
    assert lengths.count(13) == lengths.count(4) == len(adapter.keys)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_an_image_tower_equals_transformers(act: str, tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    theirs = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, image_size=32,
            patch_size=8, projection_dim=24, hidden_act=act,
        )
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    ours = load_image_tower(tmp_path)
    assert ours.config.quickgelu is (act == "quick_gelu")
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    expected = theirs(pixel_values=(image / 2 + 0.5 - mean) / std).image_embeds
    assert ((ours(image) - expected).norm() / expected.norm()).item() < 1e-5
    wide = torch.cat([torch.zeros(2, 3, 32, 8), image, torch.zeros(2, 3, 32, 8)], dim=3)
    assert torch.allclose(ours(wide), ours(image)), "the middle square is what it sees"
    assert set(names.vision(ours).shapes({n: tuple(v.shape) for n, v in ours.state_dict().items()})) == set(
        theirs.state_dict()
    )


def test_what_is_no_picture_prompt_is_refused_in_one_line(folders: dict[str, Path], unet: UNet, tmp_path: Path) -> None:
    path = tmp_path / "ip.safetensors"
    other = load(folders["sdxl"]).backbone
    assert other is not None
    adapter_file(path, unet)
    with pytest.raises(UserError, match="no picture prompt for this model"):
        load_ip_adapter(path, other)
    save_file({"ip_adapter.1.to_k_ip.weight": torch.zeros(2, 2), "image_proj.latents": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="IP-Adapter Plus"):
        load_ip_adapter(path, unet)
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(UserError, match="a LoRA, not an IP-Adapter"):
        load_ip_adapter(path, unet)
    with pytest.raises(UserError, match="no image tower"):
        load_image_tower(folders["sd1"] / "text_encoder")
