r"""The prompt's own syntax, as users of AUTOMATIC1111's web UI write it, read into a tree with the place of each error.

(word:1.2) weighs a word, ((word)) by 1.1 for each bracket, [word] by 1 / 1.1; \( \) \[ \] \: \\ are the signs
themselves. [from:to:when] paints `from` for the first `when` steps (a share of them where it has a dot), then
`to`; either may be empty. [a|b] takes turns. BREAK begins a new chunk of tokens. `a AND b:0.5` adds what each asks
for, weighted.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple, NoReturn

from ldm.errors import UserError
from ldm.files import read_text

STRESS = 1.1
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
WEIGHT = re.compile(rf":\s*({NUMBER})\s*\)")
BAD_WEIGHT = re.compile(r":\s*([+-]?[\d.][\d.eE+-]*)\s*\)")
WORD = re.compile(r"(?<!\w)(AND|BREAK)(?!\w)")
WILDCARD = re.compile(r"__(\w[\w/ -]*?)__")
LETTERS = re.compile(r"\\([()\[\]:\\|])|[^()\[\]:\\|AB]+|.", re.DOTALL)  # a sign itself, or what can be none
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


class Stressed(NamedTuple):
    """A bracket, and what it multiplies weights by."""

    nodes: tuple["Node", ...]
    weight: float


class Changing(NamedTuple):
    """One of several, by its number that a step and the count of the steps give."""

    choices: tuple[tuple["Node", ...], ...]
    choose: Callable[[int, int], int]


Node = str | Fragment | Stressed | Changing


class Prompt(NamedTuple):
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
        read = map(str.strip, read_text(path, f"the wildcard {name[0]} from ").splitlines())
        lines = [line for line in read if line and not line.startswith("#")]
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
            case Changing():
                yield from _flat(node.choices[node.choose(step, steps)], weight, step, steps)


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

    def prompt(self) -> Prompt:
        sides = [self.nodes("", top=True)]
        while self.place < len(self.text):
            self.place += len("AND")
            sides.append(self.nodes("", top=True))
        if len(sides) == 1:
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
        while self.place < len(self.text):
            sign, word = self.text[self.place], WORD.match(self.text, self.place)
            if sign in stops and (sign != ":" or ")" not in stops or self.weight_here()):
                break
            if word and word[1] == "AND" and top:
                break
            if sign in ")]":
                self.fail(self.place, f"{sign!r} closes nothing that was opened")
            if sign in "([":
                found.append(self.round() if sign == "(" else self.square())
            elif word and word[1] == "BREAK":
                found.append(Fragment(None))
                self.place = word.end()
            else:
                letters = LETTERS.match(self.text, self.place)
                assert letters
                self.place = letters.end()
                before = found.pop() if found and isinstance(found[-1], str) else ""
                found.append(f"{before}{letters[1] or letters[0]}")
        return tuple(found)

    def weight_here(self) -> bool:
        bad = BAD_WEIGHT.match(self.text, self.place)
        if bad and not WEIGHT.match(self.text, self.place):
            self.fail(self.place, f"the weight {bad[1]!r} is no number")
        return bad is not None

    def round(self) -> Node:
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
        return Stressed(nodes, weight)

    def square(self) -> Node:
        """[nodes], [a|b], [from:to:when] or [to:when]; with a colon but no number behind it, [nodes] again."""
        start, signs, parts = self.place, "", list[tuple[Node, ...]]()
        while not signs.endswith("]"):
            self.place += 1
            parts.append(self.nodes("]|:"))
            if self.place >= len(self.text):
                self.fail(start, "'[' is never closed")
            signs += self.text[self.place]
        self.place += 1
        choices = [parts[0]]
        for sign, part in zip(signs, parts[1:], strict=False):
            if sign == "|":
                choices.append(part)
            else:
                choices[-1] = (*choices[-1], ":", *part)
        if len(choices) > 1:
            return Changing(tuple(choices), lambda step, steps: step % len(choices))
        last = parts[-1]
        when = re.fullmatch(rf"\s*({NUMBER})\s*", last[0]) if len(last) == 1 and isinstance(last[0], str) else None
        if len(parts) not in (2, 3) or not when:
            return Stressed(choices[0], 1 / STRESS)
        value, share = float(when[1]), "." in when[1]
        if value < 0 or (share and value > 1):
            self.fail(start, f"{when[1]} is no share of the steps from 0. to 1., nor a number of them")
        before = parts[0] if len(parts) == 3 else ()
        return Changing((before, parts[-2]), lambda step, steps: int(step >= (value * steps if share else value)))

    def fail(self, place: int, what: str) -> NoReturn:
        shown = self.text[max(0, place - 12) : place + 20].replace("\n", " ")
        raise UserError(
            f"prompt, sign {place + 1}: {what}, at {shown!r}; write \\{self.text[place]} for the sign itself, "
            "or give --plain-prompt"
        )
