"""What a person did that cannot work: one line that says what, with the value, and what to do instead."""

import argparse
import functools
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn


class UserError(ValueError):
    """Bad input. Scripts print it as one line and exit with code 2; its text names the value and the remedy."""


def nearest(name: str, known: list[str]) -> str:
    """`" (did you mean 'x'?)"` for the closest of the known names, or an empty string."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is none of the known."""
    names = list(known)
    return UserError(f"unknown {what} {name!r}{nearest(name, names)}: choose one of {', '.join(names)}")


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is a UserError: one line, without the usage text. Flags are spelt in full."""

    def __init__(self, description: str | None) -> None:
        how = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=how, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        flags = [flag for action in self._actions for flag in action.option_strings]
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        hint = nearest(unknown, flags) if unknown.startswith("--") else ""
        raise UserError(f"{message}{hint}; --help lists the flags")


def whole(least: int) -> Callable[[str], int]:
    """An argparse `type`: a whole number that is not under `least`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return value

    return read


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


def reason(error: Exception) -> str:
    """What went wrong, without the path that the system's errors repeat."""
    return getattr(error, "strerror", None) or str(error)
