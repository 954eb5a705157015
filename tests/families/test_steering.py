"""Pictures under control: as diffusers' pipelines paint them, between their steps, and refused in one line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from torch import nn

from ldm import pipeline, steering
from ldm.errors import UserError
from ldm.families.control import save_controlnet
from ldm.images import to_pixels
from ldm.models.controlnet import ControlNet
from ldm.models.unet import UNetConfig
from ldm.recipe import Request

REQUEST = Request("a red apple on a table", "dark", seed=7, sampler="ddim", steps=6, cfg_scale=4.0, width=48, height=32)


@pytest.fixture(scope="module")
def folder(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of SD 1's layout with an index that diffusers can open."""
    root = tmp_path_factory.mktemp("steered") / "sd1"
    shutil.copytree(folders["sd1"], root)
    index = json.loads((root / "model_index.json").read_text())
    for part, value in index.items():
        if isinstance(value, list):
            value[0] = "diffusers" if part in ("unet", "vae", "scheduler") else "transformers"
    index |= {
        "_class_name": "StableDiffusionPipeline",
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    (root / "model_index.json").write_text(json.dumps(index))
    return root


@pytest.fixture
def control(folder: Path, randomised: Any) -> Path:
    """A ControlNet for it, of random weights, and a picture."""
    network = ControlNet(_config(folder), 3, (4, 8))
    randomised(network, torch.Generator().manual_seed(9))
    for layer in (*network.zero, network.zero_middle):
        assert isinstance(layer, nn.Conv2d)
        layer.weight.data.mul_(0.1)
    save_controlnet(folder.parent / "edges", network, 8, {})
    rng = np.random.default_rng(0)
    Pillow.fromarray(rng.integers(0, 255, (32, 48, 3), dtype=np.uint8)).save(folder.parent / "hint.png")
    return folder.parent


def _config(folder: Path) -> UNetConfig:
    from ldm.families.folder import unet_from

    return unet_from(json.loads((folder / "unet" / "config.json").read_text()))


def ours(folder: Path, request: Request, *controls: str, hint: str = "none") -> np.ndarray:
    painter = pipeline.load(str(folder), "cpu", "fp32")
    if controls:
        painter.control(controls, [folder.parent / "hint.png"], [hint])
    return to_pixels(painter.txt2img(request))[0].numpy().astype(int)


def changed(a: np.ndarray, b: np.ndarray) -> float:
    """The share of pixels that differ."""
    return float((np.abs(a - b).max(axis=-1) > 0).mean())


@pytest.mark.parametrize("spec,how", [("", {}), (":0.5:0.2-0.7", dict(scale=0.5, start=0.2, end=0.7))])
def test_a_picture_under_control_equals_diffusers(
    control: Path, folder: Path, spec: str, how: dict[str, float]
) -> None:
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    network = ControlNetModel.from_pretrained(control / "edges")
    pipe = StableDiffusionControlNetPipeline.from_pretrained(folder, controlnet=network)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        REQUEST.prompt,
        Pillow.open(control / "hint.png"),
        negative_prompt=REQUEST.negative,
        num_inference_steps=REQUEST.steps,
        guidance_scale=REQUEST.cfg_scale,
        width=REQUEST.width,
        height=REQUEST.height,
        generator=torch.Generator().manual_seed(REQUEST.seed),
        controlnet_conditioning_scale=how.get("scale", 1.0),
        control_guidance_start=how.get("start", 0.0),
        control_guidance_end=how.get("end", 1.0),
    ).images[0]
    got = ours(folder, REQUEST, f"{control / 'edges'}{spec}")
    difference = np.abs(got - np.asarray(expected).astype(int)).max(axis=-1)
    assert difference.max() <= 1 and (difference > 0).mean() <= 0.01
    assert changed(got, ours(folder, REQUEST)) > 0.05, "the control must be felt"


def test_two_controls_and_another_hint_are_felt(control: Path, folder: Path) -> None:
    edges = str(control / "edges")
    one, two = ours(folder, REQUEST, edges), ours(folder, REQUEST, edges, f"{edges}:0.5")
    assert changed(one, two) > 0.05
    assert changed(one, ours(folder, REQUEST, edges, hint="soft_edges")) > 0.05
    assert changed(ours(folder, REQUEST, f"{edges}:0.7", f"{edges}:0.8"), ours(folder, REQUEST, f"{edges}:1.5")) < 0.01


def test_what_steers_stands_in_the_recipe(control: Path, folder: Path) -> None:
    painter = pipeline.load(str(folder), "cpu", "fp32")
    painter.control([f"{control / 'edges'}:0.5"], [control / "hint.png"])
    (recipe,) = painter.recipes(pipeline.Batch([painter.complete(REQUEST)], slice(1)))
    assert any(name.startswith("control edges:0.5:0-1:none") for name in recipe.made.inputs)
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in kernels_of(painter.controls[0].network))


def kernels_of(network: torch.nn.Module) -> list[torch.Tensor]:
    return [module.weight for module in network.modules() if isinstance(module, torch.nn.Conv2d)]


BAD = {
    "a:b:c": "cannot read",
    "a:1:0.5": "cannot read",
    "a:nan": "finite",
    "a:1:0.7-0.2": "not empty",
    "a:1:0-2": "0-1",
}


@pytest.mark.parametrize("text,words", BAD.items())
def test_a_spec_that_is_none_is_refused(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        steering.parse(text)


def test_what_does_not_fit_is_refused_in_one_line(control: Path, folder: Path) -> None:
    painter, edges, hint = pipeline.load(str(folder), "cpu", "fp32"), str(control / "edges"), control / "hint.png"
    with pytest.raises(UserError, match="2 values for 1 controls"):
        painter.control([edges], [hint, hint])
    with pytest.raises(UserError, match="unknown hint 'cany'"):
        painter.control([edges], [hint], ["cany"])
    network = ControlNet(_config(folder), 3, (4, 8, 8))
    save_controlnet(control / "large", network, 8, {})
    with pytest.raises(UserError, match="4 times as large as latents, this model's are 2 times"):
        painter.control([str(control / "large")], [hint])
    painter.control([f"{edges}:1:0.5-0.6"], [hint])
    with pytest.raises(UserError, match="holds none of the 6 steps"):
        painter.txt2img(replace(REQUEST))
