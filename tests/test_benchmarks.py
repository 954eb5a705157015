"""The benchmarks run, at sizes of seconds, and the page of measurements has a section for each, replaced on its own."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SHARED = {"run.py", "common.py", "networks.py"}
TINY = {
    "samplers": "--steps 5 --repeats 1 --size 8",
    "steps": "--width 32 --blocks 1 --unet 8 --vae 0 --repeats 1 --variants diffusers 'ldm fp32' ldm openvino",
    "steps-sdxl": "--network sdxl --width 64 --blocks 1 --unet 4 --repeats 1 --variants 'diffusers tuned' ldm",
    "steps-embedded": "--network embedded --unet 4 --vae 4 --repeats 1 --variants diffusers ldm",
    "txt2img": "--repeats 1 --steps 1 --size 32 --variants diffusers ldm",
    "scaling": "--width 64 --batches 1 2 --sides 64 128 --steps 1 2 --repeats 1 --figure {out}/scaling.png",
    "training": "--batch 1 --repeats 1 --variants 'ldm bf16' 'diffusers bf16 memory kept'",
    "data": "--pictures 64 --repeats 1",
}


@pytest.fixture(scope="module")
def run() -> ModuleType:
    return module("run")


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def positive(figures: Any) -> bool:
    """Whether these are numbers above 0, at any depth, and some."""
    if isinstance(figures, (dict, list)):
        values = list(figures.values() if isinstance(figures, dict) else figures)
        return bool(values) and all(map(positive, values))
    return isinstance(figures, (int, float)) and figures > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_it_runs_says_under_what_and_keeps_its_figures(name: str, run: Any, tmp_path: Path) -> None:
    program, kept = run.SHORT[name].split()[0], tmp_path / "folder" / "figures.json"
    command = [sys.executable, program, *shlex.split(TINY[name].format(out=tmp_path)), "--json", str(kept)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"torch \S+, diffusers \S+, load \d", ran.stdout)
    found = json.loads(kept.read_text())
    assert positive(found["figures"]) and "load" in found["conditions"]
    if "openvino" in TINY[name]:
        there = importlib.util.find_spec("openvino") is not None
        assert ("openvino is not installed" in ran.stdout) != there
    if name == "scaling":
        from PIL import Image

        assert min(Image.open(tmp_path / "scaling.png").size) > 500


def test_peak_memory_is_that_of_the_run_alone() -> None:
    """What came before it, freed, does not count, and what it held and freed does."""
    program = """
import sys
sys.path.insert(0, "benchmarks")
from common import peak
big = peak(lambda: bytearray(300 * 2**20))
print(big - peak(lambda: None), peak(lambda: bytearray(100 * 2**20)) - peak(lambda: None))
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    first, second = map(float, ran.stdout.split())
    assert 290 < first < 320 and 95 < second < 120


def test_every_benchmark_has_its_program_and_its_section(run: Any) -> None:
    page = run.PAGE.read_text()
    for name, command in run.SHORT.items():
        assert (ROOT / command.split()[0]).is_file()
        page = run.replaced(page, name, command, f"figures of {name} \\1")
    assert all(f"figures of {name} \\1" in page for name in run.SHORT)
    programs = {command.split()[0].removeprefix("benchmarks/") for command in run.SHORT.values()}
    assert {path.name for path in (ROOT / "benchmarks").glob("*.py")} == programs | SHARED
    assert set(TINY) == set(run.SHORT) - {"load"}


def test_only_its_own_section_changes(run: Any) -> None:
    page = "a\n<!-- x -->\nold\n<!-- end -->\nb\n<!-- y -->\nkept\n<!-- end -->\n"
    new = run.replaced(page, "x", "x.py", "1.0\n")
    assert new == page.replace("old", "```\n$ python x.py\n1.0\n```") and "kept" in new
    assert run.replaced(new, "x", "x.py", "1.0") == new
    with pytest.raises(ValueError, match="no section"):
        run.replaced(page, "z", "z.py", "")


def test_one_that_fails_stops_no_other(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- {name} -->\nold {name}\n<!-- end -->\n" for name in ("bad", "slow", "good")))
    for name, body in (("bad", "raise SystemExit(3)"), ("slow", "import time; time.sleep(60)"), ("good", "print(7)")):
        (tmp_path / f"{name}.py").write_text(f"import sys\nassert sys.argv[1] == '--json'\n{body}\n")
    short = {name: str(tmp_path / f"{name}.py") for name in ("bad", "slow", "lost", "good")}
    short["lost"] = short["good"]
    for name, value in (("PAGE", page), ("SHORT", short), ("LONGEST", 5)):
        monkeypatch.setattr(run, name, value)
    monkeypatch.setattr(sys, "argv", ["run.py"])
    with pytest.raises(SystemExit, match="bad, slow, lost"):
        run.main()
    assert "old bad" in page.read_text() and "old slow" in page.read_text()
    assert f"$ python {short['good']}\n7\n" in page.read_text() and "no section" in capsys.readouterr().err
