"""Writing other layouts. What one cannot hold is kept beside it under `extra.`: the way back is the identity."""

import tempfile
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints.files import save
from ldm.checkpoints.native import EXTRA, Model, ModelSpec, spec_text
from ldm.errors import UserError
from ldm.families import Family, family_of
from ldm.families.family import Dialect, compvis_map, diffusers_map, shown_layers, text_of
from ldm.families.folder import one_scale, single_scale, text_to, unet_to, vae_to
from ldm.families.scheduler import sampling_to
from ldm.files import write_json
from ldm.models.autoencoder import AutoencoderConfig
from ldm.text.tower import TextConfig, Tokenizer

Weights = dict[str, Tensor]
CONFIGS = {"scheduler": "scheduler_config.json"}


def dialects(spec: ModelSpec) -> dict[str, Dialect]:
    """How the files that a model came from spelt what can be spelt in two ways, by part."""
    names, known = spec.provenance.get("names"), asdict(Dialect()).keys()
    said = names.items() if isinstance(names, dict) else ()
    return {part: Dialect(**how) for part, how in said if isinstance(how, dict) and how.keys() <= known}


def to_compvis(path: Path, model: Model, weights: Weights, extras: Weights) -> None:
    """Write a single file; its metadata holds the spec, for names and shapes alone do not say everything."""
    family = family_of(text_of(model.spec))
    keymap = compvis_map(family, model, dialects(model.spec).get("compvis", Dialect()))
    foreign = _foreign(keymap.save(weights), extras, "compvis")
    save(path, foreign, {"format": "pt", "ldm.spec": spec_text(model.spec)})


def to_diffusers(path: Path, model: Model, weights: Weights, extras: Weights) -> None:
    """Write a folder, whole or not at all. UserError where something stands there, or diffusers has no such model."""
    spec = model.spec
    family = family_of(text_of(spec))
    configs = folder_configs(spec, family)
    files = {f"{part}/{CONFIGS.get(part, 'config.json')}": data for part, data in configs.items()}
    files["model_index.json"] = _index(spec, family, configs)
    folded = _fold(weights, spec.autoencoder)
    keymap = diffusers_map(family, model, dialects(spec))
    shown = {ours: folded[ours] for ours in keymap.names}
    kept = {f"{EXTRA}ldm.{n}": value for n, value in weights.items() if n not in shown or shown[n] is not value}
    parts: dict[str, Weights] = {}
    for name, value in _foreign(keymap.save(shown), extras, "diffusers").items():
        part, slash, inner = name.partition("/")
        if slash:
            parts.setdefault(part, {})[inner] = value
        else:
            kept[name] = value
    if spec.autoencoder.decoder_channels:
        unread = _condition_encoder(spec.autoencoder, weights["autoencoder.decoder.conv_in.weight"].dtype)
        parts["vae"] = unread | parts["vae"]
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{str(path)!r} is there already: give a new name")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
        root = Path(temporary) / path.name
        for name, data in files.items():
            write_json(root / name, data)
        for part, tensors in parts.items():
            base = "diffusion_pytorch_model" if part in ("unet", "vae") else "model"
            save(root / part / f"{base}.safetensors", tensors, {"format": "pt"})
        for tower in family.towers:
            _write_tokenizer(root / tower.folder.replace("text_encoder", "tokenizer"), tower.config(text_of(spec)))
        # always written: the spec in it holds what config.json files have no words for
        save(root / "extra.safetensors", kept, {"ldm.spec": spec_text(spec)})
        root.rename(path)


