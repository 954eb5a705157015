"""Files that are whole or absent."""

import os
from pathlib import Path

import pytest

from ldm.files import digest, replacing, sha256, write_json


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == '{\n "a": 1\n}\n' and [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_a_taken_name_is_kept_where_asked(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for text in ("first", "second"):
        with replacing(path) as temporary:
            temporary.write_text(text)
    with pytest.raises(FileExistsError), replacing(path, replace=False) as temporary:
        temporary.write_text("third")
    assert path.read_text() == "second" and len(list(tmp_path.iterdir())) == 1


def test_others_may_read_what_is_written(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "a") as temporary:
            temporary.touch(mode=0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_digests(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "a").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-4, B.1
    assert sha256(tmp_path / "part" / "a") == digest(tmp_path / "part" / "a") == known
    before = digest(tmp_path)
    (tmp_path / "part" / "a").rename(tmp_path / "part" / "b")
    assert digest(tmp_path) != before
