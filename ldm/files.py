"""Files that are whole or absent: a temporary name, a flush to the disk, one rename. And their digests."""

import hashlib
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from threading import Thread, get_native_id
from typing import Any, Generic, TypeVar

from ldm.errors import UserError, reason

T = TypeVar("T")


@contextmanager
def replacing(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """A temporary name beside `path`, which becomes `path`, safely on disk, when the block ends well, and else goes.

    replace=False: FileExistsError where the name is taken (the other file stays as it is).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # others may be writing the same file
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # safetensors writes for the owner's eyes alone
        flush(temporary)
        if replace:
            temporary.replace(path)
        else:
            os.link(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_text(path: str | Path, what: str = "") -> str:
    """The text of a file in UTF-8. UserError that begins with `cannot read {what}`."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {what}{str(path)!r}: {reason(error)}") from None


def write_json(path: Path, data: Any) -> None:
    """Write JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(path: Path) -> str:
    """The sha256 of a file; of a folder, that of the names and hashes of the files in it and in its parts."""
    if path.is_file():
        return sha256(path)
    files = sorted(file for file in path.glob("**/*") if file.is_file())
    listed = "".join(f"{file.relative_to(path)} {sha256(file)}\n" for file in files)
    return hashlib.sha256(listed.encode()).hexdigest()


class Beside(Thread, Generic[T]):
    """Work in a thread, begun at once, which the program's end does not wait for; the result does.

    It waits for the whole thread: one that still lets go of tensors when the interpreter ends aborts the program.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        super().__init__(daemon=True)
        self._work, self._found = work, Future[T]()
        self.start()

    def run(self) -> None:
        """Called by the thread."""
        try:
            self._found.set_result(self._work())
        except BaseException as error:
            self._found.set_exception(error)
        finally:
            del self._work  # and what it holds

    def result(self) -> T:
        """What the work gave, or what it raised."""
        self.join()
        return self._found.result()


def digest_beside(path: Path) -> Callable[[], str]:
    """Begin a `digest` beside what goes on, which comes first where threads have priorities of their own (Linux)."""

    def work() -> str:
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, get_native_id(), 10)
        return digest(path)

    return Beside(work).result
