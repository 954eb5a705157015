"""Names of other programs: one to one with ours, for real checkpoints' lists and for any config."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.checkpoints import compvis, diffusers
from ldm.checkpoints.keymap import KeyMap, union
from ldm.errors import UserError
from ldm.models.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.unet import UNet, UNetConfig
from ldm.text.tower import Conditioner, TextConfig

LISTS = Path(__file__).parents[3] / "shared" / "files" / "keys"
BIG_G = TextConfig(width=1280, heads=20, layers=32, quickgelu=False, layer=2, pad="zero", projection=1280)
REAL = {
    "sd1": (UNetConfig(), TextConfig()),
    "sd2": (
        UNetConfig(heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True),
        TextConfig(width=1024, heads=16, layers=23, quickgelu=False),
    ),
    "sdxl": (
        UNetConfig(
            channels=(320, 640, 1280),
            depth=(0, 2, 10),
            mid_depth=10,
            heads=(5, 10, 20),
            context_dim=2048,
            vector_dim=2816,
            linear_projection=True,
        ),
        TextConfig(layer=2, final_norm=False, second=BIG_G),
    ),
}


def both(family: str, backbone: UNet, vae: Autoencoder, text: Conditioner) -> tuple[KeyMap, KeyMap]:
    """The CompVis map and the diffusers one of a whole model, with the prefixes of the published lists."""
    first, second = text.tower, text.second
    theirs = [
        compvis.unet(backbone, backbone.config).under("backbone.", "model.diffusion_model."),
        compvis.autoencoder(vae, vae.config).under("vae.", "first_stage_model."),
    ]
    others = [
        diffusers.unet(backbone).under("backbone.", "unet_"),
        diffusers.autoencoder(vae).under("vae.", "vae_"),
    ]
    if family == "sdxl":
        theirs.append(diffusers.clip(first, text.config).under("first.", "conditioner.embedders.0.transformer."))
        theirs.append(compvis.open_clip(second).under("second.", "conditioner.embedders.1.model."))
        others.append(diffusers.clip(first, text.config).under("first.", "te0_"))
        others.append(diffusers.clip(second, text.config.second).under("second.", "te1_"))
    elif family == "sd2":
        theirs.append(compvis.open_clip(first).under("first.", "cond_stage_model.model."))
        others.append(diffusers.clip(first, text.config).under("first.", "te_"))
    else:
        theirs.append(diffusers.clip(first, text.config).under("first.", "cond_stage_model.transformer."))
        others.append(diffusers.clip(first, text.config).under("first.", "te_"))
    return union(theirs), union(others)


@pytest.mark.skipif(not LISTS.exists(), reason="the lists of real checkpoints' names are not beside this copy")
@pytest.mark.parametrize("family", REAL)
def test_real_names_map_one_to_one(family: str) -> None:
    listed = json.loads((LISTS / f"stable_diffusion_{family}.json").read_text())
    wanted = {(name, other) for name, other in listed["ldm_diffusers_keymap"].items()}
    wanted |= {(name, part) for name, way in listed["ldm_diffusers_operator_map"].items() for part in way["cat"]}
    if family == "sdxl":  # what the list's own authors could not match: the projection, and two that are no weights
        wanted.add(("conditioner.embedders.1.model.text_projection", "te1_text_projection.weight"))
    backbone, text = REAL[family]
    with torch.device("meta"):
        there, here = both(family, UNet(backbone), Autoencoder(AutoencoderConfig()), Conditioner(text))
    got = set()
    for ours, names in there.names.items():
        others = here.names[ours]
        assert len(names) in (1, len(others))
        got |= set(zip(names * (len(others) // len(names)), others, strict=True))
    assert got == wanted


TINY = {
    "plain": UNetConfig(
        channels=(32, 64, 64), res_blocks=2, depth=(1, 1, 0), heads=(4, 4, 4), context_dim=24, groups=8
    ),
    "bare": UNetConfig(
        channels=(32, 32), res_blocks=1, depth=(0, 1), heads=(1, 2), context_dim=8, groups=8, mid_depth=0
    ),
    "three": UNetConfig(
        channels=(32, 32), res_blocks=3, depth=(2, 0), heads=(1, 1), context_dim=8, groups=8, vector_dim=9
    ),
}


@pytest.mark.parametrize("name", TINY)
def test_numbering_follows_the_config(name: str) -> None:
    unet = UNet(TINY[name])
    keymap = compvis.unet(unet, TINY[name])
    theirs = [part for parts in keymap.names.values() for part in parts]
    assert len(set(theirs)) == len(theirs) == len(unet.state_dict())
    roots = {"input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out"}
    assert {part.split(".")[0] for part in theirs} == roots - (set() if TINY[name].vector_dim else {"label_emb"})
    levels, blocks = len(TINY[name].channels), TINY[name].res_blocks
    inputs = {int(part.split(".")[1]) for part in theirs if part.startswith("input_blocks")}
    assert inputs == set(
        range(levels * (blocks + 1))
    )  # the first convolution, blocks, and one way down less than levels
    assert all(part.split(".")[-2] != "conv" or "output_blocks" in part for part in theirs)


@pytest.mark.parametrize("layout", ["compvis", "diffusers"])
def test_there_and_back(layout: str) -> None:
    config = AutoencoderConfig(channels=(16, 32), res_blocks=1, groups=8)
    text = TextConfig(width=32, heads=2, layers=2, vocab_size=600, context_length=16, projection=24)
    unet, vae, tower = UNet(TINY["plain"]), Autoencoder(config), Conditioner(text)
    if layout == "compvis":
        maps = [compvis.unet(unet, unet.config), compvis.autoencoder(vae, config), compvis.open_clip(tower)]
    else:
        maps = [diffusers.unet(unet), diffusers.autoencoder(vae), diffusers.clip(tower, text)]
    modules: list[nn.Module] = [unet, vae, tower]
    for keymap, module in zip(maps, modules, strict=True):
        ours = module.state_dict()
        there = keymap.save(ours)
        assert {name: tuple(v.shape) for name, v in there.items()} == keymap.shapes(
            {n: tuple(v.shape) for n, v in ours.items()}
        )
        back = keymap.load(there, ours)
        assert back.keys() == ours.keys()
        assert all(torch.equal(back[name], value) for name, value in ours.items())


def test_other_forms_of_the_same_numbers() -> None:
    ours = {"qkv": torch.arange(12.0).reshape(6, 2), "proj": torch.arange(6.0).reshape(2, 3), "point": torch.ones(2, 3)}
    keymap = KeyMap(
        {"qkv": ("q", "k", "v"), "proj": ("p",), "point": ("c",)}, frozenset({"proj"}), frozenset({"point"})
    )
    theirs = keymap.save(ours)
    assert {name: tuple(v.shape) for name, v in theirs.items()} == {
        "q": (2, 2), "k": (2, 2), "v": (2, 2), "p": (3, 2), "c": (2, 3, 1, 1)
    }  # fmt: skip
    assert torch.equal(theirs["p"], ours["proj"].T) and torch.equal(theirs["k"], ours["qkv"][2:4])
    theirs["c"] = theirs["c"].reshape(2, 3)  # newer files hold the linear layer itself
    assert all(torch.equal(value, ours[name]) for name, value in keymap.load(theirs, ours).items())


def test_what_does_not_fit_is_counted_and_named() -> None:
    keymap = KeyMap({"a": ("x",), "b": ("y",)})
    like = {"a": torch.zeros(2, 2), "b": torch.zeros(3)}
    with pytest.raises(UserError, match=r"1 missing \(y\); 1 unexpected \(z\); 1 misshapen \(x\)"):
        keymap.load({"x": torch.zeros(2, 3), "z": torch.zeros(1)}, like)
