"""The folder of a run: config.yaml, log.jsonl, samples, checkpoints, the model; and whether it may be gone on with."""

import json
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from ldm import config, images
from ldm.checkpoints import native
from ldm.errors import UserError
from ldm.files import flush, replacing
from ldm.shapes import Image
from ldm.training import checkpoint

# What may change between two starts of one run: it moves no weight, save `steps`, which says how far to go.
FREE = (
    *(f"run.{name}." for name in ("steps", "keep", "keep_every", "log_every", "max_skipped", "timeout", "trackers")),
    *(f"run.{name}_every." for name in ("checkpoint", "export", "sample", "validate")),
    *("run.validate_on.", "run.shard.", "samples.", "defaults.", "statistics.", "data.workers."),
)


class RunFolder:
    """Paths and small files of a run. UserError where the folder cannot be made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints, self.log, self.model = path / "checkpoints", path / "log.jsonl", path / "model.safetensors"
        try:
            (path / "samples").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the run folder {str(path)!r}: {error.strerror}") from None

    def claim(self) -> int:
        """Hold the folder until this process ends; what `claimed` then says. UserError where another run holds it."""
        number = secrets.randbelow(2**62)
        self._held = (self.path / ".lock").open("a")
        with suppress(ImportError):  # Windows
            import fcntl

            try:
                fcntl.lockf(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone: no worker inherits it
            except OSError:
                held = f"another run is going on in {str(self.path)!r}: wait for it, or take another --run"
                raise UserError(held) from None
        self._held.truncate(0)
        self._held.write(str(number))
        self._held.flush()
        os.fsync(self._held.fileno())
        return number

    def claimed(self) -> int:
        """The number of the process that holds this very folder, for others: reading ends a lock of one's own."""
        with suppress(OSError, ValueError):
            return int((self.path / ".lock").read_text())
        return -1

    def write_config(self, settings: Any) -> None:
        with replacing(self.path / "config.yaml") as temporary:
            temporary.write_text(config.dump(settings))

    def start_log(self, step: int) -> None:
        """Forget what was logged after `step`: it will be done again."""
        kept = []
        for line in self.log.read_text().splitlines() if self.log.exists() else []:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                break  # cut short when the process died
        with replacing(self.log) as temporary:
            temporary.write_text("".join(kept))

    def write_log(self, record: dict[str, Any]) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def write_checkpoint(self, step: int, saved: checkpoint.Saved, keep: int, keep_every: int) -> None:
        """After the log, on the disk: what a checkpoint goes on from is there."""
        if self.log.exists():
            flush(self.log)
        checkpoint.write(self.checkpoints, step, saved, keep, keep_every)

    def exported(self) -> int | None:
        """The steps of the model that lies there."""
        try:
            return int(native.read_spec(self.model).provenance["steps"]) if self.model.exists() else None
        except (UserError, KeyError):
            return None

    def write_sample(self, step: int, pictures: Image, columns: int) -> None:
        sheet = images.grid(images.to_pixels(pictures), columns)[0]
        with replacing(self.path / "samples" / f"{step:08d}.png") as temporary:
            temporary.write_bytes(images.png(sheet))


def check_same(settings: Any, before: dict[str, Any], path: Path) -> None:
    """UserError naming each field that differs from the run's own config, `before`, and may not."""
    with suppress(UserError):  # of another kind, or of a program with other fields: they are named below
        before = config.to_dict(config.from_dict(type(settings), before))  # fields that are newer than the run
    old, new = _flat(before), _flat(config.to_dict(settings))
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    differing = [name for name in changed if not f"{name}.".startswith(FREE)]
    if differing:
        changes = ", ".join(f"{name} (was {old.get(name)!r}, now {new.get(name)!r})" for name in differing[:5])
        changes += f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise UserError(f"the run in {str(path)!r} was started otherwise: {changes}. Undo this, or take another --run")


def _flat(data: Any, where: str = "") -> dict[str, Any]:
    if not isinstance(data, dict):
        return {where[:-1]: data}
    return {k: v for name, value in data.items() for k, v in _flat(value, f"{where}{name}.").items()}
