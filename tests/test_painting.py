"""A whole run: previews, a stop that loses nothing, jobs that go on, networks moved where memory is short."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image as Pillow
from rich.console import Console

from ldm import pipeline, preview, recipe
from ldm.errors import UserError
from ldm.jobs import read_jobs
from ldm.models.autoencoder import Autoencoder
from ldm.pipeline import Pipeline
from ldm.recipe import Request

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def painter(tiny_model: Path) -> Pipeline:
    return pipeline.load(str(tiny_model), "cpu")


class Command:
    def __init__(self, model: Path, out: Path, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.model, self.out, self.patch, self.capsys = model, out, patch, capsys
        spec = importlib.util.spec_from_file_location("txt2img", ROOT / "scripts/txt2img.py")
        assert spec and spec.loader
        self.script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.script)

    def __call__(self, *flags: object, code: int = 0) -> list[Path]:
        arguments = ["txt2img", "--model", str(self.model), "--out", str(self.out), *map(str, flags)]
        self.patch.setattr(sys, "argv", arguments)
        if code:
            with pytest.raises(SystemExit) as stop:
                self.script.main()
            assert stop.value.code == code
        else:
            self.script.main()
        said = self.capsys.readouterr()
        self.said = said.err
        return [Path(line) for line in said.out.splitlines()]


@pytest.fixture
def command(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    return Command(tiny_model, tmp_path / "out", monkeypatch, capsys)


def stopped_after(count: int, patch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the step after the count-th is on its way."""
    sample = Pipeline.sample

    def stop(self: Pipeline, *arguments: object) -> Iterator[object]:
        for number, step in enumerate(sample(self, *arguments)):  # type: ignore[arg-type]
            if number == count:
                raise KeyboardInterrupt
            yield step

    patch.setattr(Pipeline, "sample", stop)


def test_a_stop_writes_the_state(command: Command) -> None:
    whole = command("--prompt", "a cat", "--seed", 3, "--n", 2)
    with pytest.MonkeyPatch.context() as patch:
        stopped_after(2, patch)
        states = command("--prompt", "a cat", "--seed", 3, "--n", 2, code=130)
    assert len(states) == 2
    made = recipe.read(states[0])
    assert made.made.unfinished == "2 of 4 steps" and "Unfinished: 2 of 4 steps" in made.parameters()
    assert made.request == recipe.read(whole[0]).request
    assert states[0].read_bytes() != whole[0].read_bytes()
    again = command("--from-image", states[1], "--seed", 4)
    assert recipe.read(again[0]).made.unfinished == ""
    with pytest.MonkeyPatch.context() as patch:
        stopped_after(0, patch)
        assert command("--prompt", "a cat", code=130) == []


