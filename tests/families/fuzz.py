"""Broken models by the hundred thousand: each loads, or is refused by one UserError of one line, within seconds.

python tests/families/fuzz.py --n 100000 --seed 1

Three small whole models (a file of ours, a single file, a diffusers folder) are damaged by a seeded mutator: bytes,
headers and configs. Case i of a seed is the same everywhere; `--only I` runs it alone and shows what is said.
"""

import argparse
import collections
import copy
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
LIMIT = 10  # seconds of computing for one case
JUNK: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    2**31,
    2**63,
    2**70,
    -0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../../x",
]
JUNK += [
    [],
    {},
    [[]],
    [1] * 200,
    {"a": {"a": {}}},
    "x" * 5000,
    [0, 2**40],
    "\n",
    "é\u2028",
    [None],
    ["eps"],
    "F16",
    "I64",
]


def models(root: Path) -> dict[str, Path]:
    """The three models that are damaged."""
    import torch

    from ldm.checkpoints import native
    from ldm.families.convert import convert
    from ldm.models.autoencoder import AutoencoderConfig
    from ldm.models.unet import UNetConfig
    from ldm.text.tower import TextConfig

    spec = native.ModelSpec(
        autoencoder=AutoencoderConfig(channels=(32,), res_blocks=1, std=(1 / 0.18215,)),
        image_size=8,
        backbone=UNetConfig(channels=(32,), res_blocks=1, depth=(1,), heads=(8,), context_dim=64),
        text=TextConfig(width=64, heads=1, layers=1, context_length=8, vocab_size=600),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = native.build(spec)
    native.save(root / "ours", spec, built.modules, "int8")
    native.save(root / "wide", spec, built.modules, "fp16")
    convert(root / "wide", root / "single", "compvis")
    convert(root / "wide", root / "folder", "diffusers")
    (root / "wide").unlink()
    shutil.rmtree(root / "folder/tokenizer")
    return {"ours": root / "ours", "single": root / "single", "folder": root / "folder"}


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    """A few bytes changed, cut, repeated or added, more often near the start."""
    raw = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = min(int(len(raw) * rng.random() ** rng.choice([1, 3, 8])), max(len(raw) - 1, 0))
        kind = rng.randrange(6)
        if kind <= 1 and raw:
            raw[at] = rng.randrange(256)
        elif kind == 2:
            del raw[at:]
        elif kind == 3:
            del raw[at : at + rng.randrange(1, 64)]
        elif kind == 4:
            raw[at:at] = rng.randbytes(rng.randrange(1, 64))
        else:
            raw[at:at] = raw[at : at + rng.randrange(1, 64)]
    return bytes(raw)


def damage_json(rng: random.Random, data: Any) -> Any:
    """One place of a JSON value replaced by junk, dropped, renamed or swapped with another."""
    data = copy.deepcopy(data)
    at = data
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return data
        key = rng.choice(keys)
        if isinstance(at[key], (dict, list)) and at[key] and rng.random() < 0.8:
            at = at[key]
            continue
        kind = rng.randrange(5)
        if kind == 0:
            del at[key]
        elif kind == 1 and isinstance(at, dict):
            at[rng.choice(["", "x", str(key) + "x", "__metadata__", "../x", "a" * 600])] = at.pop(key)
        elif kind == 2:
            other = rng.choice(keys)
            at[key], at[other] = at[other], at[key]
        else:
            at[key] = rng.choice(JUNK)
        return data


def damage_header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file whose header says something else of the same tensors."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = header.get("__metadata__", {})
    specs = [key for key in ("spec", "ldm.spec") if key in metadata]
    if specs and rng.random() < 0.5:
        metadata[specs[0]] = json.dumps(damage_json(rng, json.loads(metadata[specs[0]])))
    else:
        header = damage_json(rng, header)
    text = json.dumps(header).encode()
    if rng.random() < 0.1:
        text = text[:-1] + b"," + text[1:]  # every name twice
    return struct.pack("<Q", len(text)) + text + body


def damage(rng: random.Random, whole: Path, broken: Path) -> None:
    """Write a damaged copy of a model."""
    if whole.is_file():
        way = rng.choice([damage_bytes, damage_header, damage_header])
        broken.write_bytes(way(rng, whole.read_bytes()))
        return
    shutil.copytree(whole, broken, copy_function=os.link)
    file = rng.choice(sorted(path for path in broken.rglob("*") if path.is_file()))
    data = file.read_bytes()
    file.unlink()  # the others are the whole model's own
    if file.suffix == ".json" and rng.random() < 0.8:
        file.write_text(json.dumps(damage_json(rng, json.loads(data))))
    elif file.suffix == ".safetensors" and rng.random() < 0.5:
        file.write_bytes(damage_header(rng, data))
    elif rng.random() >= 0.1:
        file.write_bytes(damage_bytes(rng, data))


def case(seed: int, number: int, wholes: dict[str, Path], room: Path) -> str:
    """Run one case; what was said, or "" where it loaded. AssertionError for anything else."""
    from ldm.errors import UserError
    from ldm.families.load import load

    rng = random.Random(f"{seed}/{number}")
    broken = room / "broken"
    damage(rng, wholes[rng.choice(sorted(wholes))], broken)

    ticks = iter("12")  # a machine that stands still for a while counts as our time, but as one tick

    def late(signum: int, frame: FrameType | None) -> None:
        if not next(ticks, None):
            raise AssertionError(f"case {number} of seed {seed} took more than {3 * LIMIT} s")

    signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, LIMIT, LIMIT)  # of our own time: another's work on the machine is no hang
    try:
        load(broken)
        return ""
    except UserError as error:
        said = str(error)
        if len(said.splitlines()) != 1 or len(said) > 1000:
            raise AssertionError(f"case {number} of seed {seed} says {said[:300]!r}") from None
        return said
    except Exception as error:
        raise AssertionError(f"case {number} of seed {seed}: {type(error).__name__}: {error}") from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        shutil.rmtree(broken) if broken.is_dir() else broken.unlink()


def run(n: int, seed: int, first: int = 0) -> collections.Counter[str]:
    """Run cases; how many loaded and how many were refused."""
    counts: collections.Counter[str] = collections.Counter()
    memory = Path("/dev/shm")  # where there is one, no disk is waited for
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        root = Path(folder)
        wholes = models(root)
        for number in range(first, first + n):
            said = case(seed, number, wholes, root)
            counts["refused" if said else "loaded"] += 1
            if n == 1:
                print(said or "loaded")
            elif (number + 1) % 1000 == 0:
                print(f"{number + 1} cases: {dict(counts)}", flush=True)
    return counts


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--n", type=int, default=100_000)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--first", type=int, default=0, help="the case to begin with")
    flags.add_argument("--only", type=int, help="one case alone")
    args = flags.parse_args()
    start = time.perf_counter()
    counts = run(1 if args.only is not None else args.n, args.seed, args.only or args.first)
    print(f"{sum(counts.values())} cases in {time.perf_counter() - start:.0f} s: {dict(counts)}, nothing else")
