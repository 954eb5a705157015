"""Remote shards: copied whole, checked, into a folder that never grows beyond its bound."""

import dataclasses
import fcntl
import functools
import http.server
import multiprocessing
import threading
import time
from pathlib import Path

import fsspec
import pytest

from ldm.data import remote
from ldm.data.dataset import DataConfig, loader, open_dataset
from ldm.data.remote import Cache
from ldm.data.shards import Shards, read_manifest, write_manifest, write_shard
from ldm.data.tars import Damaged
from ldm.errors import UserError


@pytest.fixture
def uploaded(tmp_path, sample):
    """Six shards of four samples, local and in memory://set, each of `size` bytes."""
    local = tmp_path / "local"
    entries = [write_shard(local / f"{s:05d}.tar", map(sample, range(4 * s, 4 * s + 4))) for s in range(6)]
    write_manifest(local, entries)
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.put(str(local) + "/", "/set/", recursive=True)
    yield local
    memory.store.clear()


def config(tmp_path: Path, shards: str = "memory://set/{00000..00005}.tar", **changes) -> DataConfig:
    common = {"shards": shards, "size": 16, "workers": 0, "readers": 2, "window": 4, "copies": str(tmp_path / "cache")}
    return DataConfig(**common | changes)


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_remote_shards_give_what_local_ones_give(uploaded, tmp_path):
    size = read_manifest(uploaded)["00000.tar"].bytes
    bound = 3 * size / 1e9
    dataset = open_dataset(config(tmp_path, copies_gb=bound))
    local = open_dataset(config(tmp_path, str(uploaded)))
    for here, there in zip(loader(local, 4, stop=60), loader(dataset, 4, stop=60), strict=True):
        assert here["key"] == there["key"] and (here["image"] == there["image"]).all()
        assert held(tmp_path / "cache") <= 3 * size
    assert not list((tmp_path / "cache").glob(".*.part"))
    folder = open_dataset(config(tmp_path, "memory://set", copies_gb=bound))
    assert len(folder) == 24


def test_what_was_used_longest_ago_goes(uploaded, tmp_path):
    entries = list(read_manifest(uploaded).values())
    cache = Cache(tmp_path / "cache", 2 * entries[0].bytes)
    paths = []
    for entry in (entries[0], entries[1], entries[0], entries[2]):
        paths.append(cache.get(f"memory://set/{entry.name}", entry.sha256, entry.bytes))
        time.sleep(0.02)
    assert [path.exists() for path in paths] == [True, False, True, True]
    assert paths[3].read_bytes() == (uploaded / entries[2].name).read_bytes()


def test_a_bound_below_what_is_read_side_by_side_is_refused(uploaded, tmp_path):
    with pytest.raises(UserError, match="2 remote shards are read side by side and need .* raise data.copies_gb"):
        open_dataset(config(tmp_path, copies_gb=2e-5))
    entry = read_manifest(uploaded)["00000.tar"]
    with pytest.raises(UserError, match="may hold 100 bytes, too few for"):
        Cache(tmp_path / "cache", 100).get("memory://set/00000.tar", entry.sha256, entry.bytes)


def test_what_is_missing_is_named_at_once(uploaded, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.rm("/set/00003.tar")
    with pytest.raises(UserError, match=r"shard 'memory://set/00003.tar' is not there \(1 of 6 missing\)"):
        open_dataset(config(tmp_path))
    memory.put(str(uploaded / "00000.tar"), "/bare/00000.tar")
    with pytest.raises(UserError, match="has no manifest.json beside it"):
        open_dataset(config(tmp_path, "memory://bare/00000.tar"))
    with pytest.raises(UserError, match="cannot open 'nosuch://set/00000.tar': Protocol not known: nosuch"):
        open_dataset(config(tmp_path, "nosuch://set/00000.tar"))


def test_a_manifest_that_was_replaced_is_read_again(uploaded, tmp_path):
    cache, memory = Cache(tmp_path / "cache", 10**6), fsspec.filesystem("memory")
    assert Shards("memory://set/00000.tar", cache=cache).counts == [4]
    entry = write_shard(uploaded / "00000.tar", [("0", {"png": b"x", "txt": b"x"})])
    write_manifest(uploaded, [entry])
    for name in ("00000.tar", "00000.idx", "manifest.json"):
        memory.put(str(uploaded / name), f"/set/{name}")
    assert Shards("memory://set/00000.tar", cache=cache).counts == [1]


def test_an_altered_shard_is_fetched_again_and_then_counted(uploaded, tmp_path, monkeypatch):
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    memory = fsspec.filesystem("memory")
    data = bytearray(memory.cat_file("/set/00002.tar"))
    data[700] ^= 1
    memory.pipe_file("/set/00002.tar", bytes(data))
    with pytest.raises(Damaged, match="00002.tar' is not what its manifest says"):
        Shards("memory://set/00002.tar", cache=Cache(tmp_path / "cache", 10**6)).sample(0, 0)
    with pytest.warns(UserWarning, match="stands in"):
        batches = list(loader(open_dataset(config(tmp_path, max_damaged=0.5)), 4, stop=24))
    assert not {f"{n:09d}" for n in range(8, 12)} & {key for batch in batches for key in batch["key"]}


def test_a_server_that_stops_sending_is_told_of(uploaded, tmp_path, monkeypatch):
    entry = read_manifest(uploaded)["00000.tar"]
    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "open", lambda *_: time.sleep(5))
    with pytest.raises(UserError, match="shard 'memory://set/00000.tar' sent nothing for 0.3 s"):
        Cache(tmp_path / "cache", 10**6, 0.3).get("memory://set/00000.tar", entry.sha256, entry.bytes)


