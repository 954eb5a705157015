"""Preparing: any source -> shards that are the same whoever makes them and however often they were stopped."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from ldm.data.prepare import PrepareConfig, fit, per_source, prepare
from ldm.data.shards import Shards, read_manifest
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
    found = [{**shards.describe(s, i), "image": shards.image(s, i), "shard": s} for s, i in places]
    return {columns["id"]: columns for columns in found}


def digests(folder) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*.*"))}


def test_shards_as_img2dataset_lays_them_out(photos, tmp_path):
    report = run([photos], tmp_path / "out", templates=("a {colour} {name}", "a {shape}"))
    manifest = read_manifest(tmp_path / "out")
    assert [(e.name, e.samples) for e in manifest.values()] == [(f"{n:05d}.tar", min(7, 40 - 7 * n)) for n in range(6)]
    assert all(entry.sha256 == sha256(tmp_path / "out" / entry.name) for entry in manifest.values())
    shards = Shards(str(tmp_path / "out"))
    assert [s.key for s in shards.samples(1)] == [f"00001{n:04d}" for n in range(7)]
    about = shards.describe(1, 2)
    number = about["text"].split()[1]
    assert about == {
        "id": f"{number}.png",
        "key": "000010002",
        "source": "photos",
        "captions": [f"thing {number}", "thing", "a red thing"],
        "text": f"thing {number}",
        "name": "thing",
        "colour": "red",
        "width": 16,
        "height": 16,
    }
    assert shards.read(1, 2, "txt").decode() == f"thing {number}"
    assert (report["samples"], report["kept"], report["refused"]) == (40, {"photos": 40}, {})
    assert report["templates"] == {"a {colour} {name}": 40, "a {shape}": 0}
    assert json.loads((tmp_path / "out/report.json").read_text()) == report


def test_sources_are_mixed_and_named(photos, tmp_path, assets):
    run([photos, assets], tmp_path / "out", shard_size=25)
    found = samples(tmp_path / "out")
    assert {c["source"] for c in found.values()} == {"photos", "fluent_emoji", "twemoji", "renders"}
    for shard in range(4):
        assert len({c["source"] for c in found.values() if c["shard"] == shard}) > 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_bytes_that_fit_are_passed_through(picture, kind):
    data = picture(0, (16, 20), kind)
    config = PrepareConfig("", 16)
    assert fit(data, config) == ({"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}[kind], data, (20, 16))
    suffix, forced, _ = fit(data, dataclasses.replace(config, format="webp", quality=80))
    assert (suffix, forced != data) == ("webp", True)


def test_others_are_resized_to_the_shorter_side(picture):
    for form, kind in (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), (None, "WEBP")):
        suffix, data, size = fit(picture(0, (50, 80)), PrepareConfig("", 20, format=form))
        image = Image.open(io.BytesIO(data))
        assert (suffix, image.format, image.size, size) == (form or "webp", kind, (32, 20), (32, 20))
    assert fit(picture(0, (10, 10)), PrepareConfig("", 20))[2] == (20, 20)


def test_quality_is_a_choice(picture):
    low, high = (len(fit(picture(0, (64, 64)), PrepareConfig("", 32, quality=q))[1]) for q in (20, 95))
    assert low < high / 2


def test_alpha_and_turned_pictures_are_written_anew(encoded):
    clear = encoded(Image.new("RGBA", (16, 16), (0, 0, 0, 0)))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(Image.new("RGB", (20, 16)), "JPEG", exif=exif)
    for data, size in ((clear, (16, 16)), (turned, (16, 20))):
        suffix, written, found = fit(data, PrepareConfig("", 16))
        assert (suffix, written != data, found) == ("webp", True, size)
    assert np.asarray(Image.open(io.BytesIO(fit(clear, PrepareConfig("", 16))[1]))).min() == 255


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
        "longer than 4": 1,
        "cannot read": 1,
        "no caption": 1,
    }
    assert report["refused"]["no caption"]["examples"] == ["photos: 4.png: no caption"]
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


@pytest.mark.parametrize("stop", [1, 10, 39])
def test_stopped_and_run_again_it_goes_on(photos, tmp_path, stop):
    def interrupt(done: int, total: int) -> None:
        if done == stop:
            raise KeyboardInterrupt

    run([photos], tmp_path / "whole")
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run([photos], out, interrupt)
    (out / "00005.tar.tmp").write_bytes(b"left by a killed process")
    shards = {path.name: path.stat().st_ino for path in out.glob("*.tar")}
    assert len(shards) == (stop - 1) // 7
    seen: list[tuple[int, int]] = []
    run([photos], out, lambda *n: seen.append(n))
    assert seen[0] == (7 * len(shards), 40)
    assert {name: (out / name).stat().st_ino for name in shards} == shards
    assert digests(out) == {**digests(tmp_path / "whole"), "plan.json": digests(out)["plan.json"]}


def test_a_finished_shard_that_was_damaged_is_made_again(photos, tmp_path):
    run([photos], tmp_path / "out")
    before = digests(tmp_path / "out")
    data = bytearray((tmp_path / "out/00002.tar").read_bytes())
    data[700] ^= 1
    (tmp_path / "out/00002.tar").write_bytes(data)
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
        ({"size": 4}, "size 4 is too small"),
        ({"shard_size": 0}, "a shard of 0 samples"),
        ({"shard_size": 10_001}, "a shard of 10001 samples"),
        ({"holdout": 1.0}, "holdout 1.0 is not a share"),
        ({"quality": 0}, "quality 0 is out of range"),
        ({"max_captions": {"foto": 2}}, r"no source is called 'foto' \(did you mean 'photos'"),
        ({"templates": ("a {",)}, "cannot be read"),
        ({"limit_per_source": 0}, "limit 0"),
        ({"match": "["}, "is not a regular expression"),
    ],
)
def test_options_that_cannot_work_are_refused(photos, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        run([photos], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_max_captions_must_be_numbers():
    with pytest.raises(UserError, match="'photos:many' is not a number"):
        per_source(["photos:many"])
