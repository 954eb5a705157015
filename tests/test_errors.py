"""Bad input becomes one line and exit code 2."""

import pytest

from ldm.errors import Parser, UserError, nearest, reason, script, whole


def test_nearest_names_the_closest_or_nothing() -> None:
    assert nearest("euler_b", ["ddim", "euler_a"]) == " (did you mean 'euler_a'?)"
    assert nearest("zzz", ["ddim", "euler_a"]) == ""


def test_a_reason_does_not_repeat_the_path() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        open("nowhere/at-all").close()
    assert reason(caught.value) == "No such file or directory"
    assert reason(ValueError("odd")) == "odd"


def test_script_prints_one_line_and_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    @script
    def main() -> None:
        raise UserError("the size 3\n is odd")

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: the size 3 is odd\n"


def test_script_says_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    @script
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_script_hides_no_fault_of_ours() -> None:
    @script
    def main() -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        main()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--promt", "x"], "did you mean '--prompt'"),
        (["--prom", "x"], "did you mean '--prompt'"),
        (["--n", "0"], "'0' is not a whole number of at least 1"),
        (["--n", "two"], "'two' is not a whole number of at least 1"),
        (["--n"], "expected one argument"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_parser_complains_in_one_line(arguments: list[str], says: str) -> None:
    parser = Parser("a test")
    parser.add_argument("--prompt")
    parser.add_argument("--n", type=whole(1))
    with pytest.raises(UserError, match=says):
        parser.parse_args(arguments)


def test_parser_reads() -> None:
    parser = Parser("a test")
    parser.add_argument("--n", type=whole(0))
    assert parser.parse_args(["--n", "0"]).n == 0
