"""Sources: folders, parquet, shards; their captions, and what cannot be read."""

import json

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ldm.data.shards import write_shard
from ldm.data.sources import Raw, open_sources
from ldm.errors import UserError


def read(path) -> dict[str, Raw | UserError]:
    """Everything in the one source that a path is."""
    (source,) = open_sources([str(path)])
    ids = source.ids()
    return dict(zip(ids, source.read(range(len(ids))), strict=True))


def test_a_folder_with_text_beside_each_picture(tmp_path, picture):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/b.png").write_bytes(picture(1))
    (tmp_path / "deep/b.txt").write_text("a cat\n\n tabby \n")
    (tmp_path / "a.JPG").write_bytes(picture(0))
    (tmp_path / "notes.md").write_text("no picture")
    found = read(tmp_path)
    assert list(found) == ["a.JPG", "deep/b.png"]
    assert found["a.JPG"] == Raw(picture(0), {"captions": []})
    assert found["deep/b.png"] == Raw(picture(1), {"captions": ["a cat", "tabby"]})


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_folder_with_metadata(tmp_path, picture, kind):
    rows = [{"file_name": "a.png", "text": "a cat", "colour": "red"}, {"file_name": "b.png", "text": "", "colour": ""}]
    if kind == "csv":
        lines = "file_name,text,colour\na.png,a cat,red\nb.png,,\n"
    else:
        lines = "\n".join(map(json.dumps, rows)) + "\n\n"
    (tmp_path / f"metadata.{kind}").write_text(lines)
    (tmp_path / "a.png").write_bytes(picture(0))
    (tmp_path / "unlisted.png").write_bytes(picture(1))
    found = read(tmp_path)
    assert found["a.png"] == Raw(picture(0), {"text": "a cat", "colour": "red", "captions": ["a cat"]})
    assert str(found["b.png"]) == "cannot read: No such file or directory"
    assert len(found) == 2


@pytest.mark.parametrize("name", ["../x.png", "/etc/hostname"])
def test_metadata_leads_nowhere_else(tmp_path, picture, name):
    (tmp_path / "x.png").write_bytes(picture(0))
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
    assert str(read(inside)[name]) == "file_name leads out of the folder"


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("metadata.jsonl", "{", "cannot be read"),
        ("metadata.jsonl", '{"file": "a.png"}', "has no file_name in entry 1"),
        ("metadata.csv", "file,text\na.png,x\n", "has no file_name in entry 1"),
        ("empty.txt", "", "holds no images"),
    ],
)
def test_folders_that_cannot_work_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        open_sources([str(tmp_path)])


def test_a_text_that_is_not_text(tmp_path, picture):
    (tmp_path / "a.png").write_bytes(picture(0))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    assert str(read(tmp_path)["a.png"]) == "the .txt is not UTF-8"


@pytest.mark.parametrize("struct", [False, True])
def test_parquet_in_several_row_groups(tmp_path, picture, struct):
    images = [picture(n) for n in range(7)]
    columns = {
        "id": [f"p{n}" for n in range(7)],
        "photo": [{"bytes": data, "path": "x"} for data in images] if struct else images,
        "captions": [[f"thing {n}", "thing"] for n in range(7)],
        "name": [f"name {n}" for n in range(7)],
        "colour": ["red", None, "", "blue", "red", "red", "red"],
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet", row_group_size=3)
    (source,) = open_sources([str(tmp_path / "x.parquet")])
    assert source.ids() == columns["id"]
    first, second, third = source.read([0, 4, 6])
    assert [raw.image for raw in (first, second, third)] == [images[0], images[4], images[6]]
    assert second.columns == {"id": "p4", "captions": ["thing 4", "thing", "name 4"], "name": "name 4", "colour": "red"}
    assert [raw.image for raw in source.read([5, 1])] == [images[5], images[1]]


def test_parquet_without_ids_or_bytes(tmp_path, picture):
    pq.write_table(pa.table({"jpg": [picture(0), None], "caption": ["x", "y"]}), tmp_path / "x.parquet")
    found = read(tmp_path / "x.parquet")
    assert list(found) == ["000000000", "000000001"]
    assert str(found["000000001"]) == "no image bytes"


def test_parquet_that_cannot_work_is_refused(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="is not a whole parquet file"):
        read(tmp_path / "x.parquet")
    pq.write_table(pa.table({"id": ["1"], "link": ["http://x"]}), tmp_path / "y.parquet")
    with pytest.raises(UserError, match="has no column of image bytes, paths or URLs, only id, link"):
        read(tmp_path / "y.parquet")


def test_a_folder_of_parquet_files_as_hugging_face_lays_them_out(tmp_path, picture):
    """data/train-*.parquet, a struct column with bytes and a path, `text` for captions: one source, files in order."""
    (tmp_path / "set/data").mkdir(parents=True)
    for part in range(2):
        rows = [{"image": {"bytes": picture(10 * part + n), "path": None}, "text": f"thing {n}"} for n in range(3)]
        path = tmp_path / f"set/data/train-{part:05d}-of-00002.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    (source,) = open_sources([str(tmp_path / "set")])
    assert (source.name, source.ids()[4]) == ("set", "train-00001-of-00002.parquet/000000001")
    assert [raw.image for raw in source.read([0, 2, 3, 5])] == [picture(n) for n in (0, 2, 10, 12)]
    pq.write_table(pa.table({"picture": [b""], "text": [""]}), tmp_path / "set/data/train-00002.parquet")
    with pytest.raises(UserError, match="train-00002.parquet' has no column 'image', which .*train-00000"):
        open_sources([str(tmp_path / "set")])


def test_parquet_as_img2dataset_writes_it(tmp_path, picture):
    """Rows of what could not be had are there, without a picture."""
    rows = [
        {
            "url": "http://a",
            "key": "00000",
            "status": "success",
            "caption": "a cat",
            "original_width": 640,
            "jpg": picture(0),
        },
        {
            "url": "http://b",
            "key": "00001",
            "status": "failed",
            "caption": "a dog",
            "original_width": None,
            "jpg": None,
        },
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "00000.parquet")
    found = read(tmp_path / "00000.parquet")
    assert found["00000"].columns == {
        "url": "http://a", "key": "00000", "status": "success", "original_width": 640, "captions": ["a cat"]
    }  # fmt: skip
    assert str(found["00001"]) == "no image bytes"


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_a_list_of_paths(tmp_path, picture, kind):
    """Relative ones start at the list's folder; those outside of it are the user's own to name."""
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/a.png").write_bytes(picture(0))
    (tmp_path / "b.png").write_bytes(picture(1))
    rows = [
        {"path": "a.png", "text": "a cat"},
        {"path": str(tmp_path / "b.png"), "text": "a dog"},
        {"path": "c", "text": ""},
    ]
    path = tmp_path / f"lists/x.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        sign = "," if kind == "csv" else "\t"
        path.write_text("".join(sign.join(row) + "\n" for row in [rows[0].keys(), *(row.values() for row in rows)]))
    (source,) = open_sources([str(path)])
    one, two, three = source.read([0, 1, 2])
    assert (source.name, len(source.ids())) == ("x", 3)
    assert one == Raw(picture(0), {"path": "a.png", "text": "a cat", "captions": ["a cat"]})
    assert two.image == picture(1)
    assert str(three) == "cannot read: No such file or directory"


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("x.jsonl", "", "list .* is empty"),
        ("x.jsonl", "{", "cannot be read"),
        ("x.jsonl", "[1]", "entry 1 is not a row of named columns"),
        ("x.jsonl", '{"link": "a"}', r"has no column of paths or URLs \(.*only \['link'\]"),
        ("x.jsonl", '{"url": "a"}\n{"text": "b"}', "has no url in entry 2"),
        ("x.csv", "url,text\na,b,c\n", "entry 1 is not a row of named columns"),
    ],
)
def test_lists_that_cannot_work_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        open_sources([str(tmp_path / name)])


