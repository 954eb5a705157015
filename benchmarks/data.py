"""Samples a second of one core, decode included: ldm's loader beside webdataset, Mosaic streaming and litdata.

    python benchmarks/data.py [--pictures 256] [--repeats 3]

The same 512 px JPEGs lie in each one's own format. Counted is the processor time of the whole process, so that a busy
machine changes little; the rounds are interleaved and the median is shown, with the ratio to webdataset + Pillow. What
is not installed (requirements-bench.txt) is named and left out. A peer is run as it comes, with Pillow, and once more
with our decoder.
"""

import io
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from common import conditions, flags, keep
from PIL import Image

from ldm.data import dataset as ours
from ldm.data.cache import CachedDataset, Encoders, cached
from ldm.data.shards import write_manifest, write_shard
from ldm.text.open_clip import _torchvision_operators

BATCH = 32
Decode = Callable[[bytes, int], Image.Image]


def pictures(count: int, rng: np.random.Generator) -> Iterator[bytes]:
    """JPEGs of 512 x 512 pixels and about 50 KB: soft shapes with a little grain."""
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8)).resize(
            (512, 512), Image.Resampling.BICUBIC
        )
        grain = rng.normal(0, 5, (512, 512, 1))
        target = io.BytesIO()
        Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(target, "JPEG", quality=90)
        yield target.getvalue()


def pillow(data: bytes, size: int) -> Image.Image:
    """Decode all of it and shrink: what most loaders' users write."""
    return Image.open(io.BytesIO(data)).convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def our_decode(data: bytes, size: int) -> Image.Image:
    return ours.square(ours.decode_for(data, size)[0], size)


def batches(stream: Iterator[bytes], size: int, decode: Decode) -> Iterator[torch.Tensor]:
    rows: list[np.ndarray] = []
    for data in stream:
        rows.append(np.asarray(decode(data, size)))
        if len(rows) == BATCH:
            yield torch.from_numpy(np.ascontiguousarray(np.stack(rows).transpose(0, 3, 1, 2)))
            rows = []


def prepare(folder: Path, jpegs: list[bytes]) -> None:
    """The same pictures in each format."""
    entries = []
    for start in range(0, len(jpegs), 64):
        samples = [
            (f"{i:09d}", {"jpg": jpegs[i], "txt": b"a picture"}) for i in range(start, min(start + 64, len(jpegs)))
        ]
        entries.append(write_shard(folder / "tar" / f"{start // 64:05d}.tar", samples))
    write_manifest(folder / "tar", entries)
    _torchvision_operators()  # Mosaic streaming imports torchvision
    try:
        from streaming import MDSWriter

        with MDSWriter(out=str(folder / "mds"), columns={"jpg": "bytes", "txt": "str"}) as writer:
            for data in jpegs:
                writer.write({"jpg": data, "txt": "a picture"})
    except ImportError as error:
        print(f"Mosaic streaming is left out: {error}")
    try:
        from litdata.streaming.writer import BinaryWriter

        (folder / "lit").mkdir()
        writer = BinaryWriter(str(folder / "lit"), chunk_bytes=1 << 24)
        for i, data in enumerate(jpegs):
            writer[i] = {"jpg": data, "txt": "a picture"}
        writer.done()
        writer.merge(1)
    except ImportError as error:
        print(f"litdata is left out: {error}")


def of_webdataset(folder: Path) -> Iterator[bytes]:
    import webdataset

    shards = [str(path) for path in sorted((folder / "tar").glob("*.tar"))]
    for sample in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).shuffle(256):
        yield sample["jpg"]


def of_streaming(folder: Path) -> Iterator[bytes]:
    from streaming import StreamingDataset

    for sample in StreamingDataset(local=str(folder / "mds"), shuffle=True, batch_size=BATCH):
        yield sample["jpg"]


def of_litdata(folder: Path) -> Iterator[bytes]:
    from litdata import StreamingDataset

    for sample in StreamingDataset(str(folder / "lit"), shuffle=True):
        yield sample["jpg"]


