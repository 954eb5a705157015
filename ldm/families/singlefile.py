"""CompVis's and Stability's single files: the family and every width, read off names and shapes.

Attention heads and norm groups leave no trace in shapes: heads follow from the family, groups are always 32.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from ldm.checkpoints.native import ModelSpec, SamplingDefaults
from ldm.diffusion.schedules import ScheduleConfig
from ldm.errors import UserError
from ldm.families import FAMILIES, KNOWN
from ldm.families.family import Dialect, Family, Tower
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.unet import UNetConfig
from ldm.text.tower import TextConfig

Shapes = Mapping[str, tuple[int, ...]]
UNET, VAE = "model.diffusion_model.", "first_stage_model."
# In real files, needed by no network: training's tables and averages, buffers, what only CLIP's picture side uses.
EXTRAS = re.compile(
    r"model_ema\..*|first_stage_model\.(loss|model_ema)\..*|denoiser\..*|betas|alphas_cumprod(_prev)?|sqrt_\w+|"
    r"log_one_minus_alphas_cumprod|posterior_\w+|logvar|lvlb_weights|scale_factor|v_pred|ztsnr|extra\..*|"
    r"(cond_stage_model|conditioner\.embedders\.\d)\.(.*\.)?(position_ids|logit_scale|text_projection|attn_mask)"
)


def recognise(names: Iterable[str]) -> Family | None:
    """The family of a single file by its text tower, None where there is no UNet of this layout."""
    names = set(names)
    if UNET + "input_blocks.0.0.weight" not in names:
        return None
    tables = {name.removesuffix("token_embedding.weight") for name in names if name.endswith("token_embedding.weight")}
    fits = [f for f in FAMILIES.values() if all(any(t.startswith(tower.prefix) for t in tables) for tower in f.towers)]
    if not fits:
        raise UserError(f"a UNet without a text tower that is known: give a whole checkpoint of {KNOWN}")
    return max(fits, key=lambda family: len(family.towers))


def infer(family: Family, shapes: Shapes, metadata: Mapping[str, str]) -> ModelSpec:
    """A whole spec. UserError that names a tensor that is needed and is not there, or has an impossible shape."""
    with misfits(f" {family.title}"):
        backbone = unet_config(shapes, family.heads)
        vae = autoencoder_config(_below(VAE, shapes), family.scale)
        towers = {tower.module: _tower(tower, family, shapes) for tower in family.towers}
    text = join(towers["tower"], towers.get("second"), family.text.size_ids, backbone.vector_dim)
    prediction = stated_prediction(shapes, metadata) or ("v" if family.name == "sd2" else "eps")
    zero_snr = "ztsnr" in shapes
    return ModelSpec(
        autoencoder=vae,
        image_size=family.sides.get(prediction, max(family.sides.values())),
        backbone=backbone,
        text=text,
        prediction=prediction,
        schedule=ScheduleConfig(zero_snr=zero_snr),
        defaults=SamplingDefaults(schedule="trailing" if zero_snr else "leading", cfg_scale=family.cfg_scale),
        provenance={"family": family.name, "layout": "compvis"},
    )


@contextmanager
def misfits(what: str = "") -> Iterator[None]:
    """Names and shapes within that make no network are a UserError."""
    try:
        yield
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"tensors do not fit: {error.args[0]} is missing") from None
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"tensors do not fit{what}: {error}") from None


def stated_prediction(shapes: Shapes, metadata: Mapping[str, str]) -> str | None:
    """What the file itself says of its prediction: a marker tensor, or the metadata of the modelspec standard."""
    said = metadata.get("modelspec.prediction_type", "").lower()
    if "v_pred" in shapes or said in ("v", "v_prediction"):
        return "v"
    return "eps" if said in ("epsilon", "eps") else None


def dialect(family: Family, names: Iterable[str]) -> Dialect:
    """Whether transformers' names carry `text_model.`."""
    prefixes = [tower.prefix for tower in family.towers if tower.naming == "transformers"]
    bare = any(name.startswith(prefix + "embeddings.") for name in names for prefix in prefixes)
    return Dialect(clip_prefix="" if bare else "text_model.")


