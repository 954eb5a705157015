"""Figures: each is drawn, says what it claims, and the script that draws them refuses what it cannot."""

import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

import torch
from PIL import Image

from ldm.diffusion.schedules import ScheduleConfig, make_schedule
from ldm.evaluation import plots

SCRIPT = Path(__file__).parents[2] / "scripts/visualize.py"
PICTURE = torch.linspace(-1, 1, 3 * 64).view(1, 3, 8, 8)


def run(*flags: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPT), *flags])
        runpy.run_path(str(SCRIPT), run_name="__main__")


def test_every_schedule_is_drawn_three_ways() -> None:
    axes = plots.schedules().axes
    assert len(axes) == 3 and all(len(axis.lines) == len(plots.SCHEDULES) for axis in axes)
    share, snr, sigma = (torch.as_tensor(axis.lines[0].get_ydata()) for axis in axes)
    torch.testing.assert_close(share, 1 / (1 + sigma**2))
    torch.testing.assert_close(snr, -2 * sigma.log())


def test_the_forward_strip_goes_from_the_picture_to_noise() -> None:
    axes = plots.forward(PICTURE, make_schedule(ScheduleConfig()), 5).axes
    first = torch.as_tensor(axes[0].images[0].get_array())
    assert torch.allclose(first, PICTURE[0].permute(1, 2, 0) / 2 + 0.5)
    assert len(axes) == 5 and axes[-1].get_title() == r"$\sigma$ 14.6"


def test_a_trajectory_shows_x_and_x0_of_each_step() -> None:
    axes = plots.trajectory("ddim", 5).axes
    assert len(axes) == 10 and axes[4].get_title() == r"$\sigma$ 0"


def test_samplers_stand_side_by_side() -> None:
    axes = plots.side_by_side(("ddim", "heun"), (2, 3)).axes
    assert [axis.get_title() for axis in axes] == ["ddim", "heun", "", ""] and axes[2].get_ylabel() == "3 steps"


def test_convergence_states_the_measured_slope() -> None:
    labels = [text.get_text() for text in plots.convergence(("euler", "heun")).axes[0].get_legend().get_texts()]
    assert labels == ["euler: slope 1.00, claims 1", "heun: slope 2.00, claims 2"]


@pytest.mark.slow
def test_the_script_draws_all_it_offers(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["schedules", "forward", "trajectory", "side_by_side", "convergence", "pictures", "painting"]
    run("--only", *names, "--model", str(tiny_model), "--out", str(tmp_path / "figures"))
    written = capsys.readouterr().out.split()
    assert [Path(path).stem for path in written] == names
    assert all(Image.open(path).format == "PNG" for path in written)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "picturs"], "unknown figure 'picturs' (did you mean 'pictures'?)"),
        (["--only", "pictures", "--model", "nowhere"], "no model 'nowhere'"),
        (["--only", "forward", "--image", "nowhere.png"], "cannot read the picture 'nowhere.png'"),
    ],
)
def test_what_it_cannot_draw_is_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(*flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
