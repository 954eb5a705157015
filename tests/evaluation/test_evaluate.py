"""scripts/evaluate.py as a person runs it: every metric of a tiny model, again after a stop, over two processes."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.checkpoints import native
from ldm.evaluation.inception import Inception
from ldm.evaluation.judge import Judge, JudgeSpec
from ldm.evaluation.store import Found
from ldm.evaluation.suite import METRICS
from ldm.families.vae import load_vae
from ldm.files import sha256
from ldm.models.perceptual import LPIPS
from ldm.text.open_clip import _torchvision_operators

ROOT = Path(__file__).parents[2]
SHARD = str(ROOT / "tests/assets/shards/00001.tar")
ALL = "fid,kid,is,pr,dc,diversity,judge,neighbours,rfid,psnr,ssim,lpips"
PROMPTS = "seen: [an apple, a red car]\nnew: [a blue heart, a red apple]\n"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, random_inception: Path) -> dict[str, str]:
    """Flags for networks with random weights."""
    folder = tmp_path_factory.mktemp("networks")
    rng = torch.Generator().manual_seed(0)
    lpips = {key: torch.rand(value.shape, generator=rng) * 0.02 for key, value in LPIPS("alex").state_dict().items()}
    heads = [key for key in lpips if key.startswith("heads")]
    lpips |= {f"lin{i}.model.1.weight": lpips.pop(key)[None, :, None, None] for i, key in enumerate(heads)}
    save_file(lpips, folder / "lpips.safetensors")
    names = {"apple": "apple", "car": "car", "heart": "heart"}
    accuracy = {"name": 0.5, "names": 4.0, "colour": 1.0, "colours": 3.0}
    spec = JudgeSpec(names, sha256(random_inception), 75, pairs={"apple": ("red",)}, accuracy=accuracy)
    torch.manual_seed(0)
    Judge(spec).save(folder / "judge.safetensors")
    (folder / "prompts.yaml").write_text(PROMPTS)
    return {"--inception": str(random_inception)} | {
        f"--{what}": str(folder / f"{what}.{kind}")
        for what, kind in {"lpips": "safetensors", "judge": "safetensors", "prompts": "yaml"}.items()
    }


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures of the committed shard, 32 pixels a side, with a caption each."""
    folder, found = tmp_path_factory.mktemp("pictures"), Found(SHARD, 32, 8)
    for number, (pixels, text) in enumerate(zip(found.read(range(8)), found.texts, strict=True)):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(text)
    return folder


