"""The pictures that a run is judged by: few, fixed, and read once."""

from dataclasses import replace
from functools import cached_property

from ldm.data.dataset import Batch, DataConfig, Tokenize, open_validation, to_image
from ldm.shapes import Image


class HeldBack:
    """At most `count` pictures, spread evenly over `config.validation`, or the training shards where it is empty."""

    def __init__(self, config: DataConfig, count: int, tokenize: Tokenize | None = None) -> None:
        self.name = "validation" if config.validation else "seen"
        self._dataset = open_validation(replace(config, validation=config.validation or config.shards), tokenize)
        self._count = min(count, len(self._dataset))

    def __len__(self) -> int:
        return self._count

    @cached_property
    def batch(self) -> Batch:
        return self._dataset.__getitems__([i * len(self._dataset) // self._count for i in range(self._count)])

    def images(self, start: int, stop: int) -> Image:
        """Pictures start .. stop - 1, on the CPU."""
        return to_image(self.batch["image"][start:stop])
