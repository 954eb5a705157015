"""Stable Diffusion 2.x: OpenCLIP's ViT-H, its penultimate layer, heads of 64; 512 pixels, or 768 predicting v."""

from ldm.families.family import Family, Tower
from ldm.text.tower import TextConfig

SD2 = Family(
    name="sd2",
    title="Stable Diffusion 2",
    towers=(Tower("tower", "cond_stage_model.model.", "open_clip", "text_encoder"),),
    heads=lambda width: max(width // 64, 1),
    text=TextConfig(width=1024, heads=16, layers=24, quickgelu=False, layer=2, pad="zero"),
    scale=0.18215,
    sides={"eps": 512, "v": 768},
    cfg_scale=7.5,
    pipelines=("StableDiffusionPipeline", "StableDiffusionInpaintPipeline"),
)
