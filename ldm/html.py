"""HTML pages that need no other file: text is escaped, and pictures lie inside."""

import base64
import html
import io
from collections.abc import Iterable, Sequence

from PIL import Image

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:72em;padding:0 1em;color:#222}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}
table{border-collapse:collapse}td,th{padding:.15em .8em;text-align:left;border-bottom:1px solid #ddd}
td.number{text-align:right}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(112px,1fr));gap:.7em}
.plots{display:flex;flex-wrap:wrap;gap:1.5em}figure{margin:0}figcaption{font-size:.85em;color:#555}
.grid figcaption{font-size:.72em;line-height:1.25;overflow-wrap:anywhere}
.grid img{max-width:100%;border:1px solid #eee}
"""


def page(title: str, parts: Iterable[str], style: str = "") -> str:
    """A whole page of parts that are HTML."""
    head = f"<meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}{style}</style>"
    return f"<!doctype html><html lang=en>{head}" + "\n".join(parts) + "</html>\n"


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{html.escape(text)}</h{level}>"


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{html.escape(text)}</p>' if text else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str | float]]) -> str:
    """Numbers stand to the right, rounded to four digits where they are no whole ones."""

    def cell(value: str | float) -> str:
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        return f"<td{'' if isinstance(value, str) else ' class=number'}>{html.escape(text)}</td>"

    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{html.escape(name)}</th>' for name in head)}</tr>{body}</table>"


def figure(picture: Image.Image, caption: str = "", kind: str = "", title: str = "") -> str:
    """A picture and what stands below it; title: what is shown where the pointer rests on it."""
    file = io.BytesIO()
    picture.save(file, "webp", quality=90)
    source = f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
    said = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="{kind}"><img alt="" src="{source}" title="{html.escape(title)}">{said}</figure>'


def grid(figures: Iterable[str], kind: str = "") -> str:
    return f'<div class="grid {kind}">{"".join(figures)}</div>'