def folder_configs(spec: ModelSpec, family: Family) -> dict[str, dict[str, Any]]:
    """The config.json of each part. UserError where diffusers has no words for the model."""
    text = text_of(spec)
    assert spec.backbone is not None
    if text.layer > 1 and not text.final_norm and len(family.towers) == 1 and not text.size_ids:
        raise UserError(f"diffusers' pipelines cannot read layer {text.layer} without the final norm")
    vae = one_scale(spec.autoencoder)
    if not single_scale(spec.autoencoder) and not vae.quant_convs:
        raise UserError("latents with statistics of each channel need both 1 x 1 convolutions in diffusers' layout")
    configs = {
        "unet": unet_to(spec.backbone, spec.image_size // vae.factor, text),
        "vae": vae_to(vae, spec.image_size, upcast=bool(text.size_ids)),
        "scheduler": sampling_to(spec),
    }
    for tower in family.towers:
        own = tower.config(text)
        configs[tower.folder] = text_to(own, shown_layers(own))
    return configs


def _index(spec: ModelSpec, family: Family, configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    assert spec.backbone is not None
    inpainting = spec.backbone.in_channels > spec.backbone.out_channels
    index: dict[str, Any] = {"_class_name": family.pipelines[inpainting], "_diffusers_version": "0.30.0"}
    index |= {part: ["diffusers", configs[part]["_class_name"]] for part in ("unet", "vae", "scheduler")}
    for tower in family.towers:
        index[tower.folder] = ["transformers", configs[tower.folder]["architectures"][0]]
        index[tower.folder.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    if text_of(spec).size_ids:
        index["force_zeros_for_empty_prompt"] = text_of(spec).zero_empty
        if len(family.towers) == 1:
            index |= {"text_encoder": [None, None], "tokenizer": [None, None], "requires_aesthetics_score": True}
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    return index


def _foreign(tensors: Weights, extras: Weights, layout: str) -> Weights:
    """The tensors of a layout, with the extras that belong to it under their own names, the others marked."""
    own = f"{EXTRA}{layout}."
    return {name.removeprefix(own): value for name, value in extras.items()} | tensors


def _fold(weights: Weights, vae: AutoencoderConfig) -> Weights:
    """Put the mean and deviation of each latent channel into the 1 x 1 convolutions on both sides of the latent."""
    if single_scale(vae):
        return weights
    mean, std = (torch.tensor(v, dtype=torch.float64).expand(vae.z_channels) for v in (vae.mean, vae.std))
    expand, moments = "autoencoder.decoder.expand", "autoencoder.encoder.moments"
    leaves = [f"{place}.{leaf}" for place in (expand, moments) for leaf in ("weight", "bias")]
    out, bias_out, into, bias_into = (weights[name].double() for name in leaves)
    scale = torch.cat([1 / std, torch.ones_like(std)])
    shift = torch.cat([mean / std, 2 * std.log()])
    folded = [out * std[None, :, None, None], bias_out + out[:, :, 0, 0] @ mean]
    folded += [into * scale[:, None, None, None], bias_into * scale - shift]
    return weights | {name: value.to(weights[name].dtype) for name, value in zip(leaves, folded, strict=True)}


def _condition_encoder(vae: AutoencoderConfig, dtype: torch.dtype) -> Weights:
    """The part of AsymmetricAutoencoderKL that reads a mask, which a picture from text never calls: zeros."""
    first, last = vae.decoder_channels[0], vae.decoder_channels[-1]
    widths = [3, *(min(first * 2**k, last) for k in range(4)), last]
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (inner, outer) in enumerate(pairwise(widths)):
        shapes |= {f"{i}.weight": (outer, inner, *[3 if i < 2 else 4] * 2), f"{i}.bias": (outer,)}
    return {f"decoder.condition_encoder.layers.{n}": torch.zeros(shape, dtype=dtype) for n, shape in shapes.items()}


def _write_tokenizer(folder: Path, text: TextConfig) -> None:
    """CLIP's tokenizer as transformers reads it, with as many merges as the tower knows."""
    tokenizer = Tokenizer(text)
    start, end = "<|startoftext|>", "<|endoftext|>"
    words = [*tokenizer.words[:-2], start, end]
    pad = end if text.pad == "end" else "!"
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad}
    write_json(folder / "vocab.json", {word: i for i, word in enumerate(words)})
    write_json(folder / "special_tokens_map.json", special)
    about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": text.context_length, "do_lower_case": True}
    write_json(folder / "tokenizer_config.json", special | about)
    merges = ["#version: 0.2", *(" ".join(pair) for pair in tokenizer.merges), ""]
    (folder / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
