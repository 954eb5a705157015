"""Stable Diffusion 1.x (Rombach et al. 2022): OpenAI's CLIP-L, 8 heads at every width, 512 pixels."""

from ldm.families.family import Family, Tower
from ldm.text.tower import TextConfig

SD1 = Family(
    name="sd1",
    title="Stable Diffusion 1",
    towers=(Tower("tower", "cond_stage_model.transformer.", "transformers", "text_encoder"),),
    heads=lambda width: 8,
    text=TextConfig(),
    scale=0.18215,
    sides={"eps": 512},
    cfg_scale=7.5,
    pipelines=("StableDiffusionPipeline", "StableDiffusionInpaintPipeline"),
)
