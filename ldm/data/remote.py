"""Files from elsewhere, by fsspec: copied whole into a folder of bounded size, checked, and used from there.

Several processes may share the folder: each file is fetched by one of them, the others wait for it. What was used
longest ago goes first. Every wait ends after `patience` seconds in which nothing has come, and says for what it waited.
"""

import fcntl
import os
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ldm.data.tars import Damaged
from ldm.errors import UserError
from ldm.files import flush, sha256

PROTOCOLS = ("http", "https", "s3", "gs", "gcs", "hf", "az", "abfs", "memory")
_TRIES = 3
_POLL = 0.02


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it. UserError for a protocol that is not allowed or installed."""
    protocol = url.partition("://")[0]
    if protocol not in PROTOCOLS:
        raise UserError(f"shards {url!r}: give local paths or one of {', '.join(PROTOCOLS)}")
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"shards {url!r} need another package: {error}") from None


def fetch_small(url: str) -> bytes | None:
    """A small file; None where there is none."""
    system, path = filesystem(url)
    try:
        return bytes(system.cat_file(path))
    except FileNotFoundError:
        return None
    except Exception as error:  # every file system has its own
        raise UserError(f"cannot read {url!r}: {error}") from None


def sizes(urls: Sequence[str]) -> list[int | None]:
    """The bytes of each file, -1 where the server does not tell them, None where there is no such file."""

    def size(url: str) -> int | None:
        system, path = filesystem(url)
        try:
            found = system.info(path)["size"]
        except FileNotFoundError:
            return None
        except Exception as error:
            raise UserError(f"cannot look for {url!r}: {error}") from None
        return -1 if found is None else int(found)

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(size, urls))


@dataclass(frozen=True)
class Cache:
    """A folder of at most `limit` bytes."""

    folder: Path
    limit: int
    patience: float = 60.0

    def get(self, url: str, digest: str, size: int) -> Path:
        """The local copy of a file of this sha256. Damaged where another comes, UserError where none comes."""
        name = f"{digest[:32]}{Path(url).suffix}"
        path = self.folder / name
        if self._use(path):
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock(name, url) as lock:
            if self._use(path):  # another process was faster
                return path
            with self._lock("room", url):
                self._make_room(size, url)
                lock.write(str(size))  # until it is there, others leave it the room
                lock.flush()
            self._fetch(url, path, digest, Path(lock.name))
        return path

    def _use(self, path: Path) -> bool:
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    @contextmanager
    def _lock(self, name: str, url: str) -> Iterator[IO[str]]:
        path = self.folder / f".{name}.lock"
        with path.open("a+") as file:
            heard, seen = time.monotonic(), 0.0
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    changed = path.stat().st_mtime
                    if changed != seen:
                        heard, seen = time.monotonic(), changed
                    if time.monotonic() - heard > self.patience:
                        raise UserError(
                            f"waited {self.patience:g} s for another process to fetch {url!r} into {str(self.folder)!r}"
                        ) from None
                    time.sleep(_POLL)
            file.truncate(0)  # what a dead process promised
            try:
                yield file
            finally:
                file.truncate(0)

    def _make_room(self, size: int, url: str) -> None:
        files = sorted(
            (s.st_mtime, s.st_size, p) for p in self.folder.iterdir() if p.name[0] != "." and (s := p.stat())
        )
        used = sum(size for _, size, _ in files) + self._promised()
        for _, held, path in files:
            if used + size <= self.limit:
                break
            path.unlink()
            used -= held
        if used + size > self.limit:
            raise UserError(
                f"{str(self.folder)!r} may hold {self.limit} bytes, too few for {url!r} with {size}: "
                "raise data.copies_gb"
            )

    def _promised(self) -> int:
        """Bytes that other processes are fetching. What dead ones left behind goes."""
        total = 0
        for path in self.folder.glob(".*.lock"):
            with path.open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except OSError:
                    total += int(file.read() or 0)
                else:
                    for part in self.folder.glob(f"{path.stem}.*.part"):
                        part.unlink(missing_ok=True)
        return total

    def _fetch(self, url: str, path: Path, digest: str, lock: Path) -> None:
        problem: Exception = Damaged("")
        for attempt in range(_TRIES):
            time.sleep(attempt**2 * 0.2)
            part = self.folder / f".{path.name}.{secrets.token_hex(4)}.part"
            try:
                self._copy(url, part, lock)
                if sha256(part) == digest:
                    flush(part)
                    part.replace(path)
                    return
                problem = Damaged(f"shard {url!r} is not what its manifest says (sha256): prepare or upload it again")
            except FileNotFoundError:
                raise UserError(f"shard {url!r} is not there any more") from None
            except OSError as error:
                problem = UserError(f"shard {url!r} cannot be fetched: {error}")
            finally:
                part.unlink(missing_ok=True)
        raise problem

    def _copy(self, url: str, part: Path, lock: Path) -> None:
        """Fetch in a thread, and watch the file grow: no file system's own limits are relied on."""
        failure: list[Exception] = []

        def work() -> None:
            try:
                system, remote = filesystem(url)
                system.get_file(remote, str(part))
            except Exception as error:  # told below
                failure.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        heard, size = time.monotonic(), -1
        while thread.is_alive():
            thread.join(_POLL)
            grown = part.stat().st_size if part.exists() else -1
            if grown != size:
                heard, size = time.monotonic(), grown
                os.utime(lock)
            if time.monotonic() - heard > self.patience:
                raise UserError(
                    f"shard {url!r} sent nothing for {self.patience:g} s: look at the server or the network"
                )
        if failure:
            raise failure[0] if isinstance(failure[0], OSError) else OSError(str(failure[0]))
