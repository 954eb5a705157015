"""The page of measurements has a section for every benchmark, and a new measurement replaces only its own."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run() -> Any:
    spec = importlib.util.spec_from_file_location("benchmarks_run", ROOT / "benchmarks" / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_benchmark_has_its_program_and_its_section(run: Any) -> None:
    page = run.PAGE.read_text()
    for name, command in run.SHORT.items():
        assert (ROOT / command.split()[0]).is_file()
        page = run.replaced(page, name, command, f"figures of {name} \\1")
    assert all(f"figures of {name} \\1" in page for name in run.SHORT)
    assert {p.name for p in (ROOT / "benchmarks").glob("*.py")} == {c.split()[0][11:] for c in run.SHORT.values()} | {
        "run.py"
    }


def test_only_its_own_section_changes(run: Any) -> None:
    page = "a\n<!-- x -->\nold\n<!-- end -->\nb\n<!-- y -->\nkept\n<!-- end -->\n"
    new = run.replaced(page, "x", "x.py", "1.0\n")
    assert new == page.replace("old", "```\n$ python x.py\n1.0\n```") and "kept" in new
    assert run.replaced(new, "x", "x.py", "1.0") == new
    with pytest.raises(ValueError, match="no section"):
        run.replaced(page, "z", "z.py", "")
