"""open_clip's text modules alone, which is what makes a start quick; and the whole package beside them."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ldm.text import open_clip

ROOT = Path(__file__).parents[2]
CODE = """
import json, sys
from ldm.text.tower import Conditioner, TextConfig
text = Conditioner(TextConfig(width=8, heads=2, layers=1, context_length=8, vocab_size=600))
tokens = text(["a red apple"]).tokens
before = [name for name in ("open_clip", "torchvision", "timm", "transformers") if name in sys.modules]
from ldm.text.open_clip import open_clip
package = open_clip()
import torchvision
whole = package.CLIPTextCfg is not None and package.transformer.TextTransformer is not None
print(json.dumps([before, whole, list(tokens.shape), hasattr(torchvision.ops, "nms")]))
"""


def test_a_tower_needs_nothing_of_the_picture_side() -> None:
    ran = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout.splitlines()[-1]) == [[], True, [1, 8, 8], True]


def test_a_version_whose_parts_cannot_stand_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def find(name: str, *rest: Any) -> Any:
        return None if name == "open_clip" else real(name, *rest)

    monkeypatch.setattr(open_clip, "_ALONE", "_open_clip_elsewhere")
    monkeypatch.setattr(importlib.util, "find_spec", find)
    found = open_clip.part.__wrapped__("transformer")
    assert found.__name__ == "open_clip.transformer" and found.TextTransformer is not None
    assert sys.modules["torchvision"].ops.misc is not None
