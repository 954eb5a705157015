"""The whole way as a person goes it, by the scripts: pictures, shards, autoencoder, diffusion model, a picture."""

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
SHORT = ["--run.steps", "12", "--run.batch_size", "4", "--run.validate_on", "4", "--run.log_every", "6"]


def run(script: str, *arguments: str | Path) -> list[str]:
    """Run a script from a folder that is not the repository's; its lines on stdout."""
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_from_pictures_to_a_picture(tmp_path: Path) -> None:
    data, vae, ldm, out = (tmp_path / name for name in ("data", "vae", "ldm", "out"))
    run(
        "prepare_data.py",
        ROOT / "tests/assets/shards",
        "--out",
        data,
        "--size",
        "32",
        "--holdout",
        "0.1",
        "--shard-size",
        "30",
    )
    shards = [
        "--data.shards",
        f"{data}/{{00000..00001}}.tar",
        "--data.validation",
        f"{data}/val/00000.tar",
        "--data.size",
        "32",
    ]
    assert json.loads((data / "report.json").read_text())["samples"] > 40

    gan = ["--loss.adversarial_start", "6", "--statistics", "8"]
    run("train_vae.py", ROOT / "configs/tiny/vae.yaml", "--run", vae, *shards, *SHORT, *gan)
    model = ["--autoencoder", vae / "model.safetensors", "--cache", tmp_path / "cache"]
    run("train_ldm.py", ROOT / "configs/tiny/ldm.yaml", "--run", ldm, *shards, *SHORT, *model)
    for folder in (vae, ldm):
        last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
        assert last["step"] == 12 and any(name.startswith("validation_") for name in last)
        assert list((folder / "samples").glob("*.png")) and list((folder / "tensorboard").rglob("events*"))

    written = run(
        "txt2img.py", "--model", ldm / "model.safetensors", "--prompt", "a red apple", "--n", "2", "--out", out
    )
    assert [Path(line) for line in written] == [out / "00000.png", out / "00001.png"]
    assert Image.open(written[0]).size == (32, 32)
