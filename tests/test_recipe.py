"""A picture's recipe: read back as it was written, as A1111 writes it, and strict with files from strangers."""

import json
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm import config, images, recipe
from ldm.errors import UserError
from ldm.recipe import Made, Recipe, Request

REQUEST = Request("a red apple", "", 7, "euler_a", "trailing", 20, 7.0, 512, 768)
MADE = Made("embedded", "0123456789abcdef", "cpu", "fp32", recipe.versions(), 2, batch=4, row=3)
RECIPE = Recipe(REQUEST, MADE)


def write(path: Path, text: dict[str, str]) -> Path:
    path.write_bytes(images.png(torch.zeros(2, 2, 3, dtype=torch.uint8), text))
    return path


@given(
    prompt=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40), seed=st.integers(0, 2**63 - 1)
)
def test_a_recipe_survives_its_file(tmp_path_factory: pytest.TempPathFactory, prompt: str, seed: int) -> None:
    made = replace(RECIPE, request=replace(REQUEST, prompt=prompt, negative=prompt[::-1], seed=seed))
    assert recipe.read(write(tmp_path_factory.mktemp("png") / "x.png", made.text())) == made


def test_parameters_are_as_a1111_writes_them() -> None:
    fields = "CFG scale: 7, Seed: 7, Size: 512x768, Model hash: 0123456789, Model: embedded"
    assert RECIPE.parameters() == f"a red apple\nSteps: 20, Sampler: Euler a, {fields}"
    full = replace(REQUEST, negative="blur, noise", sampler="dpmpp_2m", schedule="karras", cfg_scale=7.5)
    assert Recipe(full, replace(MADE, model="a, b: c")).parameters() == (
        "a red apple\nNegative prompt: blur, noise\n"
        "Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 7, Size: 512x768, "
        'Model hash: 0123456789, Model: "a, b: c"'
    )


def test_our_own_chunk_holds_everything() -> None:
    data = json.loads(RECIPE.text()["ldm"])
    usual = {f.name: f.default for f in fields(Request) if getattr(REQUEST, f.name) == f.default}
    assert {**usual, **data["request"]} == config.to_dict(REQUEST) and not usual.keys() & data["request"].keys()
    assert data["made"]["versions"].keys() == {"ldm", "torch", "python"}
    assert config.from_dict(Recipe, data) == RECIPE


GOOD = config.to_dict(RECIPE)


@pytest.mark.parametrize(
    ("chunk", "says"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[" * 20_000, "cannot be read"),
        ("3", "needs fields, not 3"),
        ("{}", "its format is None"),
        (json.dumps(GOOD | {"format": 2}), "its format is 2, this version reads 1"),
        (json.dumps(GOOD | {"extra": 1}), "unknown field 'extra'"),
        (json.dumps(GOOD | {"request": {"prompt": 3.5, "steps": []}}), "request.steps is"),
        (json.dumps(GOOD | {"request": {}}), "'request.prompt' is missing"),
        (json.dumps(GOOD | {"made": {"batch": 10**9}}), "is not a place in at most 256"),
        (json.dumps(GOOD | {"made": {"batch": 2, "row": 2}}), "row 2 of a batch of 2"),
        (json.dumps(GOOD | {"made": {"batch": 2, "row": -1}}), "row -1 of a batch of 2"),
        ('{"format": 1, "request": {"prompt": "x", "seed": ' + "9" * (sys.get_int_max_str_digits() + 1) + "}}", "read"),
    ],
    ids=range(13),
)
def test_a_hostile_chunk_is_one_error(tmp_path: Path, chunk: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        recipe.read(write(tmp_path / "x.png", {"ldm": chunk}))


def test_a_picture_without_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no recipe that is known here"):
        recipe.read(write(tmp_path / "x.png", {"parameters": "a cat"}))


def test_prompts_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a red apple\n\n  a café  \n", encoding="utf-8")
    assert recipe.read_prompts(path) == ["a red apple", "a café"]


@pytest.mark.parametrize(("content", "says"), [(None, "cannot read"), (b"\n \n", "no prompt"), (b"\xff\xfe", "UTF-8")])
def test_prompts_files_that_are_none(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=says):
        recipe.read_prompts(path)
