"""Pages hold what they show, and what others wrote stays text."""

import base64
import io
import re

from PIL import Image

from ldm import html


def test_text_is_escaped_wherever_it_stands() -> None:
    evil = '<script>"&'
    picture = Image.new("RGB", (2, 2))
    parts = [
        html.heading(evil),
        html.paragraph(evil),
        html.table([evil], [[evil]]),
        html.figure(picture, evil, "", evil),
    ]
    whole = html.page(evil, parts)
    assert "<script>" not in whole and whole.count("&lt;script&gt;") == 7


def test_numbers_stand_right_and_are_short() -> None:
    assert html.table(("a", "b", "c"), [("x", 3, 1 / 3)]).endswith(
        "<tr><td>x</td><td class=number>3</td><td class=number>0.3333</td></tr></table>"
    )


def test_a_picture_lies_inside() -> None:
    found = re.search(r'src="data:image/webp;base64,([^"]+)"', html.figure(Image.new("RGB", (3, 2), "red")))
    assert found and Image.open(io.BytesIO(base64.b64decode(found[1]))).size == (3, 2)
    assert "figcaption" not in html.figure(Image.new("RGB", (3, 2)))
