"""What is done to one picture with its captions before it is written: a list of named steps.

A stage is a pure function, record -> record. It raises Dropped for a record that is left out; what it changed it adds
to the notes. Both are counted.
"""

import collections
import io
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from PIL import Image

from ldm.data.buckets import cover, nearest_bucket
from ldm.data.captions import clean, own_captions, plain, read_templates
from ldm.data.images import finish, has_alpha, other_colours, start
from ldm.data.options import PrepareConfig
from ldm.data.recolour import PAINTS, another, painted

SUFFIX = {"WEBP": "webp", "JPEG": "jpg", "PNG": "png"}
_ORIENTATION = 0x0112
_SHARPER = 2  # a JPEG that is shrunk is decoded at least this much larger than it will be


class Dropped(ValueError):
    """Why a record is left out: `reason: detail`. Reasons are counted, details go with the examples."""

    @property
    def reason(self) -> str:
        return str(self).partition(": ")[0]


class Record(NamedTuple):
    """A picture on its way. `image` has its header read after the stage "open", its pixels after "decode"."""

    source: str
    id: str
    data: bytes
    columns: Mapping[str, Any]
    place: tuple[int, int]  # number of the source, row
    captions: tuple[str, ...] = ()
    made_by: tuple[str, ...] = ()  # templates that gave a caption
    image: Image.Image | None = None
    suffix: str = ""
    sizes: Mapping[str, int] = MappingProxyType({})  # SDXL's size and crop values, as Entry names them
    bucket: str = ""
    notes: tuple[str, ...] = ()

    @property
    def pixels(self) -> Image.Image:
        assert self.image is not None, "the stage 'open' comes first"
        return self.image

    def noted(self, *notes: str, **changes: Any) -> "Record":
        return self._replace(notes=(*self.notes, *notes), **changes)


Stage = Callable[[Record], Record]


def run(stages: Mapping[str, Stage], record: Record, seen: collections.Counter[str]) -> tuple[Record, Dropped | None]:
    """The record as the stages leave it, and why one of them dropped it. `seen` counts what each stage was given."""
    for name, stage in stages.items():
        seen[name] += 1
        try:
            record = stage(record)
        except Dropped as dropped:
            return record, dropped
    return record, None


def choosing(config: PrepareConfig, names: Sequence[str]) -> dict[str, Stage]:
    """The stages that choose by captions and headers alone."""
    templates = read_templates(config.templates, names)
    if config.recolour is not None:
        templates = [template for template in templates if "colour" in template.fields()]
    tidy = clean if config.raw_captions else plain

    def match_id(record: Record) -> Record:
        if not re.search(config.match_id, record.id):
            raise Dropped("no id that matches")
        return record

    def recolour(record: Record) -> Record:
        colour = str(record.columns.get("colour") or "")
        if colour not in (*PAINTS, "grey", "black"):
            raise Dropped("no colour to change")
        new = another(colour, f"{config.recolour}/{record.source}/{record.id}")
        return record._replace(columns={**record.columns, "colour": new, "captions": []})

    def captions(record: Record) -> Record:
        limit = config.max_captions.get(record.source, config.max_captions.get(""))
        own = own_captions(record.columns, tidy)
        fit = [text for text in own if config.min_caption <= len(text) <= config.max_caption]
        made = {t.given: t.fill(record.columns) for t in templates if t.source in ("", record.source)}
        texts = tuple(dict.fromkeys([*fit[:limit], *filter(None, made.values())]))
        if not texts:
            raise Dropped("no caption" if not own else "no caption of an allowed length")
        changed = not config.raw_captions and own != own_captions(record.columns)
        notes = [*["captions cleaned"] * changed, *["captions left out for their length"] * (len(fit) < len(own))]
        return record.noted(*notes, captions=texts, made_by=tuple(given for given, text in made.items() if text))

    def match(record: Record) -> Record:
        if not any(re.search(config.match, text) for text in record.captions):
            raise Dropped("no caption that matches")
        return record

    def open_(record: Record) -> Record:
        try:
            image = start(record.data, config.formats)
        except ValueError as error:
            raise Dropped(str(error)) from None
        if image.width * image.height > config.max_megapixels * 1e6:
            raise Dropped(f"more than {config.max_megapixels:g} megapixels: {image.width} x {image.height}")
        turned = "exif" in image.info and image.getexif().get(_ORIENTATION, 1) >= 5  # it lies on its side
        width, height = image.size[::-1] if turned else image.size
        known = [record.columns.get(name) for name in ("original_width", "original_height")]
        sound = all(isinstance(side, int) and side > 0 for side in known)  # before an earlier preparation
        found: Any = known if sound else (width, height)
        sizes = {"original_width": found[0], "original_height": found[1], "width": width, "height": height}
        return record._replace(image=image, sizes=sizes)

    def limits(record: Record) -> Record:
        width, height = record.pixels.size
        if min(width, height) < config.min_size:
            raise Dropped(f"smaller than {config.min_size}: {width} x {height}")
        if max(width, height) > config.max_aspect * min(width, height):
            raise Dropped(f"longer than {config.max_aspect:g}:1: {width} x {height}")
        return record

    stages = {
        "match id": match_id if config.match_id else None,
        "recolour": recolour if config.recolour is not None else None,
        "captions": captions,
        "match": match if config.match else None,
        "open": open_,
        "limits": limits,
    }
    return {name: stage for name, stage in stages.items() if stage}


