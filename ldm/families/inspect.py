"""What a file is, told from its header and configs alone."""

import math
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from ldm.checkpoints import lora, native, pickled
from ldm.checkpoints.files import SafeFile
from ldm.checkpoints.integrity import Entry
from ldm.checkpoints.keymap import refuse
from ldm.errors import UserError
from ldm.families import FAMILIES, family_of, singlefile
from ldm.families.source import Source, kind, open_model
from ldm.text.tower import TextConfig


def describe(path: Path, *, values: bool = False) -> list[str]:
    """Lines about a model. UserError, one line, with the reason why it would be refused.

    values: also read every weight, and refuse what is not finite.
    """
    if path.is_file() and pickled.is_pickled(path):
        raise UserError(f"{str(path)!r} holds pickles, which can run programs: python scripts/convert.py makes it safe")
    if path.is_file():
        file = SafeFile(path)
        ours = file.metadata.get("format") == native.FORMAT
        if not ours and singlefile.UNET + "input_blocks.0.0.weight" not in file.entries:
            said = [f"{path.name}: {kind(file.entries)}", _tensors(file.entries.values())]
            return said + (_lora(path) if kind(file.entries) == "a LoRA" else [])
    with open_model(path) as source:
        source.check()
        if values:
            refuse(**{"not finite": {name for name in source.needed if not native.finite(source.tensors[name])}})
        return list(_lines(source))


def _lines(source: Source) -> Iterator[str]:
    spec, tensors = source.spec, source.needed
    layout = {"ldm": "our own file", "compvis": "a single file of CompVis's layout", "diffusers": "a diffusers folder"}
    said = FAMILIES.get(str(spec.provenance.get("family")))
    family = said.title if said else "our own" if spec.text else "an autoencoder alone"
    inpainting = spec.backbone is not None and spec.backbone.in_channels > spec.backbone.out_channels
    yield f"{source.path.name}: {layout[source.layout]}; {family}{', inpainting' if inpainting else ''}"
    yield _tensors(tensors.stored())
    if source.extras:
        yield f"extras: {len(source.extras)} tensors that no network reads, such as {min(source.extras)}"
    if spec.backbone is not None and spec.text is not None:
        guess = (
            " (guessed, for the file does not say: the network is asked when it is loaded)" if source.guessed else ""
        )
        yield f"predicts {spec.prediction}{guess}; schedule {spec.schedule.kind}; {spec.image_size} pixels"
        unet = spec.backbone
        shape = f"channels {list(unet.channels)}, depth {list(unet.depth)}, heads {list(unet.heads)}"
        yield f"backbone: {shape}, text {unet.context_dim}"
        yield f"text: {_text(spec.text)}; as {family_of(spec.text).title}'s in other layouts"
    vae = spec.autoencoder
    std = ", ".join(f"{value:.4g}" for value in vae.std)
    latent = f"{vae.factor} pixels a cell, {vae.z_channels} channels of deviation {std}"
    yield f"autoencoder: {latent}, widths {list(vae.channels)}"


def _lora(path: Path) -> list[str]:
    """What --lora would find in a file, whatever the model."""
    read = lora.read(path)
    ranks = sorted({len(tensors["down"]) for tensors in read.pairs.values()})
    spare = f"; not of it: {', '.join(read.spare[:3])}" if read.spare else ""
    return [f"changes {len(read.pairs)} weights, at rank {', '.join(map(str, ranks))}{spare}"]


def _text(text: TextConfig) -> str:
    own = f"{text.layers} layers of {text.width}, layer {text.layer} from the end read, {text.vocab_size} words"
    return f"{own}; beside it {_text(text.second)}" if text.second else own


def _tensors(entries: Collection[Entry]) -> str:
    dtypes = Counter(entry.dtype for entry in entries)
    numbers = sum(math.prod(entry.shape) for entry in entries)
    size = sum(entry.size for entry in entries)
    held = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
    return f"{sum(dtypes.values())} tensors ({held}), {numbers / 1e6:.4g} M numbers, {size / 2**20:.4g} MiB"
