"""The report page of a preparation, read back: its tables, its bars, its pictures."""

import base64
import io
import json
from html.parser import HTMLParser

import pytest
from PIL import Image

from ldm.data.options import PrepareConfig
from ldm.data.prepare import prepare


class Page(HTMLParser):
    """tables: heading -> rows of cells; bars: title -> label -> count; pictures: (bytes, caption, what hovering tells).

    Whatever is no tag of the page itself, such as one in a caption, fails the reading.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.bars: dict[str, dict[str, int]] = {}
        self.pictures: list[list] = []
        self._inside: list[str] = []
        self.headings: list[str] = []
        self._bars: dict[str, int] = {}
        self.feed(text)
        assert not self._inside

    def handle_starttag(self, tag, attributes) -> None:
        assert tag != "script"
        if tag not in ("meta", "html", "img"):
            self._inside.append(tag)
        if tag == "tr":
            self.tables.setdefault(self.headings[-1], []).append([])
        elif tag in ("td", "th"):
            self.tables[self.headings[-1]][-1].append("")
        elif tag in ("h1", "h2"):
            self.headings.append("")
        elif tag == "img":
            about = dict(attributes)
            self.pictures.append([base64.b64decode(about["src"].partition("base64,")[2]), "", about["title"]])

    def handle_endtag(self, tag) -> None:
        if tag != "html":
            assert self._inside.pop() == tag

    def handle_data(self, data) -> None:
        inside = self._inside[-1] if self._inside else ""
        if inside in ("h1", "h2"):
            self.headings[-1] += data
        elif inside in ("td", "th"):
            self.tables[self.headings[-1]][-1][-1] += data
        elif inside == "title" and "rect" in self._inside:
            label, _, number = data.rpartition(": ")
            self._bars[label] = int(number)
        elif inside == "figcaption" and self._bars:
            self.bars[data.rpartition(" (most: ")[0]], self._bars = self._bars, {}
        elif inside == "figcaption":
            self.pictures[-1][1] += data


@pytest.fixture
def made(tmp_path, picture) -> tuple[dict, Page]:
    """Of 44 pictures, in two sources: one broken, one without a caption, two there twice, the others of two shapes."""
    for name, count in (("one", 30), ("two", 14)):
        folder = tmp_path / name
        folder.mkdir()
        rows = [{"file_name": f"{n}.png", "text": f"thing <{n}> & co", "name": "thing"} for n in range(count)]
        for n in range(count):
            (folder / f"{n}.png").write_bytes(picture(n + (name == "two") * 28, ((32, 16), (16, 32))[n % 2]))
        if name == "one":
            (folder / "0.png").write_bytes(b"no picture")
            rows[1] |= {"text": "", "name": ""}
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"size": 16, "shard_size": 9, "duplicates": "exact", "holdout": 0.2, "resize": "buckets"}
    config = PrepareConfig(str(tmp_path / "out"), templates=("a {name}", "<script>{none}"), **options)
    report = prepare([str(tmp_path / "one"), str(tmp_path / "two")], config, lambda *n: None)
    return report, Page((tmp_path / "out/report.html").read_text("utf-8"))


def test_the_tables_say_what_was_kept_and_dropped(made):
    report, page = made
    held = report["validation"]
    assert report["samples"] + held["samples"] == 40
    assert page.headings[0] == f"{report['samples']} + {held['samples']} samples"
    sources = {row[0]: [int(cell) for cell in row[1:]] for row in page.tables["Sources"][1:]}
    assert sources == {n: [c, report["kept"][n], held["kept"][n]] for n, c in (("one", 30), ("two", 14))}
    assert sum(map(sum, (row[1:] for row in sources.values()))) == 40
    stages = {row[0]: (int(row[1]), int(row[2])) for row in page.tables["Stages"][1:]}
    assert stages == {
        "read": (44, 0), "captions": (44, 1), "open": (43, 1), "limits": (42, 0), "duplicates": (42, 2),
        "decode and fit": (40, 0), "encode": (40, 0),
    }  # fmt: skip
    dropped: dict[str, int] = {}
    for reason, count, examples in page.tables["Dropped"][1:]:
        dropped[reason] = dropped.get(reason, 0) + int(count)
        assert examples.startswith(("one: ", "two: "))
    assert dropped == {"not a PNG, JPEG or WebP image": 1, "no caption": 1, "duplicate, same bytes": 2}
    templates = {row[0]: int(row[1]) for row in page.tables["Captions by template"][1:]}
    assert templates == {"a {name}": report["samples"], "<script>{none}": 0}


def test_the_bars_and_the_pictures_are_those_of_the_shards(made, tmp_path):
    report, page = made
    assert page.bars == report["measures"]
    assert sum(page.bars["bucket"].values()) == sum(page.bars["shorter side as found, pixels"].values())
    assert len(page.bars["bucket"]) == 2
    assert len(page.pictures) == report["samples"]
    for data, caption, told in page.pictures:
        assert Image.open(io.BytesIO(data)).format == "WEBP"
        assert caption.startswith("thing <") and caption.endswith("> & co")
        assert told.startswith(("one: ", "two: ")) and told.endswith(
            (".png, 32 x 16 as found", ".png, 16 x 32 as found")
        )
