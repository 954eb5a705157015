"""The bytes behind references: paths, any URL that fsspec knows, and http(s) with retries and limits."""

import functools
import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin

from ldm.data.remote import COPIES, place
from ldm.errors import UserError, reason

_sleep = time.sleep
_THREADS = 32  # of a process that downloads; most of them wait
_REDIRECTS = 5
_WEB = ("http://", "https://")
_PAUSE = 0.5  # seconds before the first further try, doubled for each
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_UNWILLING = {"noai", "noimageai", "noindex", "noimageindex"}  # in X-Robots-Tag, as img2dataset reads it


@dataclass(frozen=True)
class Downloads:
    """Limits of a download; `per_host` is the number of connections that a process has to one host. copies, copies_gb:
    where remote shards are kept meanwhile, and how much of them."""

    timeout: float = 20.0
    retries: int = 3
    max_bytes: int = 50_000_000
    per_host: int = 8
    copies: str = COPIES
    copies_gb: float = 50.0


def fetch_all(references: Sequence[str], limits: Downloads) -> Iterator[bytes | UserError]:
    """What each reference leads to, in order; an error, whose text before its colon is the same for all of a kind.

    Local files are read one after another, all else by several threads and a little ahead.
    """
    if all("://" not in reference for reference in references):
        yield from (fetch(reference, limits) for reference in references)
        return
    waiting: deque[Future[bytes | UserError]] = deque()
    rest = iter(references)
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            while True:
                ahead = itertools.islice(rest, 2 * _THREADS - len(waiting))
                waiting.extend(pool.submit(fetch, reference, limits) for reference in ahead)
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def fetch(reference: str, limits: Downloads) -> bytes | UserError:
    """The bytes of one reference, or why they cannot be had."""
    read, why = _http if reference.lower().startswith(_WEB) else _file, "no path or URL"
    for attempt in range(limits.retries + 1 if reference else 0):
        try:
            return read(reference, limits)
        except _Failed as failure:
            why, pause = failure.args
        if pause is None:
            break
        if attempt < limits.retries:
            _sleep(min(limits.timeout, max(pause, _PAUSE * 2**attempt)))
    return UserError(why)


class _Failed(Exception):
    """Why bytes did not come, and the seconds to wait at least before another try, None where that is of no use."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason, pause)


def _file(path: str, limits: Downloads) -> bytes:
    try:
        system, inside = place(path)
        with system.open(inside, "rb") as file:
            data: bytes = file.read(limits.max_bytes + 1 if "://" in path else -1)
    except Exception as error:  # a remote file system raises what its client library raises
        raise _Failed(f"cannot read: {reason(error) or type(error).__name__}") from None
    if "://" in path and len(data) > limits.max_bytes:
        raise _too_long(limits)
    return data


def _http(url: str, limits: Downloads) -> bytes:
    from urllib3 import exceptions as known

    deadline = time.monotonic() + limits.timeout
    try:
        for _ in range(_REDIRECTS + 1):  # by hand: urllib3 would read whatever comes with a redirect
            if not url.lower().startswith(_WEB):
                raise _Failed("download failed: not a web address")
            response = _pool(limits).request("GET", url, preload_content=False, retries=False)
            try:
                if not (where := response.get_redirect_location()):
                    return _body(response, deadline, limits)
                url = urljoin(url, where)
            finally:
                response.close()
                response.release_conn()  # its place among those to the host, which closing does not give back
        raise _Failed("download failed: too many redirects")
    except known.LocationValueError:
        raise _Failed("download failed: not a web address") from None
    except known.NewConnectionError as error:  # which counts as a timeout there
        why = "no such host" if isinstance(error, known.NameResolutionError) else "no connection"
        raise _Failed(f"download failed: {why}", 0.0) from None
    except known.TimeoutError:
        raise _late(limits) from None
    except known.SSLError:
        raise _Failed("download failed: no valid certificate") from None
    except (known.HTTPError, OSError, UnicodeError):  # a name that can be no host raises UnicodeError
        raise _Failed("download failed: the connection broke", 0.0) from None


def _body(response: Any, deadline: float, limits: Downloads) -> bytes:
    if response.status != 200:
        wait = response.headers.get("Retry-After", "")
        least = (float(wait) if wait.isdecimal() else 0.0) if response.status in _AGAIN else None
        raise _Failed(f"download failed: HTTP {response.status}", least)
    if _UNWILLING & {part.strip().lower() for part in response.headers.get("X-Robots-Tag", "").split(",")}:
        raise _Failed("the server asks not to train on it: X-Robots-Tag")
    data = bytearray()
    while chunk := response.read1(1 << 16):  # what has come, rather than wait for a full block
        data += chunk
        if len(data) > limits.max_bytes:
            raise _too_long(limits)
        if time.monotonic() > deadline:
            raise _late(limits)
    return bytes(data)


def _late(limits: Downloads) -> _Failed:
    return _Failed(f"download timed out: more than {limits.timeout:g} s", 0.0)


def _too_long(limits: Downloads) -> _Failed:
    return _Failed(f"too large: more than {limits.max_bytes} bytes")


@functools.lru_cache(8)
def _pool(limits: Downloads) -> Any:
    import urllib3

    from ldm import __version__

    return urllib3.PoolManager(
        num_pools=1024,
        maxsize=limits.per_host,
        block=True,  # the limit of connections to one host
        timeout=urllib3.Timeout(connect=limits.timeout, read=limits.timeout),
        headers={"User-Agent": f"ldm/{__version__}", "Accept": "image/*,*/*;q=0.5"},
    )
