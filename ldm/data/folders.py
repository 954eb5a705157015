"""Plain folders of pictures in place of shards: prepared when first used, and again when a file in them changes."""

import dataclasses
import hashlib
import json
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

from ldm.data.options import PrepareConfig
from ldm.data.prepare import prepare
from ldm.data.shards import MANIFEST
from ldm.data.stream import DataConfig, for_each
from ldm.errors import UserError
from ldm.files import digest


def with_shards(patterns: Sequence[str], config: DataConfig) -> list[str]:
    """Patterns of shards, one for each source, where plain folders of pictures have given way to shards of them.

    Those lie beside `config.copies`, by the content of the folder and by what was asked for. UserError for a folder
    without pictures, or whose pictures have no captions.
    """
    captions = for_each("caption", config.caption, "|", len(patterns))
    return [
        "::".join(_shards(Path(part), config, caption) if _is_plain(part) else part for part in pattern.split("::"))
        for pattern, caption in zip(patterns, captions, strict=True)
    ]


def _is_plain(part: str) -> bool:
    folder = Path(part)
    return bool(part) and folder.is_dir() and not (folder / MANIFEST).exists() and not any(folder.glob("*.tar"))


def _shards(folder: Path, config: DataConfig, caption: str) -> str:
    told = PrepareConfig("", size=config.size, resize="buckets" if config.buckets else "shorter")
    if caption:
        told = dataclasses.replace(told, templates=(caption,), max_captions={"": 0})
    mark = hashlib.sha256(json.dumps([digest(folder), told.outcome()]).encode()).hexdigest()[:16]
    beside = Path(config.copies).expanduser()
    place = beside.with_name(beside.name + "-of-folders") / f"{folder.resolve().name}-{mark}"
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=".") as work:
            made = Path(work) / "shards"
            try:
                report = prepare([str(folder)], dataclasses.replace(told, out=str(made)), lambda done, total: None)
            except UserError as error:
                remedy = "; give each a .txt, or all of them data.caption" if "no caption" in str(error) else ""
                raise UserError(f"folder {str(folder)!r}: {error}{remedy}") from None
            for why, about in report["refused"].items():
                warnings.warn(f"{about['count']} pictures in {str(folder)!r} are left out, {why}", stacklevel=2)
            try:
                made.rename(place)
            except OSError:
                if not place.is_dir():  # else another process was first
                    raise
    return str(place)