def unet_config(shapes: Shapes, heads: Callable[[int], int]) -> UNetConfig:
    """The UNet under `model.diffusion_model.`."""
    names = _below(UNET, shapes)
    levels: list[list[str]] = [[]]  # the blocks of each
    for place in (f"input_blocks.{number}" for number in range(1, count_from(names, "input_blocks."))):
        if f"{place}.0.op.weight" in names:
            levels.append([])
        else:
            levels[-1].append(place)
    blocks = [len(level) for level in levels]
    if len(set(blocks)) != 1 or not blocks[0]:
        raise ValueError(f"the levels of its UNet have {blocks} blocks")
    channels = [names[f"{level[0]}.0.in_layers.2.weight"][0] for level in levels]
    found = (re.fullmatch(r"(input_blocks\.\d+\.1\.)norm\.weight", name) for name in names)
    attention = next((match[1] for match in found if match), "")
    return UNetConfig(
        in_channels=names["input_blocks.0.0.weight"][1],
        out_channels=names["out.2.weight"][0],
        channels=tuple(channels),
        res_blocks=blocks[0],
        depth=tuple(count_from(names, f"{level[0]}.1.transformer_blocks.") for level in levels),
        mid_depth=count_from(names, "middle_block.1.transformer_blocks."),
        heads=tuple(heads(width) for width in channels),
        context_dim=names[f"{attention}transformer_blocks.0.attn2.to_k.weight"][1],
        vector_dim=names["label_emb.0.0.weight"][1] if "label_emb.0.0.weight" in names else 0,
        linear_projection=len(names[f"{attention}proj_in.weight"]) == 2,
    )


def autoencoder_config(names: Shapes, scale: float) -> AutoencoderConfig:
    """The autoencoder whose names these are, without prefix; scale: what multiplies its latents."""
    levels = count_from(names, "encoder.down.")
    channels = tuple(names[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels))
    decoder = tuple(names[f"decoder.up.{i}.block.0.conv1.weight"][0] for i in range(levels))
    return AutoencoderConfig(
        z_channels=names["decoder.conv_in.weight"][1],
        channels=channels,
        decoder_channels=decoder if decoder != channels else (),
        res_blocks=count_from(names, "encoder.down.0.block."),
        mid_attention="encoder.mid.attn_1.q.weight" in names,
        quant_convs="quant_conv.weight" in names,
        std=(1 / scale,),
    )


def _tower(tower: Tower, family: Family, shapes: Shapes) -> TextConfig:
    template = tower.config(family.text)
    names = _below(tower.prefix, shapes)
    if tower.naming == "open_clip":
        table, positions, layers = "token_embedding.weight", "positional_embedding", "transformer.resblocks."
        wide = names["transformer.resblocks.0.mlp.c_fc.weight"][0]
        projection = names["text_projection"][1] if template.projection else 0
    else:
        prefix = "text_model." if any(name.startswith("text_model.") for name in names) else ""
        table, positions = f"{prefix}embeddings.token_embedding.weight", f"{prefix}embeddings.position_embedding.weight"
        layers, projection = f"{prefix}encoder.layers.", 0
        wide = names[f"{layers}0.mlp.fc1.weight"][0]
    (words, width), count = names[table], count_from(names, layers)
    # 23 layers: a tower of SD 2 that a converter has already cut behind the penultimate.
    layer = 1 if family.name == "sd2" and count == 23 else min(template.layer, count)
    return replace(
        template,
        width=width,
        heads=max(width // 64, 1),
        layers=count,
        context_length=names[positions][0],
        vocab_size=words,
        layer=layer,
        mlp=wide if wide != 4 * width else 0,
        projection=projection,
        second=None,
        size_ids=0,
    )


def join(tower: TextConfig, second: TextConfig | None, size_ids: int, vector_dim: int) -> TextConfig:
    """The towers of a family as one config; the UNet's vector tells the width of each number."""
    if not size_ids:
        return replace(tower, second=second)
    pooled = (second or tower).projection
    return replace(tower, second=second, size_ids=size_ids, id_width=max(vector_dim - pooled, 0) // size_ids)


def _below(prefix: str, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    return {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}


def count_from(names: Iterable[str], prefix: str) -> int:
    """How many numbers follow a prefix, from 0 up without a gap."""
    numbers = {name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)}
    count = 0
    while str(count) in numbers:
        count += 1
    return count
