"""Preparing: any source -> shards that are the same whoever makes them and however often they were stopped."""

import errno
import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ldm.data.options import PrepareConfig, per_source
from ldm.data.prepare import prepare
from ldm.data.report import lines
from ldm.data.shards import Shards, read_manifest, write_shard
from ldm.errors import UserError
from ldm.files import sha256


@pytest.fixture
def photos(tmp_path, picture):
    """40 good pictures with a caption and a colour."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rows = [{"file_name": f"{n}.png", "text": f"thing {n}", "name": "thing", "colour": "red"} for n in range(40)]
    for n in range(40):
        (folder / f"{n}.png").write_bytes(picture(n))
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def run(paths, out, show=lambda done, total: None, **options):
    return prepare(
        [str(path) for path in paths], PrepareConfig(str(out), **{"size": 16, "shard_size": 7, **options}), show
    )


def samples(folder) -> dict[str, dict]:
    """id -> the columns of each sample, with its bytes and shard."""
    shards = Shards(str(folder))
    places = [(s, i) for s, count in enumerate(shards.counts) for i in range(count)]
    found = [{**shards.sample(s, i).about(), "image": shards.sample(s, i).image, "shard": s} for s, i in places]
    return {columns["id"]: columns for columns in found}


def digests(folder) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*.*"))}


def test_shards_as_img2dataset_lays_them_out(photos, tmp_path):
    report = run([photos], tmp_path / "out", templates=("a {colour} {name}", "a {shape}"))
    manifest = read_manifest(tmp_path / "out")
    assert [(e.name, e.samples) for e in manifest.values()] == [(f"{n:05d}.tar", min(7, 40 - 7 * n)) for n in range(6)]
    assert all(entry.sha256 == sha256(tmp_path / "out" / entry.name) for entry in manifest.values())
    shards = Shards(str(tmp_path / "out"))
    assert shards.keys(1) == [f"00001{n:04d}" for n in range(7)]
    about = shards.sample(1, 2).about()
    number = about["text"].split()[1]
    assert about == {
        "id": f"{number}.png",
        "key": "000010002",
        "source": "photos",
        "captions": [f"thing {number}", "thing", "a red thing"],
        "text": f"thing {number}",
        "name": "thing",
        "colour": "red",
        "original_width": 16,
        "original_height": 16,
        "crop_top": 0,
        "crop_left": 0,
        "width": 16,
        "height": 16,
    }
    assert shards.sample(1, 2).members["txt"].decode() == f"thing {number}"
    assert (report["samples"], report["kept"], report["refused"]) == (40, {"photos": 40}, {})
    assert report["templates"] == {"a {colour} {name}": 40, "a {shape}": 0}
    assert json.loads((tmp_path / "out/report.json").read_text()) == report


def test_sources_are_mixed_and_named(photos, tmp_path, assets):
    run([photos, assets], tmp_path / "out", shard_size=25)
    found = samples(tmp_path / "out")
    assert {c["source"] for c in found.values()} == {"photos", "fluent_emoji", "twemoji", "renders"}
    for shard in range(4):
        assert len({c["source"] for c in found.values() if c["shard"] == shard}) > 2


def test_what_is_refused_is_counted_and_named(photos, tmp_path, picture):
    (photos / "0.png").write_bytes(b"no picture")
    (photos / "1.png").write_bytes(picture(1)[:-80])
    (photos / "2.png").write_bytes(picture(2, (10, 41)))
    (photos / "3.png").unlink()
    rows = [json.loads(line) for line in (photos / "metadata.jsonl").read_text().splitlines()]
    rows[4] |= {"text": " ", "name": ""}
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = run([photos], tmp_path / "out")
    assert {reason: about["count"] for reason, about in report["refused"].items()} == {
        "not a PNG, JPEG or WebP image": 1,
        "broken image": 1,
        "longer than 4:1": 1,
        "cannot read": 1,
        "no caption": 1,
    }
    assert report["refused"]["no caption"]["examples"] == ["photos: 4.png: no caption"]
    assert {name: (stage["seen"], stage["dropped"]) for name, stage in report["stages"].items()} == {
        "read": (40, 1),
        "captions": (39, 1),
        "open": (38, 1),
        "limits": (37, 1),
        "decode and fit": (36, 1),
        "encode": (35, 0),
    }
    assert report["samples"] == len(samples(tmp_path / "out")) == 35


def test_a_template_captions_what_has_none(tmp_path, picture):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(picture(0))
    with pytest.raises(UserError, match="none of the 1 pictures can be used"):
        run([tmp_path / "in"], tmp_path / "bad")
    run([tmp_path / "in"], tmp_path / "out", templates=("a photo of a dog",))
    assert samples(tmp_path / "out")["a.png"]["captions"] == ["a photo of a dog"]


def test_captions_are_limited_by_source(photos, tmp_path, assets):
    run([photos, assets], tmp_path / "out", max_captions={"": 2, "photos": 1}, templates=("photos:{colour} {name}",))
    for columns in samples(tmp_path / "out").values():
        if columns["source"] == "photos":
            assert columns["captions"] == [columns["text"], "red thing"]
        else:
            assert len(columns["captions"]) == 2
    assert per_source(["3", "photos:1"]) == {"": 3, "photos": 1}


def test_the_holdout_is_a_share_and_stays(photos, tmp_path, assets):
    report = run([photos, assets], tmp_path / "out", holdout=0.2)
    train, val = samples(tmp_path / "out"), samples(tmp_path / "out/val")
    assert not train.keys() & val.keys()
    assert (len(train) + len(val), report["validation"]["samples"]) == (100, len(val))
    assert 8 <= len(val) <= 32
    run([photos], tmp_path / "alone", holdout=0.2, size=8)
    assert samples(tmp_path / "alone/val").keys() == {id for id in val if val[id]["source"] == "photos"}


def test_sources_can_be_limited(photos, tmp_path, assets):
    report = run([photos, assets], tmp_path / "out", limit_per_source=12)
    assert report["samples"] == 24
    assert report["kept"]["photos"] == 12
    assert report["offered"]["photos"] == 40


def test_pictures_can_be_chosen_by_their_captions(photos, tmp_path, assets):
    report = run([assets], tmp_path / "out", match=r"\ba 3d render\b")
    assert 0 < report["samples"] < 60
    assert all(any("a 3d render" in text for text in about["captions"]) for about in samples(tmp_path / "out").values())
    assert [about["count"] for about in report["refused"].values()] == [60 - report["samples"]]


def test_processes_change_nothing(photos, tmp_path, assets):
    seen: list[tuple[int, int]] = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        run([photos, assets], out, lambda *n: seen.append(n), workers=workers, holdout=0.1, shard_size=20)
        assert seen[-1] == (100, 100)
    one, two = digests(tmp_path / "1"), digests(tmp_path / "2")
    assert one == two
    assert "00004.tar" in one and "val/00000.tar" in one


@pytest.fixture
def table(tmp_path, picture):
    """A parquet file of 30 pictures in 6 row groups: six are there twice, six look like others."""
    flat = [picture(n, (40, 40), "JPEG") for n in range(18)]
    images = [*flat, *flat[3:9], *(picture(n, (40, 40)) for n in range(6))]
    rows = [{"id": f"p{n}", "image": image, "text": f"thing {n}"} for n, image in enumerate(images)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "table.parquet", row_group_size=5)
    return tmp_path / "table.parquet"


def test_what_was_read_before_is_never_taken_for_what_is_there(tmp_path, picture):
    """Prepared again in one process, to the same folder and out of a file of the same name."""
    for rows in (range(6), range(10, 30)):
        table = pa.Table.from_pylist([{"id": f"p{n}", "image": picture(n), "text": f"thing {n}"} for n in rows])
        pq.write_table(table, tmp_path / "x.parquet", row_group_size=len(rows) // 3)
        run([tmp_path / "x.parquet"], tmp_path / "out")
        found = samples(tmp_path / "out")
        assert {id: columns["image"] for id, columns in found.items()} == {f"p{n}": picture(n) for n in rows}
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("duplicates, left", [("keep", 70), ("exact", 64), ("near", 58)])
def test_duplicates_go_whoever_looks_for_them(photos, table, tmp_path, duplicates, left):
    options = {"duplicates": duplicates, "holdout": 0.2, "shard_size": 9}
    reports = [run([table, photos], tmp_path / str(n), workers=n, **options) for n in (1, 2)]
    assert digests(tmp_path / "1") == digests(tmp_path / "2")
    for report in reports:
        assert report["samples"] + report["validation"]["samples"] == left
    both = samples(tmp_path / "1") | samples(tmp_path / "1/val")
    gone = {f"p{n}" for n in range(30)} - both.keys()
    assert gone == {
        f"p{n}" for n in [*range(18, 24), *range(24, 30)] if n < {"keep": 18, "exact": 24}.get(duplicates, 30)
    }
    kinds = {"keep": set(), "exact": {"same bytes"}, "near": {"same bytes", "looks alike"}}[duplicates]
    assert {k for part in (report, report["validation"]) for k in part["refused"]} == {f"duplicate, {k}" for k in kinds}
    if duplicates == "exact":
        examples = report["refused"]["duplicate, same bytes"]["examples"]
        pairs = [re.fullmatch(r"table: p(\d+): duplicate, same bytes: as p(\d+)", text).groups() for text in examples]
        assert pairs and {int(second) - int(first) for second, first in pairs} == {15}


def test_a_duplicate_stays_where_its_twin_is_dropped(tmp_path, picture):
    rows = [{"id": f"{n}", "image": picture(0, (40, 40)), "text": text} for n, text in enumerate(["", "a cat"])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    for kind in ("exact", "near"):
        run([tmp_path / "x.parquet"], tmp_path / kind, duplicates=kind)
        assert samples(tmp_path / kind).keys() == {"1"}


def test_the_order_of_sources_is_kept_if_asked_for(photos, table, tmp_path):
    run([table, photos], tmp_path / "out", order="source", shard_size=25, duplicates="exact")
    found = samples(tmp_path / "out")
    assert list(found) == [
        *(f"p{n}" for n in range(30) if n not in range(18, 24)),
        *(f"{n}.png" for n in range(40)),
    ]
    assert not (tmp_path / "out/work").exists()


def test_buckets_lie_in_the_shard_as_its_manifest_says(tmp_path, picture, photos):
    folder = tmp_path / "shapes"
    folder.mkdir()
    sizes = [(64, 64), (40, 80), (80, 40), (50, 100), (64, 60)]  # height, width
    for n in range(20):
        (folder / f"{n}.png").write_bytes(picture(n, sizes[n % 5]))
        (folder / f"{n}.txt").write_text(f"thing {n}")
    report = run([folder], tmp_path / "out", size=32, resize="buckets", shard_size=10, max_aspect=2.0)
    shards = Shards(str(tmp_path / "out"))
    for shard, entry in enumerate(read_manifest(tmp_path / "out").values()):
        named = [name for name, number in entry.buckets.items() for _ in range(number)]
        about = [shards.sample(shard, i).about() for i in range(10)]
        assert [columns["bucket"] for columns in about] == named == [f"{c['width']}x{c['height']}" for c in about]
        for i, columns in enumerate(about):
            with Image.open(io.BytesIO(shards.sample(shard, i).image)) as image:
                assert image.size == (columns["width"], columns["height"])
            assert (columns["original_height"], columns["original_width"]) == sizes[
                int(columns["id"].split(".")[0]) % 5
            ]
    assert report["measures"]["bucket"] == {"24x40": 4, "32x32": 8, "40x24": 8}
    assert "16 at a batch of 16" not in (text := list(lines(report))[-2]) and text.startswith("3 buckets; ")


def test_a_full_disk_is_one_line(photos, tmp_path, monkeypatch):
    real = Path.replace

    def full(self, target):
        if Path(target).name == "00002.tar":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match="cannot write to .*No space left on device.*make room and run again"):
        run([photos], tmp_path / "out")
    monkeypatch.undo()
    run([photos], tmp_path / "out")
    run([photos], tmp_path / "whole")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_an_out_that_cannot_be_written_is_one_line(photos, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot write to .*Not a directory"):
        run([photos], tmp_path / "file/out")


@pytest.mark.parametrize("stop", [1, 10, 39])
def test_stopped_and_run_again_it_goes_on(photos, tmp_path, stop):
    def interrupt(done: int, total: int) -> None:
        if done == stop:
            raise KeyboardInterrupt

    run([photos], tmp_path / "whole")
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run([photos], out, interrupt)
    (out / "work").mkdir(exist_ok=True)
    for name in ("00005.tar.tmp", "work/.prints-000000.npz.1f.tmp"):
        (out / name).write_bytes(b"left by a killed process")
    shards = {path.name: path.stat().st_ino for path in out.glob("*.tar")}
    assert len(shards) == (stop - 1) // 7
    seen: list[tuple[int, int]] = []
    run([photos], out, lambda *n: seen.append(n))
    assert seen[0] == (7 * len(shards), 40)
    assert {name: (out / name).stat().st_ino for name in shards} == shards
    assert digests(out) == digests(tmp_path / "whole")


@pytest.mark.parametrize("stop", range(5, 90, 13))
def test_stopped_in_any_pass_it_goes_on(table, tmp_path, stop):
    """Ninety steps: thirty rows copied, thirty compared, thirty written."""

    def interrupt(done: int, total: int) -> None:
        assert total == 90
        if done == stop:
            raise KeyboardInterrupt

    out, options = tmp_path / "out", {"duplicates": "near", "shard_size": 6}
    with pytest.raises(KeyboardInterrupt):
        run([table], out, interrupt, **options)
    run([table], out, **options)
    run([table], tmp_path / "whole", **options)
    assert digests(out) == digests(tmp_path / "whole")


def test_a_finished_shard_that_was_damaged_is_made_again(photos, tmp_path):
    run([photos], tmp_path / "out")
    before = digests(tmp_path / "out")
    for name in ("00002.tar", "00003.idx"):
        data = bytearray((tmp_path / "out" / name).read_bytes())
        data[100] ^= 1
        (tmp_path / "out" / name).write_bytes(data)
        run([photos], tmp_path / "out")
        assert digests(tmp_path / "out") == before


def test_another_preparation_is_not_overwritten(photos, tmp_path):
    run([photos], tmp_path / "out")
    before = digests(tmp_path / "out")
    for options in ({"quality": 50}, {"holdout": 0.1}, {"templates": ("{name}",)}):
        with pytest.raises(UserError, match="holds shards of other sources or options"):
            run([photos], tmp_path / "out", **options)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/x.tar").write_bytes(b"")
    with pytest.raises(UserError, match="holds shards of other sources or options"):
        run([photos], tmp_path / "foreign")
    assert digests(tmp_path / "out") == before


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": 4}, "size 4 cannot be: give 8 or more"),
        ({"bucket_step": 17}, "bucket step 17 cannot be: give 1 to the size"),
        ({"resize": "buckets", "bucket_step": 15, "max_aspect": 1.0}, "no bucket of about 16 x 16 pixels"),
        ({"max_megapixels": 179.0}, "max megapixels 179.0 cannot be"),
        ({"min_size": -1}, "min size -1 cannot be"),
        ({"max_aspect": 0.5}, "max aspect 0.5 cannot be"),
        ({"near_distance": 17}, "near distance 17 cannot be"),
        ({"shard_size": 0}, "shard size 0 cannot be: give 1 to 10000"),
        ({"shard_size": 10_001}, "shard size 10001 cannot be"),
        ({"holdout": 1.0}, "holdout 1.0 cannot be"),
        ({"quality": 0}, "quality 0 cannot be"),
        ({"min_caption": 0}, "min caption 0 cannot be"),
        ({"min_caption": 9, "max_caption": 8}, "max caption 8 cannot be"),
        ({"timeout": 0.0}, "timeout 0.0 cannot be"),
        ({"retries": -1}, "retries -1 cannot be"),
        ({"max_bytes": 0}, "max bytes 0 cannot be"),
        ({"per_host": 0}, "per host 0 cannot be"),
        ({"formats": ("JPG",)}, r"no format is called 'JPG' \(did you mean 'JPEG'"),
        ({"background": "wite"}, "background 'wite' is no colour"),
        ({"max_captions": {"foto": 2}}, r"no source is called 'foto' \(did you mean 'photos'"),
        ({"templates": ("a {",)}, "cannot be read"),
        ({"limit_per_source": 0}, "limit per source 0"),
        ({"match": "["}, "is not a regular expression"),
        ({"match_id": "("}, "is not a regular expression"),
    ],
)
def test_options_that_cannot_work_are_refused(photos, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        run([photos], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["000000012", "é" * 40, "folder/" + "long" * 22])
def test_shards_are_what_tarfile_writes(tmp_path, name):
    samples = [(f"{name}{n}", {"png": bytes(n), "txt": b"x" * 600}) for n in (0, 1, 511, 512, 513, 30_000)]
    write_shard(tmp_path / "x.tar", samples)
    with tarfile.open(tmp_path / "y.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    assert (tmp_path / "x.tar").read_bytes() == (tmp_path / "y.tar").read_bytes()


def test_pictures_are_chosen_by_their_ids(photos, tmp_path):
    report = run([photos], tmp_path / "out", match_id=r"^1\d\.png$")
    assert samples(tmp_path / "out").keys() == {f"1{n}.png" for n in range(10)}
    assert report["refused"]["no id that matches"]["count"] == 30
