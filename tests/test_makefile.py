"""`make txt2img` hands the prompt on as it is, whatever stands in it."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the Makefile and an installed interpreter that only writes down its arguments."""
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nfor a in "$@"; do printf "%s\\036" "$a"; done > arguments\n')
    python.chmod(0o755)
    for stamp in (".installed", ".installed-dev"):
        (tmp_path / ".venv" / stamp).touch()
    return tmp_path


def make(clone: Path, *arguments: str) -> list[str]:
    subprocess.run(["make", "-C", str(clone), "-s", *arguments], check=True, timeout=60)
    return (clone / "arguments").read_text().split("\036")[:-1]


@pytest.mark.parametrize(
    "prompt",
    [
        "a red apple",
        "it's a \"quoted\" cat's hat",
        "costs $5 or $HOME or $(shell echo no) or $$",
        "`touch pwned`; touch pwned & \\n * ? # %",
        "--help",
        "ein Café 紫の心",
        "two\nlines",
    ],
)
def test_the_prompt_arrives_whole(clone: Path, prompt: str) -> None:
    assert make(clone, "txt2img", f"PROMPT={prompt}") == ["scripts/txt2img.py", f"--prompt={prompt}"]
    assert not (clone / "pwned").exists()


def test_other_flags_go_through_args(clone: Path) -> None:
    arguments = make(clone, "txt2img", "PROMPT=a", "ARGS=--steps 3 --grid")
    assert arguments == ["scripts/txt2img.py", "--prompt=a", "--steps", "3", "--grid"]


def test_make_test_runs_the_fast_tests(clone: Path) -> None:
    assert make(clone, "test") == ["-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "-m", "not slow"]


def test_continuous_integration_runs_make_test() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
