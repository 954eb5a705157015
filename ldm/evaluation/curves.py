"""Curves of training runs, drawn from their log.jsonl: each quantity in a panel of its own, each run in its colour."""

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import UserError
from ldm.evaluation.plots import colour, quantities
from ldm.files import read_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Records = Sequence[Mapping[str, Any]]
FIRST = ("loss", "validation_loss", "seen_loss", "validation_psnr", "seen_psnr")  # the panels that stand first
HIDDEN = ("step", "images", "skipped", "data_wait_s", "save_stall_s")
LOG = ("grad_norm", "gan_weight")  # drawn over powers of ten


def read(run: Path) -> Records:
    """The lines of a run's log, without one that is cut short. UserError where there is none."""
    path, records = run / "log.jsonl", []
    for line in read_text(path, "the log of a run from ").splitlines():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    records = [record for record in records if isinstance(record, dict) and "step" in record]
    if not records:
        raise UserError(f"{str(path)!r} has no line yet: the first comes after run.log_every steps")
    return records


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Means over up to `window` values on either side, as many on both: no lag."""
    kept = []
    for index in range(len(values)):
        reach = min(window, index, len(values) - 1 - index)
        part = values[index - reach : index + reach + 1]
        kept.append(sum(part) / len(part))
    return kept


def series(records: Records, name: str) -> tuple[list[int], list[float]]:
    """Steps and values, where there is a number."""
    pairs = [(r["step"], r[name]) for r in records if isinstance(r.get(name), (int, float)) and math.isfinite(r[name])]
    return [step for step, _ in pairs], [value for _, value in pairs]


def curves(runs: Mapping[str, Records]) -> "Figure":
    """A figure of one or several runs by name: thin lines as logged, thick ones smoothed; bars for histograms."""
    names = {name: value for records in runs.values() for record in records for name, value in record.items()}
    shown = [name for name, value in names.items() if name not in HIDDEN and value is not None]
    histograms = [name for name in shown if isinstance(names[name], list)]
    scalars = sorted(
        (name for name in shown if isinstance(names[name], (int, float))),
        key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name),
    )

    def draw(axis: Any, name: str) -> None:
        (_bars if name in histograms else _lines)(axis, runs, name)

    figure = quantities([*scalars[:1], *histograms, *scalars[1:]], 3.6, 2.7, draw)
    if len(runs) > 1:
        handles = [figure.axes[0].plot([], [], color=colour(i), label=name)[0] for i, name in enumerate(runs)]
        figure.legend(handles=handles, loc="outside upper center", ncols=min(len(runs), 6), frameon=False)
    return figure


def _lines(axis: Any, runs: Mapping[str, Records], name: str) -> None:
    lowest = math.inf
    for index, records in enumerate(runs.values()):
        (steps, values), shade = series(records, name), colour(index)
        many = len(values) >= 20 and name not in ("lr", "images_per_s", "gpu_gb")
        axis.plot(steps, values, color=shade, alpha=0.3 if many else 1, linewidth=0.8 if many else 1.4)
        if len(values) == 1:
            axis.plot(steps, values, "o", color=shade, markersize=4)
        if many:
            axis.plot(steps, smoothed(values, max(2, len(values) // 40)), color=shade, linewidth=1.6)
        lowest = min([lowest, *values])
        for step in (r["step"] for r in records if name == "loss" and r.get("skipped")):
            axis.axvline(step, color=shade, linewidth=0.6, linestyle=":")
    last = max(records[-1]["step"] for records in runs.values())
    axis.set(xlabel="step", xlim=(0, last * 1.02), yscale="log" if name in LOG and lowest > 0 else "linear")


def _bars(axis: Any, runs: Mapping[str, Records], name: str) -> None:
    """The mean over the last third of a run, for each bin of the training's noise levels."""
    for index, records in enumerate(runs.values()):
        rows = [record[name] for record in records if isinstance(record.get(name), list)]
        late = [[v for v in column if v is not None] for column in zip(*rows[-max(len(rows) // 3, 1) :], strict=True)]
        means = [sum(column) / len(column) if column else 0.0 for column in late]
        width = 0.8 / len(runs)
        places = [bin + (index - (len(runs) - 1) / 2) * width for bin in range(len(means))]
        axis.bar(places, means, width, color=colour(index))
    axis.set(xlabel="noise level: eighths of the training's, low to high")
