"""Downloads from a server on loopback that fails, dawdles, redirects and floods; what a preparation makes of them."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ldm.data import fetch as module
from ldm.data.fetch import Downloads, fetch, fetch_all
from ldm.data.options import PrepareConfig
from ldm.data.prepare import prepare
from ldm.data.shards import Shards
from ldm.errors import UserError
from ldm.files import sha256

QUICK = Downloads(timeout=0.6, retries=2, max_bytes=5_000, per_host=4)


class Server(ThreadingHTTPServer):
    """Serves /picture/N, and faults by name. asked: paths and how often; most: connections busy at a time."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, picture) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.picture, self.asked, self.lock = picture, Counter(), threading.Lock()
        self.busy = self.most = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        with server.lock:
            server.asked[self.path] += 1
            tries = server.asked[self.path]
            server.busy += 1
            server.most = max(server.most, server.busy)
        try:
            self.answer(self.path.strip("/").split("/"), tries)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with server.lock:
                server.busy -= 1

    def answer(self, words: list[str], tries: int) -> None:
        body = self.server.picture(int(words[-1])) if words[-1].isdecimal() else b"x"
        match words[0]:
            case "picture":
                self.send(200, body)
            case "busy":  # twice refused, then served
                self.send(503 if tries < 3 else 200, body, {"Retry-After": "0"})
            case "later":
                self.send(429, b"", {"Retry-After": "3600"})
            case "gone":
                self.send(404, b"")
            case "moved":
                self.send(302, b"", {"Location": f"/picture/{words[-1]}"})
            case "circle":
                self.send(302, b"", {"Location": self.path})
            case "astray":
                self.send(302, b"", {"Location": "file:///etc/hostname"})
            case "unwilling":
                self.send(200, body, {"X-Robots-Tag": "noai, noimageai"})
            case "large":  # says nothing of its size
                self.send_response(200)
                self.end_headers()
                self.close_connection = True
                for _ in range(100):
                    self.wfile.write(bytes(1_000))
            case "mute":
                time.sleep(1.5)
            case "drip":  # never long enough silent to time out
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                for _ in range(30):
                    self.wfile.write(b"x")
                    time.sleep(0.1)
            case "cut":  # half of it, the first time
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body if tries > 1 else body[: len(body) // 2])
                self.close_connection = tries == 1
            case "slow":
                time.sleep(0.05)
                self.send(200, body)

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server(picture) -> Iterator[Server]:
    found = Server(picture)
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()
    module._pool.cache_clear()


@pytest.fixture(autouse=True)
def pauses(monkeypatch) -> list[float]:
    """The pauses between tries, which are not made."""
    seen: list[float] = []
    monkeypatch.setattr(module, "_sleep", seen.append)
    return seen


@pytest.mark.parametrize("path, tries", [("picture/3", 1), ("busy/3", 3), ("moved/3", 1), ("cut/3", 2), ("slow/3", 1)])
def test_what_comes_in_the_end(server, picture, path, tries):
    assert fetch(f"{server.url}/{path}", QUICK) == picture(3)
    assert server.asked[f"/{path}"] == tries


@pytest.mark.parametrize(
    "path, message, tries",
    [
        ("gone", "download failed: HTTP 404", 1),
        ("later", "download failed: HTTP 429", 3),
        ("circle", "download failed: too many redirects", 6),
        ("astray", "download failed: not a web address", 1),
        ("unwilling/1", "the server asks not to train on it: X-Robots-Tag", 1),
        ("large", "too large: more than 5000 bytes", 1),
        ("mute", "download timed out: more than 0.6 s", 3),
        ("drip", "download timed out: more than 0.6 s", 3),
    ],
)
def test_what_never_comes(server, path, message, tries):
    start = time.monotonic()
    assert str(fetch(f"{server.url}/{path}", QUICK)) == message
    assert server.asked[f"/{path}"] == tries
    assert time.monotonic() - start < 6


def test_pauses_grow_and_obey_the_server_up_to_the_limit(server, pauses):
    fetch(f"{server.url}/later", Downloads(timeout=7.0, retries=3))
    assert pauses == [7.0, 7.0, 7.0]
    pauses.clear()
    fetch("http://127.0.0.1:9/refused", Downloads(timeout=7.0, retries=4))
    assert pauses == [0.5, 1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    "reference, message",
    [
        ("", "no path or URL"),
        ("http://", "download failed: not a web address"),
        ("http://127.0.0.1:9/x", "download failed: no connection"),
        ("http://no host/x", "download failed: "),
        ("http://" + "a" * 70 + ".example/x", "download failed: "),
        ("nosuch://x", "cannot read: cannot open 'nosuch://x': Protocol not known: nosuch"),
        ("memory://nothing", "cannot read: "),
    ],
)
def test_what_is_nowhere(reference, message):
    assert str(fetch(reference, Downloads(retries=0, timeout=5.0))).startswith(message)


def test_the_connections_to_a_host_are_limited(server, picture):
    urls = [f"{server.url}/slow/{n}" for n in range(24)]
    for most in (1, 3):
        server.most = 0
        found = list(fetch_all(urls, Downloads(per_host=most)))
        assert found == [picture(n) for n in range(24)]
        assert server.most == most


PATHS = ["picture/{}", "busy/{}", "moved/{}", "cut/{}", "gone/{}", "unwilling/{}"]


@pytest.fixture
def urls(server, tmp_path) -> str:
    """A list of 30 URLs with captions."""
    rows = [{"url": f"{server.url}/{PATHS[n % 6].format(n)}", "caption": f"thing {n}"} for n in range(30)]
    (tmp_path / "urls.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "urls.jsonl")


def digests(folder) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("order", ["mixed", "source"])
def test_a_preparation_downloads_each_picture_once(server, urls, tmp_path, order):
    config = {"size": 16, "shard_size": 8, "duplicates": "near", "order": order}
    report = prepare([urls], PrepareConfig(str(tmp_path / "out"), **config), lambda *n: None)
    assert report["samples"] == 20
    assert {reason: about["count"] for reason, about in report["refused"].items()} == {
        "download failed": 5,
        "the server asks not to train on it": 5,
    }
    columns = Shards(str(tmp_path / "out")).sample(0, 0).about()
    assert columns["url"].startswith(server.url) and columns["captions"] == [f"thing {columns['url'].split('/')[-1]}"]
    assert max(n for path, n in server.asked.items() if path.startswith("/picture")) <= 2  # once, and by a redirect
    before = server.asked.total()
    prepare([urls], PrepareConfig(str(tmp_path / "out"), **config), lambda *n: None)
    assert server.asked.total() == before


@pytest.mark.parametrize("stop", [1, 31, 80])
def test_stopped_downloads_go_on(urls, tmp_path, stop):
    def interrupt(done: int, total: int) -> None:
        if done >= stop:
            raise KeyboardInterrupt

    options = {"size": 16, "shard_size": 8, "duplicates": "exact"}
    with pytest.raises(KeyboardInterrupt):
        prepare([urls], PrepareConfig(str(tmp_path / "out"), **options), interrupt)
    for out in ("out", "whole"):
        prepare([urls], PrepareConfig(str(tmp_path / out), **options), lambda *n: None)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_downloads_that_all_fail_are_one_line(server, urls, tmp_path):
    text = (tmp_path / "urls.jsonl").read_text()
    (tmp_path / "urls.jsonl").write_text(text.replace(server.url, "http://127.0.0.1:9"))
    config = PrepareConfig(str(tmp_path / "out"), size=16, retries=0)
    with pytest.raises(UserError, match="none of the 30 pictures can be used: .*: download failed: no connection"):
        prepare([urls], config, lambda *n: None)
