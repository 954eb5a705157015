"""Pages of a mapped file go once they are copied, and what is read again is what the file holds."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm.checkpoints.files import open_safetensors
from ldm.checkpoints.mapped import forget, ranges

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="madvise is Linux's")


def resident(places: list[tuple[int, int]]) -> int:
    """KiB of the file's mappings that are in memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        field = line.split()[0]
        if "-" in field and ":" not in field:
            low = int(field.split("-")[0], 16)
            inside = any(start <= low < end for start, end in places)
        elif inside and field == "Rss:":
            total += int(line.split()[1])
    return total


@linux
def test_memory_goes_with_the_copy_and_the_numbers_stay(tmp_path: Path) -> None:
    values = {"a": torch.randn(512, 1024), "b": torch.randn(512, 1024)}
    save_file(values, tmp_path / "x.safetensors")
    with open_safetensors(tmp_path / "x.safetensors") as file:
        kept, copied = file.tensor("a"), file.tensor("b").clone()
        assert float(kept.sum()) == float(values["a"].sum())
        places = ranges(tmp_path / "x.safetensors")
        assert places, "safetensors maps its file"
        before = resident(places)
        file.forget("a", kept)
        assert resident(places) == before, "what is kept as it lies in the file stays"
        file.forget("b", copied)
        assert before - resident(places) > 1900, "two megabytes were copied"
        assert torch.equal(file.tensor("b"), values["b"]) and torch.equal(kept, values["a"])


def test_memory_of_no_file_is_never_touched(tmp_path: Path) -> None:
    value = torch.ones(512, 1024)
    forget(value, ranges(tmp_path / "nothing"))
    forget(value, [(0, 4096)])
    assert bool((value == 1).all())