def test_a_protocol_that_is_unknown_is_refused():
    with pytest.raises(UserError, match="cannot open 'nosuch://x/y': Protocol not known: nosuch"):
        open_sources(["nosuch://x/y"])


@pytest.mark.parametrize("kind", ["folder", "parquet", "list"])
def test_any_file_system_that_fsspec_knows(tmp_path, picture, kind):
    """Its memory file system stands for all."""
    memory = fsspec.filesystem("memory")
    memory.pipe({"/in/a.png": picture(0), "/in/a.txt": b"a cat", "/in/deep/b.png": picture(1)})
    if kind == "parquet":
        with memory.open("/x.parquet", "wb") as file:
            pq.write_table(pa.table({"id": ["1", "2"], "image": [picture(0), picture(1)], "text": ["a cat", ""]}), file)
    memory.pipe("/in/x.jsonl", b'{"path": "a.png", "text": "a cat"}\n{"path": "memory://in/deep/b.png"}')
    try:
        path = {"folder": "memory://in", "parquet": "memory://x.parquet", "list": "memory://in/x.jsonl"}[kind]
        (source,) = open_sources([path])
        one, two = source.read([0, 1])
        assert (one.image, one.columns["captions"], two.image) == (picture(0), ["a cat"], picture(1))
        assert not source.random and source.stamp()
        with pytest.raises(UserError, match="'memory://nowhere' is not there"):
            open_sources(["memory://nowhere"])
    finally:
        memory.rm("/", recursive=True)


def test_damaged_parquet_is_named(tmp_path, picture):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"id": ["a"], "image": [picture(0, (64, 64))]}), path, use_dictionary=False)
    path.write_bytes(path.read_bytes()[:4] + bytes(200) + path.read_bytes()[204:])
    with pytest.raises(UserError, match="is not a whole parquet file"):
        read(path)
    (source,) = open_sources([str(path)])
    with pytest.raises(UserError, match="is not a whole parquet file"):
        list(source.read([0]))


def test_shards(folder, picture):
    found = read(folder)
    assert len(found) == 18
    raw = found["00001.tar/000000012"]
    assert raw == Raw(picture(12), {"number": 12, "captions": ["thing 12", "a thing 12"]})
    write_shard(folder / "x.tar", [("7", {"txt": b"no image"})])
    assert str(read(folder / "x.tar")["x.tar/7"]).startswith("damaged sample: sample '7' of shard")


@pytest.mark.parametrize("path, message", [("none", "is not there"), ("x.zip", "is neither a folder")])
def test_what_is_no_source_is_refused(tmp_path, path, message):
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(UserError, match=message):
        open_sources([str(tmp_path / path)])


def test_two_sources_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder / "photos").mkdir(parents=True)
        (tmp_path / folder / "photos/x.png").write_bytes(b"")
    with pytest.raises(UserError, match="two sources are called 'photos'"):
        open_sources([str(tmp_path / folder / "photos") for folder in ("a", "b")])
