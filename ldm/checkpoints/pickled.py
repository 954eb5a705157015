"""Pickled weights (.ckpt, .bin, .pt), read for one purpose only: to be written as safetensors.

Reading happens in a process of its own, which may use no network of ours and little time, and in torch's restricted
reader (weights_only), which builds tensors and plain containers and calls nothing else. Whatever goes wrong there is
one error here.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from ldm.errors import UserError
from ldm.files import replacing

SUFFIXES = (".ckpt", ".bin", ".pt", ".pth")
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
TIME = 1800  # seconds: the largest checkpoints take a minute
# Runs alone: no import of ours, nothing from the current folder (-I), one line of complaint on stderr. A trainer's
# callbacks that lie beside the weights of many .ckpt files become objects that do nothing.
_CHILD = """
import sys, torch
from safetensors.torch import save_file

class Inert:
    def __init__(self, *_, **__): pass
    def __setstate__(self, state): pass

path, out = sys.argv[1:]
try:
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
except Exception:
    names = []
known = [name for name in names if name.split(".")[0] in ("pytorch_lightning", "lightning")]
torch.serialization.add_safe_globals([(Inert, name) for name in known])
try:
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
except Exception:
    state = torch.load(path, map_location="cpu", weights_only=True)
for key in ("state_dict", "model", "string_to_param"):  # the last in A1111's textual inversions
    if isinstance(state, dict) and isinstance(state.get(key), dict):
        state = state[key]
if isinstance(state, list):  # the first LoRA files: up and down by turns
    state = {f"lora:{i // 2}:{('up', 'down')[i % 2]}": value for i, value in enumerate(state)}
if not isinstance(state, dict):
    sys.exit("it holds no table of tensors")
named = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, torch.Tensor)}
tensors = {name: value.detach().clone().contiguous() for name, value in named.items()}
if not tensors:
    sys.exit("it holds no tensors")
save_file(tensors, out)
"""


def is_pickled(path: Path) -> bool:
    """Whether a file is a zip or a pickle, as torch writes them; its name says nothing."""
    with path.open("rb") as file:
        head = file.read(9).ljust(2)
    if head[8:] == b"{":  # safetensors, whose length may begin as a pickle does
        return False
    return head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and 2 <= head[1] <= 5)


def to_safetensors(path: Path, out: Path) -> None:
    """Write the tensors of a pickled file as safetensors. UserError, one line, where it holds anything else."""
    with replacing(out) as temporary:
        command = [sys.executable, "-I", "-c", _CHILD, str(path.resolve()), str(temporary)]
        environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "HOME") if name in os.environ}
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=TIME, env=environment, check=False)
        except subprocess.TimeoutExpired:
            raise UserError(f"{str(path)!r} could not be read within {TIME} s") from None
        if ran.returncode:
            lines = [line for line in ran.stderr.splitlines() if line.strip()] or [f"exit code {ran.returncode}"]
            reason = next((line for line in lines if "Unsupported" in line or "GLOBAL" in line), lines[-1])
            said = f"is not a file of weights alone, and nothing in it was run: {reason.strip()[:200]}"
            raise UserError(f"{str(path)!r} {said}")


def unpacked(path: Path, scratch: Path) -> Path:
    """The same model without pickles: `path` itself where it has none, else a copy in `scratch`."""
    if path.is_file():
        if not is_pickled(path):
            return path
        to_safetensors(path, scratch / path.stem)
        return scratch / path.stem
    parts = [path / part for part in PARTS if not any((path / part).glob("*.safetensors"))]
    weights = [file for part in parts for file in sorted(part.glob("*")) if file.suffix in SUFFIXES]
    if not weights:
        return path
    copy = scratch / path.name
    left_out = shutil.ignore_patterns("*.safetensors", *(f"*{suffix}" for suffix in SUFFIXES), "*.msgpack")
    shutil.copytree(path, copy, ignore=left_out)
    for file in path.glob("*/*.safetensors"):
        (copy / file.parent.name / file.name).symlink_to(file.resolve())
    for file in weights:
        # transformers' pickles have another stem than its safetensors
        name = file.name.replace("pytorch_model", "model") if file.parent.name.startswith("text") else file.name
        to_safetensors(file, copy / file.parent.name / Path(name).with_suffix(".safetensors").name)
    return copy


def room(out: Path) -> Path:
    """The nearest folder above `out` that is there: where there is room for it there is for a copy."""
    return next(parent for parent in out.resolve().parents if parent.is_dir())