def test_waiting_for_another_process_has_an_end(uploaded, tmp_path):
    entry = read_manifest(uploaded)["00000.tar"]
    cache = Cache(tmp_path / "cache", 10**6, 0.2)
    cache.folder.mkdir()
    with (cache.folder / f".{entry.sha256[:32]}.tar.part").open("w") as held_by_another:
        fcntl.flock(held_by_another, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="waited 0.2 s for another process to fetch 'memory://set/00000.tar'"):
            cache.get("memory://set/00000.tar", entry.sha256, entry.bytes)
    assert cache.get("memory://set/00000.tar", entry.sha256, entry.bytes).exists()


def test_what_a_killed_process_left_is_cleared(uploaded, tmp_path):
    entry = read_manifest(uploaded)["00000.tar"]
    cache = Cache(tmp_path / "cache", entry.bytes)
    cache.folder.mkdir()
    for name in ("abc", entry.sha256[:32]):
        (cache.folder / f".{name}.tar.part").write_bytes(bytes(entry.bytes))  # which nobody holds
    copy = cache.get("memory://set/00000.tar", entry.sha256, entry.bytes)
    assert copy.read_bytes() == (uploaded / "00000.tar").read_bytes()
    assert not list(cache.folder.glob("*.part"))


def test_a_fault_on_the_way_is_tried_again(uploaded, tmp_path, monkeypatch):
    entry, tries = read_manifest(uploaded)["00000.tar"], []
    kind = fsspec.get_filesystem_class("memory")
    fetch = kind.open

    def flaky(self, source, *how):
        tries.append(source)
        if len(tries) < 3:
            raise ConnectionResetError("gone")
        return fetch(self, source, *how)

    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    monkeypatch.setattr(kind, "open", flaky)
    cache = Cache(tmp_path / "cache", 10**6)
    assert cache.get("memory://set/00000.tar", entry.sha256, entry.bytes).stat().st_size == entry.bytes
    monkeypatch.setattr(kind, "open", lambda *_: (_ for _ in ()).throw(ConnectionResetError("gone")))
    other = read_manifest(uploaded)["00001.tar"]
    with pytest.raises(UserError, match="00001.tar' cannot be fetched: gone"):
        cache.get("memory://set/00001.tar", other.sha256, other.bytes)


def test_over_http_by_several_processes_each_shard_once(uploaded, tmp_path):
    pytest.importorskip("aiohttp")
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            time.sleep(0.2)
            super().do_GET()

        def log_message(self, *_) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(uploaded)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        entry = read_manifest(uploaded)["00000.tar"]
        cache = Cache(tmp_path / "cache", 10**6)
        work = (f"{url}/00000.tar", entry.sha256, entry.bytes)
        processes = [multiprocessing.get_context("spawn").Process(target=cache.get, args=work) for _ in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0, 0]
        assert asked.count("/00000.tar") == 1
        dataset = open_dataset(config(tmp_path, f"{url}/{{00000..00005}}.tar"))
        batches = list(loader(dataset, 4, stop=16, workers=1))  # fsspec has worked in the process that forks
        assert [batch["image"].shape for batch in batches] == [(4, 3, 16, 16)] * 4
        with pytest.raises(UserError, match="00009.tar' is not there"):
            open_dataset(config(tmp_path, f"{url}/00009.tar"))
    finally:
        server.shutdown()


def test_bounds_of_waiting_reach_the_cache(uploaded, tmp_path):
    dataset = open_dataset(config(tmp_path, patience=7.0))
    assert dataset.shards.cache == dataclasses.replace(Cache(tmp_path / "cache", 50 * 10**9), patience=7.0)
