"""Shards and manifests: names, deterministic bytes, random access, and every way they can be damaged."""

import dataclasses
import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset

from ldm.data.shards import Damaged, Shards, expand, read_manifest, write_manifest, write_shard
from ldm.data.tars import scan
from ldm.errors import UserError


def test_names_expand(folder):
    one, two, three = (folder / f"{s:05d}.tar" for s in range(3))
    assert expand(f"{folder}/{{00000..00001}}.tar::{three}") == [one, two, three]
    assert expand(f"{one}::{one}") == [one, one]
    assert expand(str(folder)) == [one, two, three]
    (folder / "manifest.json").unlink()
    assert expand(str(folder)) == [one, two, three]


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("", "no shards match ''"),
        ("{folder}/{{00000..00003}}.tar", r"00003.tar' is not there \(1 of 4 missing\)"),
        ("{folder}/{{0..", "unbalanced braces"),
        ("pipe:cat {folder}/00000.tar", "commands are never run"),
        ("s3://bucket/00000.tar", "are not local files"),
        ("{folder}/empty", "no shards match"),
    ],
)
def test_names_that_match_nothing_are_refused(folder, pattern, message):
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        Shards(pattern.format(folder=folder))


def test_the_same_samples_give_the_same_bytes(folder, tmp_path, sample):
    again = write_shard(tmp_path / "again.tar", map(sample, range(5)))
    assert again.sha256 == read_manifest(folder)["00000.tar"].sha256
    assert (again.samples, again.bytes) == (5, (tmp_path / "again.tar").stat().st_size)


def test_a_shard_that_fails_leaves_nothing(tmp_path, sample):
    def samples():
        yield sample(0)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "x.tar", samples())
    assert not list(tmp_path.iterdir())


def test_webdataset_reads_what_is_written(folder, picture):
    found = list(webdataset.WebDataset(str(folder / "00001.tar"), shardshuffle=False))
    assert [row["__key__"] for row in found] == [f"{n:09d}" for n in range(10, 16)]
    assert found[2]["png"] == picture(12)


def test_random_access(folder, picture):
    shards = Shards(f"{folder}/{{00000..00002}}.tar")
    assert shards.counts == [5, 6, 7]
    assert shards.sample(2, 4).image == picture(24)
    assert shards.sample(1, 3).about()["captions"] == ["thing 13", "a thing 13"]
    assert pickle.loads(pickle.dumps(shards)).sample(0, 1).image == picture(1)  # as a worker process gets it


def test_without_a_manifest_the_samples_are_counted(folder):
    (folder / "manifest.json").unlink()
    assert Shards(str(folder)).counts == [5, 6, 7]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_other_tools(tmp_path, kind):
    """Folders, long names, members that are not ours: only the allowed ones are seen."""
    long = "x" * 120
    with tarfile.open(tmp_path / "a.tar", "w", format=kind) as tar:
        folder = tarfile.TarInfo("pictures")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        members = {"pictures/a.b.png": b"1", "pictures/a.pyd": b"2", "pictures/a.TXT": b"one"}
        members |= {"b.png": b"4", f"{long}.jpg": b"3"}
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert scan(tmp_path / "a.tar")[0] == ["pictures/a", "b", long]
    shards = Shards(str(tmp_path / "a.tar"))
    assert [sorted(shards.sample(0, i).members) for i in range(3)] == [["txt"], ["png"], ["jpg"]]
    assert shards.sample(0, 2).image == b"3"
    assert Shards(str(tmp_path / "a.tar")).sample(0, 0).about()["captions"] == ["one"]


def test_a_caption_column_of_text_is_one_caption(tmp_path):
    write_shard(tmp_path / "a.tar", [("0", {"png": b"", "json": b'{"captions": "a cat"}'})])
    assert Shards(str(tmp_path / "a.tar")).sample(0, 0).about()["captions"] == ["a cat"]


