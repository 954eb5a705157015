"""A copy of the rows of a source that is slow to read out of order, such as downloads: Arrow files, mapped to memory.

Each file holds a fixed number of rows, and is whole or not there. What could not be had stays an error in it, so that
reading twice gives the same twice.
"""

import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.data.engine import Tick
from ldm.data.sources import Raw, Source
from ldm.errors import UserError
from ldm.files import replacing

ROWS = 1000  # of a file
_BATCH = 20  # rows in memory while writing


@dataclass(frozen=True)
class Piece:
    """One file to write, and the rows of the source that it holds."""

    source: int
    path: Path
    rows: list[int]


@dataclass(frozen=True)
class Spool:
    """The rows of one source that were chosen, numbered from 0 in their order there."""

    folder: Path
    random: bool = field(default=True, init=False)

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.arrow"

    def pieces(self, source: int, rows: Sequence[int]) -> list[Piece]:
        """All the files, for the rows chosen, in rising order."""
        return [
            Piece(source, self.path(n), list(rows[start : start + ROWS]))
            for n, start in enumerate(range(0, len(rows), ROWS))
        ]

    def read(self, rows: Sequence[int]) -> Iterator[Raw | UserError]:
        """The rows by their number here."""
        import pyarrow as pa

        at, columns, images = -1, pa.array([]), pa.array([])
        for row in rows:
            batch, index = divmod(row, _BATCH)  # ROWS is a multiple of it
            if batch != at:
                at, found = batch, _open(self.path(row // ROWS)).get_batch(batch % (ROWS // _BATCH))
                columns, images = found.column(0), found.column(1)
            about = json.loads(columns[index].as_py())
            yield Raw(images[index].as_py(), about) if isinstance(about, dict) else UserError(about)


@functools.lru_cache(16384)
def _open(path: Path) -> Any:
    import pyarrow as pa

    return pa.ipc.open_file(pa.memory_map(str(path)))


@dataclass(frozen=True)
class Spooling:
    """The work of writing pieces."""

    sources: Sequence[Source]

    def __call__(self, piece: Piece, tick: Tick) -> None:
        import pyarrow as pa

        schema = pa.schema(
            [("columns", pa.string()), ("image", pa.large_binary())]
        )  # or the text of an error, and none
        raws = self.sources[piece.source].read(piece.rows)
        with replacing(piece.path) as temporary, pa.ipc.new_file(str(temporary), schema) as file:
            while rows := list(itertools.islice(raws, _BATCH)):
                texts = [json.dumps(str(row) if isinstance(row, UserError) else row.columns) for row in rows]
                images = [b"" if isinstance(row, UserError) else row.image for row in rows]
                file.write_batch(pa.record_batch([texts, pa.array(images, pa.large_binary())], schema=schema))
                for _ in rows:
                    tick()
