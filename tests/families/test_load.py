"""What a start waits for, and what it does not."""

import subprocess
import sys
from pathlib import Path

import pytest

from ldm import files, pipeline
from ldm.files import digest, digest_beside
from ldm.recipe import Request

ROOT = Path(__file__).parents[2]
CODE = """
import sys
from ldm import pipeline
from ldm.recipe import Request
painter = pipeline.load(sys.argv[1], "cpu")
painter.txt2img(Request("a red apple", steps=1))
heavy = ("torch._dynamo", "torch._inductor", "sympy", "torchvision", "open_clip", "timm", "transformers", "accelerate")
print(*[name for name in heavy if name in sys.modules])
"""


def test_a_picture_imports_no_compiler_and_no_second_library(tiny_model: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", CODE, tiny_model], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []


def test_the_first_steps_do_not_wait_for_the_digest(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []

    def beside(path: Path) -> object:
        def result() -> str:
            waited.append(path)
            return digest(path)

        return result

    monkeypatch.setattr(pipeline, "digest_beside", beside)
    painter = pipeline.load(str(tiny_model), "cpu")
    request = painter.complete(Request("a red apple", steps=2))
    assert painter.notes([request])
    *_, last = painter.sample([request])
    painter.decode(last.x)
    assert not waited
    recipe = painter.recipes(pipeline.Batch([request], slice(1)))[0]
    assert waited == [tiny_model] and recipe.made.model_hash == digest(tiny_model)
    assert not painter.made.check(recipe.made) and waited == [tiny_model]


def test_a_digest_worked_out_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert digest_beside(tmp_path / "a")() == digest(tmp_path / "a")

    def fail(path: Path) -> str:
        raise OSError("it is gone")

    monkeypatch.setattr(files, "sha256", fail)
    with pytest.raises(OSError, match="it is gone"):
        digest_beside(tmp_path / "a")()
