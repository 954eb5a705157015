"""An evaluation as one JSON file and one HTML page that needs nothing beside it."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from ldm import config, html
from ldm.evaluation.plots import curves
from ldm.evaluation.store import Pictures
from ldm.evaluation.suite import Measured, Suite
from ldm.files import replacing, write_json
from ldm.recipe import versions

# How each figure reads: a name for people, and whether more is better.
ABOUT = {
    "fid": ("FID", "less"),
    "kid": ("KID", "less"),
    "inception_score": ("Inception score", "more"),
    "precision": ("precision (3 neighbours)", "more"),
    "recall": ("recall (3 neighbours)", "more"),
    "density": ("density (5 neighbours)", "more"),
    "coverage": ("coverage (5 neighbours)", "more"),
    "clip": ("CLIP score", "more"),
    "diversity": ("LPIPS between pictures of a prompt", "more"),
    "rfid": ("rFID of the autoencoder", "less"),
    "psnr": ("PSNR of the autoencoder, dB", "more"),
    "ssim": ("SSIM of the autoencoder", "more"),
    "lpips": ("LPIPS of the autoencoder", "less"),
    "nearest_train": ("distance to the nearest training picture", "more"),
    "nearest_train_of_held_back": ("the same of held-back pictures", ""),
    "copied": ("nearer than 99 % of the held-back", "less"),
}
_STYLE = """img{width:100%}.right img{border:3px solid #2a9d4e}.wrong img{border:3px solid #d0453b}
.near{grid-template-columns:130px repeat(4,112px)}.note{color:#a04000}svg{max-width:100%;height:auto}"""
SHOWN = 48
Sweeps = Mapping[str, Mapping[float, Measured]]


def write(folder: Path, suite: Suite, base: Measured, sweeps: Sweeps) -> dict[str, Any]:
    """Write `evaluation.json` and `evaluation.html`; returns what the JSON holds. Nothing in it tells the time."""
    made = suite.painter.made if "painter" in vars(suite) else None
    judged = "judge" in suite.plan.metrics
    result: dict[str, Any] = {
        "model": made.model if made else suite.plan.model,
        "model_hash": made.model_hash if made else "",
        "plan": config.to_dict(suite.plan),
        "settings": dict(base.settings),
        "metrics": _figures(base),
        "sweeps": {
            axis: [{axis: value} | _figures(one) for value, one in points.items()] for axis, points in sweeps.items()
        },
        "judge": dict(suite.judge.spec.accuracy) if judged else {},
        "verdicts": _verdicts(base) if judged else [],
        "notes": list(dict.fromkeys(suite.notes)),
        "versions": versions(),
    }
    write_json(folder / "evaluation.json", result)
    with replacing(folder / "evaluation.html") as temporary:
        temporary.write_text(page(result, base, sweeps), encoding="utf-8")
    return result


def _figures(measured: Measured) -> dict[str, Any]:
    return {name: asdict(estimate) for name, estimate in measured.metrics.items()}


def _verdicts(base: Measured) -> list[dict[str, Any]]:
    judged = zip(base.prompted.texts, base.verdicts, base.right, strict=True)
    return [{"prompt": t, "name": name, "colour": c, "right": all(right)} for t, (name, c), right in judged]


def page(result: Mapping[str, Any], base: Measured, sweeps: Sweeps) -> str:
    """The HTML page: of what was measured, what there is to see."""
    plan, judge, suite = result["plan"], result["judge"], base.suite
    title = str(result["model"] or plan["images"])
    said = {"model": result["model_hash"][:10], "data": plan["data"], "seed": plan["seed"], **result["settings"]}
    made = ", ".join(f"{name} {value}" for name, value in said.items() if value != "")
    parts = [html.heading(title, 1), html.paragraph(made), _table(base)]
    if judge:
        names, colours = (f"{judge[what]:.0%} of {judge[what + 's']:.0f}" for what in ("name", "colour"))
        told = f"The judge itself names {names} held-back pictures rightly, and the colour of {colours}."
        parts.append(html.paragraph(told))
    parts += [html.paragraph(note, "note") for note in result["notes"]]
    for axis, points in sweeps.items():
        drawn = {_about(name)[0]: [one.metrics[name] for one in points.values()] for name in base.metrics}
        parts += [html.heading(f"Over {axis}"), _svg(curves(axis, list(points), drawn))]
    if "prompted" in vars(base):
        parts += [html.heading("What was asked, and what came"), _prompted(base)]
    if "captioned" in vars(base):
        parts += [html.heading("Of the data's captions"), _grid(base.captioned, SHOWN)]
    if "real" in vars(suite):
        parts += [html.heading("The data"), _grid(suite.real, SHOWN // 2)]
    if "reconstructed" in vars(suite):
        parts += [html.heading("The data after the autoencoder"), _grid(suite.reconstructed[0], SHOWN // 2)]
    if "neighbours" in vars(base):
        parts += [html.heading("The nearest training pictures, of those that are nearest"), _neighbours(base)]
    return html.page(title, parts, _STYLE)


def _about(name: str) -> tuple[str, str]:
    what, _, group = name.rpartition("_")
    return ABOUT.get(name, (f"{what} of {group} prompts" if what else name, "more"))


def _table(base: Measured) -> str:
    rows = []
    for name, one in base.metrics.items():
        text, better = _about(name)
        interval = f"{one.low:.4g} to {one.high:.4g}"
        rows.append((text, float(one.value), interval, one.n, f"{better} is better" if better else ""))
    return html.table(("", "value", "95 % interval", "n", ""), rows)


def _figure(pixels: Any, caption: str = "", kind: str = "") -> str:
    return html.figure(Image.fromarray(pixels.permute(1, 2, 0).numpy()), caption, kind)


def _grid(pictures: Pictures, most: int, captions: Sequence[str] = (), kinds: Sequence[str] = ()) -> str:
    rows = range(min(most, len(pictures.texts)))
    shown = zip(pictures.read(rows), captions or pictures.texts, kinds or [""] * len(pictures.texts), strict=False)
    return html.grid(_figure(*one) for one in shown)


def _prompted(base: Measured) -> str:
    if "verdicts" not in vars(base):
        return _grid(base.prompted, 400)
    said = _verdicts(base)
    captions = [v["prompt"] if v["right"] else f"{v['prompt']} → {v['colour']} {v['name']}" for v in said]
    return _grid(base.prompted, 400, captions, ["right" if v["right"] else "wrong" for v in said])


def _neighbours(base: Measured) -> str:
    train, distances, indices, _ = base.neighbours
    rows = distances[:, 0].argsort()[: SHOWN // 4].tolist()
    shown = []
    for row, pixels in zip(rows, base.captioned.read(rows), strict=True):
        near = zip(train.read(indices[row].tolist()), distances[row].tolist(), strict=True)
        shown += [_figure(pixels, base.captioned.texts[row]), *(_figure(p, f"{d:.3f}") for p, d in near)]
    return html.grid(shown, "near")


def _svg(figure: Any) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()[file.getvalue().index("<svg") :]
