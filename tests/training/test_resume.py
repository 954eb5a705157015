"""A run that is killed goes on bit for bit: real processes, SIGKILL, one and two ranks."""

import itertools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from training.trainee import SHARDS, Server, Trainee, records, result

from ldm.training import checkpoint


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def autoencoder(server: Server) -> str:
    assert server.start("vae", server.folder / "vae", ["--run.steps", "1"]).wait() == [0]
    return str(server.folder / "vae/model.safetensors")


def overrides(kind: str, precision: str, workers: int, run: Path, autoencoder: str) -> list[str]:
    words = ["--run.precision", precision, "--data.workers", str(workers), "--run.checkpoint_every", "2"]
    words += ["--run.log_every", "3"]  # with means that a checkpoint cuts through
    if kind.startswith("ldm"):
        words += ["--autoencoder", autoencoder]
    cached = ["--cache", str(run / "latents"), "--optim.accumulate", "2"] if kind in CACHED else []
    return [*words, *cached, *REMEMBERING.get(kind, [])]


CACHED = {"ldm cached", "ldm remembering"}
# Losses that draw noise levels, the weight of the step before, codes, and optimisers of two kinds.
REMEMBERING = {
    "ldm remembering": ["--loss.importance", "true", "--optim.kind", "muon", "--run.ema.widths", "[0.05, 0.1]"],
    "ldm split": ["--run.shard", "true", "--run.ema.widths", "[0.05, 0.1]", "--run.ema.snapshot_every", "2"],
    "vae split": ["--run.shard", "true", "--model.codebook", "8"],
    "vae remembering": ["--model.codebook", "8", "--discriminator.norm", "spectral", "--optim.kind", "adafactor"],
}


QUICK = [("vae", "bf16", 2, 2), ("ldm remembering", "fp32", 0, 2), ("vae remembering", "fp32", 0, 1)]
QUICK += [("ldm split", "fp32", 0, 2)]
SLOW = [("vae split", "bf16", 0, 2)]
CASES = [pytest.param(*case, [3]) for case in QUICK]
CASES += [
    pytest.param(*case, [3, 5], marks=pytest.mark.slow)
    for case in [*itertools.product(("vae", "ldm", "ldm cached"), ("fp32", "bf16"), (0, 2), (1, 2)), *QUICK[1:], *SLOW]
]


@pytest.mark.parametrize(("kind", "precision", "workers", "ranks", "deaths"), CASES)
def test_a_killed_run_goes_on_bit_for_bit(
    kind: str,
    precision: str,
    workers: int,
    ranks: int,
    deaths: list[int],
    server: Server,
    autoencoder: str,
    tmp_path: Path,
):
    script = kind.split()[0]
    for name, steps in (("whole", []), ("killed", deaths)):  # of 6, in the middle of an epoch
        run = tmp_path / name
        settings = overrides(kind, precision, workers, run, autoencoder)
        for die in steps:
            trainee = server.start(script, run, settings, ranks, die=die)
            assert -signal.SIGKILL in trainee.wait(), trainee.said
            if die == 3:
                assert not (run / "checkpoints/00000004").exists()
        trainee = server.start(script, run, settings, ranks)
        assert trainee.wait() == [0] * ranks, trainee.said
        assert ("going on from" in trainee.said) == bool(steps)
    for one, other in zip(result(tmp_path / "whole"), result(tmp_path / "killed"), strict=True):
        if isinstance(one, bytes):  # the folder of the cache is a setting, and so in both
            one = one.replace(str(tmp_path / "whole").encode(), b"")
            other = other.replace(str(tmp_path / "killed").encode(), b"")
        assert one == other


def until_saved(trainee: Trainee, run: Path) -> None:
    """Wait for its first checkpoint."""
    while not checkpoint.complete(run / "checkpoints"):
        assert trainee.running(0), trainee.said
        time.sleep(0.02)