@pytest.mark.parametrize("manifest", [True, False])
def test_a_shard_cut_short_anywhere_is_seen(folder, manifest):
    path = folder / "00001.tar"
    whole = path.read_bytes()
    used = 512 * (len(whole.rstrip(b"\0")) // 512 + 1)
    if not manifest:
        (folder / "manifest.json").unlink()
    for length in range(0, used + 1, 512):
        path.write_bytes(whole[:length])
        with pytest.raises(Damaged, match=r"00001.tar' (is cut short at|has \d+) byte"):
            Shards(str(path))


def test_what_is_not_a_tar_is_refused(folder):
    (folder / "x.tar").write_bytes(b"not a tar" * 200)
    with pytest.raises(Damaged, match="not a tar file at byte 0"):
        Shards(str(folder / "x.tar"))


def test_a_manifest_of_other_shards_is_seen(folder):
    path, manifest = folder / "00001.tar", read_manifest(folder)
    entry = write_shard(path, [("0", {"txt": b"x"})])
    for wrong, message in (
        (dataclasses.replace(entry, sha256="0" * 64, index=""), "is not what its manifest says"),
        (dataclasses.replace(entry, samples=6), "holds 1 samples, its manifest says 6"),
    ):
        write_manifest(folder, list((manifest | {path.name: wrong}).values()))
        with pytest.raises(Damaged, match=message):
            Shards(str(path)).sample(0, 0)


@pytest.mark.parametrize("text", ["[]", "{", '{"shards": [{"name": "x"}]}'])
def test_a_broken_manifest_is_refused(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="is not a manifest of shards"):
        Shards(str(folder))


@pytest.mark.parametrize(
    "members, message",
    [
        ({"txt": b"x"}, "sample '7' of shard .*a.tar' has no .webp"),
        ({"png": b"x"}, "sample '7' of shard .*a.tar' has no .txt"),
        ({"png": b"x", "json": b"{"}, "sample '7' of shard .*a.tar' has a broken .json"),
        ({"png": b"x", "json": b"[]"}, "sample '7' of shard .*a.tar' has a broken .json"),
        ({"png": b"x", "txt": b"\xff"}, "sample '7' of shard .*a.tar' has a broken .txt"),
    ],
)
def test_damaged_samples_are_named(tmp_path, members, message):
    write_shard(tmp_path / "a.tar", [("7", members)])
    shards = Shards(str(tmp_path / "a.tar"))
    with pytest.raises(Damaged, match=message):
        assert shards.sample(0, 0).image
        shards.sample(0, 0).about()


def test_empty_shards_are_refused(tmp_path):
    write_shard(tmp_path / "a.tar", [])
    with pytest.raises(UserError, match="hold no samples"):
        Shards(str(tmp_path / "a.tar"))


@pytest.fixture
def small(tmp_path, sample) -> tuple[Path, Callable[[], list[dict[str, bytes]]]]:
    """A shard of three samples with its manifest, and what it now gives: samples, or None for damaged ones."""
    path = tmp_path / "small.tar"
    write_manifest(tmp_path, [write_shard(path, map(sample, range(3)))])

    def given() -> list[dict[str, bytes] | None]:
        shards, found = Shards(str(path), tolerate=1), []
        for index in range(3):
            try:
                found.append(dict(shards.sample(0, index).members))
            except Damaged as error:
                assert str(path) in str(error)
                found.append(None)
        return found

    return path, given


@pytest.mark.parametrize("indexed", [True, False])
def test_cut_anywhere_no_altered_sample_is_given(small, sample, indexed):
    path, given = small
    whole, good = path.read_bytes(), [sample(n)[1] for n in range(3)]
    if not indexed:
        path.with_suffix(".idx").unlink()
    assert given() == good
    for length in range(0, len(whole), 512):
        path.write_bytes(whole[:length])
        with pytest.raises(Damaged, match="its manifest says"):
            Shards(str(path))
        found = given()
        assert all(one in (None, right) for one, right in zip(found, good, strict=True))
        ends = [whole.index(members["json"]) + len(members["json"]) for members in good]
        assert [one is not None for one in found] == [indexed and length >= end for end in ends]


@pytest.mark.parametrize("indexed", [True, False])
def test_a_thousand_flipped_bits_alter_no_sample(small, sample, indexed):
    path, given = small
    whole, good = path.read_bytes(), [sample(n)[1] for n in range(3)]
    if not indexed:
        path.with_suffix(".idx").unlink()
    rng, lost = np.random.default_rng(0), 0
    for bit in rng.integers(0, 8 * len(whole), 1000 if indexed else 250).tolist():
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        found = given()
        assert all(one in (None, right) for one, right in zip(found, good, strict=True))
        assert found.count(None) <= (1 if indexed else 3)
        lost += found.count(None)
    assert lost > (200 if indexed else 740)


def test_a_flipped_index_or_manifest_alters_no_sample(small, sample, tmp_path):
    good = [sample(n)[1] for n in range(3)]
    for path in (small[0].with_suffix(".idx"), tmp_path / "manifest.json"):
        whole = path.read_bytes()
        for bit in np.random.default_rng(1).integers(0, 8 * len(whole), 60).tolist():
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            try:
                found = small[1]()
            except UserError:
                continue  # refused as a whole
            assert all(one in (None, right) for one, right in zip(found, good, strict=True))
        path.write_bytes(whole)


def test_runs_of_one_size(tmp_path, sample):
    entries = [write_shard(tmp_path / f"{s}.tar", map(sample, range(5))) for s in range(2)]
    sizes = [{"32x16": 2, "16x16": 3}, {"16x16": 5}]
    write_manifest(tmp_path, [dataclasses.replace(e, buckets=b) for e, b in zip(entries, sizes, strict=True)])
    runs = [(0, "32x16", 0, 2), (0, "16x16", 2, 3), (1, "16x16", 5, 5)]
    assert [tuple(run) for run in Shards(str(tmp_path)).runs()] == runs
    write_manifest(tmp_path, entries)
    with pytest.raises(UserError, match="was made without buckets"):
        Shards(str(tmp_path)).runs()
