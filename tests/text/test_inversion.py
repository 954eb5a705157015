"""Textual inversions as others write them: pickles by conversion alone, and real files where they lie beside."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm.checkpoints import pickled
from ldm.errors import UserError
from ldm.text.inversion import from_tensors
from ldm.text.tower import Conditioner, TextConfig

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared/files/ti"


def tower(width: int) -> Conditioner:
    return Conditioner(TextConfig(width=width, heads=4, layers=1, vocab_size=600))


def test_pickles_are_converted_by_the_script_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = torch.randn(3, 16)
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": rows}, "name": "x"}, tmp_path / "a.pt")
    torch.save({"<birb>": rows[0]}, tmp_path / "b.bin")
    spec = importlib.util.spec_from_file_location("convert", ROOT / "scripts/convert.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name, expected, names in (("a.pt", rows, ("new",)), ("b.bin", rows[:1], ("new", "<birb>"))):
        out = tmp_path / "new.safetensors"
        monkeypatch.setattr(sys, "argv", ["convert.py", str(tmp_path / name), str(out), "--to", "tensors"])
        script.main()
        embedding = from_tensors(out, load_file(out), tower(16))
        assert torch.equal(embedding.vectors, expected) and embedding.names == names


@pytest.mark.skipif(not REAL.exists(), reason="the real files are not beside this copy")
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("EasyNegative.safetensors", 8),
        pytest.param("bad-hands-5.pt", 2, marks=pytest.mark.slow),  # a process of its own reads each pickle
        pytest.param("bad_prompt_version2.pt", 8, marks=pytest.mark.slow),
        pytest.param("learned_embeds.bin", 1, marks=pytest.mark.slow),
    ],
)
def test_real_files(name: str, count: int, tmp_path: Path) -> None:
    path = REAL / name
    if pickled.is_pickled(path):
        pickled.to_safetensors(path, tmp_path / "x.safetensors")
        path = tmp_path / "x.safetensors"
    embedding = from_tensors(path, load_file(path), tower(768))
    assert embedding.vectors.shape == (count, 768) and embedding.vectors.std() > 0.001
    with pytest.raises(UserError, match="width 768, this model's is 16"):
        from_tensors(path, load_file(path), tower(16))