def making(config: PrepareConfig) -> dict[str, Stage]:
    """The stages that make the picture that is written, out of one that was chosen."""
    buckets = config.buckets()

    def fit(record: Record) -> Record:
        size = record.sizes["width"], record.sizes["height"]
        scaled = target = size
        left = top = 0
        if config.resize == "shorter":
            scale = config.size / min(size)
            scaled = target = max(config.size, round(size[0] * scale)), max(config.size, round(size[1] * scale))
        elif config.resize != "none":
            target = nearest_bucket(size, buckets) if buckets else (config.size, config.size)
            scaled, (left, top) = cover(size, target)
        found = record.pixels
        plain = found.format in SUFFIX and not (has_alpha(found) or "exif" in found.info or other_colours(found))
        notes = [
            *["turned upright"] * (found.size != size),
            *["alpha laid on the background"] * has_alpha(found),
            *["colours brought to sRGB"] * other_colours(found),
        ]
        image = decoded(record, config, scaled)
        if scaled != size:
            notes.append("enlarged" if scaled[0] > size[0] else "shrunk")
            image = image.resize(scaled, Image.Resampling.LANCZOS, reducing_gap=3.0)
        if target != scaled:
            notes.append("cropped")
            image = image.crop((left, top, left + target[0], top + target[1]))
        sizes = {**record.sizes, "crop_top": top, "crop_left": left, "width": target[0], "height": target[1]}
        as_it_is = plain and target == size and config.format is None
        return record.noted(
            *notes,
            image=image,
            sizes=sizes,
            bucket=f"{target[0]}x{target[1]}" if buckets else "",
            suffix=SUFFIX[str(found.format)] if as_it_is else "",
        )

    def paint(record: Record) -> Record:
        return record.noted("recoloured", image=painted(record.pixels, record.columns["colour"]), suffix="")

    def encode(record: Record) -> Record:
        if record.suffix:
            return record.noted("bytes kept")
        suffix, target = config.format or "webp", io.BytesIO()
        kind = next(name for name, s in SUFFIX.items() if s == suffix)
        record.pixels.save(target, kind, quality=config.quality)
        return record.noted("encoded", data=target.getvalue(), suffix=suffix)

    return {"decode and fit": fit, **({"paint": paint} if config.recolour is not None else {}), "encode": encode}


def decoded(record: Record, config: PrepareConfig, least: tuple[int, int]) -> Image.Image:
    """RGB pixels of a record that was chosen, of a JPEG at the least scale that is `_SHARPER` times the size needed."""
    image = record.pixels
    width, height = _SHARPER * least[0], _SHARPER * least[1]
    lies = image.size != (record.sizes["width"], record.sizes["height"])
    image.draft(None, (height, width) if lies else (width, height))  # for other formats it does nothing
    try:
        return finish(image, config.background)
    except ValueError as error:
        raise Dropped(str(error)) from None
