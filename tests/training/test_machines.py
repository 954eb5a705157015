"""Two machines as docs/training.md starts them: here two launchers, with nothing in common but the run folder."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from training.trainee import ROOT, VAE, records, result

ENVIRONMENT = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The working copies."""
    copies = [tmp_path_factory.mktemp("machine") for _ in range(2)]
    for copy in copies:
        for part in ("ldm", "scripts", "configs/accelerate"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / "vae.yaml").write_text(VAE)
    return copies


def by_accelerate(rank: int, port: int) -> list[str]:
    words = "-m accelerate.commands.launch --config_file configs/accelerate/nodes.yaml --num_processes 2"
    return f"{words} --main_process_ip 127.0.0.1 --main_process_port {port} --machine_rank {rank}".split()


def by_torchrun(rank: int, port: int) -> list[str]:
    words = "-m torch.distributed.run --nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_id ldm"
    return f"{words} --rdzv_endpoint 127.0.0.1:{port} --".split()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [by_accelerate, by_torchrun])
def test_two_machines_are_one_run_and_one_that_dies_ends_the_other(launcher, machines: list[Path], tmp_path: Path):
    def script(run: str) -> list[str]:
        where = ["vae.yaml", "--run", str(tmp_path / run)]
        return ["scripts/train_vae.py", *where, "--run.steps", "80", "--optim.schedule", "constant"]

    def start(run: str) -> list[subprocess.Popen[str]]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        return [
            subprocess.Popen(
                [sys.executable, *launcher(rank, port), *script(run)],
                cwd=machine,
                env=ENVIRONMENT,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, machine in enumerate(machines)
        ]

    def end(started: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
        said = [process.communicate(timeout=300)[1] for process in started]
        return [(process.returncode, text) for process, text in zip(started, said, strict=True)]

    alone = subprocess.Popen([sys.executable, *script("one")], cwd=machines[0], env=ENVIRONMENT)
    together = end(start("two"))
    assert [code for code, _ in together] == [0, 0], together
    for one, two in zip(
        records(tmp_path / "one")[:6] if not alone.wait() else [], records(tmp_path / "two"), strict=False
    ):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4 if one["step"] < 3 else 5e-3)

    started = start("killed")
    while not list((tmp_path / "killed").glob("checkpoints/0*")):
        assert [process.poll() for process in started] == [None, None], end(started)
        time.sleep(0.02)
    for process in [*psutil.Process(started[1].pid).children(recursive=True), started[1]]:
        process.send_signal(signal.SIGKILL)  # as if its power were cut
    began = time.monotonic()
    left, _ = end(started)
    assert time.monotonic() - began < 60 and left[0] == 1
    assert "process 0 of 2 stops, since another one is gone or hangs" in left[1]
    assert records(tmp_path / "killed")[-1]["step"] < 80
    again = end(start("killed"))
    assert [code for code, _ in again] == [0, 0] and "going on from" in again[0][1], again
    assert result(tmp_path / "killed") == result(tmp_path / "two")


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "$1"; shift; done
codes=0
for SLURM_PROCID in 0 1; do
  export SLURM_PROCID SLURM_LOCALID=0 SLURM_NTASKS=2
  "$@"; code=$?; codes=$((code > codes ? code : codes))
done
exit $codes
"""
PYTHON = """#!/bin/bash
echo "$RANK of $WORLD_SIZE, $LOCAL_RANK here, $MASTER_ADDR:$MASTER_PORT: $*"
exit "$CODE"
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then printf 'first\nsecond\n'; else echo "$@"; fi
"""


@pytest.mark.parametrize("code", [0, 2, 137, 143])
def test_the_batch_script_starts_a_task_each_and_queues_again_what_was_told_to_end(code: int, tmp_path: Path):
    """By stand-ins for Slurm's commands; what the real ones did stands in docs/training.md."""
    for name, text in (("srun", SRUN), ("python", PYTHON), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "20007", "SLURM_JOB_NODELIST": "m[0-1]", "SLURM_CPUS_PER_TASK": "8", "CODE": str(code)}
    batch = ["bash", str(ROOT / "configs/accelerate/slurm.sbatch"), "scripts/train_ldm.py", "a b.yaml", "--run", "RUN"]
    environment = os.environ | job | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(batch, env=environment, capture_output=True, text=True)
    options, tasks = (
        ["--kill-on-bad-exit=0", "--wait=300", "--cpus-per-task=8"],
        [f"{rank} of 2, 0 here, first:20007: scripts/train_ldm.py a b.yaml --run RUN" for rank in (0, 1)],
    )
    assert done.stdout.splitlines() == [*options, *tasks, *(["requeue 20007"] if code == 143 else [])]
    assert done.returncode == code and not done.stderr
