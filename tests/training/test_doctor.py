"""Each planted fault is found before the first step, in one line; a run that is well is said to be."""

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from ldm import config
from ldm.checkpoints import native
from ldm.data.shards import write_manifest, write_shard
from ldm.training import doctor, memory
from ldm.training.config import LdmRun, VaeRun
from ldm.training.loop import train
from ldm.training.tasks.denoising import DenoisingTask

ROOT = Path(__file__).parents[2]
SHARDS = ROOT / "tests/assets/shards"
Make = Callable[..., LdmRun]


@pytest.fixture
def tiny() -> Make:
    """configs/tiny/ldm.yaml over the shards of the tests, with overrides."""
    path = ROOT / "configs/tiny/ldm.yaml"
    return lambda *words: config.load(LdmRun, path, ["--data.shards", f"{SHARDS}/{{00000..00001}}.tar", *words])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prediction of memory takes a second."""
    monkeypatch.setattr(memory, "predict", lambda *_: memory.Memory(10**6, 0, 10**6, 10**6, 10**7))


# What is planted, by how many processes it is run, and what is found.
SETTINGS: dict[str, tuple[list[str], int, str]] = {
    "a batch that cannot be shared": ([], 3, "run.batch_size 16 cannot be shared evenly by 3 processes"),
    "a batch that cannot be cut": (["--optim.accumulate", "5"], 1, "optim.accumulate 5: take a multiple of 5"),
    "shards that are not there": (["--data.shards", "nowhere/{0..3}.tar"], 1, "shard 'nowhere/0.tar' is not there"),
    "no shards": (["--data.shards", ""], 1, "data.shards: no shards match"),
    "less than a batch": (["--run.batch_size", "64"], 1, "hold 60 samples, less than one run.batch_size 64"),
    "validation on what is seen": (["--data.validation", f"{SHARDS}/{{00000..00001}}.tar"], 1, "hold others back"),
    "no rate": (["--optim.lr", "0"], 1, "nothing will move"),
    "a rate far too high": (["--optim.lr", "2"], 1, "hardly ever stands more than 0.02"),
    "a warmup without end": (["--optim.warmup", "200"], 1, "optim.warmup 200 is not over in 200 steps"),
    "an average of the start": (["--run.ema", "{decay: 0.9999, warmup: false}"], 1, "holds 98% of the first weights"),
    "no save before the end": (["--run.checkpoint_every", "1000"], 1, "saves only at step 200"),
    "a tracker that is not there": (["--run.trackers", "[tensorboard, notracker]"], 1, "pip install notracker"),
    "fp16 on a CPU": (["--run.precision", "fp16"], 1, "run.precision fp16 needs a GPU"),
    "tf32 on a CPU": (["--run.precision", "tf32"], 1, "run.precision tf32 is one of GPUs"),
    "eps with zero SNR": (["--schedule.zero_snr", "true", "--prediction", "eps"], 1, "take v or x0"),
    "zero SNR that is not sampled": (
        ["--schedule.zero_snr", "true", "--defaults.schedule", "karras"], 1, "take trailing, which begins at pure noise"
    ),
    "guidance without dropout": (["--loss.caption_dropout", "0"], 1, "no prediction to guide away from"),
    "too much dropout": (["--loss.caption_dropout", "0.9"], 1, "hides most captions"),
}  # fmt: skip


def test_mixtures_and_plain_folders_are_looked_into_like_other_shards(tiny: Make, tmp_path: Path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "photos/0.png")
    words = ["--data.copies", str(tmp_path / "copies"), "--data.shards"]
    both = [*words, f"{SHARDS}:0.5,{tmp_path / 'photos'}:0.5"]
    assert not [*doctor.shards(tiny(*both, "--data.caption", "a thing"), 1)]
    (found,) = doctor.shards(tiny(*both), 1)
    assert "give each a .txt, or all of them data.caption" in found


@pytest.mark.parametrize("name", SETTINGS)
def test_a_fault_of_the_settings_is_found(name: str, tiny: Make):
    if torch.cuda.is_available() and "on a CPU" in name:
        pytest.skip("here is a GPU")
    words, processes, line = SETTINGS[name]
    found = [found for check in doctor.CHECKS for found in check(tiny(*words), processes)]
    assert any(line in one for one in found), found
    assert len(found) == 1
    assert all("\n" not in one for one in found)


def test_a_run_that_is_well(tiny: Make, tmp_path: Path):
    assert doctor.examine(tiny(), tmp_path / "run") == []
    path, words = ROOT / "configs/tiny/vae.yaml", ["--data.shards", f"{SHARDS}/{{00000..00001}}.tar"]
    assert doctor.examine(config.load(VaeRun, path, words), None) == []


def copied(to: Path) -> Path:
    shutil.copytree(SHARDS, to)
    return to / "00000.tar"


@pytest.mark.parametrize("how", ["a flipped bit", "cut short"])
def test_damaged_shards(how: str, tiny: Make, tmp_path: Path):
    path = copied(tmp_path / "shards")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if how == "a flipped bit" else data[:-1000])
    settings = tiny("--data.shards", f"{tmp_path}/shards/{{00000..00001}}.tar")
    (line,) = [line for check in doctor.CHECKS for line in check(settings, 1)]
    assert "00000.tar" in line and ("another sha256" in line or "its manifest says" in line)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("text", "line"), [("", "captions looked at are empty"), ("a thing", "are 'a thing': nothing")]
)
def test_captions_that_say_nothing(text: str, line: str, tiny: Make, tmp_path: Path):
    picture = doctor.Shards(str(SHARDS / "00000.tar")).sample(0, 0).image
    samples = [(f"{i:05d}", {"webp": picture, "json": json.dumps({"captions": [text]}).encode()}) for i in range(20)]
    write_manifest(tmp_path, [write_shard(tmp_path / "0.tar", samples)])
    found = doctor.examine(tiny("--data.shards", str(tmp_path / "0.tar")), None)
    assert any(line in one for one in found), found


@pytest.mark.usefixtures("small")
def test_latents_on_another_scale(tiny: Make, tmp_path: Path):
    model = native.load(ROOT / "ldm/assets/embedded.safetensors")
    values = model.spec.autoencoder
    for std, mean in ((0.18215, 0.0), (1.0, 20.0)):
        wrong = replace(values, std=tuple(s * std for s in values.std), mean=tuple(m + mean for m in values.mean))
        native.save(tmp_path / "wrong.safetensors", native.ModelSpec(wrong, 128), {"autoencoder": model.autoencoder})
        (line,) = doctor.examine(tiny("--autoencoder", str(tmp_path / "wrong.safetensors")), None)
        assert "not 0 and 1" in line and "wrong.safetensors" in line


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--text.train", "false"], "text.weights"),
        (["--text.weights", "MODEL"], "tower"),
        (["--backbone.context_dim", "32"], "backbone.context_dim is 32"),
        (["--data.size", "60"], "data.size 60 is not a multiple"),
        (["--weights", "nowhere.safetensors"], "nowhere.safetensors"),
    ],
)
def test_parts_that_do_not_fit(words: list[str], line: str, tiny: Make, tiny_model: Path):
    (found,) = doctor.examine(tiny(*[str(tiny_model) if word == "MODEL" else word for word in words]), None)
    assert line in found


@pytest.mark.usefixtures("small")
def test_too_little_room(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "free", lambda _: 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4 * 10**6))
    first, second = doctor.examine(tiny(), tmp_path / "new/run")
    assert "a step needs 13.0 MB of memory, 1.0 MB are free" in first
    assert "3 checkpoints of 3.0 MB do not fit on the disk" in second
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=20 * 10**6))
    assert len(doctor.examine(tiny(), tmp_path)) == 1
    assert len(doctor.examine(tiny("--run.keep_every", "10"), tmp_path)) == 2


@pytest.mark.usefixtures("small")
def test_a_folder_of_another_run(ldm: Make, tmp_path: Path):
    settings = ldm("--run.steps", "1")
    train(DenoisingTask(settings), settings, tmp_path)
    found = doctor.examine(ldm("--run.steps", "1", "--optim.betas", "[0.5, 0.5]"), tmp_path)
    assert any("was started otherwise: optim.betas" in line for line in found)
    assert not any("was started otherwise" in line for line in doctor.examine(settings, tmp_path))


@pytest.mark.usefixtures("small")
def test_the_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["doctor.py", *words, "--data.shards", f"{SHARDS}/{{00000..00001}}.tar"])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "scripts/doctor.py"), run_name="__main__")
        return int(end.value.code or 0), *capsys.readouterr()

    vae, ldm = (str(ROOT / f"configs/tiny/{kind}.yaml") for kind in ("vae", "ldm"))
    assert run(vae) == (0, "all is well\n", "")
    code, out, _ = run(ldm, "--processes", "3", "--loss.caption_dropout", "0")
    assert code == 1 and out.count("\n- ") == 1 and out.startswith("- ") and out.endswith("2 found\n")
    tuned = ROOT / "configs/tune"
    for name in ("lora", "distil", "controlnet", "inversion"):
        code, out, error = run(str(tuned / f"{name}.yaml"))
        assert (code, error) == (int(name == "inversion"), "")
        assert "no caption holds inversion.token" in out if name == "inversion" else out == "all is well\n"
    for path, field in ((vae, "statisticss"), (ldm, "predictionn")):
        code, _, error = run(path, f"--{field}", "1")
        assert code == 2 and f"unknown field '{field}' (did you mean" in error
