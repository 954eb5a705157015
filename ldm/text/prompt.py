r"""The prompt's own syntax, as users of AUTOMATIC1111's web UI write it, read into a tree with the place of each error.

(word:1.2) weighs a word, ((word)) by 1.1 for each bracket, [word] by 1 / 1.1; \( \) \[ \] \: \\ are the signs
themselves. [from:to:when] paints `from` for the first `when` steps (a share of them where it has a dot), then
`to`; either may be empty. [a|b] takes turns. BREAK begins a new chunk of tokens. `a AND b:0.5` adds what each asks
for, weighted.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple, NoReturn

from ldm.errors import UserError, reason

STRESS = 1.1
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
WEIGHT = re.compile(rf":\s*({NUMBER})\s*\)")
BAD_WEIGHT = re.compile(r":\s*([+-]?[\d.][\d.eE+-]*)\s*\)")
WORD = re.compile(r"(?<!\w)(AND|BREAK)(?!\w)")
WILDCARD = re.compile(r"__(\w[\w/ -]*?)__")
MAX_DEPTH = 100
SHARE = re.compile(rf"(.*):\s*({NUMBER})\s*", re.DOTALL)


class Fragment(NamedTuple):
    """Text of one weight; None in place of text: a new chunk begins."""

    text: str | None
    weight: float = 1.0


class Part(NamedTuple):
    """What one side of an AND asks for at one step, and how much of it."""

    fragments: tuple[Fragment, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Stressed:
    nodes: tuple["Node", ...]
    weight: float


@dataclass(frozen=True)
class Scheduled:
    before: tuple["Node", ...]
    after: tuple["Node", ...]
    when: float
    share: bool  # of the steps, in place of a number of them


@dataclass(frozen=True)
class Alternating:
    choices: tuple[tuple["Node", ...], ...]


Node = str | Fragment | Stressed | Scheduled | Alternating


@dataclass(frozen=True)
class Prompt:
    """A parsed prompt: the sides of its ANDs, each a tree and a weight."""

    sides: tuple[tuple[tuple[Node, ...], float], ...]

    def at(self, step: int, steps: int) -> tuple[Part, ...]:
        """What it asks for at a step, counted from 0, of a run of `steps`."""
        return tuple(Part(_merge(_flat(nodes, 1.0, step, steps)), weight) for nodes, weight in self.sides)


def plain(text: str) -> Prompt:
    """A prompt as it stands, without any syntax."""
    return Prompt((((text,), 1.0),))


def parse(text: str) -> Prompt:
    """Read a prompt. UserError that shows the place of what cannot be read."""
    return _Parser(text).prompt()


def fill(text: str, folder: Path, rng: Random) -> str:
    """A random line of `folder/name.txt` in place of each __name__, also within such a line.

    UserError where there is none.
    """
    for _ in range(MAX_DEPTH):
        name = WILDCARD.search(text)
        if name is None:
            return text
        path = folder / f"{name[1]}.txt"
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the wildcard {name[0]} from {str(path)!r}: {reason(error)}") from None
        lines = [line for line in lines if line and not line.startswith("#")]
        if not lines:
            raise UserError(f"the wildcard {name[0]} has no lines: write some into {str(path)!r}")
        text = text[: name.start()] + rng.choice(lines) + text[name.end() :]
    raise UserError(f"wildcards within wildcards without an end: {text[:60]!r}")


def _flat(nodes: tuple[Node, ...], weight: float, step: int, steps: int) -> Iterator[Fragment]:
    for node in nodes:
        match node:
            case str():
                yield Fragment(node, weight)
            case Fragment():
                yield node
            case Stressed():
                yield from _flat(node.nodes, weight * node.weight, step, steps)
            case Scheduled():
                first = node.when * steps if node.share else node.when
                yield from _flat(node.before if step < first else node.after, weight, step, steps)
            case Alternating():
                yield from _flat(node.choices[step % len(node.choices)], weight, step, steps)


def _merge(fragments: Iterator[Fragment]) -> tuple[Fragment, ...]:
    """Neighbours of one weight as one, so that they are tokenised together."""
    merged: list[Fragment] = []
    for fragment in fragments:
        last = merged[-1] if merged else None
        if last and last.text is not None and fragment.text is not None and last.weight == fragment.weight:
            merged[-1] = Fragment(last.text + fragment.text, last.weight)
        elif fragment.text != "":
            merged.append(fragment)
    return tuple(merged)


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.place = text, 0
        self.ands = False

    def prompt(self) -> Prompt:
        sides = []
        while True:
            nodes = self.nodes("", top=True)
            sides.append(nodes)
            if self.place >= len(self.text):
                break
            self.place += len("AND")
            self.ands = True
        if not self.ands:
            return Prompt(((sides[0], 1.0),))
        weighed = tuple(self.side(nodes) for nodes in sides)
        if not all(nodes for nodes, _ in weighed):
            self.fail(WORD.search(self.text).start(), "AND needs a prompt on both sides")  # type: ignore[union-attr]
        return Prompt(weighed)

    def side(self, nodes: tuple[Node, ...]) -> tuple[tuple[Node, ...], float]:
        """One side of an AND without the weight at its end, and without the blanks around it."""
        weight = 1.0
        found = SHARE.fullmatch(nodes[-1]) if nodes and isinstance(nodes[-1], str) else None
        if found:
            nodes, weight = (*nodes[:-1], found[1]), float(found[2])
        if nodes and isinstance(nodes[0], str):
            nodes = (nodes[0].lstrip(), *nodes[1:])
        if nodes and isinstance(nodes[-1], str):
            nodes = (*nodes[:-1], nodes[-1].rstrip())
        return tuple(node for node in nodes if node != ""), weight

    def nodes(self, stops: str, top: bool = False) -> tuple[Node, ...]:
        """Everything up to a sign of `stops`, or to the end (top: or to an AND), which is left unread."""
        found: list[Node] = []
        letters: list[str] = []

        def close() -> None:
            if letters:
                found.append("".join(letters))
                letters.clear()

        while self.place < len(self.text):
            sign = self.text[self.place]
            if sign in stops and (sign != ":" or ")" not in stops or self.weight_here()):
                break
            if sign == "\\" and self.text[self.place + 1 : self.place + 2] in tuple("()[]:\\|"):
                letters.append(self.text[self.place + 1])
                self.place += 2
            elif sign in "([":
                close()
                found.extend(self.round() if sign == "(" else self.square())
            elif sign in ")]":
                self.fail(self.place, f"{sign!r} closes nothing that was opened")
            elif (word := WORD.match(self.text, self.place)) and (word[1] == "BREAK" or top):
                if word[1] == "AND":
                    break
                close()
                found.append(Fragment(None))
                self.place += len("BREAK")
            else:
                letters.append(sign)
                self.place += 1
        close()
        return tuple(found)

    def weight_here(self) -> bool:
        bad = BAD_WEIGHT.match(self.text, self.place)
        if bad and not WEIGHT.match(self.text, self.place):
            self.fail(self.place, f"the weight {bad[1]!r} is no number")
        return bad is not None

    def round(self) -> tuple[Node, ...]:
        """(nodes) or (nodes:weight)."""
        start, weight = self.place, STRESS
        self.place += 1
        nodes = self.nodes("):")
        if self.place >= len(self.text):
            self.fail(start, "'(' is never closed")
        if found := WEIGHT.match(self.text, self.place):
            weight, self.place = float(found[1]), found.end()
        else:
            self.place += 1
        return (Stressed(nodes, weight),)

    def square(self) -> tuple[Node, ...]:
        """[nodes], [a|b], [from:to:when] or [to:when]; with a colon but no number behind it, [nodes] again."""
        start = self.place
        parts: list[tuple[Node, ...]] = []
        signs: list[str] = []
        while not signs or signs[-1] != "]":
            self.place += 1
            parts.append(self.nodes("]|:"))
            if self.place >= len(self.text):
                self.fail(start, "'[' is never closed")
            signs.append(self.text[self.place])
        self.place += 1
        if "|" in signs:
            choices: list[tuple[Node, ...]] = [parts[0]]
            for sign, part in zip(signs, parts[1:], strict=False):
                choices = [*choices, part] if sign == "|" else [*choices[:-1], (*choices[-1], ":", *part)]
            return (Alternating(tuple(choices)),)
        last = parts[-1]
        when = re.fullmatch(rf"\s*({NUMBER})\s*", last[0]) if len(last) == 1 and isinstance(last[0], str) else None
        if len(parts) in (2, 3) and when:
            value, share = float(when[1]), "." in when[1]
            if value < 0 or (share and value > 1):
                self.fail(start, f"{when[1]} is no share of the steps from 0. to 1., nor a number of them")
            return (Scheduled(parts[0] if len(parts) == 3 else (), parts[-2], value, share),)
        joined: tuple[Node, ...] = parts[0]
        for part in parts[1:]:
            joined = (*joined, ":", *part)
        return (Stressed(joined, 1 / STRESS),)

    def fail(self, place: int, what: str) -> NoReturn:
        shown = self.text[max(0, place - 12) : place + 20].replace("\n", " ")
        raise UserError(
            f"prompt, sign {place + 1}: {what}, at {shown!r}; write \\{self.text[place]} for the sign itself, "
            "or give --plain-prompt"
        )
