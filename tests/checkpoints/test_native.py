"""Our own files: what is written is what is read, and what is broken is one clear line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ldm.checkpoints import files, native
from ldm.checkpoints.native import ModelSpec
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.unet import UNetConfig
from ldm.text.tower import TextConfig

SPEC = ModelSpec(
    autoencoder=AutoencoderConfig(channels=(16, 32), res_blocks=1, groups=8, mean=(0.1, 0.2, 0.3, 0.4), std=(2.0,)),
    image_size=32,
    backbone=UNetConfig(channels=(16, 32), res_blocks=1, depth=(0, 1), heads=(2, 2), context_dim=32, groups=8),
    text=TextConfig(width=32, heads=2, layers=2, context_length=16, vocab_size=600),
    prediction="v",
    provenance={"steps": 3, "note": "naïve"},
)


@pytest.fixture(scope="module")
def model() -> native.Model:
    built = native.build(SPEC)
    rng = torch.Generator().manual_seed(0)
    for module in built.modules.values():
        for parameter in module.parameters():
            parameter.data = torch.randn(parameter.shape, generator=rng) * 0.1
    return built


@pytest.fixture
def file(model: native.Model, tmp_path: Path) -> Path:
    native.save(tmp_path / "model.safetensors", SPEC, model.modules)
    return tmp_path / "model.safetensors"


# What each storage may change a weight by, relative to the largest of its row.
ERRORS = {"fp32": 0.0, "fp16": 2**-11, "bf16": 2**-8, "int8": 0.5 / 127 + 2**-11}


@pytest.mark.parametrize("storage", ERRORS)
def test_round_trip(storage: native.Storage, model: native.Model, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    native.save(path, SPEC, model.modules, storage)
    read = native.load(path)
    assert read.spec == SPEC == native.read_spec(path)
    for prefix, module in model.modules.items():
        for name, value in read.modules[prefix].state_dict().items():
            wanted = module.state_dict()[name]
            bound = (
                ERRORS[storage] * wanted.abs().flatten(1).amax(1)
                if wanted.dim() > 1
                else ERRORS[storage] * wanted.abs()
            )
            error = (value - wanted).abs()
            assert (error <= (bound.reshape(-1, *[1] * (wanted.dim() - 1)) + 1e-7)).all(), name
            assert value.dtype == torch.float32


def test_int8_is_a_quarter_of_fp32(model: native.Model, tmp_path: Path) -> None:
    for storage in ("fp32", "int8"):
        native.save(tmp_path / storage, SPEC, model.modules, storage)  # type: ignore[arg-type]
    assert (tmp_path / "int8").stat().st_size < 0.4 * (tmp_path / "fp32").stat().st_size


def test_what_is_loaded_is_still_and_of_the_asked_dtype(file: Path) -> None:
    read = native.load(file, dtype=torch.float64)
    for module in read.modules.values():
        assert not module.training
        assert all(p.dtype == torch.float64 and not p.requires_grad and not p.is_meta for p in module.parameters())


def test_autoencoder_alone(model: native.Model, tmp_path: Path) -> None:
    alone = tmp_path / "vae.safetensors"
    native.save(alone, replace(SPEC, backbone=None, text=None), {"autoencoder": model.autoencoder})
    read = native.load(alone)
    assert read.backbone is None and read.conditioner is None
    assert torch.equal(read.autoencoder.decoder.conv_out.weight, model.autoencoder.decoder.conv_out.weight)
    with pytest.raises(UserError, match="autoencoder alone"):
        read.denoiser()


def rewrite(path: Path, change) -> None:  # type: ignore[no-untyped-def]
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


NAME = "backbone.conv_in.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop(NAME), f"1 missing .*{NAME}"),
        (lambda t, m: t.update({"backbone.extra": torch.zeros(1)}), r"1 unexpected .*backbone\.extra"),
        (lambda t, m: t.update({NAME: t[NAME][:1].clone()}), f"1 misshapen .*{NAME}"),
        (lambda t, m: m.update(format="other"), "not an ldm model"),
        (lambda t, m: m.update(version="99"), "version 99"),
        (lambda t, m: m.update(spec="{"), "no readable spec"),
        (lambda t, m: m.pop("spec"), "no readable spec"),
        (lambda t, m: m.update(spec='{"image_size": 1' + 5000 * "0" + "}"), "5001 digits"),
        (lambda t, m: m.update(spec=m["spec"].replace("image_size", "image_sise")), "did you mean 'image_size'"),
        (lambda t, m: m.update(spec=json.dumps(json.loads(m["spec"]) | {"prediction": "w"})), "'w' is not one of"),
    ],
)
def test_strict(change, message: str, file: Path) -> None:  # type: ignore[no-untyped-def]
    rewrite(file, change)
    with pytest.raises(UserError, match=message) as caught:
        native.load(file)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("what", ["cut", "header", "empty", "text", "pickle", "absent", "folder"])
def test_a_broken_file_is_one_line(what: str, file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    broken = tmp_path / "broken.safetensors"
    content = {
        "cut": whole[:-1],
        "header": whole[:40],
        "empty": b"",
        "text": b"hello " * 9,
        "pickle": b"\x80\x02}q\x00.",
    }
    if what in content:
        broken.write_bytes(content[what])
    elif what == "folder":
        broken.mkdir()
    with pytest.raises(UserError, match=r"broken\.safetensors") as caught:
        native.load(broken)
    assert len(str(caught.value).splitlines()) == 1


def test_a_failing_writer_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def fail(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        native.save(file, SPEC, {"autoencoder": nn.Identity()})
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == [file.name]
