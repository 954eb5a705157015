"""The command: what it writes, that it can be done again to the byte, and how it refuses."""

import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm import images, pipeline, recipe

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "txt2img.py"
needs_embedded = pytest.mark.skipif(
    not (pipeline.ASSETS / "embedded.safetensors").exists(), reason="the embedded model is not in this copy yet"
)
# Any connection is an error: runs the script whole, in a process of its own.
OFFLINE = """
import runpy, socket, sys
def refuse(*_, **__): raise SystemExit("the network was asked for")
socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = socket.getaddrinfo = refuse
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Command:
    """txt2img in this process: `run(...)` returns the files it printed, `fails(...)` its one line."""

    def __init__(self, model: Path, out: Path, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        self.model, self.out, self.capsys, self.patch = str(model), out, capsys, patch
        spec = importlib.util.spec_from_file_location("txt2img", SCRIPT)
        assert spec and spec.loader
        self.script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.script)
        self.said = ""

    def run(self, *arguments: str | int, model: str = "") -> list[Path]:
        flags = ["--model", model or self.model, "--out", str(self.out), *map(str, arguments)]
        self.patch.setattr(sys, "argv", [str(SCRIPT), *flags])
        self.script.main()
        captured = self.capsys.readouterr()
        self.said = captured.err
        return [Path(line) for line in captured.out.splitlines()]

    def fails(self, *arguments: str | int, model: str = "") -> str:
        with pytest.raises(SystemExit) as stop:
            self.run(*arguments, model=model)
        captured = self.capsys.readouterr()
        assert stop.value.code == 2
        assert captured.out == ""
        lines = captured.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
        assert not list(self.out.glob("*.png"))
        return lines[0]


@pytest.fixture
def command(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Command:
    return Command(tiny_model, tmp_path / "out", capsys, monkeypatch)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pixels(path: Path) -> torch.Tensor:
    return torch.frombuffer(bytearray(Image.open(path).tobytes()), dtype=torch.uint8).int()


def test_several_prompts_and_a_grid(command: Command) -> None:
    written = command.run("--prompt", "a red apple", "a sofa", "--n", 3, "--seed", 4, "--batch-size", 2, "--grid")
    assert [path.name for path in written] == [*(f"{i:05d}.png" for i in range(6)), "grid-0000.png"]
    requests = [recipe.read(path).request for path in written[:6]]
    assert [(r.prompt, r.seed) for r in requests] == [
        (p, 4 + i) for i, p in enumerate(["a red apple"] * 3 + ["a sofa"] * 3)
    ]
    assert [(recipe.read(p).made.batch, recipe.read(p).made.row) for p in written[:6]] == [(2, 0), (2, 1)] * 3
    assert Image.open(written[-1]).size == (3 * 32 + 4, 2 * 32 + 2)
    assert "seeds 4 to 9" in command.said
    assert len({digest(path) for path in written}) == 7


def test_prompts_given_one_by_one_or_in_a_file(command: Command, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\n\nb\n")
    one_by_one = command.run("--prompt", "a", "--prompt", "b", "--seed", 1)
    command.out = tmp_path / "other"
    from_file = command.run("--prompts-file", tmp_path / "prompts.txt", "--seed", 1)
    assert [digest(p) for p in one_by_one] == [digest(p) for p in from_file]


def test_a_run_goes_on_where_the_last_one_ended(command: Command) -> None:
    first = command.run("--prompt", "a", "--grid")
    before = digest(first[0])
    second = command.run("--prompt", "b", "--grid")
    assert [p.name for p in second] == ["00001.png", "grid-0001.png"]
    assert digest(first[0]) == before


def test_without_a_seed_it_is_random_and_told(command: Command) -> None:
    a, b = (command.run("--prompt", "a")[0] for _ in range(2))
    seeds = [recipe.read(path).request.seed for path in (a, b)]
    assert seeds[0] != seeds[1]
    assert f"seed {seeds[1]}:" in command.said


def test_every_flag_reaches_the_recipe(command: Command) -> None:
    flags = ["--negative", "a dog", "--sampler", "euler_a", "--schedule", "karras", "--steps", 3, "--cfg-scale", 2.5]
    flags += [
        "--guidance",
        "rescale:0.5",
        "--seed",
        9,
        "--width",
        16,
        "--height",
        24,
        "--device",
        "cpu",
        "--precision",
        "bf16",
    ]
    (path,) = command.run("--prompt", "a red apple", *flags)
    made = recipe.read(path)
    assert made.request == recipe.Request(
        "a red apple", "a dog", 9, "euler_a", "karras", 3, 2.5, 16, 24, guidance="rescale:0.5"
    )
    assert (made.made.device, made.made.precision) == ("cpu", "bf16")
    assert made.made.model == "tiny" and len(made.made.model_hash) == 64
    assert Image.open(path).size == (16, 24)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_a"])
def test_from_image_makes_it_again_to_the_byte(command: Command, sampler: str) -> None:
    """Also a picture from the middle of a batch, whose company is not known any more."""
    flags = ["--negative", "a dog", "--sampler", sampler, "--precision", "bf16", "--seed", 3, "--batch-size", 3]
    written = command.run("--prompt", "a red apple", "a blue sofa", *flags, "--n", 2)
    for path in written:
        (again,) = command.run("--from-image", path)
        assert again != path and digest(again) == digest(path)


def test_flags_change_the_recipe_of_from_image(command: Command) -> None:
    (path,) = command.run("--prompt", "a red apple", "--seed", 3, "--steps", 2)
    again = command.run("--from-image", path, "--prompt", "a blue sofa", "--cfg-scale", 2, "--n", 2)
    assert [recipe.read(p).request.seed for p in again] == [3, 4]
    assert recipe.read(again[0]).request == recipe.Request(
        "a blue sofa", "", 3, "dpmpp_2m", "trailing", 2, 2.0, 32, 32, guidance=""
    )


def test_from_image_wants_the_model_it_was_made_with(command: Command, tmp_path: Path) -> None:
    (path,) = command.run("--prompt", "a red apple", "--seed", 3)
    other = tmp_path / "embedded.safetensors"
    model = pipeline.load(command.model, "cpu").model
    next(model.autoencoder.parameters()).data.add_(0.5)
    pipeline.native.save(other, model.spec, model.modules)
    command.patch.setattr(pipeline, "ASSETS", tmp_path)
    command.patch.setattr(sys, "argv", [str(SCRIPT), "--from-image", str(path), "--out", str(command.out)])
    with pytest.raises(SystemExit) as stop:
        command.script.main()
    assert stop.value.code == 2
    assert "was made with the model 'tiny'" in command.capsys.readouterr().err
    (again,) = command.run("--from-image", path, model=str(other))
    assert digest(again) != digest(path)


def test_a_picture_is_the_same_alone_and_in_a_batch(command: Command) -> None:
    together = command.run("--prompt", "a red apple", "--n", 3, "--seed", 5)
    (alone,) = command.run("--prompt", "a red apple", "--seed", 6)
    assert (pixels(together[1]) - pixels(alone)).abs().max() <= 1


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "nothing to paint"),
        (["--prompt"], "expected at least one argument"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a", "--promt", "b"], "did you mean '--prompt'"),
        (["--prompt", "a", "--sampler", "euler_b"], "did you mean 'euler_a'"),
        (["--prompt", "a", "--schedule", "karas"], "did you mean 'karras'"),
        (["--prompt", "a", "--steps", "0"], "steps is 0"),
        (["--prompt", "a", "--steps", "many"], "'many'"),
        (["--prompt", "a", "--width", "30"], "multiple of 4, which this model needs: try 28 or 32"),
        (["--prompt", "a", "--height", "-32"], "height is -32"),
        (["--prompt", "a", "--n", "0"], "--n: '0' is not a whole number of at least 1"),
        (["--prompt", "a", "--batch-size", "0"], "--batch-size: '0'"),
        (["--prompt", "a", "--cfg-scale", "nan"], "cfg scale is nan"),
        (["--prompt", "a", "--seed", "-1"], "seed is -1"),
        (["--prompt", "a", "--seed", str(2**63 - 1), "--n", "2"], "seed is 9223372036854775808"),
        (["--prompt", "a", "--device", "gpu"], "device 'gpu' cannot be used here"),
        (["--prompt", "a", "--precision", "fp8"], "unknown precision 'fp8'"),
        (["--prompts-file", "absent.txt"], "cannot read prompts from 'absent.txt'"),
        (["--prompts-file", os.devnull], "holds no prompt"),
        (["--prompts-file", "x", "--prompt", "a"], "not allowed with"),
        (["--from-image", "absent.png"], "cannot read 'absent.png'"),
        (["--from-image", str(SCRIPT)], "as a picture"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_2(command: Command, flags: list[str], says: str) -> None:
    assert says in command.fails(*flags)


def test_a_picture_without_a_recipe(command: Command, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(images.png(torch.zeros(2, 2, 3, dtype=torch.uint8), {"parameters": "a cat"}))
    assert "holds no recipe" in command.fails("--from-image", tmp_path / "x.png")


def test_a_picture_of_another_program_is_painted_by_its_settings(command: Command, tmp_path: Path) -> None:
    fields = "Steps: 3, Sampler: Euler a, CFG scale: 2, Seed: 7, Size: 16x24, Model: x"
    text = f"a (red:1.2) apple\nNegative prompt: dog\n{fields}"
    (tmp_path / "x.png").write_bytes(images.png(torch.zeros(2, 2, 3, dtype=torch.uint8), {"parameters": text}))
    command.patch.setattr(pipeline, "ASSETS", Path(command.model).parent)
    command.patch.setattr(pipeline, "EMBEDDED", "tiny")
    command.patch.setattr(
        sys, "argv", [str(SCRIPT), "--from-image", str(tmp_path / "x.png"), "--out", str(command.out)]
    )
    command.script.main()
    said = command.capsys.readouterr()
    assert "the picture is AUTOMATIC1111's, of the model 'x': it will be another one" in said.err
    made = recipe.read(said.out.strip())
    assert made.request == recipe.Request(
        "a (red:1.2) apple", "dog", 7, "euler_a", "linspace", 3, 2.0, 16, 24, guidance=""
    )
    assert (made.made.program, made.made.model) == ("", "tiny")


def test_out_is_a_file(command: Command, tmp_path: Path) -> None:
    command.out.write_text("mine")
    assert "cannot write pictures to" in command.fails("--prompt", "a")
    assert command.out.read_text() == "mine"


def test_models_that_are_none(command: Command, tmp_path: Path) -> None:
    whole = Path(command.model).read_bytes()
    files = {
        "text": b"hello, I am a model",
        "empty": b"",
        "head": whole[:100],
        "cut": whole[:-100],
        "length": (2**62).to_bytes(8, "little") + whole[8:],
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert "is not a whole safetensors file" in command.fails("--prompt", "a", model=str(tmp_path / name)), name
    save_file({"x": torch.zeros(2)}, tmp_path / "foreign")
    assert "of no kind known here" in command.fails("--prompt", "a", model=str(tmp_path / "foreign"))
    assert "no model 'absent'" in command.fails("--prompt", "a", model="absent")
    assert "no model" in command.fails("--prompt", "a", model=str(tmp_path))


def process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", OFFLINE, str(SCRIPT), *arguments], cwd=cwd, capture_output=True, text=True, timeout=120
    )


def test_whole_command_without_a_network(tiny_model: Path, tmp_path: Path) -> None:
    done = process("--prompt", "a red apple", "--seed", "1", "--model", str(tiny_model), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "outputs/00000.png\n"
    assert "Traceback" not in done.stderr and "\x1b" not in done.stderr
    again = process("--from-image", "outputs/00000.png", "--model", str(tiny_model), cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert digest(tmp_path / "outputs/00000.png") == digest(tmp_path / "outputs/00001.png")


@needs_embedded
def test_embedded_model_paints_offline_with_no_other_flag(tmp_path: Path) -> None:
    done = process("--prompt", "a red apple", "--seed", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "outputs/00000.png") as picture:
        assert picture.size == (128, 128)
        spread = [high - low for low, high in picture.getextrema()]
    assert max(spread) > 60
    again = process("--from-image", "outputs/00000.png", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert digest(tmp_path / "outputs/00000.png") == digest(tmp_path / "outputs/00001.png")


def test_only_what_the_path_needs_is_imported(tmp_path: Path) -> None:
    heavy = "accelerate webdataset pyarrow tensorboard diffusers scipy matplotlib tyro fsspec"
    code = f"import sys, ldm.pipeline; print([m for m in '{heavy}'.split() if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_help_is_there_before_torch(tmp_path: Path) -> None:
    code = OFFLINE.replace("runpy.run_path", "sys.modules['torch'] = None\nrunpy.run_path")
    done = subprocess.run(
        [sys.executable, "-c", code, str(SCRIPT), "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    for flag in ("--prompt", "--from-image", "--cfg-scale", "--grid"):
        assert flag in done.stdout


def test_a_picture_to_start_from(command: Command, tmp_path: Path) -> None:
    """Its size is kept, its recipe made again with the same picture, and the flags that need it say so."""
    Image.effect_noise((30, 22), 90).convert("RGB").save(tmp_path / "first.png")
    Image.new("L", (15, 22), 255).save(tmp_path / "half.png")
    first = ["--init-image", tmp_path / "first.png"]
    (path,) = command.run("--prompt", "a", "--seed", 3, *first, "--strength", 0.5)
    assert Image.open(path).size == (30, 22)
    made = recipe.read(path)
    assert made.request.strength == 0.5 and len(made.made.inputs["canvas"]) == 64
    (again,) = command.run("--from-image", path, *first)
    assert digest(again) == digest(path)
    (grown,) = command.run("--prompt", "a", *first, "--expand", 4)
    assert Image.open(grown).size == (38, 30)
    (scaled,) = command.run("--prompt", "a", *first, "--width", 16)
    assert Image.open(scaled).size == (16, 22)
    for old in (path, again, grown, scaled):
        old.rename(tmp_path / old.name)
    old = tmp_path / path.name
    assert "give that as --init-image" in command.fails("--from-image", old)
    assert "give it as --init-image" in command.fails("--prompt", "a", "--mask", old)
    assert "mask" in command.fails("--prompt", "a", *first, "--mask", tmp_path / "half.png")
    assert "cannot read" in command.fails("--prompt", "a", "--init-image", SCRIPT)
    assert "strength is of a picture" in command.fails("--prompt", "a", "--strength", 0.5)


def test_what_else_goes_into_a_picture(command: Command, tmp_path: Path) -> None:
    """Embeddings and LoRAs are told of, are in the recipe, and must be given to make the picture again."""
    torch.manual_seed(0)
    save_file({"emb_params": torch.randn(2, 16)}, tmp_path / "style.safetensors")
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    halves = {f"{name}.lora_down.weight": torch.randn(2, 32), f"{name}.lora_up.weight": torch.randn(32, 2)}
    save_file(halves, tmp_path / "low.safetensors")
    (tmp_path / "colour.txt").write_text("red\nblue\n")
    extra = ["--embedding", tmp_path / "style.safetensors", "--lora", f"{tmp_path / 'low.safetensors'}:0.5"]
    wild = ["--wildcards", tmp_path, "--seed", 3]
    (path,) = command.run("--prompt", "a __colour__ cat, style", *extra, *wild)
    assert "lora low at 0.5: 1 weights changed" in command.said and "tokens:" in command.said
    made = recipe.read(path)
    assert made.request.prompt in ("a red cat, style", "a blue cat, style")
    assert set(made.made.inputs) == {"embedding style", "lora low:0.5"}
    (plain,) = command.run("--prompt", made.request.prompt, "--seed", 3)
    (without,) = command.run("--prompt", made.request.prompt, "--seed", 3, *extra[2:])
    assert len({digest(path), digest(plain), digest(without)}) == 3
    command.patch.setattr(pipeline, "ASSETS", Path(command.model).parent)
    command.patch.setattr(pipeline, "EMBEDDED", "tiny")
    for arguments, code in (([], 2), (extra, None)):
        command.patch.setattr(
            sys, "argv", [str(SCRIPT), "--from-image", str(path), "--out", str(command.out), *map(str, arguments)]
        )
        if code is None:
            command.script.main()
            assert digest(Path(command.capsys.readouterr().out.strip())) == digest(path)
        else:
            with pytest.raises(SystemExit):
                command.script.main()
            assert "was made with the embedding style" in command.capsys.readouterr().err
