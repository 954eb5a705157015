"""What a person did that cannot work: one line that says what, with the value, and what to do instead."""

import functools
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input. Scripts print it as one line and exit with code 2; its text names the value and the remedy."""


def nearest(name: str, known: list[str]) -> str:
    """`" (did you mean 'x'?)"` for the closest of the known names, or an empty string."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def script(main: Callable[[], None]) -> Callable[[], None]:
    """Run a script's `main`: a UserError becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""

    @functools.wraps(main)
    def run() -> None:
        try:
            main()
        except UserError as error:
            print("error: " + " ".join(str(error).split()), file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None

    return run
