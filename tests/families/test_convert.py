"""The convert script, and pickles: read in a process of their own, and nothing in them run."""

import pickle
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm.checkpoints import native, pickled
from ldm.checkpoints.native import ModelSpec
from ldm.errors import UserError
from ldm.families.convert import convert
from ldm.families.family import Layout
from ldm.families.load import load
from ldm.models.autoencoder import Autoencoder, AutoencoderConfig

SCRIPT = Path(__file__).parents[2] / "scripts" / "convert.py"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_dtype_and_layout(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, folders["sd1"], tmp_path / "half", "--to", "ldm", "--dtype", "fp16")
    assert {value.dtype for value in load_file(tmp_path / "half").values()} == {torch.float16}
    whole, half = load(folders["sd1"]), load(tmp_path / "half")
    for prefix, module in half.modules.items():
        other = whole.modules[prefix].state_dict()
        assert all(torch.equal(value, other[n].half().float()) for n, value in module.state_dict().items())


def test_int8_is_our_own(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, folders["sd1"], tmp_path / "small", "--to", "ldm", "--dtype", "int8")
    small, whole = load(tmp_path / "small"), load(folders["sd1"])
    assert torch.int8 in {value.dtype for value in load_file(tmp_path / "small").values()}
    for prefix, module in small.modules.items():
        other = whole.modules[prefix].state_dict()
        for name, value in module.state_dict().items():
            assert (value - other[name]).abs().max() <= other[name].abs().max() / 250


@pytest.mark.parametrize("to", ["ldm", "compvis"])
def test_equal_models_are_equal_bytes(to: Layout, folders: dict[str, Path], tmp_path: Path) -> None:
    for i in range(4):
        convert(folders["sd1"], tmp_path / str(i), to)
    assert len({(tmp_path / str(i)).read_bytes() for i in range(4)}) == 1


def test_complaints_are_one_line(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    native.save(
        tmp_path / "vae",
        ModelSpec(AutoencoderConfig(channels=(32,)), 8),
        native.build(ModelSpec(AutoencoderConfig(channels=(32,)), 8)).modules,
    )
    (tmp_path / "text").write_text("hello")
    for arguments in (
        (tmp_path / "absent", tmp_path / "out", "--to", "ldm"),
        (tmp_path / "text", tmp_path / "out", "--to", "ldm"),
        (tmp_path / "vae", tmp_path / "out", "--to", "diffusers"),
        (folders["sd1"], tmp_path / "out", "--to", "onnx"),
        (folders["sd1"], tmp_path / "out", "--to", "compvis", "--dtype", "int8"),
        (folders["sd1"], tmp_path / "vae", "--to", "diffusers"),
        (folders["sd1"], tmp_path / "text", "--to", "ldm"),
    ):
        with pytest.raises(SystemExit) as caught:
            run(monkeypatch, *arguments)
        assert caught.value.code == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"vae", "text"}  # nothing half-made stays
    assert (tmp_path / "text").read_text() == "hello"


def test_ckpt(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(folders["sd1"], tmp_path / "single", "compvis")
    state = load_file(tmp_path / "single")
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="safetensors"):
        load(tmp_path / "model.ckpt")  # only to be converted
    run(monkeypatch, tmp_path / "model.ckpt", tmp_path / "back", "--to", "compvis")
    back = load_file(tmp_path / "back")
    assert back.keys() == state.keys() and all(torch.equal(value, state[n]) for n, value in back.items())


def test_folder_of_bin(folders: dict[str, Path], tmp_path: Path) -> None:
    old = Path(shutil.copytree(folders["sd1"], tmp_path / "old"))
    for file in old.rglob("*.safetensors"):
        name = "pytorch_model.bin" if file.name == "model.safetensors" else f"{file.stem}.bin"
        torch.save(load_file(file), file.with_name(name))
        file.unlink()
    with pytest.raises(UserError, match=r"convert\.py"):
        load(old)
    (tmp_path / "scratch").mkdir()
    safe = pickled.unpacked(old, tmp_path / "scratch")
    model, expected = load(safe), load(folders["sd1"])
    for prefix, module in model.modules.items():
        other = expected.modules[prefix].state_dict()
        assert all(torch.equal(value, other[n]) for n, value in module.state_dict().items())


class Evil:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> object:
        return (open, (str(self.place), "w"))


@pytest.mark.parametrize("protocol", [pytest.param(2, marks=pytest.mark.slow), 5, "torch"])
def test_a_pickle_is_not_run(protocol: int | str, tmp_path: Path) -> None:
    harm, place = {"state_dict": {"a": torch.zeros(1)}, "x": Evil(tmp_path / "harm")}, tmp_path / "evil.ckpt"
    torch.save(harm, place) if protocol == "torch" else place.write_bytes(pickle.dumps(harm, int(protocol)))
    with pytest.raises(UserError, match="nothing in it was run") as caught:
        pickled.unpacked(place, tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["evil.ckpt"]


def test_a_trainers_callbacks_do_not_hinder(tmp_path: Path) -> None:
    """Many .ckpt files were written by PyTorch Lightning and name its classes."""
    import types

    module = types.ModuleType("pytorch_lightning.callbacks")

    class ModelCheckpoint:
        pass

    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = module.__name__, "ModelCheckpoint"
    module.ModelCheckpoint = ModelCheckpoint  # type: ignore[attr-defined]
    parent = types.ModuleType("pytorch_lightning")
    sys.modules |= {"pytorch_lightning": parent, module.__name__: module}
    try:
        torch.save({"state_dict": {"a": torch.ones(2)}, "callbacks": {ModelCheckpoint: 1}}, tmp_path / "a.ckpt")
    finally:
        del sys.modules[module.__name__], sys.modules["pytorch_lightning"]
    pickled.to_safetensors(tmp_path / "a.ckpt", tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out")["a"], torch.ones(2))


# Each is read in a process of its own, which takes seconds to begin.
ALSO_BROKEN = [pytest.param(content, marks=pytest.mark.slow) for content in (b"\x80\x02.", b"\x80\x04\x95")]


@pytest.mark.parametrize("content", [b"PK\x03\x04 rubbish", pickle.dumps([1, 2]), *ALSO_BROKEN])
def test_broken_pickles_are_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError) as caught:
        pickled.unpacked(tmp_path / "a", tmp_path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("length", [640, 0x04504B])
def test_a_header_may_begin_as_a_pickle_does(length: int, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(length.to_bytes(8, "little") + b"{}")
    assert not pickled.is_pickled(tmp_path / "a")


@pytest.mark.parametrize("to", ["ldm", "diffusers", "compvis"])
def test_another_autoencoder_takes_the_place_of_the_models_own(
    folders: dict[str, Path], tmp_path: Path, to: str
) -> None:
    convert(folders["sd1"], tmp_path / "out", to, vae=folders["sd2"])
    out, own, other = load(tmp_path / "out"), load(folders["sd1"]), load(folders["sd2"])
    theirs = other.autoencoder.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in out.autoencoder.state_dict().items())
    assert out.backbone is not None and own.backbone is not None
    kept = own.backbone.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in out.backbone.state_dict().items())


def test_an_autoencoder_for_other_latents_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    config = AutoencoderConfig(z_channels=3, channels=(32, 32), res_blocks=1, std=(2.0,))
    native.save(tmp_path / "vae", ModelSpec(config, 32), {"autoencoder": Autoencoder(config)})
    with pytest.raises(UserError, match="its latents have 3 channels, the model's 4"):
        convert(folders["sd1"], tmp_path / "out", "ldm", vae=tmp_path / "vae")
    assert not (tmp_path / "out").exists()
