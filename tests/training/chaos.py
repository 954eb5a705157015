"""Runs that are killed, starved and damaged at random until they are done, and then compared with runs left alone.

    make chaos                      # 1,000 kills, and 50 trials of each of the rest
    make chaos ARGS="--kills 100 --others 10 --seed 1"

Each trial is a run of scripts/train_vae.py or train_ldm.py in a folder of its own. It is right if, in the end, weights,
averages, optimisers, log and model are bit for bit those of the same run left alone. Half of the kills come at a random
time, half right before a random use of a file in the run's folder: between any two steps of writing a checkpoint.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from trainee import Server, Trainee, result

BF16, READERS, CACHE = ["--run.precision", "bf16"], ["--data.workers", "2"], ["--cache", "RUN/latents"]
VARIANTS: dict[str, tuple[str, list[str], int, int]] = {  # script, words, processes, share of the trials
    "vae, fp32": ("vae", [], 1, 3),
    "vae, bf16": ("vae", BF16, 1, 3),
    "vae, bf16, 2 workers": ("vae", BF16 + READERS, 1, 2),
    "ldm, fp32": ("ldm", [], 1, 3),
    "ldm, bf16, 2 workers": ("ldm", BF16 + READERS, 1, 2),
    "ldm, bf16, cached": ("ldm", BF16 + CACHE, 1, 3),
    "ldm, fp32, cached, 2 workers": ("ldm", CACHE + READERS, 1, 2),
    "vae, fp32, 2 processes": ("vae", [], 2, 1),
    "ldm, bf16, cached, 2 processes": ("ldm", BF16 + CACHE, 2, 1),
    "ldm, fp32, split, 2 processes": ("ldm", ["--run.shard", "true"], 2, 1),
}
FILE_USES = 140  # of a run, about


class Chaos:
    """rows: trouble -> what came of it."""

    def __init__(self, server: Server, folder: Path, seed: int) -> None:
        self.server, self.folder, self.rng = server, folder, random.Random(seed)
        self.rows: dict[str, Counter[str]] = {}
        self.wrong: list[str] = []
        self.pace, self.newest = 1.0, ""
        self.autoencoder = folder / "vae/model.safetensors"
        self.whole: dict[str, tuple[tuple[object, ...], float]] = {}  # of each variant: its result, and its seconds
        assert server.start("vae", folder / "vae").wait() == [0]

    def start(self, variant: str, run: Path, **how: int) -> Trainee:
        kind, words, ranks, _ = VARIANTS[variant]
        words = [word.replace("RUN", str(run)) for word in words]
        words += [] if kind == "vae" else ["--autoencoder", str(self.autoencoder)]
        return self.server.start(kind, run, words, ranks, **how)

    def reference(self, variant: str) -> tuple[tuple[object, ...], float]:
        """The result of a run left alone, and how long it took."""
        if variant not in self.whole:
            run, began = self.folder / "run", time.monotonic()
            assert not any((trainee := self.start(variant, run)).wait()), trainee.said
            self.whole[variant] = result(run), time.monotonic() - began
            shutil.rmtree(run)
        return self.whole[variant]

    def trial(self, trouble: str, strike: Callable[[str, Path, float, Counter[str]], bool]) -> None:
        """Strike until the run is done, or `strike` says that it is enough; then finish it and compare."""
        (variant,) = self.rng.choices(list(VARIANTS), [share for *_, share in VARIANTS.values()])
        whole, seconds = self.reference(variant)
        run, row, new = self.folder / "run", self.rows.setdefault(trouble, Counter()), Counter[str]()
        while strike(variant, run, seconds, new):
            pass
        last = self.start(variant, run)
        codes = last.wait()
        new["resumed"] += "going on from" in last.said
        new["runs"] += 1
        if not any(codes) and result(run) == whole:
            new["equal"] += 1
        else:
            self.wrong.append(f"{trouble}, {variant}: exit {codes}\n{last.said}")
        new["damaged by it"] += 0 if trouble == "flipped byte" else len(list(run.glob("checkpoints/damaged-*")))
        shutil.rmtree(run)
        row.update(new)
        if trouble == "kill -9":
            named = self.rows.setdefault(f"  {variant}", Counter())
            named.update({name: new[name] for name in ("strikes", "runs", "equal")})

    def kill(self, variant: str, run: Path, seconds: float, row: Counter[str]) -> bool:
        """At a random time the process alone or its workers too, as the users of `kill` do; or at a random file."""
        if at_file := self.rng.random() < 0.5:
            trainee = self.start(variant, run, strike=self.rng.randint(1, FILE_USES))
            codes = trainee.first()
        else:
            trainee = self.start(variant, run)
            time.sleep(self.rng.uniform(0, seconds * self.pace))
            codes = []
        if not codes or any(codes):  # a launcher ends those that are left
            trainee.signal(signal.SIGKILL, alone=self.rng.random() < 0.5)
        killed = -signal.SIGKILL in trainee.wait()
        row["strikes"] += killed
        row["at a file" if at_file else "at a time"] += killed
        row["with half a checkpoint"] += bool(list(run.glob("checkpoints/.*.partial")))
        newest = max((path.name for path in run.glob("checkpoints/[0-9]*")), default="")
        self.pace = max(self.pace * (1.1 if newest == self.newest else 0.7), 0.2)  # as busy as the machine is now
        self.newest = newest
        return killed  # else it was done before

    def terminate(self, variant: str, run: Path, seconds: float, row: Counter[str]) -> bool:
        return self._signalled(variant, run, seconds, row, [signal.SIGTERM], (0, 143, -signal.SIGTERM))

    def double_ctrl_c(self, variant: str, run: Path, seconds: float, row: Counter[str]) -> bool:
        return self._signalled(variant, run, seconds, row, [signal.SIGINT] * 2, (0, 130, -signal.SIGINT))

    def _signalled(
        self, variant: str, run: Path, seconds: float, row: Counter[str], numbers: list[int], codes: tuple[int, ...]
    ) -> bool:
        trainee = self.start(variant, run)
        time.sleep(self.rng.uniform(0.2, 1) * seconds)
        for number in numbers:
            trainee.signal(number)
            time.sleep(self.rng.uniform(0, 0.05))
        got = trainee.wait()
        lost = len(got) > 1 and 2 in got  # one of two was gone before the other
        if any(code not in codes for code in got) and not lost:
            self.wrong.append(f"{variant}: exit {got} after signals {numbers}\n{trainee.said}")
        row["strikes"] += any(got)
        row["saved on the way out"] += "which is saved" in trainee.said
        return False

    def full_disk(self, variant: str, run: Path, seconds: float, row: Counter[str]) -> bool:
        size = len(self.reference(variant)[0][1])  # type: ignore[arg-type]
        trainee = self.start(variant, run, file_size=self.rng.randrange(0, size))
        got = trainee.wait()
        row["strikes"] += 1
        row["refused in a line"] += 2 in got and "Traceback" not in trainee.said
        return False

    def flipped_byte(self, variant: str, run: Path, seconds: float, row: Counter[str]) -> bool:
        """In any file of the newest checkpoint of a killed run."""
        while len(folders := sorted((run / "checkpoints").glob("[0-9]*"))) < 2:
            shutil.rmtree(run, ignore_errors=True)
            trainee = self.start(variant, run)
            time.sleep(self.rng.uniform(0.4, 1) * seconds)
            trainee.signal(signal.SIGKILL)
            trainee.wait()
        path = self.rng.choice(list(folders[-1].iterdir()))
        data = bytearray(path.read_bytes())
        data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
        path.write_bytes(data)
        row["strikes"] += 1
        return False

    def table(self, seconds: float) -> str:
        lines = [f"after {seconds:.0f} s, {len(self.wrong)} wrong"]
        for trouble, row in self.rows.items():
            facts = ", ".join(f"{name} {count}" for name, count in row.items())
            lines.append(f"{trouble:34} {facts}")
        return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--others", type=int, default=50, help="trials of each of the rest")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, Server(Path(folder) / "server") as server:
        chaos = Chaos(server, Path(folder), arguments.seed)

        def report() -> None:
            print(chaos.table(time.monotonic() - began), *chaos.wrong[-3:], sep="\n", flush=True)

        rest = {
            "SIGTERM": chaos.terminate,
            "double Ctrl-C": chaos.double_ctrl_c,
            "full disk": chaos.full_disk,
            "flipped byte": chaos.flipped_byte,
        }
        while chaos.rows.setdefault("kill -9", Counter())["strikes"] < arguments.kills:
            chaos.trial("kill -9", chaos.kill)
            report()
        for _ in range(arguments.others):
            for trouble, strike in rest.items():
                chaos.trial(trouble, strike)
            report()
    sys.exit(bool(chaos.wrong))


if __name__ == "__main__":
    main()
