"""From any layout to any other: read in ours, written in theirs, every tensor kept."""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ldm.checkpoints import native
from ldm.checkpoints.keymap import refuse
from ldm.checkpoints.native import EXTRA, Model
from ldm.errors import UserError
from ldm.families.export import to_compvis, to_diffusers
from ldm.families.family import Layout
from ldm.families.source import Source, open_model
from ldm.families.vae import load_vae
from ldm.models.autoencoder import Autoencoder


def convert(path: Path, out: Path, to: Layout, storage: native.Storage | None = None, vae: Path | None = None) -> None:
    """Write the model at `path` to `out` in another layout, or the same, with the tensors that no network needs.

    storage: of every weight, None as they are; vae: an autoencoder in place of the model's own. UserError where the
    model is broken, or the layout cannot hold it (int8: only ours can).
    """
    if storage == "int8" and to != "ldm":
        raise UserError(f"int8 weights are of our own layout: write them --to ldm, or {to} as fp16")
    if out.exists() and (to == "diffusers" or out.is_dir()):
        raise UserError(f"{str(out)!r} is there already: give a new name")
    with open_model(path) as source:
        source.check()
        shapes = source.model.shapes()
        weights = {ours: source.keymap.tensor(ours, source.tensors, shapes[ours]) for ours in shapes}
        refuse(**{"not finite": {name for name, value in weights.items() if not native.finite(value)}})
        model, extras = source.model, _extras(source)
        if vae is not None:
            model, weights = _with(vae, model, weights)
        weights = native.pack(weights, storage) if storage else weights
        if to == "ldm":
            native.write(out, model.spec, weights | extras)
        else:
            {"diffusers": to_diffusers, "compvis": to_compvis}[to](out, model, weights, extras)


def _with(vae: Path, model: Model, weights: dict[str, Tensor]) -> tuple[Model, dict[str, Tensor]]:
    """A model and its weights with another autoencoder. UserError where it does not fit, or is a tiny one."""
    found = load_vae(vae, model.spec.autoencoder, dtype=None)
    if not isinstance(found, Autoencoder):
        raise UserError(
            f"{str(vae)!r} is a tiny autoencoder: --vae of txt2img decodes by it, a file has no place for it"
        )
    kept = {name: value for name, value in weights.items() if not name.startswith("autoencoder.")}
    spec = replace(model.spec, autoencoder=found.config)
    return replace(model, spec=spec, autoencoder=found), native.named({"autoencoder": found}) | kept


def _extras(source: Source) -> dict[str, Tensor]:
    """What no network needs, each marked with the layout that it belongs to."""
    own = "" if source.layout == "ldm" else f"{EXTRA}{source.layout}."
    values = {name: source.tensors[name] for name in source.extras}
    ours = {name for name in values if name.startswith(f"{EXTRA}ldm.")}  # stand in the weights already
    return {name if name.startswith(EXTRA) else own + name: v for name, v in values.items() if name not in ours}
