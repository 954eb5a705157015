"""The judge: what prompts ask for, what it learns, and that a file holds all of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm.errors import UserError
from ldm.evaluation.inception import Inception
from ldm.evaluation.judge import COLOURS, Judge, JudgeRun, JudgeSpec, blurred, fit, histogram, make_judge, recoloured
from ldm.evaluation.store import Store

NAMES = {"apple": "apples?", "car": r"(\w+ )?car", "river": "satellite image of a river", "orange": "orange"}


@pytest.mark.parametrize(
    ("prompt", "name", "colour"),
    [
        ("a red apple", "apple", "red"),
        ("an apple", "apple", ""),
        ("Apples", "apple", ""),
        ("a gray racing car", "car", "grey"),
        ("a photo of a green car", "car", "green"),
        ("3d emoji of a car", "car", ""),
        ("a satellite image of a river", "river", ""),
        ("an orange", "orange", ""),
        ("an orange car", "car", "orange"),
    ],
)
def test_what_a_prompt_asks_for(prompt: str, name: str, colour: str) -> None:
    assert JudgeSpec(NAMES).asked(prompt) == (name, colour)


def test_a_prompt_for_what_it_does_not_know() -> None:
    assert JudgeSpec(NAMES).name("a red apple tree") == ""
    with pytest.raises(UserError, match=r"'a red appel' \(did you mean 'apple'\?\)"):
        JudgeSpec(NAMES).asked("a red appel")


def test_the_histogram_leaves_out_white_ground() -> None:
    pixels = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
    pixels[0, :, :4, :4] = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None]
    pixels[0, :, 4:, :2] = torch.tensor([0, 0, 130], dtype=torch.uint8)[:, None, None]
    found = histogram(pixels)
    assert found[0].square().sum().item() == pytest.approx(1)
    assert found[0, 5 * 36].item() == pytest.approx((16 / 24) ** 0.5)
    assert found[0, 3].item() == pytest.approx((8 / 24) ** 0.5)
    assert found[1].sum() == 0


def test_it_learns_names_and_colours(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    names, colours = torch.arange(120) % 4, torch.arange(120) % 3
    features = torch.randn(120, 2048, generator=rng)
    features[torch.arange(120), names] += 9
    histograms = torch.zeros(120, 216)
    histograms[torch.arange(120), colours * 7] = 1
    unknown = torch.arange(120) >= 110
    judge = Judge(JudgeSpec(NAMES))
    fit(judge, features, histograms, names, torch.where(unknown, -1, colours), JudgeRun("", "", NAMES, steps=80))
    asked = [(list(NAMES)[n], COLOURS[c]) for n, c in zip(names.tolist(), colours.tolist(), strict=True)]
    assert judge.verdicts(features, histograms) == asked
    judge.spec = replace(judge.spec, pairs={"car": ("red", "blue")}, accuracy={"name": 0.5})
    judge.save(tmp_path / "judge.safetensors")
    loaded = Judge.load(tmp_path / "judge.safetensors")
    assert loaded.spec == judge.spec
    assert loaded.verdicts(features, histograms) == asked


def test_a_file_that_is_no_judge(tmp_path: Path) -> None:
    for name, prepare in {"none": lambda _: None, "other": lambda path: save_file({"x": torch.zeros(1)}, path)}.items():
        prepare(tmp_path / name)
        with pytest.raises(UserError, match="cannot read a judge"):
            Judge.load(tmp_path / name)


def test_changed_pictures_keep_or_lose_their_colours() -> None:
    pixels = torch.full((6, 3, 32, 32), 255, dtype=torch.uint8)
    pixels[:, :, 8:24, 8:24] = torch.tensor([200, 40, 90], dtype=torch.uint8)[:, None, None]
    soft = blurred(pixels, torch.Generator().manual_seed(1))
    assert soft.shape == pixels.shape and not torch.equal(soft, pixels)
    assert (soft[:, :, 16, 16].float() - pixels[:, :, 16, 16].float()).abs().max() < 40
    other = recoloured(pixels, torch.Generator().manual_seed(1))
    assert torch.equal(other.sort(1).values, pixels.sort(1).values) and not torch.equal(other, pixels)


def test_it_is_made_from_a_corpus(random_inception: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the committed shards: faces against the rest of what is there, and their colours."""
    shards = Path(__file__).parents[1] / "assets/shards"
    names = {"face": ".*face.*", "animal": "cat|dog|.*horse|.*bird|.*fish|.*(table|chair|sofa).*"}
    run = JudgeRun(str(shards / "00000.tar"), str(shards / "00001.tar"), names, str(random_inception), 4, 75, 64, 0, 30)
    store = Store(tmp_path, chunk=8)
    judge = make_judge(run, store)
    assert set(judge.spec.accuracy) == {"name", "names", "colour", "colours"}
    assert 0 <= judge.spec.accuracy["name"] <= 1 <= judge.spec.accuracy["names"]
    assert "yellow" in judge.spec.pairs["face"]
    monkeypatch.setattr(Inception, "forward", lambda *_: pytest.fail("the features are kept"))
    again = make_judge(run, store)
    assert all(torch.equal(x, y) for x, y in zip(judge.state_dict().values(), again.state_dict().values(), strict=True))
    with pytest.raises(UserError, match="no picture of the corpus is called 'pizza'"):
        make_judge(replace(run, names=names | {"pizza": "pizza"}), store)