def rows(path: Path, *values: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_jobs_go_on_with_the_same_bytes(command: Command, tmp_path: Path) -> None:
    jobs = rows(
        tmp_path / "jobs.jsonl",
        {"prompt": "a cat", "seed": 5, "name": "cat"},
        {"prompt": "a dog"},
        {"prompt": "a dog", "negative": "red", "steps": 2},
        {"prompt": "a cow", "steps": 2},
        {"prompt": "a pig", "steps": 2},
    )
    flags = ["--jobs", jobs, "--batch-size", 2, "--seed", 40]
    first = command(*flags)
    assert [path.name for path in first] == ["cat.png", "00001.png", "00002.png", "00003.png", "00004.png"]
    assert [recipe.read(path).request.seed for path in first] == [5, 41, 42, 43, 44]
    assert [recipe.read(path).request.steps for path in first] == [4, 4, 2, 2, 2]
    bytes_of = {path: path.read_bytes() for path in first}
    assert command(*flags) == []
    for path in first[1:4]:
        path.unlink()
    assert command(*flags) == first[1:4]
    assert {path: path.read_bytes() for path in first} == bytes_of
    first[4].unlink()
    with pytest.MonkeyPatch.context() as patch:
        stopped_after(1, patch)
        assert command(*flags, code=130) == []  # no unfinished picture takes a job's name
    assert command(*flags) == first[4:]
    assert first[4].read_bytes() == bytes_of[first[4]]
    rows(jobs, {"prompt": "another", "name": "cat"})
    command(*flags, code=2)
    assert "cat.png' is there, of other settings" in command.said


def test_prompts_with_a_seed_go_on_too(command: Command, tmp_path: Path) -> None:
    """Without a seed they are new pictures under the next free numbers; with one, each number's picture is decided."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    flags = ["--prompts-file", prompts, "--n", 2, "--batch-size", 3, "--seed", 40]
    first = command(*flags, "--grid")
    assert [path.name for path in first] == [*(f"{i:05d}.png" for i in range(4)), "grid-0000.png"]
    assert [recipe.read(path).request.seed for path in first[:4]] == [40, 41, 42, 43]
    bytes_of = {path: path.read_bytes() for path in first}
    first[1].unlink()
    again = command(*flags, "--grid")
    assert [path.name for path in again] == ["00001.png", "grid-0001.png"]
    assert "process 1 of 1: 1 of 4 pictures are not there yet" in command.said
    assert {path: path.read_bytes() for path in first} == bytes_of
    assert again[1].read_bytes() == bytes_of[first[4]], "the sheet shows those that were there too"
    assert [path.name for path in command(*flags[:2])] == ["00004.png", "00005.png"]
    for changed in (["--seed", 41], ["--seed", 40, "--vae", command.model]):
        command(*flags[:-2], *changed, code=2)
        assert "00000.png' is there, of other settings or inputs" in command.said


def launched(command: Command, rank: int, *flags: object, code: int = 0) -> list[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", str(rank))
        patch.setenv("WORLD_SIZE", "2")
        return command(*flags, code=code)


DIES = """
import os, runpy, signal, sys
link, written = os.link, []
def dying(*names):
    link(*names)
    written.append(names)
    if len(written) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
os.link = dying
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_two_processes_share_the_pictures(command: Command, tmp_path: Path) -> None:
    """One of them is killed while it writes; begun again, also as one process, all are those of one process."""
    prompts, shared = tmp_path / "prompts.txt", tmp_path / "shared"
    prompts.write_text("a cat\na dog\na cow\n")
    flags = ["--prompts-file", prompts, "--n", 3, "--batch-size", 2, "--seed", 7, "--precision", "fp32"]
    alone = {path.name: path.read_bytes() for path in command(*flags)}
    assert len(alone) == 9
    command.out = shared
    arguments = [str(ROOT / "scripts/txt2img.py"), "--model", str(command.model), "--out", str(shared), *flags]
    begun = [
        subprocess.Popen(
            [sys.executable, "-c", DIES, *map(str, arguments)],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": str(torch.get_num_threads())},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=120) for process in begun]
    assert [process.returncode for process in begun] == [-signal.SIGKILL] * 2, said
    there = {path.name: path.read_bytes() for path in shared.glob("*.png")}
    assert sorted(there) == [f"{i:05d}.png" for i in (0, 1, 2, 3, 4, 6)]
    assert [path.name for path in launched(command, 1, *flags)] == ["00007.png"]
    assert "process 2 of 2: 1 of 4 pictures are not there yet" in command.said
    assert "seeds" not in command.said, "the first process tells what all have in common"
    assert [path.name for path in launched(command, 0, *flags)] == ["00005.png", "00008.png"]
    assert "9 pictures, seeds 7 to 15" in command.said
    assert {path.name: path.read_bytes() for path in shared.glob("*.png")} == alone
    assert command(*flags) == []


def test_several_processes_share_what_is_decided(command: Command, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    jobs = rows(tmp_path / "jobs.jsonl", {"prompt": "a"}, {"prompt": "b"})
    file = ["--prompts-file", tmp_path / "prompts.txt"]
    for flags in (["--prompt", "a", "--seed", 1], file, [*file, "--seed", 1, "--grid"]):
        launched(command, 0, *flags, code=2)
        assert "2 processes (WORLD_SIZE in the environment) share the pictures of --jobs" in command.said
    launched(command, 2, *file, "--seed", 1, code=2)
    assert "RANK '2' of WORLD_SIZE '2'" in command.said
    assert [path.name for path in launched(command, 1, "--jobs", jobs, "--batch-size", 1)] == ["00001.png"]
    assert launched(command, 1, *file, "--seed", 1) == [], "one batch is not split"


def test_each_process_has_a_gpu(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its number on its machine; recipes then say `cuda` in all of them."""
    chosen: list[int] = []
    for name, value in {"is_available": lambda: True, "device_count": lambda: 2, "set_device": chosen.append}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    jobs = rows(tmp_path / "jobs.jsonl", {"prompt": "a"})
    for local in ("0", "1", "2"):
        monkeypatch.setenv("LOCAL_RANK", local)
        launched(command, 1, "--jobs", jobs, "--device", "cpu")
    assert chosen == [0, 1, 0]
    monkeypatch.delenv("LOCAL_RANK")
    launched(command, 1, "--jobs", jobs, "--device", "cpu")
    command("--jobs", jobs, "--device", "cpu")
    assert chosen == [0, 1, 0, 1]


def test_fp32_is_that_on_a_gpu_too(command: Command) -> None:
    """torch lets convolutions there be tf32 unless told otherwise."""
    before = torch.backends.cudnn.allow_tf32
    try:
        for precision in ("fp32", "bf16"):
            torch.backends.cudnn.allow_tf32 = precision == "fp32"
            command("--prompt", "a pear", "--steps", 1, "--precision", precision)
            assert torch.backends.cudnn.allow_tf32 is (precision == "bf16")
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_jobs_have_wildcards_too(command: Command, tmp_path: Path) -> None:
    (tmp_path / "colour.txt").write_text("red\n")
    jobs = rows(tmp_path / "jobs.jsonl", {"prompt": "a __colour__ cat"})
    (path,) = command("--jobs", jobs, "--wildcards", tmp_path)
    assert recipe.read(path).request.prompt == "a red cat" and "__" not in command.said
    path.unlink()
    (path,) = command("--jobs", jobs)
    assert recipe.read(path).request.prompt == "a __colour__ cat"
    assert "__colour__ is painted as it stands: give the folder of its lines as --wildcards" in command.said
    path.unlink()
    command("--jobs", jobs, "--plain-prompt")
    assert "as it stands" not in command.said
    command("--jobs", rows(jobs, {"prompt": "a cat", "strength": 0.5}), code=2)
    assert "strength is of a picture to start from" in command.said


def test_jobs_in_a_table(command: Command, tmp_path: Path) -> None:
    (tmp_path / "jobs.csv").write_text(
        'prompt,steps,cfg_scale,name,plain_prompt\n"a cat, red",3,2.5,x,\n"a :)",,,y,true\n'
    )
    made = [recipe.read(path).request for path in command("--jobs", tmp_path / "jobs.csv")]
    assert [(r.prompt, r.steps, r.cfg_scale, r.plain_prompt) for r in made] == [
        ("a cat, red", 3, 2.5, False),
        ("a :)", 4, 3.0, True),
    ]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "", "holds no jobs"),
        ("a.csv", "prompt,stepz\na,3\n", "job 1: unknown field 'stepz' .did you mean 'steps'"),
        ("a.csv", "prompt,steps\na,many\n", "job 1: steps is 'many'"),
        ("a.csv", "prompt,name\na,x\nb,x\n", "job 2: another has the name 'x' too"),
        ("a.jsonl", '{"prompt": "a", "name": "../x"}', "'../x' is no file's"),
        ("a.jsonl", "{", "neither CSV nor JSONL"),
        ("a.jsonl", "3", "job 1: it is '3': needs fields"),
        ("a.jsonl", '{"prompt": 3.5, "steps": "x"}', "job 1: "),
        ("absent", None, "cannot read jobs"),
    ],
)
def test_jobs_that_are_none(tmp_path: Path, name: str, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says):
        read_jobs(tmp_path / name, Request("", seed=0))


def test_jobs_go_alone(command: Command, tmp_path: Path) -> None:
    jobs = rows(tmp_path / "jobs.jsonl", {"prompt": "a"})
    command("--jobs", jobs, "--grid", code=2)
    assert "--jobs says itself" in command.said
    command("--jobs", jobs, "--prompt", "b", code=2)
    assert "not allowed with" in command.said


def test_a_preview_is_seen_on_the_way(command: Command, tmp_path: Path) -> None:
    file, seen = tmp_path / "now.png", []
    show = preview.Preview.__call__

    def watch(self: preview.Preview, number: int, x0: torch.Tensor) -> None:
        show(self, number, x0)
        seen.append((number, file.read_bytes() if file.exists() else b""))

    command.patch.setattr(preview.Preview, "__call__", watch)
    command("--prompt", "a cat", "--preview", file, "--preview-every", 2)
    assert [number for number, _ in seen] == [1, 2, 3, 4]
    assert seen[0][1] == b"" and seen[1][1] == seen[2][1] != seen[3][1]
    assert max(Pillow.open(file).size) == 256
    command("--prompt", "a cat", "--preview", tmp_path, "--preview-every", 1, code=2)
    assert "cannot write a preview" in command.said


def test_a_preview_by_another_autoencoder(command: Command, tmp_path: Path) -> None:
    command("--prompt", "a cat", "--preview", tmp_path / "a.png", "--preview-every", 1)
    command("--prompt", "a cat", "--preview", tmp_path / "b.png", "--preview-every", 1, "--preview-vae", command.model)
    assert Pillow.open(tmp_path / "b.png").size == (256, 256)
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    command("--prompt", "a cat", "--preview", tmp_path / "x.png", "--preview-vae", tmp_path / "absent", code=2)
    assert "absent" in command.said


def test_the_linear_map_shows_the_picture(painter: Pipeline) -> None:
    """Of an autoencoder whose decoder is linear in its cells, it is the decoder."""
    mix = torch.tensor([[0.3, -0.1, 0.2, 0.05], [0.1, 0.1, -0.2, 0.0], [0.0, 0.2, 0.1, -0.1]])

    class Linear(Autoencoder):
        def decode(self, latent: torch.Tensor) -> torch.Tensor:
            mixed = torch.einsum("dc,bchw->bdhw", mix, latent) + 0.1
            return mixed.repeat_interleave(2, 2).repeat_interleave(2, 3)

    look = preview.projection(Linear(painter.model.spec.autoencoder))
    latent = torch.randn(1, 4, 5, 6, generator=torch.Generator().manual_seed(1)) * 0.5
    torch.testing.assert_close(look(latent), torch.einsum("dc,bchw->bdhw", mix, latent) + 0.1, atol=0.03, rtol=0)


def test_pictures_in_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    pixels = torch.tensor([[[255, 0, 0]], [[0, 0, 255]], [[0, 255, 0]]], dtype=torch.uint8)
    text = preview.blocks(pixels)
    assert text.plain == "▀\n▀\n"
    assert [str(span.style) for span in text.spans] == ["#ff0000 on #0000ff", "#00ff00 on #00ff00"]
    show = preview.Preview(lambda x: x[:, :3], "-", 1, Console(force_terminal=False))
    show(1, torch.zeros(1, 4, 2, 2))
    assert capsys.readouterr().out == "▀▀\n\n"


def test_only_the_network_that_works_is_on_the_device(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    painter = pipeline.load(str(tiny_model), "cpu", offload=True)
    request = Request("a cat", seed=1)
    expected = painter.txt2img(request)
    where = dict.fromkeys(painter.model.modules, "cpu")
    seen = []
    painter._made = replace(painter.made, device="far")
    for name, network in painter.model.modules.items():
        monkeypatch.setattr(network, "to", lambda device, name=name: where.update({name: str(device)}))

    def spy(name: str, owner: object, method: str) -> None:
        inner = getattr(owner, method)

        def call(*arguments: object, **more: object) -> object:
            seen.append((name, sorted(n for n, device in where.items() if device == "far")))
            return inner(*arguments, **more)

        monkeypatch.setattr(owner, method, call)

    spy("text", painter.conditioner, "encode")
    spy("backbone", painter.model.backbone, "forward")
    spy("autoencoder", painter.model.autoencoder, "decode")
    assert torch.equal(painter.txt2img(request), expected)
    assert {name for name, _ in seen} == {"text", "backbone", "autoencoder"}
    assert all(there == [name] for name, there in seen)


def test_it_asks_for_something_that_goes_together(command: Command) -> None:
    command("--prompt", "a", "--preview", "x", "--preview-every", 0, code=2)
    assert "'0' is not a whole number of at least 1" in command.said
    command("--prompt", "a", "--control", "x", code=2)
    assert "--control and --control-image go together" in command.said
    command("--prompt", "a", "--control", "x", "--control-image", "x", "--offload", code=2)
    assert "--offload does not go with --control" in command.said
    command("--prompt", "a", "--compile", "--offload", code=2)
    assert "--offload does not go with --compile" in command.said
    command("--prompt", "a", "--ip-image", "x", code=2)
    assert "--ip-adapter, --ip-image and --image-tower go together" in command.said
    command("--prompt", "a", "--control", "absent:0.5", "--control-image", "absent.png", code=2)
    assert "absent" in command.said
