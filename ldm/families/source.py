"""Any model on disk, opened and checked but not loaded: content decides what it is, never a suffix."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ldm.checkpoints import native, pickled
from ldm.checkpoints.files import SafeFile, Tensors, brief
from ldm.checkpoints.keymap import KeyMap
from ldm.checkpoints.native import Model, ModelSpec
from ldm.errors import UserError
from ldm.families import FAMILIES, KNOWN, Family, family_of, singlefile
from ldm.families.family import Dialect, Layout, compvis_map, diffusers_map, text_of
from ldm.families.folder import read_json, text_from, unet_from, vae_from
from ldm.families.scheduler import sampling_from
from ldm.text.tower import FULL_VOCABULARY, TextConfig

INDEX, EXTRA = "model_index.json", "extra.safetensors"
OURS = native.EXTRA + "ldm."
# Read by no picture from text: buffers, unused projections, what an uneven autoencoder does with masks.
SPARE = re.compile(
    r"text_encoder(_2)?/(.*position_ids|logit_scale|text_projection\.weight)|vae/decoder\.condition_encoder\..*|extra\..*"
)
# In a folder that we wrote, these may hold the latents' statistics, and stand beside our own as extras.
SPARE_OF_OURS = re.compile(rf"{SPARE.pattern}|vae/(post_)?quant_conv\.(weight|bias)")


@dataclass(frozen=True)
class Source:
    """An open model. model: its networks, still without weights; keymap: our names to the file's.

    extras: tensors that no network needs. guessed: the prediction is the family's usual one, the file says nothing.
    """

    path: Path
    layout: Layout
    spec: ModelSpec
    model: Model
    tensors: Tensors
    keymap: KeyMap
    extras: frozenset[str]
    guessed: bool = False

    @property
    def needed(self) -> Tensors:
        """The tensors without the extras."""
        return self.tensors.without(self.extras)

    def check(self) -> None:
        """UserError unless every tensor that the model needs is there, and no other, each of its shape."""
        with brief(self.path):
            native.check(self.model.shapes(), self.needed, self.keymap)


@contextmanager
def open_model(path: Path) -> Iterator[Source]:
    """Open one of our files, a single file of CompVis's layout, or a diffusers folder. UserError otherwise."""
    with brief():
        with brief(path):
            source = _folder(path) if path.is_dir() else _single(SafeFile(path))
        yield source


def _single(file: SafeFile) -> Source:
    if file.metadata.get("format") == native.FORMAT:
        spec = native.spec_of(file.metadata)
        tensors: Tensors = native.Packed([(file, "")])
        model = native.skeleton(spec)
        extras = frozenset(name for name in tensors if name.startswith(native.EXTRA))
        return Source(file.path, "ldm", spec, model, tensors, model.own_names(), extras)
    tensors = Tensors([(file, "")])
    shapes = tensors.shapes()
    family = singlefile.recognise(shapes)
    if family is None:
        raise UserError(f"it is {kind(shapes)}: --model takes a whole model")
    stated = file.metadata.get("ldm.spec")
    spec = native.read_spec_json(stated) if stated else singlefile.infer(family, shapes, file.metadata)
    guessed = not stated and len(family.sides) > 1 and singlefile.stated_prediction(shapes, file.metadata) is None
    dialect = singlefile.dialect(family, shapes)
    if dialect != Dialect() and not stated:
        spec = replace(spec, provenance=spec.provenance | {"names": {"compvis": asdict(dialect)}})
    model = native.skeleton(spec)
    keymap = _override(compvis_map(family, model, dialect), tensors, model)
    extras = frozenset(name for name in keymap.unused(tensors) if singlefile.EXTRAS.fullmatch(name))
    return Source(file.path, "compvis", spec, model, tensors, keymap, extras, guessed)


