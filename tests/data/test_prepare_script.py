"""scripts/prepare_data.py as a person runs it: flags, one-line errors, killed and run again."""

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ldm.data.shards import Shards
from ldm.files import sha256

SCRIPT = str(Path(__file__).parents[2] / "scripts/prepare_data.py")


def command(*arguments: str) -> list[str]:
    return [sys.executable, SCRIPT, *arguments]


def test_every_flag_reaches_the_shards(assets, tmp_path):
    flags = "--size 32 --format jpg --quality 70 --shard-size 9 --holdout 0.1 --max-captions 1 --limit-per-source 50"
    templates = ["--caption-template", "the {name}", "--caption-template", "the {none}"]
    done = subprocess.run(
        command(assets, "--out", str(tmp_path / "out"), "--workers", "2", *flags.split(), *templates),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    train, val = Shards(str(tmp_path / "out")), Shards(str(tmp_path / "out/val"))
    assert sum(train.counts) + sum(val.counts) == 50
    assert max(train.counts) == 9
    about = train.sample(0, 0).about()
    assert (about["width"], sorted(train.sample(0, 0).members)) == (32, ["jpg", "json", "txt"])
    assert all(len(train.sample(0, i).about()["captions"]) <= 2 for i in range(9))
    assert f"{sum(train.counts)} + {sum(val.counts)} samples" in done.stdout
    assert "'the {none}' made no caption" in done.stdout
    assert len(list(tmp_path.glob("out/*.tar"))) == len(train.counts)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere", "--out", "x"], "error: source 'nowhere' is not there"),
        (["--out", "x"], "error: the following arguments are required: SOURCE"),
        (["ASSETS", "--out", "x", "--sise", "3"], "error: unrecognized arguments: --sise"),
        (["ASSETS", "--out", "x", "--size", "big"], "error: argument --size: "),
        (["ASSETS", "--out", "x", "--format", "gif"], "error: argument --format: invalid choice"),
    ],
)
def test_errors_are_one_line(assets, tmp_path, arguments, message):
    done = subprocess.run(
        command(*(a.replace("ASSETS", assets) for a in arguments)), capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_ended_and_run_again(assets, tmp_path, end):
    """Big PNGs are slow enough to be caught in the middle."""
    flags = shlex.split("--size 512 --format png --limit-per-source 40 --shard-size 2 --workers 2")
    process = subprocess.Popen(
        command(assets, "--out", str(tmp_path / "a"), *flags),
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background may ignore Ctrl-C
    )
    limit = time.monotonic() + 30
    while not list(tmp_path.glob("a/*.tar")) and time.monotonic() < limit:
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)  # what it does meanwhile, it cannot finish
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(end)
    process.send_signal(signal.SIGCONT)
    assert process.wait(30) == (130 if end == signal.SIGINT else -9)
    assert psutil.wait_procs(workers, 10)[1] == []
    assert not (tmp_path / "a/manifest.json").exists()
    for out in "ab":
        subprocess.run(command(assets, "--out", str(tmp_path / out), *flags), capture_output=True, check=True)
    one, two = ({p.name: sha256(p) for p in (tmp_path / out).iterdir()} for out in "ab")
    assert one == two
    assert len(one) == 20 * 3 + 4  # tar, idx, stats; manifest, plan, two reports
