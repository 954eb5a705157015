"""The README's Python runs as it stands, and what the documents and the scripts name is there."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm import pipeline

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_runs_from_top_to_bottom(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "embedded.safetensors").symlink_to(tiny_model)
    monkeypatch.setattr(pipeline, "ASSETS", tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), names)
    assert names["image"].shape == (1, 3, 32, 32)
    assert torch.isfinite(names["loss"]) and names["loss"] > 0


SAYING = [
    ROOT / "README.md",
    *(path for at in ("docs", "scripts", "configs") for path in sorted((ROOT / at).rglob("*.*"))),
]


@pytest.mark.parametrize("path", [path for path in SAYING if path.suffix in (".md", ".py", ".yaml", ".sh")], ids=str)
def test_what_is_named_is_there(path: Path) -> None:
    names = set(re.findall(r"(?<![\w/])(?:scripts|configs|ldm|tests)/[\w./]*\w", path.read_text(encoding="utf-8")))
    assert not [name for name in sorted(names) if not (ROOT / name).exists()]