def _folder(path: Path) -> Source:
    parts = folder_parts(path)
    configs = {part: read_json(path / part / name) for part, name in parts.items()}
    networks = [part for part in parts if part != "scheduler"]
    opened = [(SafeFile(file), f"{part}/") for part in networks for file in weight_files(path / part)]
    stated = None
    if (path / EXTRA).is_file():
        opened.append((SafeFile(path / EXTRA), ""))
        stated = opened[-1][0].metadata.get("ldm.spec")
    tensors = Tensors(opened)
    family, spec = folder_spec(path, configs)
    dialects = {part: _dialect(part, tensors) for part in networks}
    if stated is not None:
        own = native.read_spec_json(stated)
        # The config.json files have the last word: what we wrote beside them counts while they still say the same.
        spec = own if same_configs(own, configs, family) else spec
    unusual = {part: asdict(dialect) for part, dialect in dialects.items() if dialect != Dialect()}
    if unusual and stated is None:
        spec = replace(spec, provenance=spec.provenance | {"names": unusual})
    model = native.skeleton(spec)
    keymap = _override(diffusers_map(family, model, dialects), tensors, model)
    spare = SPARE if stated is None else SPARE_OF_OURS
    extras = frozenset(name for name in keymap.unused(tensors) if spare.fullmatch(name))
    return Source(path, "diffusers", spec, model, tensors, keymap, extras)


def folder_parts(path: Path) -> dict[str, str]:
    """The parts of a diffusers folder that a picture needs, and each one's config. UserError for another's."""
    if not (path / INDEX).is_file():
        raise UserError(f"{str(path)!r} is a folder without {INDEX}: give a diffusers folder that holds one")
    index = read_json(path / INDEX)
    named = {part for part, value in index.items() if isinstance(value, list) and value and value[0] is not None}
    if "unet" not in named or "vae" not in named or not named & {"text_encoder", "text_encoder_2"}:
        raise UserError(f"it holds a {index.get('_class_name')!r}, which is no family known here: {KNOWN}")
    wanted = [part for part in pickled.PARTS if part in named]
    return dict.fromkeys(wanted, "config.json") | {"scheduler": "scheduler_config.json"}