@pytest.fixture
def evaluate(
    weights: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Runs the script in this process: its exit code, its JSON, and what it said on stderr."""

    def run(*arguments: Any) -> tuple[int, dict[str, Any], str]:
        flags = [*map(str, arguments), *[part for pair in weights.items() for part in pair]]
        flags += [
            "--out",
            str(tmp_path / "out"),
            "--work",
            str(tmp_path / "work"),
            "--device",
            "cpu",
            "--batch-size",
            "4",
        ]
        monkeypatch.setattr(sys, "argv", ["scripts/evaluate.py", *flags])
        monkeypatch.chdir(ROOT)
        code = 0
        try:
            runpy.run_path("scripts/evaluate.py", run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
        path = tmp_path / "out/evaluation.json"
        return code, json.loads(path.read_text()) if path.is_file() else {}, capsys.readouterr().err

    return run


def painted(tiny_model: Path, pictures: Path, *more: Any) -> list[Any]:
    return ["--model", tiny_model, "--data", pictures, "--rounds", 5, "--set", "steps=2", *more]


def test_every_metric(evaluate, tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    arguments = painted(tiny_model, pictures, "--train", pictures, "--train-n", 7, "--per-prompt", 2, "--n", 7)
    code, result, said = evaluate(*arguments, "--metrics", ALL, "--sweep", "cfg_scale=1,2")
    assert code == 0, said
    figures = result["metrics"]
    groups = {f"{what}_{group}" for what in ("accuracy", "name", "colour") for group in ("seen", "new")}
    several = {"inception_score", "precision", "recall", "density", "coverage"} | groups
    several |= {"nearest_train", "nearest_train_of_held_back", "copied"}
    assert set(figures) == several | {"fid", "kid", "diversity", "rfid", "psnr", "ssim", "lpips"}
    assert all(one["low"] - 1e-9 <= one["value"] <= one["high"] + 1e-9 for one in figures.values())
    counts = {name: one["n"] for name, one in figures.items()}
    assert (counts["fid"], counts["psnr"], counts["diversity"], counts["accuracy_new"]) == (7, 8, 4, 4)
    assert (counts["precision"], counts["recall"]) == (7, 8)
    assert figures["nearest_train_of_held_back"]["value"] < figures["nearest_train"]["value"]  # train is data, but one
    assert len(result["verdicts"]) == 8 and result["judge"]["names"] == 4
    assert result["notes"] == ["not new, for the corpus shows them: a red apple"]
    assert [point["cfg_scale"] for point in result["sweeps"]["cfg_scale"]] == [1, 2]
    assert result["sweeps"]["cfg_scale"][0]["fid"]["value"] != result["sweeps"]["cfg_scale"][1]["fid"]["value"]

    page = (tmp_path / "out/evaluation.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page) and "Over cfg_scale" in page and "<svg" in page
    # 8 of prompts, 7 of captions, 8 real, 8 reconstructed, 7 rows of neighbours
    assert page.count("<img") == 8 + 7 + 8 + 8 + 7 * 5
    assert len(re.findall('class="(?:right|wrong)"', page)) == 8

    # stopped and run again: nothing is lost, and the figures are the same to the last digit
    for path in sorted((tmp_path / "work").rglob("*.safetensors"))[::3]:
        path.unlink()
    assert evaluate(*arguments, "--metrics", ALL, "--sweep", "cfg_scale=1,2")[1] == result


def test_what_was_made_is_not_made_again(evaluate, tiny_model: Path, pictures: Path, monkeypatch) -> None:
    arguments = painted(tiny_model, pictures, "--metrics", "kid")
    first = evaluate(*arguments)[1]
    monkeypatch.setattr(Inception, "forward", lambda *_: pytest.fail("the features are kept"))
    assert evaluate(*arguments)[1] == first


def test_ready_pictures(evaluate, pictures: Path, tmp_path: Path) -> None:
    for number, text in enumerate(["an apple", "an apple", "a red car"]):
        (tmp_path / f"ready/{number}.png").parent.mkdir(exist_ok=True)
        (tmp_path / f"ready/{number}.png").write_bytes((pictures / f"{number}.png").read_bytes())
        (tmp_path / f"ready/{number}.txt").write_text(text)
    code, result, said = evaluate(
        "--images", tmp_path / "ready", "--data", pictures, "--metrics", "kid,diversity,judge"
    )
    assert code == 0, said
    assert result["metrics"]["kid"]["n"] == 3 and result["metrics"]["diversity"]["n"] == 1
    assert [one["prompt"] for one in result["verdicts"]] == ["an apple", "an apple", "a red car"]
    assert result["metrics"]["accuracy_seen"]["n"] == 3
    fewer = evaluate("--images", pictures, "--data", pictures, "--metrics", "kid", "--n", 5)[1]
    assert fewer["metrics"]["kid"]["n"] == 5


def test_an_autoencoder_alone(evaluate, tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    vae = load_vae(tiny_model)
    native.save(tmp_path / "vae.safetensors", native.ModelSpec(vae.config, 32), {"autoencoder": vae})
    arguments = ["--model", tmp_path / "vae.safetensors", "--data", pictures, "--rounds", 5]
    code, result, said = evaluate(*arguments, "--metrics", "psnr,ssim")
    assert code == 0, said
    again = vae.decode(vae.encode(target := Found(str(pictures)).read(range(8)) / 127.5 - 1).mode)
    error = (again.clamp(-1, 1) - target).square().mean((1, 2, 3))
    assert result["metrics"]["psnr"]["value"] == pytest.approx((10 * (4 / error).log10()).mean().item(), abs=1e-3)
    assert evaluate(*arguments, "--metrics", "judge")[0] == 2


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny CLIP's weights and config."""
    folder = tmp_path_factory.mktemp("clip")
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    (folder / "tiny-clip.json").write_text(json.dumps({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}))
    from ldm.text.open_clip import open_clip

    open_clip().add_model_config(folder / "tiny-clip.json")
    torch.manual_seed(0)
    save_file(open_clip().create_model("tiny-clip", load_weights=False).state_dict(), folder / "clip.safetensors")
    return folder / "clip.safetensors", folder / "tiny-clip.json"


def test_clip_score(evaluate, pictures: Path, clip: tuple[Path, Path], tmp_path: Path) -> None:
    from ldm.text.open_clip import open_clip

    arguments = ["--images", pictures, "--metrics", "clip", "--clip", clip[0], "--clip-model", clip[1]]
    code, result, said = evaluate(*arguments)
    assert code == 0, said
    network = open_clip().create_model("tiny-clip", load_weights=False).eval()
    from safetensors.torch import load_file

    network.load_state_dict(load_file(clip[0]))
    found = Found(str(pictures))
    mean, std = (torch.tensor(v)[:, None, None] for v in (network.visual.image_mean, network.visual.image_std))
    with torch.no_grad():
        shown, said_, _ = network(
            (found.read(range(8)) / 255 - mean) / std, open_clip().get_tokenizer("tiny-clip")(found.texts)
        )
    expected = 100 * (shown * said_).sum(1).clamp(min=0).mean()
    assert result["metrics"]["clip"]["value"] == pytest.approx(expected.item(), abs=1e-4)
    torch.save(load_file(clip[0]), tmp_path / "clip.pt")  # a pickle is read, and not run
    again = evaluate(*arguments[:5], tmp_path / "clip.pt", *arguments[6:])[1]
    assert again["metrics"] == result["metrics"]
    (pictures / "7.txt").rename(pictures / "7.kept")
    assert "needs a text for each picture" in evaluate(*arguments)[2]
    (pictures / "7.kept").rename(pictures / "7.txt")
    assert "no model 'VIT'" in evaluate(*arguments[:-1], "VIT")[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "x", "--metrics", "fidd", "--data", "x"], "unknown metric 'fidd' (did you mean 'fid'?)"),
        (["--metrics", "fid"], "give either a model"),
        (["--model", "x", "--images", "y"], "give either a model"),
        (["--images", "x", "--metrics", "rfid", "--data", "x"], "measures an autoencoder"),
        (["--model", "x", "--metrics", "kid"], "needs --data"),
        (["--model", "x", "--metrics", "clip"], "needs --clip"),
        (["--model", "x", "--metrics", "neighbours"], "needs --train"),
        (["--model", "x", "--data", "x", "--sweep", "stepps=1"], "'stepps' (did you mean 'steps'?)"),
        (["--model", "x", "--data", "x", "--sweep", "steps=many"], "write it as steps=4,8,16"),
        (["--model", "x", "--data", "x", "--set", "steps=1,2"], "--sweep takes several"),
        (["--model", "nowhere", "--metrics", "judge"], "no model 'nowhere'"),
        (["--images", "nowhere", "--metrics", "is"], "'nowhere' is not there"),
    ],
)
def test_one_line_for_a_mistake(evaluate, arguments: list[str], message: str) -> None:
    code, _, said = evaluate(*arguments)
    assert code == 2 and message in said and said.startswith("error: ") and said.count("\n") == 1


