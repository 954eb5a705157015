"""Pages of a mapped file go once they are copied, and what is read again is what the file holds."""

import json
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoints.files import SafeFile, Tensors

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="madvise is Linux's")


def resident(value: Tensor) -> int:
    """KiB of the mapping that a tensor lies in that are in memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        field = line.split()[0]
        if "-" in field and ":" not in field:
            low, high = (int(end, 16) for end in field.split("-"))
            inside = low <= value.data_ptr() < high
        elif inside and field == "Rss:":
            total += int(line.split()[1])
    return total


@linux
def test_memory_goes_with_the_copy_and_the_numbers_stay(tmp_path: Path) -> None:
    values = {"a": torch.randn(512, 1024), "b": torch.randn(512, 1024)}
    save_file(values, tmp_path / "x.safetensors")
    file = SafeFile(tmp_path / "x.safetensors")
    kept, copied = file.tensor("a"), file.tensor("b").clone()
    before = resident(kept)
    assert before >= 4096, "both are at hand, read ahead"
    file.forget("a", kept)
    assert resident(kept) == before, "what is kept as it lies in the file stays"
    file.forget("b", copied)
    assert before - resident(kept) > 1900, "two megabytes were copied"
    assert torch.equal(file.tensor("b"), values["b"]) and torch.equal(kept, values["a"])


def test_what_is_written_into_a_tensor_stays_out_of_its_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(8)}, tmp_path / "x")
    SafeFile(tmp_path / "x").tensor("a").add_(1)
    assert SafeFile(tmp_path / "x").tensor("a").tolist() == [0.0] * 8


def test_every_type_and_place(tmp_path: Path) -> None:
    """A header of odd length puts the tensors where their type cannot be read in place; one has no numbers."""
    values = {
        "a": torch.arange(6, dtype=torch.float64).reshape(2, 3),
        "b": torch.tensor(True),
        "c": torch.ones(0, 4, dtype=torch.bfloat16),
        "d": torch.tensor([0.5, -2.0]).to(torch.float8_e4m3fn),
        "e": torch.arange(-3, 3),
    }
    save_file(values, tmp_path / "even")
    raw = (tmp_path / "even").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.dumps(json.loads(raw[8 : 8 + length])).encode()
    header += b" " * (1 - len(header) % 2)
    (tmp_path / "odd").write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])
    for name in ("even", "odd"):
        tensors = Tensors([(SafeFile(tmp_path / name), "x.")])
        assert len(tensors) == 5
        for key, value in values.items():
            found = tensors[f"x.{key}"]
            assert found.dtype == value.dtype and found.shape == value.shape
            assert torch.equal(found.double(), value.double())
