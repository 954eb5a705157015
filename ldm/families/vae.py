"""Another autoencoder for a model (`--vae`): ours, CompVis's, diffusers', or the tiny TAESD."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ldm.checkpoints import compvis, diffusers, native
from ldm.checkpoints.files import SafeFile, Tensors, brief
from ldm.checkpoints.keymap import KeyMap
from ldm.checkpoints.native import ModelSpec
from ldm.errors import UserError
from ldm.families.folder import read_json, vae_from
from ldm.families.singlefile import VAE, autoencoder_config, misfits
from ldm.families.source import INDEX, kind, weight_files
from ldm.models.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.taesd import TinyAutoencoder, TinyConfig


def load_vae(
    path: Path,
    like: AutoencoderConfig | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> Autoencoder | TinyAutoencoder:
    """An autoencoder, for a model whose own is `like`. UserError where the file holds none, or one for other latents.

    path: any whole model; an autoencoder of ours, of CompVis's names, or in diffusers' folder; TAESD as a folder of its
    two halves or as either half, the other being looked for beside it under the same name.
    """
    with brief(path):
        vae, keymap, tensors = _understand(_files(path), path, like or AutoencoderConfig())
        if like is not None and vae.config.z_channels != like.z_channels:
            raise UserError(f"its latents have {vae.config.z_channels} channels, the model's {like.z_channels}")
        native.fill({"autoencoder": vae}, tensors, keymap, device, dtype)
    return vae


def _files(path: Path) -> list[tuple[SafeFile, str]]:
    """The files of an autoencoder, each with a prefix."""
    if path.is_dir():
        folder = path / "vae" if (path / INDEX).is_file() else path
        tiny = sorted(file for file in folder.glob("*.safetensors") if re.search(r"taesd.*_(en|de)coder", file.name))
        halves = {half: [file for file in tiny if f"_{half}." in file.name] for half in ("encoder", "decoder")}
        if halves["decoder"]:
            return [(SafeFile(files[0]), f"taesd.{half}.") for half, files in halves.items() if files]
        return [(SafeFile(file), "") for file in weight_files(folder)]
    file = SafeFile(path)
    if "1.weight" not in file.entries and "0.weight" not in file.entries:
        return [(file, "")]
    mine, other = ("decoder", "encoder") if "19.weight" in file.entries else ("encoder", "decoder")
    beside = path.with_name(path.name.replace(mine, other))
    if beside == path or not beside.is_file():
        raise UserError(f"{str(path)!r} is TAESD's {mine}: its {other} must stand beside it as {beside.name!r}")
    return [(file, f"taesd.{mine}."), (SafeFile(beside), f"taesd.{other}.")]


def _understand(
    files: list[tuple[SafeFile, str]], path: Path, like: AutoencoderConfig
) -> tuple[Autoencoder | TinyAutoencoder, KeyMap, Tensors]:
    """The network without weights, where its tensors stand, and these alone."""
    tensors = Tensors(files)
    shapes, metadata = tensors.shapes(), files[0][0].metadata
    if "taesd.decoder.1.weight" in shapes:
        return *_tiny(shapes, "taesd.encoder.", "taesd.decoder.", 0), tensors
    if "decoder.layers.0.weight" in shapes:  # diffusers' AutoencoderTiny leaves out the first layer, without weights
        return *_tiny(shapes, "encoder.layers.", "decoder.layers.", 1), tensors
    if "encoder.down_blocks.0.resnets.0.norm1.weight" in shapes:
        folder = path / "vae" if (path / "vae").is_dir() else path if path.is_dir() else path.parent
        vae = _skeleton(vae_from(read_json(folder / "config.json")))
        legacy = "encoder.mid_block.attentions.0.query.weight" in shapes
        return vae, diffusers.autoencoder(vae, legacy=legacy).under("autoencoder.", ""), tensors
    if metadata.get("format") == native.FORMAT:
        vae, packed = _skeleton(native.spec_of(metadata).autoencoder), native.Packed(files)
        keymap = KeyMap({name: (name,) for name in native.named({"autoencoder": vae})})
        return vae, keymap, packed.without(name for name in packed if not name.startswith("autoencoder."))
    prefix = VAE if any(name.startswith(VAE) for name in shapes) else ""
    if f"{prefix}encoder.conv_in.weight" not in shapes:
        raise UserError(f"this is {kind(shapes)}, not an autoencoder")
    bare = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    with misfits():
        config = replace(autoencoder_config(bare, 1.0), mean=like.mean, std=like.std)
    vae = _skeleton(config)
    spare = re.compile(rf"(?!{re.escape(prefix)}).*|{re.escape(prefix)}(loss|model_ema)\..*")
    rest = tensors.without(name for name in shapes if spare.fullmatch(name))
    return vae, compvis.autoencoder(vae, config).under("autoencoder.", prefix), rest


def _skeleton(config: AutoencoderConfig) -> Autoencoder:
    vae = native.skeleton(ModelSpec(config, 512)).autoencoder
    assert isinstance(vae, Autoencoder)
    return vae


def _tiny(
    shapes: Mapping[str, tuple[int, ...]], encoder: str, decoder: str, skipped: int
) -> tuple[TinyAutoencoder, KeyMap]:
    first = shapes[f"{decoder}{1 - skipped}.weight"]
    if len(first) != 4 or not all(0 < side <= 4096 for side in first):
        raise UserError(f"its first layer has the shape {list(first)}")
    with torch.device("meta"):
        tiny = TinyAutoencoder(TinyConfig(z_channels=first[1], width=first[0]))
    names: dict[str, tuple[str, ...]] = {}
    for ours in tiny.state_dict():
        half, number, rest = ours.split(".", 2)
        place = f"{encoder}{number}" if half == "encoder" else f"{decoder}{int(number) - skipped}"
        names[f"autoencoder.{ours}"] = (f"{place}.{rest}",)
    return tiny, KeyMap(names)