def test_too_few_pictures_and_bad_prompts(evaluate, pictures: Path, tiny_model: Path, tmp_path: Path, weights) -> None:
    kept, path = Path(weights["--prompts"]).read_text(), Path(weights["--prompts"])
    assert "paint more" in evaluate(*painted(tiny_model, pictures, "--metrics", "pr", "--n", 3))[2]
    for text, message in {
        "[a, b]": "must hold groups",
        "seen: [a tree]": "knows no name in the prompt 'a tree'",
        "{": "cannot read prompts",
    }.items():
        path.write_text(text)
        assert message in evaluate(*painted(tiny_model, pictures, "--metrics", "judge", "--per-prompt", 1))[2]
    path.write_text("seen: [an apple]")
    assert (
        "two pictures or more"
        in evaluate(*painted(tiny_model, pictures, "--metrics", "diversity", "--per-prompt", 1))[2]
    )
    path.write_text(kept)


@pytest.mark.parametrize(("metric", "missing"), [("fid", "inception"), ("diversity", "lpips"), ("judge", "judge")])
def test_missing_weights_are_named_before_anything_is_painted(
    evaluate, tiny_model: Path, pictures: Path, weights, tmp_path: Path, monkeypatch, metric: str, missing: str
) -> None:
    monkeypatch.setitem(weights, f"--{missing}", str(tmp_path / "nowhere"))
    code, _, said = evaluate(*painted(tiny_model, pictures, "--metrics", metric))
    assert code == 2 and "nowhere" in said and said.count("\n") == 1
    assert not [*(tmp_path / "work").rglob("*.safetensors")]