def of_ldm(folder: Path, size: int) -> Iterator[torch.Tensor]:
    dataset = ours.open_dataset(ours.DataConfig(shards=str(folder / "tar"), size=size))
    return (batch["image"] for batch in ours.loader(dataset, BATCH, stop=len(dataset) // BATCH * BATCH))


def contenders(folder: Path, size: int) -> dict[str, Callable[[], Iterator[torch.Tensor]]]:
    peers = {"webdataset": of_webdataset}
    peers |= {"Mosaic streaming": of_streaming} if (folder / "mds/index.json").is_file() else {}
    peers |= {"litdata": of_litdata} if (folder / "lit/index.json").is_file() else {}
    found: dict[str, Callable[[], Iterator[torch.Tensor]]] = {}
    for name, stream in peers.items():
        for how, decode in (("Pillow", pillow), ("our decoder", our_decode)):
            found[f"{name} + {how}"] = lambda s=stream, d=decode: batches(s(folder), size, d)
    return found | {"ldm": lambda: of_ldm(folder, size)}


def latents(folder: Path) -> dict[str, Callable[[], Iterator[torch.Tensor]]]:
    """Records of 126 KB, latents with text states, from our cache and as .npy in webdataset's shards."""
    dataset = ours.open_dataset(ours.DataConfig(shards=str(folder / "tar"), size=64, workers=0))
    rng = torch.Generator().manual_seed(0)

    def encode(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(torch.randn(2, len(image), 4, 32, 32, generator=rng))  # type: ignore[return-value]

    def states(texts: list[str]) -> tuple[torch.Tensor, None]:
        return torch.randn(len(texts), 72, 768, generator=rng), None

    encoders = Encoders("m", encode, "t", states)
    kept = cached(dataset, encoders, folder / "kept")
    for start in range(0, len(dataset), 64):
        samples = []
        for position in range(start, min(start + 64, len(dataset))):
            batch, members = kept.__getitems__([position]), {}
            for name, tensor in (
                ("latent.npy", torch.stack([batch["mean"], batch["std"]], 1)),
                ("text.npy", batch["states"]),
            ):
                target = io.BytesIO()
                np.save(target, tensor[0].numpy())
                members[name] = target.getvalue()
            samples.append((f"{position:09d}", members))
        write_shard(folder / "npy" / f"{start // 64:05d}.tar", samples)

    def of_npy() -> Iterator[torch.Tensor]:
        import webdataset

        shards = [str(path) for path in sorted((folder / "npy").glob("*.tar"))]
        rows: list[np.ndarray] = []
        texts: list[np.ndarray] = []
        for sample in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).shuffle(256):
            rows.append(np.load(io.BytesIO(sample["latent.npy"])))
            texts.append(np.load(io.BytesIO(sample["text.npy"])))
            if len(rows) == BATCH:
                torch.from_numpy(np.stack(texts))
                yield torch.from_numpy(np.stack(rows))
                rows, texts = [], []

    def of_ours(records: CachedDataset) -> Iterator[torch.Tensor]:
        return (batch["mean"] for batch in ours.loader(records, BATCH, stop=len(dataset) // BATCH * BATCH))

    return {
        "webdataset, npy": of_npy,
        "ldm, mapped records, when first read": lambda: of_ours(CachedDataset(dataset, encoders, folder / "kept")),
        "ldm, mapped records, from then on": lambda: of_ours(kept),
    }


def measure(table: dict[str, Callable[[], Iterator[torch.Tensor]]], repeats: int, title: str) -> dict[str, float]:
    rates: dict[str, list[float]] = {name: [] for name in table}
    for turn in range(repeats + 1):  # the first warms up
        for name, make in table.items():
            began, seen = time.process_time(), 0
            for batch in make():
                seen += len(batch)
            if turn:
                rates[name].append(seen / (time.process_time() - began))
    found = {name: statistics.median(values) for name, values in rates.items()}
    print(f"\n| {title} | samples/s a core | ratio |\n|---|---|---|")
    for name, rate in found.items():
        print(f"| {name} | {rate:,.0f} | {rate / next(iter(found.values())):.2f} |", flush=True)
    return found


def main() -> None:
    parser = flags(__doc__, 3)
    parser.add_argument("--pictures", type=int, default=256)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        jpegs = list(pictures(args.pictures, np.random.default_rng(0)))
        prepare(folder, jpegs)
        size = statistics.mean(map(len, jpegs)) / 1000
        print(f"{conditions(args)}; {len(jpegs)} JPEGs of 512 px, {size:.0f} KB each; medians of {args.repeats}")
        tables = {f"JPEG to {size} px": contenders(folder, size) for size in (128, 256)}
        tables["latents and text, 126 KB"] = latents(folder)
        keep(args, {title: measure(table, args.repeats, title) for title, table in tables.items()})


if __name__ == "__main__":
    main()
