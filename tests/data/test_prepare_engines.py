"""The same shards from Ray as from processes here, with a node lost on the way; sources in an S3 bucket."""

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ldm.data import engine
from ldm.data.fetch import Downloads
from ldm.data.options import PrepareConfig
from ldm.data.prepare import prepare
from ldm.data.shards import write_manifest, write_shard
from ldm.data.sources import open_sources
from ldm.errors import UserError
from ldm.files import sha256


def digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*.*"))}


@pytest.fixture
def photos(tmp_path: Path, picture) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for n in range(60):
        (folder / f"{n}.png").write_bytes(picture(n // 2, (100, 100)))
        (folder / f"{n}.txt").write_text(f"thing {n}")
    return folder


def test_ray_is_asked_for_where_it_is_missing(photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="engine ray needs Ray: pip install -r requirements-ray.txt"):
        prepare([str(photos)], PrepareConfig(str(tmp_path / "out"), engine="ray"), lambda *n: None)


@pytest.mark.slow
def test_ray_makes_the_same_shards_though_a_node_is_lost(photos, tmp_path, monkeypatch):
    """Two nodes of one core. The second is killed at its first shard, which is then made on the other."""
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "200")  # a busy machine takes its time
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install -r requirements-ray.txt")
    from ray.cluster_utils import Cluster

    options = {"size": 64, "shard_size": 9, "duplicates": "near", "holdout": 0.1}
    prepare([str(photos)], PrepareConfig(str(tmp_path / "local"), **options), lambda *n: None)
    memory = {"num_cpus": 1, "object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={**memory, "include_dashboard": False})
    try:
        victim = cluster.add_node(**memory)
        ray.init(address=cluster.address, log_to_driver=False)
        cluster.wait_for_nodes()

        class Caught:
            def __init__(self, work):
                self.work = work

            def __call__(self, part, tick):
                import ray

                if ray.get_runtime_context().get_node_id() == doomed and type(self.work).__name__ == "Making":
                    (started / str(part.number)).touch()
                    time.sleep(300)
                return self.work(part, tick)

        def kill() -> None:
            while not any(started.iterdir()):
                time.sleep(0.05)
            cluster.remove_node(victim, allow_graceful=False)

        doomed, started = victim.node_id, tmp_path / "started"
        started.mkdir()
        run = engine.run
        monkeypatch.setattr(engine, "run", lambda name, work, *rest: run(name, Caught(work), *rest))
        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        prepare([str(photos)], PrepareConfig(str(tmp_path / "ray"), engine="ray", **options), lambda *n: None)
        killer.join(10)
        assert not killer.is_alive() and any(started.iterdir())
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert digests(tmp_path / "ray") == digests(tmp_path / "local")


@pytest.fixture
def bucket(monkeypatch) -> Iterator[str]:
    """An empty bucket of a local S3 server."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install -r requirements-dev.txt")
    server = pytest.importorskip("moto.server", reason="moto is not installed: pip install -r requirements-dev.txt")
    running = server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    for name, value in {
        "ENDPOINT_URL": f"http://{host}:{port}",
        "ACCESS_KEY_ID": "a",
        "SECRET_ACCESS_KEY": "b",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    system = fsspec.filesystem("s3", skip_instance_cache=True)
    system.mkdir("pictures")
    yield "s3://pictures"
    system.rm("pictures", recursive=True)  # the server's memory is the process's
    system.clear_instance_cache()
    running.stop()


@pytest.mark.parametrize(
    "kind", ["folder", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("table.parquet", "list.csv"))]
)
def test_a_bucket_is_as_good_as_a_folder(bucket, tmp_path, picture, kind):
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(12):
        (folder / f"{n}.png").write_bytes(picture(n))
        (folder / f"{n}.txt").write_text(f"thing {n}")
    rows = [{"id": str(n), "image": picture(n), "text": f"thing {n}"} for n in range(12)]
    if kind == "table.parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / kind, row_group_size=5)
    elif kind == "list.csv":
        (folder / kind).write_text("path,text\n" + "".join(f"{n}.png,thing {n}\n" for n in range(12)))
    system = fsspec.filesystem("s3")
    system.put(f"{folder}/", f"{bucket}/in/", recursive=True)
    part = "" if kind == "folder" else f"/{kind}"
    for path, out in ((f"{folder}{part}", "near"), (f"{bucket}/in{part}", "far")):
        report = prepare([path], PrepareConfig(str(tmp_path / out), size=16, shard_size=5), lambda *n: None)
        assert report["samples"] == 12
    assert {n: d for n, d in digests(tmp_path / "near").items() if n.endswith(".tar")} == {
        n: d for n, d in digests(tmp_path / "far").items() if n.endswith(".tar")
    }
    with pytest.raises(UserError, match="'s3://pictures/none' is not there"):
        prepare([f"{bucket}/none"], PrepareConfig(str(tmp_path / "no")), lambda *n: None)
    with pytest.raises(UserError, match="'s3://nobucket' (is not there|cannot be reached)"):
        prepare(["s3://nobucket"], PrepareConfig(str(tmp_path / "no")), lambda *n: None)


@pytest.mark.parametrize("listed", [True, False], ids=["manifest", "bare"])
@pytest.mark.parametrize("order", ["mixed", "source"])
def test_shards_in_a_bucket_are_as_good_as_here(bucket, tmp_path, sample, listed, order):
    """They are copied through a folder that holds two of the three; without a manifest as img2dataset leaves them."""
    folder = tmp_path / "in"
    entries = [write_shard(folder / f"{s:05d}.tar", map(sample, range(6 * s, 6 * s + 6))) for s in range(3)]
    if listed:
        write_manifest(folder, entries)
    fsspec.filesystem("s3").put(f"{folder}/", f"{bucket}/in/", recursive=True)
    room = {"copies": str(tmp_path / "copies"), "copies_gb": 2.2 * entries[0].bytes / 1e9}
    options = {"size": 16, "shard_size": 7, "order": order, "holdout": 0.2, "workers": 1}
    for path, out in ((str(folder), "near"), (f"{bucket}/in", "far"), (f"{bucket}/in/{{00000..00002}}.tar", "named")):
        report = prepare([path], PrepareConfig(str(tmp_path / out), **room, **options), lambda *n: None)
        assert report["samples"] + report["validation"]["samples"] == 18
    near, far, named = (
        {n: d for n, d in digests(tmp_path / out).items() if n.endswith((".tar", ".idx"))}
        for out in ("near", "far", "named")
    )
    assert near == far == named and len(near) >= 6
    copies = list((tmp_path / "copies").iterdir())
    assert copies and sum(path.stat().st_size for path in copies) <= 2.2 * entries[0].bytes
    with pytest.raises(UserError, match="may hold 100 bytes, too few for 's3://.*raise copies_gb"):
        small = {"copies": str(tmp_path / "none"), "copies_gb": 1e-7}
        prepare([f"{bucket}/in"], PrepareConfig(str(tmp_path / "no"), **small), lambda *n: None)


def test_a_shard_that_changes_in_the_bucket_stops_the_preparation(bucket, tmp_path, sample, monkeypatch):
    """What was counted is not what is there now: no picture is lost in silence."""
    write_shard(tmp_path / "in/a.tar", map(sample, range(4)))
    s3 = fsspec.filesystem("s3")
    s3.put(str(tmp_path / "in/a.tar"), f"{bucket}/in/a.tar")
    (source,) = open_sources([f"{bucket}/in/a.tar"], Downloads(copies=str(tmp_path / "copies")))
    assert source.ids()[3] == "a.tar/000000003"
    (tmp_path / "copies" / next(p.name for p in (tmp_path / "copies").glob("*.tar"))).unlink()
    s3.rm(f"{bucket}/in/a.tar")
    with pytest.raises(UserError, match="a.tar' is not there any more"):
        list(source.read([0]))
