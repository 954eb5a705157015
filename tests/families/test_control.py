"""ControlNets and T2I-Adapters from files and folders: each layout loads, and what does not fit is one line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.checkpoints import control as names
from ldm.errors import UserError
from ldm.families.control import load_control, save_controlnet
from ldm.families.folder import unet_from
from ldm.models.controlnet import ControlNet, T2IAdapter, T2IConfig
from ldm.models.unet import UNetConfig


@pytest.fixture(scope="module")
def like(folders: dict[str, Path]) -> UNetConfig:
    return unet_from(json.loads((folders["sd1"] / "unet" / "config.json").read_text()))


def filled(network: torch.nn.Module) -> torch.nn.Module:
    rng = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng) * 0.1
    return network.requires_grad_(False)


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("layout,prefix", [("diffusers", ""), ("compvis", ""), ("compvis", "control_model.")])
def test_a_controlnet_file_of_each_layout_loads(layout: str, prefix: str, like: UNetConfig, tmp_path: Path) -> None:
    network = filled(ControlNet(like, 3, (4, 8, 8)))
    tensors = names.controlnet(network, layout=layout).save(network.state_dict())
    save_file({prefix + name: value for name, value in tensors.items()}, tmp_path / "control.safetensors")
    loaded = load_control(tmp_path / "control.safetensors", like)
    assert isinstance(loaded, ControlNet) and loaded.factor == 4 and same(loaded, network)
    assert (
        load_control(tmp_path / "control.safetensors", like, dtype=torch.bfloat16).conv_in.weight.dtype
        == torch.bfloat16
    )


def test_a_folder_that_we_write_loads_here_and_in_diffusers(like: UNetConfig, tmp_path: Path) -> None:
    from diffusers import ControlNetModel

    network = filled(ControlNet(like, 1, (4, 8, 8)))
    save_controlnet(tmp_path / "edges", network, 8, {"steps": 3})
    assert same(load_control(tmp_path / "edges", like), network)
    theirs, report = ControlNetModel.from_pretrained(tmp_path / "edges", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    back = names.controlnet(network, layout="diffusers").load(theirs.state_dict(), network.state_dict())
    assert all(torch.equal(back[name], value) for name, value in network.state_dict().items())
    assert theirs.config.conditioning_channels == 1


@pytest.mark.parametrize("layout", ["diffusers", "t2i"])
def test_a_t2i_adapter_of_each_layout_loads(layout: str, like: UNetConfig, tmp_path: Path) -> None:
    adapter = filled(T2IAdapter(T2IConfig(like.channels, 2, 1, 8, (False, True))))
    save_file(names.t2i(adapter, layout=layout).save(adapter.state_dict()), tmp_path / "sketch.safetensors")
    loaded = load_control(tmp_path / "sketch.safetensors", like)
    assert isinstance(loaded, T2IAdapter) and loaded.config == adapter.config and same(loaded, adapter)


def test_what_does_not_fit_is_refused_in_one_line(like: UNetConfig, folders: dict[str, Path], tmp_path: Path) -> None:
    network = filled(ControlNet(like, 3, (4, 8, 8)))
    good, bad = tmp_path / "good", tmp_path / "bad.safetensors"
    save_controlnet(good, network, 8, {})
    larger = unet_from(json.loads((folders["sdxl"] / "unet" / "config.json").read_text()))
    for path, to in ((good, larger), (good / "diffusion_pytorch_model.safetensors", larger)):
        with pytest.raises(UserError, match="does not steer this model"):
            load_control(path, to)
    tensors = load_file(good / "diffusion_pytorch_model.safetensors")
    adapter = T2IAdapter(T2IConfig(like.channels, 2, 1, 8, (False, True)))
    sketch = names.t2i(adapter, layout="diffusers").save(adapter.state_dict())
    cases = {
        "missing": {name: value for name, value in tensors.items() if not name.startswith("mid_block")},
        "not finite": tensors | {"conv_in.bias": tensors["conv_in.bias"] * float("nan")},
        "conv_in.weight is missing": {name: v for name, v in tensors.items() if name != "conv_in.weight"},
        "tensors do not fit": tensors | {"controlnet_cond_embedding.conv_in.weight": torch.zeros(1)},
        "1 unexpected": sketch | {"adapter.body.0.resnets.1000000000.block1.weight": torch.zeros(1)},
        "a LoRA": {"lora_unet_x.lora_down.weight": torch.zeros(2, 2)},
    }
    for words, content in cases.items():
        save_file(content, bad)
        with pytest.raises(UserError, match=words) as caught:
            load_control(bad, like)
        assert "\n" not in str(caught.value)
    config = json.loads((good / "config.json").read_text())
    (good / "config.json").write_text(json.dumps(config | {"_class_name": "FluxControlNetModel"}))
    with pytest.raises(UserError, match="FluxControlNetModel"):
        load_control(good, like)
