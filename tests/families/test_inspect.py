"""What a file is said to be, and every broken one refused in one line."""

import json
import pickle
import runpy
import struct
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.checkpoints import native
from ldm.checkpoints.integrity import MAX_HEADER, read_header
from ldm.errors import UserError
from ldm.families.convert import convert
from ldm.families.inspect import describe

SCRIPT = Path(__file__).parents[2] / "scripts" / "inspect_model.py"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sd1", "Stable Diffusion 1"),
        ("sd2", "Stable Diffusion 2"),
        ("inpainting", "inpainting"),
        ("sdxl", "Stable Diffusion XL"),
        ("sdxl-refiner", "refiner"),
    ],
)
def test_families_are_named(folders: dict[str, Path], name: str, words: str) -> None:
    lines = describe(folders[name])
    assert "a diffusers folder" in lines[0] and words in lines[0]
    assert ("predicts v" if name == "sd2" else "predicts eps") in "\n".join(lines)


def test_layouts_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    convert(folders["sd2"], tmp_path / "single", "compvis")
    convert(folders["sd2"], tmp_path / "ours", "ldm", "fp16")
    assert "our own file; Stable Diffusion 2" in describe(tmp_path / "ours")[0]
    assert "F16" in describe(tmp_path / "ours")[1]
    convert(folders["sd2"], tmp_path / "packed", "ldm", "int8")
    said = Counter(entry.dtype for entry in read_header(tmp_path / "packed").entries.values())
    assert {"I8", "F16", "F32"} == said.keys()  # matrices, the rest, and the scales of the rows
    assert all(f"{count} {dtype}" in describe(tmp_path / "packed")[1] for dtype, count in said.items())
    save_file(load_file(tmp_path / "single") | {"betas": torch.ones(3)}, tmp_path / "foreign")
    text = "\n".join(describe(tmp_path / "foreign"))
    assert "a single file of CompVis's layout" in text and "guessed" in text and "such as betas" in text


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("input_hint_block.0.weight", "a ControlNet"),
        ("down_blocks.0.resnets.0.norm1.weight", "diffusers' UNet alone"),
        ("first_stage_model.encoder.down.0.block.0.norm1.weight", "an autoencoder alone"),
        ("text_model.encoder.layers.0.layer_norm1.weight", "a text tower alone"),
        ("emb_params", "an embedding"),
        ("x", "of no kind known here"),
    ],
)
def test_what_is_no_whole_model_is_named(key: str, words: str, tmp_path: Path) -> None:
    save_file({key: torch.zeros(1)}, tmp_path / "a")
    assert words in describe(tmp_path / "a")[0]


def test_a_lora_is_named_and_a_damaged_one_refused(tmp_path: Path) -> None:
    halves = {"lora_unet_a.lora_up.weight": torch.zeros(6, 2), "lora_unet_a.lora_down.weight": torch.zeros(2, 4)}
    save_file(halves | {"x": torch.zeros(1)}, tmp_path / "a")
    first, *_, last = describe(tmp_path / "a")
    assert "a LoRA" in first and last == "changes 1 weights, at rank 2; not of it: x"
    save_file(dict([halves.popitem()]), tmp_path / "b")
    with pytest.raises(UserError, match="1 without both of down and up"):
        describe(tmp_path / "b")


def test_values_are_read_where_asked(folders: dict[str, Path], tmp_path: Path) -> None:
    convert(folders["sd1"], tmp_path / "ours", "ldm")
    tensors = load_file(tmp_path / "ours")
    tensors["backbone.conv_in.bias"][0] = float("inf")
    native.write(tmp_path / "ours", native.read_spec(tmp_path / "ours"), tensors)
    describe(tmp_path / "ours")
    with pytest.raises(UserError, match=r"1 not finite \(backbone\.conv_in\.bias\)"):
        describe(tmp_path / "ours", values=True)


def header(data: Any, body: bytes = b"\0" * 8) -> bytes:
    text = data if isinstance(data, bytes) else json.dumps(data).encode()
    return struct.pack("<Q", len(text)) + text + body


def one(shape: Any = (2,), span: Any = (0, 8), dtype: Any = "F32", name: str = "a") -> dict[str, Any]:
    return {name: {"dtype": dtype, "shape": shape, "data_offsets": span}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{}}'), "'a' stands in its header twice"),
        (header(one(), b"\0" * 12), "something was appended"),
        (header(one(), b"\0" * 4), "cut short"),
        (header(one(span=(4, 12)), b"\0" * 12), "leave a hole at byte 0"),
        (header(one() | one(span=(4, 12), name="b"), b"\0" * 12), "overlap at byte 4"),
        (header(one(shape=(0, 2**40), span=(0, 0)), b""), "impossible shape"),
        (header(one(shape=(-1,))), "impossible shape"),
        (header(one(shape=(True, 2))), "impossible shape"),
        (header(one(shape=(3,))), "cannot take 8 bytes"),
        (header(one(span=(8, 0))), "impossible place"),
        (header(one(dtype="F33")), "unknown type 'F33'"),
        (header(one(dtype=["F32"])), "unknown type"),
        (header(one(name="../../x")), "no name of a tensor"),
        (header(one(name="a\nb")), "no name of a tensor"),
        (header(one(name="a" * 600)), "no name of a tensor"),
        (header({"a": 3}), "not described"),
        (header([1]), "not JSON"),
        (header(b"{" * 100_000), "not a whole safetensors file"),
        (header(b'{"a":' * 50_000), "not a whole safetensors file"),
        (header(b"{\xff}"), "not a whole safetensors file"),
        (header({"__metadata__": {"a": 1}}, b""), "metadata is not text"),
        (struct.pack("<Q", 2**63) + b"{}", "does not begin as one"),
        (struct.pack("<Q", 300) + b"{}", "cut short, 10 bytes do not even hold its header of 300"),
        (b"", "it is empty"),
        (pickle.dumps({"a": 1}), "holds pickles"),
        (b"PK\x03\x04", "holds pickles"),
    ],
)
def test_broken_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        describe(tmp_path / "a")
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 400


def test_a_header_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER + 1) + b"{")
        file.truncate(MAX_HEADER + 100)
    with pytest.raises(UserError, match="does not begin as one"):
        read_header(tmp_path / "a")


def script(*arguments: object) -> Callable[[], None]:
    def run() -> None:
        sys.argv = [str(SCRIPT), *map(str, arguments)]
        runpy.run_path(str(SCRIPT), run_name="__main__")

    return run


def test_the_script(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    script(folders["sd1"], "--values")()
    assert "Stable Diffusion 1" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        script(folders["sd1"] / "absent")()
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
