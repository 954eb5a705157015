"""Settings are read strictly: what is wrong is named with its place, and a round trip changes nothing."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm import config
from ldm.errors import UserError


@dataclass(frozen=True)
class Optimiser:
    lr: float = 1e-4
    kind: Literal["adamw", "sgd"] = "adamw"


@dataclass(frozen=True)
class Run:
    steps: int
    name: str = "run"
    widths: tuple[int, ...] = (1, 2)
    betas: tuple[float, float] = (0.9, 0.99)
    warm: bool = False
    limit: int | None = None
    optimiser: Optimiser = Optimiser()
    weights: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


runs = st.builds(
    Run,
    steps=st.integers(-(2**53), 2**53),
    name=st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=9),
    widths=st.lists(st.integers(0, 2000), max_size=4).map(tuple),
    betas=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    warm=st.booleans(),
    limit=st.none() | st.integers(0, 9),
    optimiser=st.builds(
        Optimiser, lr=st.floats(allow_nan=False, allow_infinity=False), kind=st.sampled_from(["adamw", "sgd"])
    ),
    weights=st.dictionaries(st.text("abc", min_size=1), st.floats(0, 9), max_size=2),
)


@given(runs)
def test_round_trip_is_the_identity(run: Run) -> None:
    assert config.from_dict(Run, config.to_dict(run)) == run


@given(runs)
def test_yaml_round_trip_is_the_identity(tmp_path_factory: pytest.TempPathFactory, run: Run) -> None:
    path = tmp_path_factory.mktemp("yaml") / "run.yaml"
    path.write_text(config.dump(run))
    assert config.load(Run, path) == run


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({}, "field 'steps' is missing"),
        ({"steps": 1, "nmae": "x"}, "unknown field 'nmae' .did you mean 'name'"),
        ({"steps": 1, "optimiser": {"rl": 1}}, "unknown field 'optimiser.rl'"),
        ({"steps": 1, "optimiser": 3}, "optimiser needs fields, not 3"),
        ({"steps": 1, "optimiser": {"kind": "lion"}}, "optimiser.kind is 'lion': choose one of adamw, sgd"),
        ({"steps": 1.5}, "steps is 1.5: needs int"),
        ({"steps": True}, "steps is True: needs int"),
        ({"steps": "1"}, "steps is '1': needs int"),
        ({"steps": None}, "steps is None: needs int"),
        ({"steps": 1, "warm": 1}, "warm is 1: needs bool"),
        ({"steps": 1, "widths": 3}, "widths is 3: needs a list"),
        ({"steps": 1, "widths": [1, "x"]}, r"widths\[1\] is 'x': needs int"),
        ({"steps": 1, "betas": [0.9]}, "betas has 1 values, needs 2"),
        ({"steps": 1, "weights": [1]}, "weights is .1.: needs fields"),
        ({"steps": 1, "weights": {"a": "x"}}, "weights.a is 'x': needs float"),
        ({"steps": 1, "optimiser": {"lr": 10**400}}, "optimiser.lr is .*needs float"),
        ([1], "Run needs fields"),
        ({"steps": 1, 7: 8}, "unknown field '7'"),
    ],
)
def test_what_is_wrong_is_named(data: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        config.from_dict(Run, data)


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("steps: 3\nname: 2024\noptimiser: {lr: 1e-4}\nbetas: [1, 0]\n")
    run = config.load(Run, path)
    assert run.name == "2024"
    assert run.optimiser.lr == 1e-4
    assert run.betas == (1.0, 0.0) and type(run.betas[0]) is float


def test_overrides_win(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("steps: 3\noptimiser: {kind: sgd}\n")
    run = config.load(
        Run,
        path,
        ["--optimiser.lr", "1e-3", "--warm", "--name=a b", "--widths", "[4]", "--steps", "-2", "--limit", "null"],
    )
    assert run == Run(steps=-2, name="a b", widths=(4,), warm=True, optimiser=Optimiser(lr=1e-3, kind="sgd"))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["stray"], "unexpected argument 'stray'"),
        (["--optimizer.lr", "1"], "unknown field 'optimizer' .did you mean 'optimiser'"),
        (["--optimiser.lr", "fast"], "optimiser.lr is 'fast': needs float"),
        (["--name", "[unclosed"], ""),
    ],
)
def test_overrides_are_read_strictly(tmp_path: Path, overrides: list[str], says: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("steps: 3\n")
    if not says:
        assert config.load(Run, path, overrides).name == "[unclosed"
        return
    with pytest.raises(UserError, match=says):
        config.load(Run, path, overrides)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot read config"),
        (b"a: [1", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"- 1\n", "holds no fields"),
        (b"!!python/object/apply:os.system ['true']", "is not YAML"),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=says):
        config.load(Run, path)


def test_a_path_is_written_as_text() -> None:
    assert config.to_dict({"at": Path("a") / "b"}) == {"at": "a/b"}