def folder_spec(path: Path, configs: Mapping[str, dict[str, Any]]) -> tuple[Family, ModelSpec]:
    """The family and the whole spec that a folder's config.json files describe."""
    if "text_encoder_2" in configs:
        family = FAMILIES["sdxl" if "text_encoder" in configs else "sdxl-refiner"]
    else:
        family = FAMILIES["sd2" if configs["text_encoder"].get("hidden_act") == "gelu" else "sd1"]
    towers = {}
    for tower in family.towers:
        template, data = tower.config(family.text), configs[tower.folder]
        pad = _pad(path, tower.folder, template, data.get("vocab_size"))
        towers[tower.module] = text_from(data, tower.folder, replace(template, pad=pad))
    backbone, vae = unet_from(configs["unet"]), vae_from(configs["vae"])
    text = singlefile.join(towers["tower"], towers.get("second"), family.text.size_ids, backbone.vector_dim)
    zero = read_json(path / INDEX).get("force_zeros_for_empty_prompt", family.text.zero_empty)
    text = replace(text, zero_empty=bool(family.text.size_ids and zero))
    prediction, schedule, defaults = sampling_from(configs["scheduler"])
    side = configs["unet"].get("sample_size")
    image_size = side * vae.factor if isinstance(side, int) and 0 < side <= 8192 else family.sides["eps"]
    return family, ModelSpec(
        autoencoder=vae,
        image_size=image_size,
        backbone=backbone,
        text=text,
        prediction=prediction,
        schedule=schedule,
        defaults=replace(defaults, cfg_scale=family.cfg_scale),
        provenance={"family": family.name, "layout": "diffusers"},
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a part: whole, in shards by an index, or a variant such as fp16. UserError for none."""
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    base = "diffusion_pytorch_model" if any(name.startswith("diffusion_pytorch_model") for name in names) else "model"
    whole = [name for name in names if re.fullmatch(rf"{base}(\.\w+)?\.safetensors", name)]
    sharded = [name for name in names if re.fullmatch(rf"{base}(\.\w+)?\.safetensors\.index(\.\w+)?\.json", name)]
    # Full precision before fp16, fp16 before any other variant; full-sized averages are for training on.
    order = [f"{base}.safetensors", f"{base}.safetensors.index.json", f"{base}.fp16.safetensors"]
    found = sorted(whole + sharded, key=lambda name: (order.index(name) if name in order else len(order), name))
    found = [name for name in found if "non_ema" not in name] or found
    if not found:
        pickled = next((name for name in names if name.endswith((".bin", ".ckpt", ".pt"))), None)
        remedy = f"only {pickled}: python scripts/convert.py IN OUT reads that" if pickled else "no weights"
        raise UserError(f"{str(folder)!r} holds {remedy}")
    if found[0] in whole:
        return [folder / found[0]]
    placed = read_json(folder / found[0]).get("weight_map")
    shards = list(placed.values()) if isinstance(placed, dict) else []
    if not shards or any(not isinstance(s, str) or not re.fullmatch(r"[\w.-]+\.safetensors", s) for s in shards):
        raise UserError(f"{str(folder / found[0])!r} does not list shards that lie beside it")
    return [folder / shard for shard in sorted(set(shards))]


def same_configs(spec: ModelSpec, configs: Mapping[str, dict[str, Any]], family: Family) -> bool:
    """Whether a spec, written as a folder, gives the config.json files that are there."""
    from ldm.families.export import folder_configs

    if spec.text is None or family_of(text_of(spec)).towers != family.towers:
        return False
    written = folder_configs(spec, family)
    return all(configs[part].get(key) == value for part in configs for key, value in written[part].items())


def kind(shapes: Mapping[str, Any]) -> str:
    """In words, what a safetensors file holds that is no whole model."""
    names = set(shapes)
    for words, pattern in _KINDS.items():
        if any(re.search(pattern, name) for name in names):
            return words
    return "a safetensors file of no kind known here"


_KINDS = {
    "a LoRA": r"lora_(up|down|A|B)\b|\.lora\.|lora\.(up|down)|^(unet|text_encoder|lora):\d+:up$",
    "a ControlNet": r"(^|\.)(input_hint_block|controlnet_cond_embedding|zero_convs)\.",
    "diffusers' UNet alone (give the folder that holds model_index.json)": r"^down_blocks\.0\.",
    "a UNet alone": r"^(model\.diffusion_model\.)?input_blocks\.0\.",
    "an autoencoder alone (--vae takes it)": r"^(first_stage_model\.)?encoder\.(down|down_blocks|layers)\.0\.",
    "half of a tiny autoencoder, TAESD (--vae takes it)": r"^1[34]\.conv\.0\.weight$",
    "a text tower alone": r"^(text_model\.)?(encoder\.layers|embeddings)\.|^transformer\.resblocks\.",
    "an embedding (textual inversion)": r"^(emb_params|clip_[lg])$",
}


def _override(keymap: KeyMap, tensors: Tensors, model: Model) -> KeyMap:
    """Take those of our tensors that a conversion kept beside the foreign ones, because those could not hold them."""
    places = {name.removeprefix(OURS): name for name in tensors if name.startswith(OURS)}
    kept = {ours: (place,) for ours, place in places.items() if ours in model.shapes()}
    return KeyMap(keymap.names | kept, keymap.turned.difference(kept), keymap.pointwise.difference(kept))


def _dialect(part: str, tensors: Tensors) -> Dialect:
    if part.startswith("text_encoder"):
        bare = f"{part}/embeddings.token_embedding.weight" in tensors
        return Dialect(clip_prefix="" if bare else "text_model.")
    return Dialect(legacy_attention=part == "vae" and "vae/encoder.mid_block.attentions.0.query.weight" in tensors)


def _pad(path: Path, folder: str, template: TextConfig, words: Any) -> Any:
    """What the folder's tokenizer fills up with: `end`, or `zero` (its token 0 is an exclamation mark).

    UserError where it is not CLIP's tokenizer, or its first merges: the same prompt would give other tokens.
    """
    tokenizer = path / folder.replace("text_encoder", "tokenizer")
    if (tokenizer / "vocab.json").is_file() and isinstance(words, int):
        vocabulary, end = read_json(tokenizer / "vocab.json"), min(words, FULL_VOCABULARY) - 1
        if (vocabulary.get("!"), vocabulary.get("<|endoftext|>")) != (0, end):
            raise UserError(f"{tokenizer.name}: its vocabulary is not CLIP's {end + 1} words")
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (tokenizer / name).is_file():
            token = read_json(tokenizer / name).get("pad_token")
            text = token.get("content") if isinstance(token, dict) else token
            if text in ("!", "<|endoftext|>"):
                return "zero" if text == "!" else "end"
    return template.pad
