"""An evaluation as one JSON file and one HTML page that needs nothing beside it."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from ldm import config
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
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h2 { margin-top: 2.5rem } td, th { padding: .15rem .9rem .15rem 0; text-align: left } td.n { text-align: right }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); gap: 10px }
figure { margin: 0 } img { width: 100%; display: block; border: 3px solid transparent; box-sizing: border-box }
figcaption { font-size: 11px; line-height: 1.25; color: #555 }
.right img { border-color: #2a9d4e } .wrong img { border-color: #d0453b }
.near { grid-template-columns: 130px repeat(4, 112px) } .note { color: #a04000 } svg { max-width: 100%; height: auto }
"""
SHOWN = 48


def write(folder: Path, suite: Suite, base: Measured, sweeps: Mapping[str, Mapping[float, Measured]]) -> dict[str, Any]:
    """Write `evaluation.json` and `evaluation.html`; returns what the JSON holds. Nothing in it tells the time."""
    painter = suite.painter if suite.plan.model and "painter" in vars(suite) else None
    result: dict[str, Any] = {
        "model": painter.made.model if painter else suite.plan.model,
        "model_hash": painter.made.model_hash if painter else "",
        "plan": config.to_dict(suite.plan),
        "settings": dict(base.settings),
        "metrics": {name: asdict(estimate) for name, estimate in base.metrics.items()},
        "sweeps": {
            axis: [{axis: value} | {n: asdict(e) for n, e in one.metrics.items()} for value, one in points.items()]
            for axis, points in sweeps.items()
        },
        "judge": dict(suite.judge.spec.accuracy) if "judge" in suite.plan.metrics else {},
        "verdicts": [
            {"prompt": text, "name": name, "colour": colour, "right": all(right)}
            for text, (name, colour), right in zip(base.prompted.texts, base.verdicts, base.right, strict=True)
        ]
        if "judge" in suite.plan.metrics
        else [],
        "notes": list(dict.fromkeys(suite.notes)),
        "versions": versions(),
    }
    write_json(folder / "evaluation.json", result)
    with replacing(folder / "evaluation.html") as temporary:
        temporary.write_text(page(result, base, sweeps), encoding="utf-8")
    return result


def page(result: Mapping[str, Any], base: Measured, sweeps: Mapping[str, Mapping[float, Measured]]) -> str:
    """The HTML page."""
    what = html.escape(str(result["model"] or result["plan"]["images"]))
    parts = [f"<h1>{what}</h1><p>{_made(result)}</p>{_table(result)}"]
    parts += [f'<p class="note">{html.escape(note)}</p>' for note in result["notes"]]
    for axis, points in sweeps.items():
        figures = {name: [one.metrics[name] for one in points.values()] for name in base.metrics}
        drawn = {ABOUT.get(name, (_plain(name), ""))[0]: values for name, values in figures.items()}
        parts.append(f"<h2>Over {html.escape(axis)}</h2>{_svg(curves(axis, list(points), drawn))}")
    used = vars(base)
    if "prompted" in used:
        parts.append("<h2>What was asked, and what came</h2>" + _prompted(base))
    if "captioned" in used:
        rows = range(min(SHOWN, len(base.captioned.texts)))
        parts.append("<h2>Of the data's captions</h2>" + _grid(base.captioned, rows, base.captioned.texts))
    if "real" in vars(base.suite):
        real = base.suite.real
        parts.append("<h2>The data</h2>" + _grid(real, range(min(SHOWN // 2, len(real.texts))), real.texts))
    if "reconstructed" in vars(base.suite):
        again = base.suite.reconstructed[0]
        parts.append(
            "<h2>The data after the autoencoder</h2>"
            + _grid(again, range(min(SHOWN // 2, len(again.texts))), again.texts)
        )
    if "neighbours" in used:
        parts.append("<h2>The nearest training pictures, of those that are nearest</h2>" + _neighbours(base))
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>{what}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en">{head}{body}</html>\n'


def _made(result: Mapping[str, Any]) -> str:
    plan = result["plan"]
    said = {"model": result["model_hash"][:10], "data": plan["data"], "seed": plan["seed"], **result["settings"]}
    return html.escape(", ".join(f"{name} {value}" for name, value in said.items() if value != ""))


def _plain(name: str) -> str:
    what, _, group = name.rpartition("_")
    return f"{what} of {group} prompts" if what else name


def _table(result: Mapping[str, Any]) -> str:
    rows = []
    for name, one in result["metrics"].items():
        text, better = ABOUT.get(name, (_plain(name), "more"))
        interval = f"{one['low']:.4g} to {one['high']:.4g}"
        hint = f"{better} is better" if better else ""
        cells = f'<td class="n"><b>{one["value"]:.4g}</b><td>{interval}<td class="n">{one["n"]}<td>{hint}'
        rows.append(f"<tr><td>{html.escape(text)}{cells}")
    table = f"<table><tr><th><th>value<th>95 % interval<th>n<th>{''.join(rows)}</table>"
    judge = result["judge"]
    if not judge:
        return table
    names, colours = (f"{judge[what]:.0%} of {judge[what + 's']:.0f}" for what in ("name", "colour"))
    return f"{table}<p>The judge itself names {names} held-back pictures rightly, and the colour of {colours}.</p>"


def _picture(pixels: Any, caption: str = "", kind: str = "") -> str:
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "webp", quality=90)
    data = base64.b64encode(file.getvalue()).decode()
    said = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="{kind}"><img alt="" src="data:image/webp;base64,{data}">{said}</figure>'


def _grid(pictures: Pictures, rows: Sequence[int], captions: Sequence[str], kinds: Sequence[str] = ()) -> str:
    shown = [
        _picture(pixels, captions[row], kinds[row] if kinds else "")
        for row, pixels in zip(rows, pictures.read(rows) if len(rows) else [], strict=True)
    ]
    return f'<div class="grid">{"".join(shown)}</div>'


def _prompted(base: Measured) -> str:
    texts, rows = base.prompted.texts, range(min(len(base.prompted.texts), 400))
    if "verdicts" not in vars(base):
        return _grid(base.prompted, rows, texts)
    captions = [
        text if all(right) else f"{text} → {colour} {name}"
        for text, (name, colour), right in zip(texts, base.verdicts, base.right, strict=True)
    ]
    return _grid(base.prompted, rows, captions, ["right" if all(right) else "wrong" for right in base.right])


def _neighbours(base: Measured) -> str:
    train, distances, indices, _ = base.neighbours
    rows = distances[:, 0].argsort()[: SHOWN // 4].tolist()
    shown = []
    for row, pixels in zip(rows, base.captioned.read(rows), strict=True):
        near = zip(train.read(indices[row].tolist()), distances[row].tolist(), strict=True)
        shown += [_picture(pixels, base.captioned.texts[row]), *(_picture(p, f"{d:.3f}") for p, d in near)]
    return f'<div class="grid near">{"".join(shown)}</div>'


def _svg(figure: Any) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()[file.getvalue().index("<svg") :]
