"""Imports go down only: the floors of the house, read from the source with ast."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (
    {"shapes", "errors", "config", "conditioning", "files", "request", "html"},
    {"diffusion", "models", "data"},
    {"text", "adapters"},
    {"checkpoints"},
    {"families", "images", "recipe", "canvas", "steering", "start", "foreign", "restore", "limits", "jobs"},
    {"pipeline", "training", "evaluation", "preview"},
    {"painting"},
    {"serving", "scripts"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
SIBLINGS = {
    ("steering", "families"),  # networks from files
    ("steering", "images"),
    ("training", "pipeline"),  # previews
    ("training", "evaluation"),  # metrics
    ("evaluation", "pipeline"),  # pictures to judge
    ("jobs", "recipe"),  # what is done already
    ("recipe", "images"),  # a recipe lives in a picture's file
    ("canvas", "images"),  # read from pictures' files
    ("restore", "canvas"),  # what was measured is a picture
    ("limits", "restore"),  # what can be undone
    ("start", "canvas"),  # a run may begin with a picture
    ("recipe", "foreign"),  # what others wrote
}
ORACLES = {"diffusers", "transformers", "pytest", "hypothesis", "beartype"}  # tests may, the package may not


def room(name: str) -> str:
    """`ldm.models.unet` -> models; "" for what is not ours."""
    parts = name.split(".")
    return parts[1] if parts[0] == "ldm" and len(parts) > 1 else ""


def imports(source: str) -> set[str]:
    """Every module that a source imports, wherever in the file; `from ldm import x` counts as ldm.x."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            module = node.module or ""
            names |= {f"ldm.{alias.name}" for alias in node.names} if module == "ldm" else {module}
    return names


def faults(here: str, names: set[str]) -> list[str]:
    """What a file in the room `here` imports and may not."""
    found = [f"{here} imports {name}" for name in names if name.split(".")[0] in ORACLES]
    for name in names:
        there = room(name)
        if not there or there == here or there.startswith("__"):
            continue
        assert there in FLOOR, f"{there} stands on no floor: give it one in FLOORS"
        up = FLOOR[there] > FLOOR[here]
        beside = FLOOR[there] == FLOOR[here] > 0 and (here, there) not in SIBLINGS
        if up or beside:
            found.append(f"{here} (floor {FLOOR[here]}) imports {name} (floor {FLOOR[there]})")
    return found


FILES = sorted([*(ROOT / "ldm").rglob("*.py"), *(ROOT / "scripts").glob("*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    here = "scripts" if parts[0] == "scripts" else parts[1]
    if here == "__init__":
        assert not imports(path.read_text()), "ldm/__init__.py imports nothing"
        return
    assert not faults(here, imports(path.read_text()))


def test_floor_zero_has_no_circle() -> None:
    sources = {path.stem: path.read_text() for path in (ROOT / "ldm").glob("*.py") if path.stem in FLOORS[0]}
    graph = {name: {room(n) for n in imports(source)} & FLOORS[0] for name, source in sources.items()}
    while graph:
        free = {name for name, below in graph.items() if not below & set(graph)}
        assert free, f"these import each other in a circle: {sorted(graph)}"
        graph = {name: below for name, below in graph.items() if name not in free}


@pytest.mark.parametrize(
    ("here", "source", "wrong"),
    [
        ("diffusion", "from ldm.models.unet import UNet", True),
        ("diffusion", "from ldm import models", True),
        ("data", "def f():\n    import ldm.checkpoints.native", True),
        ("evaluation", "import ldm.training", True),
        ("training", "import ldm.pipeline", False),
        ("pipeline", "import ldm.training", True),
        ("checkpoints", "from ldm.text.tower import Conditioner", False),
        ("models", "import diffusers", True),
        ("config", "from ldm.errors import UserError", False),
    ],
)
def test_the_reader_of_imports_sees(here: str, source: str, wrong: bool) -> None:
    assert bool(faults(here, imports(source))) is wrong