def test_a_signal_to_every_process_of_a_run_still_saves_it(server: Server, tmp_path: Path):
    trainee = server.start("vae", tmp_path, ["--run.steps", "100000", "--data.workers", "2"], ranks=2)
    until_saved(trainee, tmp_path)
    trainee.signal(signal.SIGTERM)  # as Slurm does: the processes that read data get it too
    assert trainee.wait() == [128 + signal.SIGTERM] * 2, trainee.said
    assert "which is saved" in trainee.said
    assert int(checkpoint.complete(tmp_path / "checkpoints")[-1].name) == records(tmp_path)[-1]["step"]


def test_no_process_of_a_run_ends_before_its_checkpoint_is_written(server: Server, tmp_path: Path):
    trainee = server.start("vae", tmp_path, ["--run.steps", "100000", "--run.checkpoint_every", "1"], ranks=2, slow=1)
    until_saved(trainee, tmp_path)
    trainee.signal(signal.SIGTERM)
    while trainee.running(1):  # a launcher ends, or kills, the others of a machine when the first has ended
        time.sleep(0.02)
    assert int(checkpoint.complete(tmp_path / "checkpoints")[-1].name) == records(tmp_path)[-1]["step"]
    assert trainee.wait() == [128 + signal.SIGTERM] * 2, trainee.said


def test_a_rank_that_fails_takes_the_other_down_with_a_message(server: Server, tmp_path: Path):
    trainee = server.start("vae", tmp_path, ["--run.steps", "100000"], ranks=2, fail=3)
    assert trainee.wait(60) == [2, 1], trainee.said
    assert "ValueError: this process alone" in trainee.said and trainee.said.count("Traceback") == 1
    assert "process 0 of 2 stops, since another one is gone or hangs" in trainee.said


@pytest.mark.parametrize("fault", [["--data.shards", "MISSING"], ["--run.steps", "RANK"], ["--run.stepz", "RANK"]])
def test_a_mistake_on_one_machine_is_not_waited_for_on_the_other(fault: list[str], server: Server, tmp_path: Path):
    (tmp_path / "0").symlink_to(SHARDS.parent)
    shards = str(tmp_path / "RANK" / SHARDS.name)
    words = [word.replace("MISSING", shards) for word in fault]
    trainee = server.start("vae", tmp_path / "run", words, ranks=2)
    assert trainee.wait(60) == [2, 2], trainee.said
    each = 2 if "--run.stepz" in fault else 1
    assert trainee.said.count("error: ") == 2 and "Traceback" not in trainee.said
    assert trainee.said.count("another one is gone or hangs") == 2 - each, trainee.said


def test_machines_that_share_no_folder_are_refused(server: Server, tmp_path: Path):
    trainee = server.start("vae", tmp_path / "RANK", ranks=2)
    assert trainee.wait(60) == [2, 2], trainee.said
    assert trainee.said.count("error: the machines see different folders") == 2
    assert not list(tmp_path.glob("*/checkpoints"))


def test_processes_that_cannot_be_together_do_not_train_alone(server: Server, tmp_path: Path):
    no_gpu = {"ACCELERATE_USE_CPU": "false", "CUDA_VISIBLE_DEVICES": ""}
    trainee = server.start("vae", tmp_path, ranks=2, more=no_gpu)
    assert trainee.wait(60) == [2, 2] and trainee.said.count("2 processes and no GPU") == 2, trainee.said
    lone = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    trainee = server.start("vae", tmp_path, ["--run.timeout", "2"], more=lone)
    assert trainee.wait(60) == [2], trainee.said
    assert "2 processes did not find each other within 2 s" in trainee.said and "Traceback" not in trainee.said


def test_a_rank_that_ends_while_they_meet_is_named_as_the_reason(server: Server, tmp_path: Path):
    main = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(main.port)}
    before = main.num_keys()
    trainee = server.start("vae", tmp_path, more={"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"} | where)
    while main.num_keys() < before + 2:  # it has come, and said where it is reached
        assert trainee.running(0), trainee.said
        time.sleep(0.02)
    del main
    assert trainee.wait(60) == [2], trainee.said
    assert "process 1 of 2 stops, since another one is gone or hangs" in trainee.said
    assert "Traceback" not in trainee.said


