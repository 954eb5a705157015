"""The prompt's syntax: what each sign means, and the place of each error."""

from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.errors import UserError
from ldm.text.prompt import Fragment, fill, parse, plain


def flat(text: str, step: int = 0, steps: int = 10) -> list[tuple[str | None, float]]:
    (part,) = parse(text).at(step, steps)
    return [(fragment.text, pytest.approx(fragment.weight)) for fragment in part.fragments]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("an ((important)) word", [("an ", 1), ("important", 1.21), (" word", 1)]),
        ("an [unimportant] word", [("an ", 1), ("unimportant", 1 / 1.1), (" word", 1)]),
        ("(a:1.3)", [("a", 1.3)]),
        ("(a : .5 )", [("a ", 0.5)]),
        ("(a:-0.5)", [("a", -0.5)]),
        ("(unnecessary)(brackets)", [("unnecessarybrackets", 1.1)]),
        (r"\(literal\] \\ \:", [("(literal] \\ :", 1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun)",
            [("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55), (", sun", 1.1)],
        ),
        ("(ratio 16:9 wide)", [("ratio 16:9 wide", 1.1)]),
        ("at 12:30", [("at 12:30", 1)]),
        ("[at 12:30 sharp]", [("at 12:30 sharp", 1 / 1.1)]),
        ("a BREAK b", [("a ", 1), (None, 1), (" b", 1)]),
        ("a BREAKFAST", [("a BREAKFAST", 1)]),
        ("(a BREAK b:2)", [("a ", 2), (None, 1), (" b", 2)]),
        ("SAND (AND)", [("SAND ", 1), ("AND", 1.1)]),
        ("", []),
    ],
    ids=str,
)
def test_weights_and_escapes(text: str, expected: list[tuple[str, float]]) -> None:
    assert flat(text) == expected


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("a [cat:dog:3]", ["a cat"] * 3 + ["a dog"] * 7),
        ("a [cat:dog:0.4]", ["a cat"] * 4 + ["a dog"] * 6),
        ("a [cat:dog:1.0]", ["a cat"] * 10),
        ("a [cat:dog:0]", ["a dog"] * 10),
        ("a[ big:0.5]", ["a"] * 5 + ["a big"] * 5),
        ("a[ big::0.5]", ["a big"] * 5 + ["a"] * 5),
        ("[cat|dog]", ["cat", "dog"] * 5),
        ("[cat|dog|]", ["cat", "dog", ""] * 3 + ["cat"]),
        ("[a:b|c]", ["a:b", "c"] * 5),
        ("[[a:b:2]:c:5]", ["a"] * 2 + ["b"] * 3 + ["c"] * 5),
    ],
)
def test_what_changes_with_the_steps(text: str, seen: list[str]) -> None:
    assert ["".join(str(t) for t, _ in flat(text, step)) for step in range(10)] == seen


def test_weights_inside_what_changes() -> None:
    assert flat("([cat:(dog:2):5]:1.5)", 0) == [("cat", 1.5)]
    assert flat("([cat:(dog:2):5]:1.5)", 5) == [("dog", 3)]


def test_composition() -> None:
    parts = parse("a cat :1.2 AND a (blue:2) dog AND sky:-0.5").at(0, 1)
    assert [part.weight for part in parts] == [1.2, 1, -0.5]
    assert [part.fragments for part in parts] == [
        (Fragment("a cat"),),
        (Fragment("a "), Fragment("blue", 2), Fragment(" dog")),
        (Fragment("sky"),),
    ]
    assert flat("a cat :1.2") == [("a cat :1.2", 1)]  # a weight of a side only beside an AND


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a (red apple", r"sign 3: '\(' is never closed, at 'a \(red apple'; write \\\(.*--plain-prompt"),
        ("a red) apple", r"sign 6: '\)' closes nothing"),
        ("a [red apple", r"sign 3: '\[' is never closed"),
        ("a red] apple", r"sign 6: '\]' closes nothing"),
        ("a (red] apple)", r"sign 7: '\]' closes nothing"),
        ("a ((red) apple", r"sign 3: '\(' is never closed"),
        ("(red:1.2.3)", r"sign 5: the weight '1.2.3' is no number"),
        ("[a:b:1.5]", "1.5 is no share of the steps"),
        ("[a:b:-2]", "-2 is no share of the steps, nor|-2 is no share"),
        ("a AND ", "sign 3: AND needs a prompt on both sides"),
        ("AND b", "sign 1: AND needs"),
        ("x" * 500 + "(", "sign 501:"),
    ],
)
def test_errors_show_the_place(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        parse(text)
    assert len(str(error.value)) < 200


@given(st.text(alphabet="ab ()[]:|\\.12ANDBREK", max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        prompt = parse(text)
    except UserError:
        return
    for step in range(3):
        prompt.at(step, 3)


@given(st.text(max_size=30))
def test_plain_is_plain(text: str) -> None:
    assert plain(text).at(0, 1)[0].fragments == ((Fragment(text),) if text else ())


@given(
    st.text(st.characters(exclude_characters="()[]\\"), max_size=30).filter(
        lambda t: "AND" not in t and "BREAK" not in t
    )
)
def test_without_syntax_nothing_happens(text: str) -> None:
    assert parse(text).at(0, 1) == plain(text).at(0, 1)


def test_wildcards(tmp_path: Path) -> None:
    (tmp_path / "colour.txt").write_text("red\n\n# a comment\nblue\n")
    (tmp_path / "thing.txt").write_text("__colour__ apple\n")
    (tmp_path / "loop.txt").write_text("__loop__\n")
    (tmp_path / "none.txt").write_text("# nothing\n")
    drawn = {fill("a __thing__ on __colour__", tmp_path, Random(seed)) for seed in range(40)}
    assert drawn == {f"a {a} apple on {b}" for a in ("red", "blue") for b in ("red", "blue")}
    assert fill("a __thing__", tmp_path, Random(3)) == fill("a __thing__", tmp_path, Random(3))
    for text, says in (
        ("__absent__", "cannot read the wildcard __absent__"),
        ("__none__", "no lines"),
        ("__loop__", "without an end"),
    ):
        with pytest.raises(UserError, match=says):
            fill(text, tmp_path, Random(0))
    with pytest.raises(UserError, match="cannot read"):
        fill("__a/../colour__ __x__", tmp_path, Random(0))
