"""Files from elsewhere, by fsspec: copied whole into a folder of bounded size, checked, and used from there.

Several processes may share the folder: each file is fetched by one of them, the others wait for it. What was used
longest ago goes first. Every wait ends after `patience` seconds in which nothing has come, and says for what it waited.
"""

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ldm.data.tars import Damaged
from ldm.errors import UserError
from ldm.files import Beside, flush, sha256

COPIES = "~/.cache/ldm/shards"
_TRIES = 3
_POLL = 0.02


def place(path: str) -> tuple[Any, str]:
    """(fsspec file system, path in it). UserError for a protocol that is unknown or whose package is missing."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:  # "Install s3fs to access S3", "Protocol not known: x"
        raise UserError(f"cannot open {path!r}: {error}") from None


@contextmanager
def reaching(url: str) -> Iterator[None]:
    """What a file system raises is a UserError: each has errors of its own. Only FileNotFoundError stays what it is."""
    try:
        yield
    except (UserError, FileNotFoundError):
        raise
    except Exception as error:
        raise UserError(f"{url!r} cannot be reached: {error or type(error).__name__}") from None


def fetch_small(url: str) -> bytes | None:
    """A small file; None where there is none."""
    system, path = place(url)
    with suppress(FileNotFoundError), reaching(url):
        return bytes(system.cat_file(path))
    return None


def sizes(places: Sequence[Path | str]) -> list[int | None]:
    """The bytes of each file or URL, -1 where a server does not tell them, None where there is no such file."""

    def size(file: Path | str) -> int | None:
        with suppress(FileNotFoundError), reaching(str(file)):
            if isinstance(file, Path):
                return file.stat().st_size if file.is_file() else None
            system, path = place(file)
            found = system.info(path)["size"]
            return -1 if found is None else int(found)
        return None

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(size, places))


@dataclass(frozen=True)
class Cache:
    """A folder of at most `limit` bytes."""

    folder: Path
    limit: int
    patience: float = 60.0

    @classmethod
    def at(cls, folder: str, gigabytes: float, patience: float = 60.0) -> "Cache":
        return cls(Path(folder).expanduser(), int(gigabytes * 1e9), patience)

    def get(self, url: str, digest: str, size: int, version: str = "") -> Path:
        """The local copy of a file of this sha256, or where that is not known ("") of this version, as its server has
        it. Damaged where another comes, UserError where none comes."""
        size = max(size, 0)  # -1 where a server does not tell
        name = f"{(digest or hashlib.sha256(f'{url} {version}'.encode()).hexdigest())[:32]}{Path(url).suffix}"
        path = self.folder / name
        while not _used(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._held(self.folder / f".{name}.part", url) as part:
                if not _used(path):  # no other process was faster
                    part.truncate(0)  # what a dead one left
                    with self._held(self.folder / ".room", url):
                        self._make_room(size, url)
                        part.truncate(size)  # which others count, though it is yet to come
                    self._fetch(url, part, digest)
                    Path(part.name).replace(path)
        return path

    @contextmanager
    def _held(self, path: Path, url: str) -> Iterator[IO[bytes]]:
        """A file of this process alone. While another holds it, it is waited for as long as that one writes to it."""
        heard, seen = time.monotonic(), 0.0
        while (file := _locked(path)) is None:
            with suppress(FileNotFoundError):
                if (changed := path.stat().st_mtime) != seen:
                    heard, seen = time.monotonic(), changed
            if time.monotonic() - heard > self.patience:
                raise UserError(
                    f"waited {self.patience:g} s for another process to fetch {url!r} into {str(self.folder)!r}"
                )
            time.sleep(_POLL)
        with file:
            try:
                yield file
            finally:
                with suppress(FileNotFoundError):
                    if path.suffix == ".part" and _same(file, path):  # it was not renamed
                        path.unlink()

    def _make_room(self, size: int, url: str) -> None:
        """Called by one process at a time. What dead ones left half done goes first."""
        for part in self.folder.glob(".*.part"):
            if left := _locked(part):
                part.unlink(missing_ok=True)
                left.close()
        files = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                files.append((path.stat().st_mtime, path.stat().st_size, path))
        used = sum(held for _, held, _ in files)
        for _, held, path in sorted(files):
            if used + size > self.limit and not path.name.startswith("."):
                path.unlink()
                used -= held
        if used + size > self.limit:
            raise UserError(
                f"{str(self.folder)!r} may hold {self.limit} bytes, too few for {url!r} with {size}: raise copies_gb"
            )

    def _fetch(self, url: str, part: IO[bytes], digest: str) -> None:
        problem = UserError("")
        for attempt in range(_TRIES):
            time.sleep(attempt**2 * 0.2)
            try:
                self._copy(url, part)
            except FileNotFoundError:
                raise UserError(f"shard {url!r} is not there any more") from None
            except OSError as error:
                problem = UserError(f"shard {url!r} cannot be fetched: {error}")
                continue
            if digest in ("", sha256(Path(part.name))):
                return flush(Path(part.name))
            problem = Damaged(f"shard {url!r} is not what its manifest says (sha256): prepare or upload it again")
        raise problem

    def _copy(self, url: str, part: IO[bytes]) -> None:
        """Fetch in a thread, and watch it: no file system's own limits are relied on."""
        came = 0

        def work() -> None:
            nonlocal came
            system, remote = place(url)
            part.seek(0)
            with system.open(remote, "rb") as source:
                while chunk := source.read(1 << 20):
                    came += part.write(chunk)
            part.truncate()

        copying, heard, seen = Beside(work), time.monotonic(), 0
        while copying.is_alive():
            copying.join(_POLL)
            if came != seen:
                heard, seen = time.monotonic(), came
            if time.monotonic() - heard > self.patience:
                raise UserError(
                    f"shard {url!r} sent nothing for {self.patience:g} s: look at the server or the network"
                )
        try:
            copying.result()
        except Exception as error:  # a remote file system raises what its client library raises
            raise error if isinstance(error, OSError) else OSError(str(error)) from None


def _used(path: Path) -> bool:
    with suppress(FileNotFoundError):
        os.utime(path)
        return True
    return False


def _locked(path: Path) -> IO[bytes] | None:
    """The file, made where there is none and locked; None where another process has it, or has just renamed it."""

    def make(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_CREAT, 0o666)

    file = open(path, "r+b", buffering=0, opener=make)  # noqa: SIM115 (it is handed on)
    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _same(file, path):
            return file
    file.close()
    return None


def _same(file: IO[bytes], path: Path) -> bool:
    return os.path.samestat(os.fstat(file.fileno()), path.stat())