def test_a_rank_that_dies_takes_the_other_down_with_a_message(server: Server, tmp_path: Path):
    trainee = server.start("vae", tmp_path, ["--run.steps", "100000", "--run.checkpoint_every", "5"], ranks=2)
    until_saved(trainee, tmp_path)
    trainee.signal(signal.SIGKILL, rank=1)
    began = time.monotonic()
    assert trainee.wait(60) == [2, -signal.SIGKILL], trainee.said
    assert time.monotonic() - began < 30  # not the timeout of 600 s
    assert "process 0 of 2 stops, since another one is gone or hangs" in trainee.said
    assert "Traceback" not in trainee.said


def test_a_rank_that_hangs_is_not_waited_for_without_end(server: Server, tmp_path: Path):
    trainee = server.start("vae", tmp_path, ["--run.steps", "100000", "--run.timeout", "3"], ranks=2)
    until_saved(trainee, tmp_path)
    trainee.signal(signal.SIGSTOP, rank=1)
    deadline = time.monotonic() + 60
    while trainee.running(0) and time.monotonic() < deadline:
        time.sleep(0.02)
    trainee.signal(signal.SIGKILL, rank=1)
    assert trainee.wait(30)[0] == 2, trainee.said
    assert "another one is gone or hangs" in trainee.said


def test_what_splits_weights_is_refused(server: Server, tmp_path: Path):
    trainee = server.start("vae", tmp_path, ranks=2, more={"ACCELERATE_USE_FSDP": "true"})
    assert trainee.wait() == [2, 2], trainee.said
    assert "the launcher asks for FSDP" in trainee.said and "Traceback" not in trainee.said


SPLIT = ("split", 2, ["--run.shard", "true", "--optim.accumulate", "2"])


@pytest.mark.parametrize("kind", ["ldm", pytest.param("vae", marks=pytest.mark.slow)])
def test_one_process_two_and_accumulation_take_the_same_steps(
    kind: str, server: Server, autoencoder: str, tmp_path: Path
):
    settings = ["--autoencoder", autoencoder] if kind == "ldm" else []
    settings += ["--optim.clip", "0.1"]  # below what the gradients have
    logs = []
    for name, ranks, more in (("one", 1, []), ("two", 2, []), ("parts", 1, ["--optim.accumulate", "2"]), SPLIT):
        words = [*settings, *more, "--run.batch_size", "8", "--run.log_every", "1"]
        trainee = server.start(kind, tmp_path / name, words, ranks)
        assert trainee.wait() == [0] * ranks, trainee.said
        logs.append(records(tmp_path / name))
    for one, *others in zip(*logs, strict=True):
        for other in others:
            assert one.keys() == other.keys()
            for name in one:
                assert other[name] == pytest.approx(one[name], rel=1e-4 if one["step"] < 3 else 5e-3, abs=1e-6)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(server: Server, autoencoder: str, tmp_path: Path):
    words = ["--autoencoder", autoencoder, "--optim.schedule", "constant"]
    words += ["--run.log_every", "4"]  # with a mean that the change cuts through
    for run, parts in (("one", [(1, "6")]), ("both", [(1, "3"), (2, "4"), (2, "6")])):
        for ranks, steps in parts:
            more = ["--run.shard", str(steps == "4").lower()]
            trainee = server.start("ldm", tmp_path / run, [*words, "--run.steps", steps, *more], ranks)
            assert trainee.wait() == [0] * ranks, trainee.said
    one, both = ({r["step"]: r for r in records(tmp_path / run)} for run in ("one", "both"))
    for name, value in one[6].items():
        assert both[6][name] == pytest.approx(value, rel=5e-3)


def test_the_log_is_on_the_disk_before_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from ldm.training.folder import RunFolder

    folder, order = RunFolder(tmp_path), []
    folder.write_log({"step": 1})
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    monkeypatch.setattr(Path, "rename", lambda path, to: (order.append(f"-> {to}"), rename(path, to))[1])
    folder.write_checkpoint(1, ({"a": torch.zeros(1)}, {}), 1, 0)
    assert order[0] == str(tmp_path / "log.jsonl")
    assert order.index(f"-> {tmp_path / 'checkpoints/00000001'}") > order.index(
        str(tmp_path / "checkpoints/.00000001.partial")
    )
