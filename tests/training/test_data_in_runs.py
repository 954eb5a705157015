"""What a run makes of its data: sizes that vary, damage, an end."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.shards import Shards, write_manifest, write_shard
from ldm.errors import UserError
from ldm.training.checkpoint import TENSORS


@pytest.fixture
def sized(tmp_path: Path) -> str:
    """Two shards with pictures of 32 x 48, and then of 48 x 32."""
    rng, entries = np.random.default_rng(0), []
    for s in range(2):
        samples = []
        for n in range(10):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (48, 32, 3) if n < 4 else (32, 48, 3), np.uint8)).save(file, "PNG")
            samples.append((f"{s}{n}", {"png": file.getvalue(), "txt": b"noise"}))
        entry = write_shard(tmp_path / "sized" / f"{s:05d}.tar", samples)
        entries.append(dataclasses.replace(entry, buckets={"32x48": 4, "48x32": 6}))
    write_manifest(tmp_path / "sized", entries)
    return str(tmp_path / "sized")


def test_a_run_over_sizes_goes_on_bit_for_bit(vae, run, sized, tmp_path: Path, capsys):
    common = ["--data.shards", sized, "--data.buckets", "true", "--run.batch_size", "4"]
    run(vae(*common, "--run.steps", "4"), tmp_path / "whole")
    assert "20 pictures in 2 shards of 2 sizes; 0 of an epoch fill no batch of 4" in capsys.readouterr().err
    run(vae(*common, "--run.steps", "2"), tmp_path / "halves")
    run(vae(*common, "--run.steps", "4"), tmp_path / "halves")
    one, two = ((tmp_path / name / "checkpoints/00000004" / TENSORS).read_bytes() for name in ("whole", "halves"))
    assert one == two


def test_damage_is_logged_and_too_much_stops_the_run(vae, run, sized, tmp_path: Path):
    path = Path(sized) / "00000.tar"
    data = bytearray(path.read_bytes())
    image = Shards(sized).sample(0, 3).image
    data[data.index(image) + 50] ^= 1
    path.write_bytes(data)
    common = ["--data.shards", sized, "--run.batch_size", "10", "--run.validate_on", "1"]
    with pytest.warns(UserWarning, match="00000.tar' was altered or cut short; another sample stands in"):
        run(vae(*common, "--data.max_damaged", "0.2"), tmp_path / "some")
    records = [json.loads(line) for line in (tmp_path / "some/log.jsonl").read_text().splitlines()]
    assert records[-1]["damaged"] == 2  # in two epochs
    with pytest.raises(
        UserError, match=r"00000.tar' was altered.* samples read were damaged, more than data.max_damaged"
    ):
        run(vae(*common), tmp_path / "none")


def test_more_steps_than_the_data_gives_are_refused_before_the_first(vae, run, sized, tmp_path: Path):
    with pytest.raises(UserError, match="40 samples are asked for, data.epochs gives 20"):
        run(vae("--data.shards", sized, "--data.epochs", "1", "--run.batch_size", "10"), tmp_path / "run")
    assert not (tmp_path / "run/checkpoints").exists()
