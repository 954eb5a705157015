"""Tiny models of every family with random weights, written in diffusers' layout by diffusers and transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families.lora_files import Peft, peft
from torch import nn

from ldm.families.export import _write_tokenizer
from ldm.text.open_clip import open_clip
from ldm.text.tower import TextConfig

open_clip()  # declares torchvision's operators, which transformers asks for too
WORDS = 1000


def randomise(module: nn.Module, rng: torch.Generator) -> None:
    """Fresh values for every tensor, norms and zero-initialised layers too, so that no branch hides behind a zero."""
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=rng)
        fan = parameter[0].numel() if parameter.dim() > 1 else 4.0
        parameter.data = (noise / fan**0.5 + (1.0 if parameter.dim() == 1 else 0.0)).to(parameter.dtype)


def text_config(**changes: Any) -> Any:
    from transformers import CLIPTextConfig

    settings = dict(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=1,
        max_position_embeddings=16,
        hidden_act="quick_gelu",
        projection_dim=64,
        bos_token_id=WORDS - 2,
        eos_token_id=WORDS - 1,
        pad_token_id=WORDS - 1,
    )
    return CLIPTextConfig(**settings | changes)


UNETS: dict[str, dict[str, Any]] = {
    "sd1": dict(attention_head_dim=8, cross_attention_dim=64),
    "sd2": dict(attention_head_dim=[1, 1], cross_attention_dim=64, use_linear_projection=True),
    "inpainting": dict(attention_head_dim=8, cross_attention_dim=64, in_channels=9),
    "sdxl": dict(
        attention_head_dim=[1, 1],
        cross_attention_dim=128,
        use_linear_projection=True,
        transformer_layers_per_block=[1, 2],
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=48 + 6 * 8,
    ),
    "sdxl-refiner": dict(
        attention_head_dim=[1, 1],
        cross_attention_dim=64,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=48 + 5 * 8,
    ),
}
SCHEDULER = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


def write_folder(root: Path, name: str) -> None:
    """A whole diffusers folder of a family."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    rng = torch.Generator().manual_seed(5)
    big = text_config(hidden_act="gelu", projection_dim=48, pad_token_id=0)
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel(
            **dict(
                sample_size=8,
                block_out_channels=[32, 64],
                layers_per_block=1,
                down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
                up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
            )
            | UNETS[name]
        ),
        "vae": AutoencoderKL(
            block_out_channels=[32, 64],
            layers_per_block=1,
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            scaling_factor=0.13025 if name.startswith("sdxl") else 0.18215,
        ),
    }
    if name in ("sd1", "inpainting", "sdxl"):
        parts["text_encoder"] = CLIPTextModel(text_config())
    if name == "sd2":
        parts["text_encoder"] = CLIPTextModel(text_config(hidden_act="gelu", pad_token_id=0))
    if name.startswith("sdxl"):
        parts["text_encoder_2"] = CLIPTextModelWithProjection(big)
    index = {"_class_name": "a name that is never imported", "scheduler": ["diffusers", "DDIMScheduler"]}
    for part, module in parts.items():
        randomise(module, rng)
        module.save_pretrained(root / part)
        index[part] = ["somewhere", type(module).__name__]
        if part.startswith("text_encoder"):
            pad = "zero" if module.config.hidden_act == "gelu" else "end"
            tokenizer = part.replace("text_encoder", "tokenizer")
            config = TextConfig(width=64, heads=1, context_length=16, vocab_size=WORDS, pad=pad)
            _write_tokenizer(root / tokenizer, config)
            index[tokenizer] = ["transformers", "CLIPTokenizer"]
    prediction = "v_prediction" if name == "sd2" else "epsilon"
    DDIMScheduler(**SCHEDULER, prediction_type=prediction, clip_sample=False).save_pretrained(root / "scheduler")
    (root / "model_index.json").write_text(json.dumps(index))


@pytest.fixture
def randomised() -> Any:
    """`randomise`, for tests that build models of their own."""
    return randomise


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each family; not to be changed."""
    root = tmp_path_factory.mktemp("folders")
    for name in UNETS:
        write_folder(root / name, name)
    return {name: root / name for name in UNETS}


@pytest.fixture(scope="session")
def plain(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Peft]:
    """What peft makes of a family's folder, each made once."""
    made: dict[str, Peft] = {}

    def of(name: str) -> Peft:
        if name not in made:
            made[name] = peft(folders[name], tmp_path_factory.mktemp("peft") / name)
        return made[name]

    return of
