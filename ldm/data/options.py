"""What a preparation is told: settings, each a flag of scripts/prepare_data.py, and the check that they can work."""

import argparse
import dataclasses
import math
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ldm.data.buckets import bucket_list
from ldm.data.captions import read_templates
from ldm.data.images import READABLE
from ldm.data.remote import COPIES
from ldm.errors import UserError, nearest


def _option(default: Any, help: str, **more: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, **more})


def _number(default: Any, help: str, least: float = 1, most: float = math.inf, *, above: bool = False) -> Any:
    """An option from `least`, or `above` it, to `most`."""
    words = f"more than {least:g}" if above else f"{least:g}{' or more' * (most == math.inf)}"
    words += f" to {most:g}" * (most < math.inf)
    return _option(default, help, range=(lambda v: least <= v <= most and not (above and v == least), words))


@dataclass(frozen=True)
class PrepareConfig:
    """What to make of the sources. `workers`, `engine` and what concerns downloads change no byte of the outcome."""

    out: str = _option(dataclasses.MISSING, "folder for the shards, manifest.json, report.json and report.html")
    # Pictures: which, and what becomes of them
    size: int = _number(128, "pixels of the shorter side; of the side of a square of the buckets' area (128)", 8)
    resize: Literal["shorter", "square", "buckets", "none"] = _option(
        "shorter",
        "shorter side to SIZE; centre square of SIZE; nearest aspect-ratio bucket of SIZE x SIZE pixels, as SDXL has "
        "them; none (shorter)",
    )
    bucket_step: int | None = _number(None, "sides of buckets are multiples of this (SIZE / 16, at least 8)")
    formats: tuple[str, ...] = _option(
        ("PNG", "JPEG", "WEBP"),
        f"formats that are read, of {','.join(READABLE)} (PNG,JPEG,WEBP)",
        type=lambda text: tuple(text.upper().split(",")),
    )
    max_megapixels: float = _number(89.0, "a picture of more is refused before it is decoded (89)", 0, 178, above=True)
    min_size: int = _number(0, "least pixels of the shorter side of a picture as it was found (0)", 0)
    max_aspect: float = _number(4.0, "most that a picture may be longer than it is wide, or wider than long (4)")
    duplicates: Literal["keep", "exact", "near"] = _option(
        "keep", "of pictures with the same bytes, or that also look alike, the first alone is kept (keep: all)"
    )
    near_distance: int = _number(4, "bits of 64 by which perceptual hashes of near duplicates may differ (4)", 0, 16)
    background: str = _option("white", "colour under transparent pixels: a name or #rrggbb (white)")
    recolour: int | None = _option(
        None, "paint each picture that has a colour word in another one, drawn by this seed; templates alone name it"
    )
    format: Literal["webp", "jpg", "png"] | None = _option(None, "write this (keep bytes that fit, else webp)")
    quality: int = _number(90, "of webp and jpg (90)", 1, 100)
    # Captions
    templates: tuple[str, ...] = _option(
        (), 'a caption made of columns, such as "a {colour} {name}"; may be repeated',
        flag="--caption-template", metavar="[SOURCE:]TEXT", action="append",
    )  # fmt: skip
    max_captions: dict[str, int] = dataclasses.field(
        default_factory=dict,
        metadata={
            "help": "keep the first N captions of a picture, beside those from templates; may be repeated",
            "metavar": "[SOURCE:]N",
            "action": "append",
        },
    )
    min_caption: int = _number(1, "shorter captions, in characters, are left out (1)")
    max_caption: int = _number(2000, "longer captions, in characters, are left out (2000)")
    raw_captions: bool = _option(False, "leave HTML and Unicode in captions as they are (cleaned)")
    match: str = _option("", "keep pictures with a caption that has this regular expression")
    match_id: str = _option("", "keep pictures whose id has this regular expression")
    # Shards
    shard_size: int = _number(2000, "most samples in a shard (2000)", 1, 10_000)
    holdout: float = _number(0.0, "share kept for validation in OUT/val (0)", 0, 0.999)
    limit_per_source: int | None = _number(None, "at most N pictures of each source")
    order: Literal["mixed", "source"] = _option("mixed", "shuffled over all sources, or as they lie in them (mixed)")
    # Work
    engine: Literal["local", "ray"] = _option("local", "processes here, or a Ray cluster: docs/data.md (local)")
    workers: int = _option(0, "processes of the local engine (all cores)")
    timeout: float = _number(20.0, "seconds for one download (20)", 0, above=True)
    retries: int = _number(3, "further tries of a download that failed (3)", 0)
    max_bytes: int = _number(50_000_000, "longest download in bytes (50000000)")
    per_host: int = _number(8, "connections to one host at a time (8)")
    copies: str = _option(COPIES, f"folder where remote shards are kept while they are read ({COPIES})")
    copies_gb: float = _number(50.0, "most gigabytes of them (50)", 0, above=True)

    def outcome(self) -> dict[str, Any]:
        """The options that the bytes of the shards follow from."""
        free = ("out", "engine", "workers", "timeout", "retries", "max_bytes", "per_host", "copies", "copies_gb")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in free}

    def buckets(self) -> list[tuple[int, int]]:
        """The (width, height) of the buckets, none where there are none."""
        return bucket_list(self.size, self.bucket_step, self.max_aspect) if self.resize == "buckets" else []


