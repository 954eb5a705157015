"""Runs that can be killed: each is a process forked from a server that has everything imported, so it begins at once.

The server is `python -m training.trainee`, told by lines of JSON what to start and whom to wait for.
"""

import gc
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

ROOT = Path(__file__).parents[2]
SHARDS = ROOT / "tests/assets/shards/{00000..00001}.tar"
FILES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.chmod")
TIMES = ("images_per_s", "data_wait_s", "save_stall_s")

VAE = f"""
data: {{shards: '{SHARDS}', size: 16, workers: 0}}
model: {{z_channels: 2, channels: [8, 16], res_blocks: 1, mid_attention: false, groups: 4}}
discriminator: {{channels: 16, layers: 1}}
loss: {{lpips: 0, lpips_weights: "", adversarial_start: 2}}
optim: {{lr: 5e-3, schedule: cosine, warmup: 2}}
run: {{steps: 6, batch_size: 4, trackers: [], log_every: 1, checkpoint_every: 1, keep: 2, sample_every: 0,
  validate_every: 3, validate_on: 4, ema: {{decay: 0.9}}}}
statistics: 8
"""
LDM = f"""
data: {{shards: '{SHARDS}', size: 16, workers: 0}}
backbone: {{in_channels: 2, out_channels: 2, channels: [8, 16], res_blocks: 1, depth: [0, 1], heads: [1, 2],
  context_dim: 16, groups: 4}}
text: {{tower: {{width: 16, heads: 2, layers: 1, context_length: 12, vocab_size: 600}}}}
prediction: v
optim: {{lr: 5e-3, schedule: cosine, warmup: 2}}
run: {{steps: 6, batch_size: 4, trackers: [], log_every: 2, checkpoint_every: 1, keep: 2, sample_every: 0,
  validate_every: 3, validate_on: 4, ema: {{decay: 0.9}}}}
samples: {{prompts: [a red apple]}}
defaults: {{sampler: euler, steps: 1}}
"""


class Trainee:
    """The processes of one run."""

    def __init__(self, server: "Server", pids: list[int], said: Path) -> None:
        self.server, self.pids, self._said = server, pids, said

    @property
    def said(self) -> str:
        return self._said.read_text()

    def signal(self, number: int, rank: int | None = None, *, alone: bool = False) -> None:
        """To all of them, or to one; and, unless alone, to what they started."""
        for pid in self.pids if rank is None else [self.pids[rank]]:
            try:
                (os.kill if alone else os.killpg)(pid, number)
            except ProcessLookupError:
                with suppress(ProcessLookupError):  # it has ended
                    os.kill(pid, number)  # it has not yet made its group

    def running(self, rank: int) -> bool:
        return self.server.ask({"wait": self.pids[rank]}) is None

    def first(self) -> list[int]:
        """The exit codes of those that ended, as soon as one died or all are done."""
        while True:
            codes = [self.server.ask({"wait": pid}) for pid in self.pids]
            if None not in codes or any(codes):
                return [code for code in codes if code is not None]
            time.sleep(0.01)

    def wait(self, seconds: float = 300) -> list[int]:
        """The exit codes; a signal's number is negative. TimeoutError, and they are killed, if they hang."""
        deadline, codes = time.monotonic() + seconds, list[int | None]()
        while None in (codes := [self.server.ask({"wait": pid}) for pid in self.pids]):
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                raise TimeoutError(f"the run hangs: {codes}\n{self.said}")
            time.sleep(0.01)
        return [code for code in codes if code is not None]


