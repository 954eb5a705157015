"""Pictures from pictures: diffusers' own pipelines and ours, from one folder, one picture and one recipe."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from ldm import pipeline
from ldm.canvas import read_canvas
from ldm.images import to_pixels
from ldm.recipe import Request

REQUEST = Request("a red apple", "blurry", seed=7, steps=8, cfg_scale=4.0, sampler="ddim", schedule="trailing")
BOX = (slice(8, 24), slice(16, 40))  # on whole latent cells, where diffusers' way to shrink a mask is ours


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A smooth picture of 48 x 32 and a hard mask."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(1)
    coarse = Pillow.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
    coarse.resize((48, 32), Pillow.Resampling.BICUBIC).save(root / "picture.png")
    mask = np.zeros((32, 48), np.uint8)
    mask[BOX] = 255
    Pillow.fromarray(mask).save(root / "mask.png")
    return {"picture": root / "picture.png", "mask": root / "mask.png"}


def theirs(folder: Path, kind: str, files: dict[str, Path], strength: float, **more: Any) -> np.ndarray:
    import diffusers

    parts = {
        "vae": diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
        "unet": diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
        "scheduler": diffusers.DDIMScheduler.from_pretrained(folder / "scheduler", timestep_spacing="trailing"),
    }
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    names = ["", "_2"] if "XL" in kind else [""]
    for name in names:
        tower = CLIPTextModelWithProjection if name else CLIPTextModel
        parts[f"text_encoder{name}"] = tower.from_pretrained(folder / f"text_encoder{name}")
        parts[f"tokenizer{name}"] = CLIPTokenizer.from_pretrained(folder / f"tokenizer{name}")
    if "XL" not in kind:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = getattr(diffusers, kind)(**parts)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        REQUEST.prompt,
        negative_prompt=REQUEST.negative,
        image=Pillow.open(files["picture"]),
        strength=strength,
        num_inference_steps=REQUEST.steps,
        guidance_scale=REQUEST.cfg_scale,
        generator=torch.Generator().manual_seed(REQUEST.seed),
        **more,
    ).images[0]
    return np.asarray(image).astype(int)


def ours(folder: Path, strength: float, *pictures: Path) -> np.ndarray:
    start = read_canvas(*pictures)
    painter = pipeline.load(str(folder), "cpu", "fp32")
    return to_pixels(painter.paint(replace(REQUEST, strength=strength), canvas=start))[0].numpy().astype(int)


def assert_same(a: np.ndarray, b: np.ndarray) -> None:
    assert a.shape == b.shape and a.std() > 20
    difference = np.abs(a - b).max(axis=-1)
    assert difference.max() <= 1 and (difference > 0).mean() <= 0.01


@pytest.mark.parametrize(
    ("name", "kind"), [("sd1", "StableDiffusionImg2ImgPipeline"), ("sdxl", "StableDiffusionXLImg2ImgPipeline")]
)
def test_img2img_equals_diffusers(folders: dict[str, Path], files: dict[str, Path], name: str, kind: str) -> None:
    assert_same(ours(folders[name], 0.6, files["picture"]), theirs(folders[name], kind, files, 0.6))


@pytest.mark.parametrize(("name", "strength"), [("inpainting", 1.0), ("inpainting", 0.6), ("sd1", 0.6)])
def test_inpainting_equals_diffusers(
    folders: dict[str, Path], files: dict[str, Path], name: str, strength: float
) -> None:
    """Inside the mask; outside it diffusers returns what the autoencoder makes of the picture, and we the picture."""
    kind = "StableDiffusionInpaintPipeline"
    mask = Pillow.open(files["mask"])
    expected = theirs(folders[name], kind, files, strength, mask_image=mask, width=48, height=32)
    result = ours(folders[name], strength, files["picture"], files["mask"])
    assert_same(result[BOX], expected[BOX])
    outside = np.ones((32, 48), bool)
    outside[BOX] = False
    assert (result[outside] == np.asarray(Pillow.open(files["picture"]))[outside]).all()


def test_textual_inversion_equals_diffusers(folders: dict[str, Path], tmp_path: Path) -> None:
    """Two vectors by the name of their token, in the middle of a prompt."""
    import diffusers
    from safetensors.torch import save_file
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = folders["sd1"]
    rows = torch.randn(2, 64, generator=torch.Generator().manual_seed(3))
    save_file({"<birb>": rows}, tmp_path / "birb.safetensors")
    pipe = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
        unet=diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
        scheduler=diffusers.DDIMScheduler.from_pretrained(folder / "scheduler", timestep_spacing="trailing"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.load_textual_inversion(tmp_path / "birb.safetensors", token="<birb>")
    pipe.set_progress_bar_config(disable=True)
    request = replace(REQUEST, prompt="a red <birb> on a table", width=32, height=32, plain_prompt=True)
    expected = pipe(
        request.prompt,
        negative_prompt=request.negative,
        num_inference_steps=request.steps,
        guidance_scale=request.cfg_scale,
        width=32,
        height=32,
        generator=torch.Generator().manual_seed(request.seed),
    ).images[0]
    painter = pipeline.load(str(folder), "cpu", "fp32")
    painter.embed([tmp_path / "birb.safetensors"])
    result = to_pixels(painter.txt2img(request))[0].numpy().astype(int)
    assert_same(result, np.asarray(expected).astype(int))