def check(config: PrepareConfig) -> None:
    """UserError for settings that cannot work, whatever the sources."""
    from PIL import ImageColor

    for field in dataclasses.fields(config):
        value, range_ = getattr(config, field.name), field.metadata.get("range")
        if range_ and value is not None and not range_[0](value):
            raise UserError(f"{field.name.replace('_', ' ')} {value} cannot be: give {range_[1]}")
    if config.bucket_step and config.bucket_step > config.size:
        raise UserError(f"bucket step {config.bucket_step} cannot be: give 1 to the size")
    if config.max_caption < config.min_caption:
        raise UserError(f"max caption {config.max_caption} cannot be: give at least the shortest, {config.min_caption}")
    for name in config.formats:
        if name not in READABLE:
            raise UserError(f"no format is called {name!r}{nearest(name, list(READABLE))}: {', '.join(READABLE)}")
    for pattern in (config.match, config.match_id):
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"match {pattern!r} is not a regular expression: {error}") from None
    try:
        ImageColor.getcolor(config.background, "RGB")
    except ValueError:
        raise UserError(f"background {config.background!r} is no colour: give a name or #rrggbb") from None
    config.buckets()


def check_names(config: PrepareConfig, names: Sequence[str]) -> None:
    """UserError for settings that name sources which are not among these."""
    for name in config.max_captions:
        if name and name not in names:
            raise UserError(f"no source is called {name!r}{nearest(name, list(names))}")
    templates = read_templates(config.templates, names)
    if config.recolour is not None and not any("colour" in template.fields() for template in templates):
        raise UserError(f"recolour {config.recolour} needs a caption template with {{colour}}: a {{colour}} {{name}}")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every setting; one that is not given is left to the dataclass."""
    hints = typing.get_type_hints(PrepareConfig)
    for field in dataclasses.fields(PrepareConfig):
        about: dict[str, Any] = {name: value for name, value in field.metadata.items() if name != "range"}
        flag = about.pop("flag", "--" + field.name.replace("_", "-"))
        hint = hints[field.name]
        if type(None) in typing.get_args(hint):
            hint = typing.get_args(hint)[0]
        if hint is bool:
            about["action"] = "store_true"
        elif typing.get_origin(hint) is Literal:
            about["choices"] = typing.get_args(hint)
        elif not {"action", "type"} & set(about):
            about["type"] = hint
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        parser.add_argument(flag, dest=field.name, default=argparse.SUPPRESS, required=needed, **about)


def from_flags(given: dict[str, Any]) -> PrepareConfig:
    """The settings that a command line asks for."""
    read: dict[str, Callable[[Any], Any]] = {"templates": tuple, "max_captions": per_source}
    return PrepareConfig(**{name: read[name](value) if name in read else value for name, value in given.items()})


def per_source(texts: Sequence[str]) -> dict[str, int]:
    """`["3", "renders:2"]` as {"": 3, "renders": 2}. UserError for what is not a whole number from 0."""
    numbers = {}
    for text in texts:
        name, _, number = text.rpartition(":")
        if not number.isdecimal():
            raise UserError(f"{text!r} is not a number: give N or SOURCE:N, such as 3")
        numbers[name] = int(number)
    return numbers
