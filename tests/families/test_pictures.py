"""Whole pictures: diffusers' own pipelines and ours, from one folder and one recipe."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families.lora_files import Peft, kohya
from safetensors.torch import save_file

from ldm import pipeline
from ldm.checkpoints import native
from ldm.diffusion.schedules import ScheduleConfig
from ldm.errors import UserError
from ldm.families.convert import convert
from ldm.images import to_pixels
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.unet import UNetConfig
from ldm.recipe import Request
from ldm.text.tower import TextConfig

PIPELINES = {"sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
SCHEDULERS = {"ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler"}
WEIGHT = 0.7
REQUEST = Request("a red apple on a wooden table", "blurry, dark", seed=7, steps=8, cfg_scale=5.0, width=48, height=32)


def theirs(
    folder: Path, name: str, scheduler: str | None, request: Request, lora: Path | None = None, **settings: Any
) -> np.ndarray:
    import diffusers

    pipe = getattr(diffusers, PIPELINES[name]).from_pretrained(folder)
    if lora:
        pipe.load_lora_weights(lora.parent, weight_name=lora.name, adapter_name="it")
        pipe.set_adapters(["it"], [WEIGHT])
    pipe.set_progress_bar_config(disable=True)
    if scheduler:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **settings)
    image = pipe(
        request.prompt,
        negative_prompt=request.negative or None,
        num_inference_steps=request.steps,
        guidance_scale=request.cfg_scale,
        width=request.width,
        height=request.height,
        generator=torch.Generator().manual_seed(request.seed),
    ).images[0]
    return np.asarray(image).astype(int)


def ours(folder: Path, request: Request, lora: Path | None = None) -> np.ndarray:
    painter = pipeline.load(str(folder), "cpu", "fp32")
    if lora:
        painter.adapt([f"{lora}:{WEIGHT}"])
    return to_pixels(painter.txt2img(request))[0].numpy().astype(int)


def assert_same(a: np.ndarray, b: np.ndarray) -> None:
    """At most 1/255 apart, in at most 1 % of the pixels; and a picture that is not flat."""
    assert a.shape == b.shape and a.std() > 20
    difference = np.abs(a - b).max(axis=-1)
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 0.01


@pytest.fixture(scope="module")
def named(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders with an index that diffusers can open."""
    root = tmp_path_factory.mktemp("named")
    kinds = PIPELINES | {"sdxl-refiner": "StableDiffusionXLImg2ImgPipeline"}
    for name, kind in kinds.items():
        shutil.copytree(folders[name], root / name)
        index = json.loads((root / name / "model_index.json").read_text())
        for part, value in index.items():
            if isinstance(value, list):
                value[0] = "diffusers" if part in ("unet", "vae", "scheduler") else "transformers"
        empty = ["feature_extractor", "image_encoder" if name.startswith("sdxl") else "safety_checker"]
        if name == "sdxl-refiner":
            index |= {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
            empty += ["text_encoder", "tokenizer"]
        index |= {"_class_name": kind} | {part: [None, None] for part in empty}
        (root / name / "model_index.json").write_text(json.dumps(index))
    return {name: root / name for name in kinds}


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("name", PIPELINES)
def test_pictures_equal_diffusers(
    named: dict[str, Path], tmp_path: Path, name: str, sampler: str, spacing: str
) -> None:
    """The scheduler stands in the folder: what it means by a spacing, and by the first noise, is its own."""
    import diffusers

    for part in named[name].iterdir():
        (tmp_path / part.name).symlink_to(part)
    for part in ("scheduler", "model_index.json"):
        (tmp_path / part).unlink()
    index = json.loads((named[name] / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", SCHEDULERS[sampler]]}))
    config = json.loads((named[name] / "scheduler/scheduler_config.json").read_text())
    scheduler = getattr(diffusers, SCHEDULERS[sampler]).from_config(config, timestep_spacing=spacing)
    scheduler.save_pretrained(tmp_path / "scheduler")
    request = replace(REQUEST, sampler=sampler)
    assert_same(ours(tmp_path, request), theirs(tmp_path, name, None, request))


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_lora_paints_what_it_does_in_diffusers(
    named: dict[str, Path], plain: Callable[[str], Peft], tmp_path: Path, name: str
) -> None:
    """A file in kohya's names, read by diffusers' own converter and by ours."""
    file = tmp_path / "it.safetensors"
    save_file(kohya(plain(name).state), file)
    request = replace(REQUEST, sampler="ddim", schedule="trailing")
    expected = theirs(named[name], name, SCHEDULERS["ddim"], request, file, timestep_spacing="trailing")
    assert_same(ours(named[name], request, file), expected)
    assert np.abs(ours(named[name], request) - expected).mean() > 5


def test_an_empty_negative_is_zeros_in_sdxl(named: dict[str, Path]) -> None:
    request = replace(REQUEST, negative="", sampler="ddim", schedule="trailing")
    expected = theirs(named["sdxl"], "sdxl", SCHEDULERS["ddim"], request, timestep_spacing="trailing")
    assert_same(ours(named["sdxl"], request), expected)


def test_what_we_write_diffusers_paints(randomised: Any, tmp_path: Path) -> None:
    """A folder written by us, opened by diffusers with nothing changed in it, its own scheduler and all."""
    spec = native.ModelSpec(
        autoencoder=AutoencoderConfig(
            channels=(16, 32),
            decoder_channels=(32, 48),
            res_blocks=1,
            groups=16,
            mean=(0.3, -0.1, 0.2, 0.0),
            std=(2.0, 1.5, 1.0, 0.7),
        ),
        image_size=32,
        backbone=UNetConfig(channels=(32, 64), res_blocks=1, depth=(1, 1), heads=(2, 4), context_dim=64, groups=16),
        text=TextConfig(width=64, heads=1, layers=3, context_length=16, vocab_size=800, pad="zero", quickgelu=False),
        prediction="v",
        schedule=ScheduleConfig(),
        defaults=native.SamplingDefaults("ddim", "trailing", 8, 5.0),
    )
    model = native.build(spec)
    rng = torch.Generator().manual_seed(3)
    for module in model.modules.values():
        randomised(module, rng)
    native.save(tmp_path / "ours", spec, model.modules)
    convert(tmp_path / "ours", tmp_path / "folder", "diffusers")
    expected = theirs(tmp_path / "folder", "sd1", None, REQUEST)
    assert_same(ours(tmp_path / "ours", REQUEST), expected)
    assert_same(ours(tmp_path / "folder", REQUEST), expected)
    (tmp_path / "folder/extra.safetensors").unlink()  # the folder stands for itself
    assert_same(ours(tmp_path / "folder", replace(REQUEST, sampler="ddim", schedule="trailing")), expected)


def test_a_flow_in_diffusers(randomised: Any, tmp_path: Path) -> None:
    """The embedded model's form, in diffusers by the folder alone; it rounds labels, and starts from 0.999."""
    spec = native.ModelSpec(
        autoencoder=AutoencoderConfig(
            channels=(32, 64), res_blocks=1, mid_attention=False, mean=(0.4, 0.9, 0.6, 0.1), std=(1.8, 2.8, 1.9, 2.4)
        ),
        image_size=32,
        backbone=UNetConfig(channels=(32, 64, 96), res_blocks=1, depth=(0, 1, 1), heads=(1, 2, 3), context_dim=64),
        text=TextConfig(width=64, heads=1, layers=4, context_length=32, vocab_size=8192, pad="zero", quickgelu=False),
        prediction="flow",
        schedule=ScheduleConfig(kind="flow"),
        defaults=native.SamplingDefaults("dpmpp_2m", "trailing", 20, 5.0),
    )
    model = native.build(spec)
    rng = torch.Generator().manual_seed(3)
    for module in model.modules.values():
        randomised(module, rng)
    native.save(tmp_path / "ours", spec, model.modules)
    convert(tmp_path / "ours", tmp_path / "folder", "diffusers")
    request = replace(REQUEST, steps=20)
    expected = theirs(tmp_path / "folder", "sd1", None, request)
    assert np.abs(ours(tmp_path / "ours", request) - expected).max() <= 2
    (tmp_path / "folder/extra.safetensors").unlink()  # the folder stands for itself, its scheduler's ways with it
    assert_same(ours(tmp_path / "folder", request), expected)


def test_patches_have_no_place_in_diffusers(randomised: Any, tmp_path: Path) -> None:
    spec = native.ModelSpec(
        autoencoder=AutoencoderConfig(channels=(32,), res_blocks=1, patch=4, std=(2.0,)),
        image_size=32,
        backbone=UNetConfig(channels=(32,), res_blocks=1, depth=(1,), heads=(2,), context_dim=64),
        text=TextConfig(width=64, heads=1, layers=2, context_length=16, vocab_size=800),
    )
    native.save(tmp_path / "ours", spec, native.build(spec).modules)
    with pytest.raises(UserError, match="patches of 4"):
        convert(tmp_path / "ours", tmp_path / "folder", "diffusers")
    convert(tmp_path / "ours", tmp_path / "single", "compvis")
    assert pipeline.load(str(tmp_path / "single"), "cpu").model.spec == spec


def test_inpainting_paints_a_whole_picture(folders: dict[str, Path]) -> None:
    assert ours(folders["inpainting"], replace(REQUEST, sampler="ddim", steps=2)).std() > 20


def test_the_refiner_paints(folders: dict[str, Path]) -> None:
    assert ours(folders["sdxl-refiner"], replace(REQUEST, sampler="ddim", steps=2)).std() > 20


@pytest.mark.parametrize(
    ("sampler", "spacing", "start"),
    [("ddim", "trailing", 0.8), ("ddim", "leading", 0.749), ("euler", "leading", 0.5)],  # 0.749: a step is just there
)
def test_a_refiner_ends_the_picture_as_in_diffusers(
    named: dict[str, Path], sampler: str, spacing: str, start: float
) -> None:
    """Its denoising_end and denoising_start; both models decoded by the first one's autoencoder."""
    import diffusers

    request = replace(REQUEST, sampler=sampler, schedule=spacing, refiner_start=start)
    first = diffusers.StableDiffusionXLPipeline.from_pretrained(named["sdxl"])
    last = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(named["sdxl-refiner"], vae=first.vae)
    asked = dict(negative_prompt=request.negative, num_inference_steps=request.steps, guidance_scale=request.cfg_scale)
    for pipe in (first, last):
        kind = getattr(diffusers, SCHEDULERS[sampler])
        pipe.scheduler = kind.from_config(pipe.scheduler.config, timestep_spacing=spacing)
        pipe.set_progress_bar_config(disable=True)
    size = dict(width=request.width, height=request.height, generator=torch.Generator().manual_seed(request.seed))
    latents = first(request.prompt, **asked, **size, denoising_end=start, output_type="latent").images
    expected = np.asarray(last(request.prompt, **asked, image=latents, denoising_start=start).images[0]).astype(int)
    painter = pipeline.load(str(named["sdxl"]), "cpu", "fp32")
    alone = to_pixels(painter.txt2img(replace(request, refiner_start=None)))[0].numpy().astype(int)
    painter.refine(pipeline.load(str(named["sdxl-refiner"]), "cpu", "fp32"))
    assert_same(to_pixels(painter.txt2img(request))[0].numpy().astype(int), expected)
    assert (np.abs(alone - expected).max(axis=-1) > 1).mean() > 0.2, "the refiner must be felt"
