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
from ldm.errors import UserError

_sleep = time.sleep
_THREADS = 32  # of a process that downloads; most of them wait
_REDIRECTS = 5
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
    if not reference:
        return UserError("no path or URL")
    return (_http if reference.lower().startswith(("http://", "https://")) else _file)(reference, limits)


def _file(path: str, limits: Downloads) -> bytes | UserError:
    try:
        system, inside = place(path)
        with system.open(inside, "rb") as file:
            data: bytes = file.read(limits.max_bytes + 1 if "://" in path else -1)
    except UserError as error:
        return UserError(f"cannot read: {error}")
    except Exception as error:  # a remote file system raises what its client library raises
        return UserError(f"cannot read: {getattr(error, 'strerror', None) or error or type(error).__name__}")
    return _too_long(limits) if "://" in path and len(data) > limits.max_bytes else data


def _http(url: str, limits: Downloads) -> bytes | UserError:
    reason = UserError("")
    for attempt in range(limits.retries + 1):
        outcome, pause = _once(url, limits)
        if pause is None or isinstance(outcome, bytes):
            return outcome
        reason = outcome
        if attempt < limits.retries:
            _sleep(min(limits.timeout, max(pause, _PAUSE * 2**attempt)))
    return reason


def _once(url: str, limits: Downloads) -> tuple[bytes | UserError, float | None]:
    """What came, and the seconds to wait at least before another try, None where that is of no use."""
    from urllib3.exceptions import HTTPError, LocationValueError, NameResolutionError, NewConnectionError, SSLError
    from urllib3.exceptions import TimeoutError as Timeout

    deadline = time.monotonic() + limits.timeout
    try:
        for _ in range(_REDIRECTS + 1):  # by hand: urllib3 would read whatever comes with a redirect
            if not url.lower().startswith(("http://", "https://")):
                break
            response = _pool(limits).request("GET", url, preload_content=False, retries=False)
            try:
                if where := response.get_redirect_location():
                    url = urljoin(url, where)
                    continue
                return _answer(response, deadline, limits)
            finally:
                response.close()
                response.release_conn()  # its place among those to the host, which closing does not give back
        else:
            return UserError("download failed: too many redirects"), None
        return UserError("download failed: not a web address"), None
    except LocationValueError:
        return UserError("download failed: not a web address"), None
    except NewConnectionError as error:  # which counts as a timeout there
        why = "no such host" if isinstance(error, NameResolutionError) else "no connection"
        return UserError(f"download failed: {why}"), 0.0
    except Timeout:
        return _late(limits), 0.0
    except SSLError:
        return UserError("download failed: no valid certificate"), None
    except (HTTPError, OSError, UnicodeError):  # a name that can be no host raises UnicodeError
        return UserError("download failed: the connection broke"), 0.0


def _answer(response: Any, deadline: float, limits: Downloads) -> tuple[bytes | UserError, float | None]:
    if response.status != 200:
        wait = response.headers.get("Retry-After", "")
        least = (float(wait) if wait.isdecimal() else 0.0) if response.status in _AGAIN else None
        return UserError(f"download failed: HTTP {response.status}"), least
    if _UNWILLING & {part.strip().lower() for part in response.headers.get("X-Robots-Tag", "").split(",")}:
        return UserError("the server asks not to train on it: X-Robots-Tag"), None
    data = bytearray()
    while chunk := response.read1(1 << 16):  # what has come, rather than wait for a full block
        data += chunk
        if len(data) > limits.max_bytes:
            return _too_long(limits), None
        if time.monotonic() > deadline:
            return _late(limits), 0.0
    return bytes(data), None


def _late(limits: Downloads) -> UserError:
    return UserError(f"download timed out: more than {limits.timeout:g} s")


def _too_long(limits: Downloads) -> UserError:
    return UserError(f"too large: more than {limits.max_bytes} bytes")


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
