"""Stable Diffusion XL (Podell et al. 2023): two text towers, a vector of pooled text and sizes; and its refiner."""

from dataclasses import replace

from ldm.families.family import Family, Tower
from ldm.text.tower import TextConfig

_BIG_G = TextConfig(
    width=1280, heads=20, layers=32, quickgelu=False, layer=2, final_norm=False, pad="zero", projection=1280
)  # fmt: skip

SDXL = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    towers=(
        Tower("tower", "conditioner.embedders.0.transformer.", "transformers", "text_encoder"),
        Tower("second", "conditioner.embedders.1.model.", "open_clip", "text_encoder_2"),
    ),
    heads=lambda width: max(width // 64, 1),
    text=TextConfig(layer=2, final_norm=False, second=_BIG_G, size_ids=6, zero_empty=True),
    scale=0.13025,
    sides={"eps": 1024, "v": 1024},
    cfg_scale=5.0,
    pipelines=("StableDiffusionXLPipeline", "StableDiffusionXLInpaintPipeline"),
)

REFINER = Family(
    name="sdxl-refiner",
    title="Stable Diffusion XL refiner",
    towers=(Tower("tower", "conditioner.embedders.0.model.", "open_clip", "text_encoder_2"),),
    heads=lambda width: max(width // 64, 1),
    text=replace(_BIG_G, size_ids=5),
    scale=0.13025,
    sides={"eps": 1024, "v": 1024},
    cfg_scale=5.0,
    pipelines=("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
)
