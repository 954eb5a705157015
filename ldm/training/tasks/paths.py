"""A teacher's whole paths from noise to picture: painted once, kept in a folder, and then read in every epoch.

A student learns from them at the very points that it passes when it paints, and its steps cost the teacher nothing.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.data.loader import Batch
from ldm.data.order import Order
from ldm.files import replacing

PART = 64  # paths in a file


class Paths:
    """Files of paths as an endless stream, shuffled anew in each epoch.

    A batch has `path` (b, levels, c, h, w), fp16, and what else was kept of each: `tokens`, `size_ids`.
    """

    def __init__(self, files: Sequence[Path], count: int, seed: int) -> None:
        self.files, self.count = files, count
        self._order = Order([count], seed, readers=1, window=count)

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """The batch at these positions of the stream."""
        rows = self._order.rows(np.asarray(positions, np.int64)).tolist()
        records = [(_mapped(self.files[row // PART]), row % PART) for row in rows]
        batch: dict[str, Any] = {
            name: torch.from_numpy(np.stack([tensors[name][place] for tensors, place in records]))
            for name in records[0][0]
        }
        batch |= {"key": [f"path {row}" for row in rows], "position": torch.tensor(positions)}
        return batch  # type: ignore[return-value]  # `path` besides


def painted(
    folder: Path,
    count: int,
    about: object,
    paint: Callable[[range], dict[str, Tensor]],
    show: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Files with `count` paths, of which those that are missing are painted now; each is whole there or not at all.

    about: what the paths depend on, by which files in the folder are told from those of other runs.
    """
    from safetensors.torch import save_file

    mark = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    files = []
    for first in range(0, count, PART):
        part = range(first, min(first + PART, count))
        files.append(folder / f"paths-{mark}-{first:06d}-{len(part)}.safetensors")
        if not files[-1].is_file():
            show(first, count)
            with replacing(files[-1]) as temporary:
                save_file({name: value.cpu().contiguous() for name, value in paint(part).items()}, temporary)
    return files


@functools.lru_cache(1024)
def _mapped(path: Path) -> dict[str, NDArray[Any]]:
    """The tensors of a file, mapped."""
    from safetensors.torch import load_file

    return {name: tensor.numpy() for name, tensor in load_file(path).items()}