def test_a_judge_of_other_features_is_refused(
    evaluate, pictures: Path, weights: dict[str, str], tmp_path: Path
) -> None:
    Judge(JudgeSpec({"apple": "apple"}, "0" * 64)).save(tmp_path / "judge.safetensors")
    kept = weights["--judge"]
    weights["--judge"] = str(tmp_path / "judge.safetensors")
    assert "was trained on other features" in evaluate("--images", pictures, "--metrics", "judge")[2]
    weights["--judge"] = kept


def test_every_metric_is_in_the_test_of_all() -> None:
    assert {*ALL.split(","), "clip"} == set(METRICS)


@pytest.mark.slow
def test_equals_torch_fidelity_on_folders(evaluate, pictures: Path, tmp_path: Path, random_inception: Path) -> None:
    """FID and the Inception score of two fixed folders, from the files to the figure."""
    _torchvision_operators()
    import torch_fidelity
    from safetensors.torch import load_file
    from torch_fidelity import feature_extractor_inceptionv3 as module

    other = tmp_path / "other"
    other.mkdir()
    found = Found(SHARD, 32, 24)
    for number, pixels in enumerate(found.read(range(24))[1::2]):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(other / f"{number}.png")
    code, result, said = evaluate("--images", pictures, "--data", other, "--metrics", "fid,is", "--rounds", 0)
    assert code == 0, said
    with pytest.MonkeyPatch.context() as patch:
        bias = {"fc.bias": torch.zeros(1008)}
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: bias | load_file(random_inception))
        wanted = {"fid": True, "isc": True, "isc_splits": 1, "cuda": False, "verbose": False}
        theirs = torch_fidelity.calculate_metrics(input1=str(pictures), input2=str(other), **wanted)
    for ours, name in {"fid": "frechet_inception_distance", "inception_score": "inception_score_mean"}.items():
        assert result["metrics"][ours]["value"] == pytest.approx(theirs[name], rel=1e-3), ours


def command(arguments: list[Any], weights: dict[str, str], folder: Path, *launcher: str) -> list[str]:
    flags = [*map(str, arguments), *[part for pair in weights.items() for part in pair], "--device", "cpu"]
    where = ["--out", str(folder / "out"), "--work", str(folder / "work"), "--batch-size", "2"]
    return [sys.executable, *launcher, "scripts/evaluate.py", *flags, *where]


@pytest.mark.slow
def test_two_processes_and_a_kill_change_nothing(
    weights: dict[str, str], tiny_model: Path, pictures: Path, tmp_path: Path
) -> None:
    arguments = painted(tiny_model, pictures, "--metrics", "fid,kid,pr,diversity,judge", "--per-prompt", 2)
    surroundings = os.environ | {"OMP_NUM_THREADS": "1"}
    run = {"cwd": ROOT, "env": surroundings, "check": True, "timeout": 500}
    subprocess.run(command(arguments, weights, tmp_path / "one"), **run)
    two = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29713", "--"]
    subprocess.run(command(arguments, weights, tmp_path / "two", *two), **run)
    killed = command(arguments, weights, tmp_path / "killed")
    process = subprocess.Popen(killed, cwd=ROOT, env=surroundings)
    while len(list((tmp_path / "killed").rglob("*.safetensors"))) < 5:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed/out").exists()
    subprocess.run(killed, **run)
    one, other, third = (
        json.loads((tmp_path / f"{n}/out/evaluation.json").read_text()) for n in ("one", "two", "killed")
    )
    assert one == third
    assert one["verdicts"] == other["verdicts"]
    for name, figure in one["metrics"].items():
        assert other["metrics"][name] == pytest.approx(figure, rel=1e-5), name
