"""What a family of models is: where its parts stand in other people's files, and what those files leave unsaid."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ldm.checkpoints import compvis, diffusers
from ldm.checkpoints.keymap import KeyMap, union
from ldm.checkpoints.native import Model, ModelSpec
from ldm.errors import UserError
from ldm.models.autoencoder import Autoencoder
from ldm.models.unet import UNet
from ldm.text.tower import Conditioner, TextConfig

Layout = Literal["ldm", "diffusers", "compvis"]


@dataclass(frozen=True)
class Tower:
    """One text tower: our module, its prefix and naming in a single file, and its folder in diffusers' layout."""

    module: Literal["tower", "second"]
    prefix: str
    naming: Literal["transformers", "open_clip"]
    folder: str

    def config(self, text: TextConfig) -> TextConfig:
        """This tower's own settings."""
        return text.towers[self.module == "second"]


@dataclass(frozen=True)
class Family:
    """A family; what a folder's config.json says goes before what is said here.

    heads: of attention, from a width; text: settings that shapes do not tell; scale: of the latents; sides: the
    picture's, by prediction; pipelines: diffusers' classes for 4 and for 9 input channels.
    """

    name: str
    title: str
    towers: tuple[Tower, ...]
    heads: Callable[[int], int]
    text: TextConfig
    scale: float
    sides: dict[str, int]
    cfg_scale: float
    pipelines: tuple[str, str]

    def tells(self, text: TextConfig) -> bool:
        """Whether a model with this text side is of the family."""
        mine = self.text
        same = (len(text.towers), text.size_ids) == (len(mine.towers), mine.size_ids)
        return same and (bool(mine.size_ids) or text.quickgelu == mine.quickgelu)


@dataclass(frozen=True)
class Dialect:
    """What files of one layout spell in two ways; a model's provenance keeps it, to be written as it came."""

    clip_prefix: str = "text_model."
    legacy_attention: bool = False


def compvis_map(family: Family, model: Model, dialect: Dialect) -> KeyMap:
    """Names in a single file of the family."""
    backbone, text, vae = _parts(model)
    parts = [
        compvis.unet(backbone, backbone.config).under("backbone.", "model.diffusion_model."),
        compvis.autoencoder(vae, vae.config).under("autoencoder.", "first_stage_model."),
    ]
    for tower in family.towers:
        module = getattr(text, tower.module)
        if tower.naming == "open_clip":
            names = compvis.open_clip(module)
        else:
            names = diffusers.clip(module, tower.config(text.config), prefix=dialect.clip_prefix)
        parts.append(names.under(f"text.{tower.module}.", tower.prefix))
    return union(parts)


def diffusers_map(family: Family, model: Model, dialect: dict[str, Dialect]) -> KeyMap:
    """Names in a folder of the family, each behind its part's folder; a dialect for each part that has one."""
    backbone, text, vae = _parts(model)
    legacy = dialect.get("vae", Dialect()).legacy_attention
    parts = [
        diffusers.unet(backbone).under("backbone.", "unet/"),
        diffusers.autoencoder(vae, legacy=legacy).under("autoencoder.", "vae/"),
    ]
    for tower in family.towers:
        config = tower.config(text.config)
        prefix = dialect.get(tower.folder, Dialect()).clip_prefix
        names = diffusers.clip(getattr(text, tower.module), config, prefix=prefix, layers=shown_layers(config))
        parts.append(names.under(f"text.{tower.module}.", f"{tower.folder}/"))
    return union(parts)


def shown_layers(config: TextConfig) -> int:
    """How many layers a diffusers folder holds: where the final norm follows, its pipelines read the last."""
    return config.layers - (config.layer - 1 if config.final_norm else 0)


def _parts(model: Model) -> tuple[UNet, Conditioner, Autoencoder]:
    (backbone, text, _), vae = model.whole(), model.autoencoder
    if not isinstance(vae, Autoencoder) or vae.config.codebook:
        raise UserError("this model's autoencoder has a codebook, which no other layout has words for")
    return backbone, text, vae


def text_of(spec: ModelSpec) -> TextConfig:
    """The text settings of a whole model. UserError for an autoencoder alone."""
    if spec.text is None:
        raise UserError("this file holds an autoencoder alone: give a whole model")
    return spec.text
