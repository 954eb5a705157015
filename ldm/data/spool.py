"""A copy of the rows of a source that is slow to read out of order, such as downloads: shards of so many rows each.

Each is whole or not there. What could not be had stays an error in it, so that reading twice gives the same twice.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ldm.data import tars
from ldm.data.engine import Tick
from ldm.data.order import Ints, Recent
from ldm.data.shards import write_shard
from ldm.data.sources import Raw, Source
from ldm.data.tars import Damaged, Index
from ldm.errors import UserError

ROWS = 1000  # of a file
_OPEN_FILES = 256
_PICTURE = "jpg"  # in which format ever


@dataclass(frozen=True)
class Piece:
    """One file to write, and the rows of the source that it holds."""

    source: int
    path: Path
    rows: list[int]


class Spool:
    """The rows of one source that were chosen, in rising order."""

    def __init__(self, source: int, folder: Path, rows: Ints) -> None:
        self.source, self.folder, self.rows = source, folder, rows
        self._opened = Recent(self._open, _OPEN_FILES)

    def pieces(self) -> list[Piece]:
        """All the files."""
        starts = enumerate(range(0, len(self.rows), ROWS))
        return [Piece(self.source, self._path(n), self.rows[start : start + ROWS].tolist()) for n, start in starts]

    def read(self, rows: Sequence[int]) -> Iterator[Raw | UserError]:
        """The rows by their number in the source."""
        for number in np.searchsorted(self.rows, rows).tolist():
            file, index = self._opened(number // ROWS)
            found = tars.read(file.fileno(), index[number % ROWS], check=True)
            if found is None:
                raise Damaged(f"{file.name!r} was altered: remove it and run again")
            about = json.loads(found[1]["json"])
            yield Raw(found[1][_PICTURE], about) if isinstance(about, dict) else UserError(about)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.tar"

    def _open(self, number: int) -> tuple[BinaryIO, Index]:
        path = self._path(number)
        return path.open("rb"), tars.parse_index(path.with_suffix(".idx").read_bytes())


@dataclass(frozen=True)
class Spooling:
    """The work of writing pieces."""

    sources: Sequence[Source]

    def __call__(self, piece: Piece, tick: Tick) -> None:
        def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
            for row, raw in zip(piece.rows, self.sources[piece.source].read(piece.rows), strict=True):
                tick()
                about, image = (str(raw), b"") if isinstance(raw, UserError) else (raw.columns, raw.image)
                yield f"{row}", {"json": json.dumps(about).encode(), _PICTURE: image}

        write_shard(piece.path, samples())