class Server:
    """`with Server(folder) as server: server.start("vae", run).wait()`; folder: for configs and what the runs say."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vae.yaml").write_text(VAE)
        (folder / "ldm.yaml").write_text(LDM)
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._count = 0

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self,
        kind: str,
        run: Path,
        overrides: Sequence[str] = (),
        ranks: int = 1,
        more: Mapping[str, str] = MappingProxyType({}),
        **how: int,
    ) -> Trainee:
        """RANK in a run's path or an override is each process's own. more: of the environment. how: `die`, the step in
        which it kills itself; `fail`, in which the second rank raises; `strike`, the use of a file in its folder before
        which it dies; `file_size`, a limit in bytes; `slow`, seconds that a checkpoint takes."""
        self._count += 1
        said = self.folder / f"said-{self._count}.txt"
        environment = dict(more)
        if ranks > 1:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            environment |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        arguments = [str(self.folder / f"{kind}.yaml"), "--run", str(run), *overrides]
        pids = []
        for rank in range(ranks):
            own = environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
            words = [word.replace("RANK", str(rank)) for word in arguments]
            request = {"kind": kind, "arguments": words, "environment": own, "said": str(said)} | how
            pids.append(self.ask(request))
        return Trainee(self, pids, said)


def records(run: Path) -> list[dict[str, Any]]:
    """The log of a run without its times."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    kept = [{name: value for name, value in line.items() if name not in TIMES} for line in lines]
    for record in kept:
        for name in [name for name, value in record.items() if isinstance(value, list)]:
            record |= {f"{name}.{i}": value for i, value in enumerate(record.pop(name)) if value is not None}
    return kept


def result(run: Path) -> tuple[Any, ...]:
    """What a run left: weights, average and optimisers; the rest of its state; its log; its model."""
    last = sorted((run / "checkpoints").glob("[0-9]*"))[-1]
    state = [(last / name).read_bytes() for name in ("state.safetensors", "state.json")]
    model = (run / "model.safetensors").read_bytes()
    length = int.from_bytes(model[:8], "little")
    header = json.dumps(json.loads(model[8 : 8 + length]), sort_keys=True)  # its metadata stand in any order
    return last.name, *state, records(run), header.encode(), model[8 + length :]


def _child(request: dict[str, Any]) -> None:
    """Be a training script: the very one, but for the memory's forecast, which takes longer than the training here."""
    os.setsid()
    with open(request["said"], "ab", buffering=0) as said:
        os.dup2(said.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 1)
    os.environ.update(request["environment"])
    if "file_size" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"],) * 2)
    run = Path(request["arguments"][2])
    if "die" in request:
        die_in_step(request["die"], run / "checkpoints")
    if "fail" in request and os.environ["RANK"] != "0":
        die_in_step(request["fail"], run / "checkpoints", raising=True)
    if "slow" in request:
        write_slowly(request["slow"])
    if "strike" in request:
        die_at_file(request["strike"], run)
    script = ROOT / f"scripts/train_{request['kind']}.py"
    sys.argv = [str(script), *request["arguments"]]
    runpy.run_path(str(script), run_name="__main__")


def die_in_step(step: int, checkpoints: Path, *, raising: bool = False) -> None:
    """This process, and its workers, when it sees the batch of a step, and there is a checkpoint."""
    from ldm.training.guard import Guard

    look = Guard.look

    def see(guard: Guard, batch: dict[str, Any]) -> None:
        if batch["step"] == step:
            while not list(checkpoints.glob("[0-9]*")):
                time.sleep(0.01)
            if raising:
                raise ValueError("this process alone has an error")
            os.killpg(os.getpgid(0), signal.SIGKILL)
        look(guard, batch)

    Guard.look = see  # type: ignore[method-assign]


def write_slowly(seconds: int) -> None:
    """As a slow disk does."""
    from ldm.training import checkpoint

    write = checkpoint.write
    checkpoint.write = lambda *given: (time.sleep(seconds), write(*given))[1]


def die_at_file(count: int, run: Path) -> None:
    """This process, and its workers, before it opens, makes, renames or removes for this many'th time in its run."""
    folder = str(run)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in FILES and arguments and folder in str(arguments[0]):
            count -= 1
            if not count:
                os.killpg(os.getpgid(0), signal.SIGKILL)

    sys.addaudithook(watch)


def _serve() -> None:
    from accelerate import Accelerator  # noqa: F401
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    import ldm.training.arguments
    import ldm.training.tasks.autoencoder
    import ldm.training.tasks.denoising
    from ldm.text.open_clip import open_clip

    open_clip()
    ldm.training.arguments.announce = lambda task, config: None
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads does not fork safely"
    gc.collect()
    gc.freeze()  # or each child copies every page that it looks over
    codes: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            pid = request["wait"]
            if pid not in codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            answer = codes.get(pid)
        elif not (answer := os.fork()):
            code = 1
            try:
                _child(request)
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        else:
            codes.pop(answer, None)  # of an earlier process with this number
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
