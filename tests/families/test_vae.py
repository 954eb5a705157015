"""Another autoencoder for a model, from any layout, and the tiny one."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm import pipeline
from ldm.checkpoints import native
from ldm.errors import UserError
from ldm.families.convert import convert
from ldm.families.load import load
from ldm.families.vae import load_vae
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.taesd import TinyAutoencoder, TinyConfig

TAESD = Path(__file__).parents[3] / "shared" / "files" / "taesd"
SD = AutoencoderConfig(std=(1 / 0.18215,))


@pytest.fixture(scope="module")
def sources(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same autoencoder in every layout."""
    root = tmp_path_factory.mktemp("vae")
    convert(folders["sd1"], root / "single", "compvis")
    convert(folders["sd1"], root / "ours", "ldm")
    prefix = "first_stage_model."
    bare = {n.removeprefix(prefix): v for n, v in load_file(root / "single").items() if n.startswith(prefix)}
    save_file(bare | {"loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(1)}, root / "bare")
    vae = load_vae(root / "ours")
    native.save(root / "alone", native.ModelSpec(vae.config, 512), {"autoencoder": vae})
    return {
        "folder": folders["sd1"],
        "part": folders["sd1"] / "vae",
        "file of a part": folders["sd1"] / "vae/diffusion_pytorch_model.safetensors",
        **{name: root / name for name in ("single", "ours", "bare", "alone")},
    }


@pytest.mark.parametrize("kind", ["folder", "part", "file of a part", "single", "ours", "bare", "alone"])
def test_every_layout_gives_the_same(sources: dict[str, Path], kind: str) -> None:
    expected = load(sources["folder"]).autoencoder
    vae = load_vae(sources[kind], SD)
    assert vae.config == expected.config
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in vae.state_dict().items())


def test_a_model_takes_another_autoencoder(folders: dict[str, Path], sources: dict[str, Path]) -> None:
    other = folders["sd2"]
    swapped = load(other, vae=sources["bare"])
    assert torch.equal(
        swapped.autoencoder.decoder.conv_in.weight, load(sources["folder"]).autoencoder.decoder.conv_in.weight
    )
    assert (
        pipeline.load(str(other), "cpu", vae=str(sources["bare"])).model.autoencoder.config
        == swapped.autoencoder.config
    )


def test_what_is_no_autoencoder(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="have 4 channels, the model's 8"):
        load_vae(sources["bare"], AutoencoderConfig(z_channels=8))
    save_file({"a.lora_up.weight": torch.zeros(1)}, tmp_path / "lora")
    with pytest.raises(UserError, match="a LoRA, not an autoencoder"):
        load_vae(tmp_path / "lora", SD)
    with pytest.raises(UserError, match="an autoencoder alone"):
        load(sources["bare"])


needs_taesd = pytest.mark.skipif(not TAESD.exists(), reason="TAESD's weights are not beside this copy")


@needs_taesd
@pytest.mark.parametrize("place", ["taesd_decoder.safetensors", "taesd_encoder.safetensors"])
def test_taesd_equals_diffusers(place: str) -> None:
    from diffusers import AutoencoderTiny

    vae = load_vae(TAESD / place, SD)
    assert isinstance(vae, TinyAutoencoder)
    theirs = AutoencoderTiny()
    for half, skipped in (("encoder", 0), ("decoder", 1)):
        state = load_file(TAESD / f"taesd_{half}.safetensors")
        renamed = {f"layers.{int(n.split('.')[0]) - skipped}.{n.split('.', 1)[1]}": v.float() for n, v in state.items()}
        getattr(theirs, half).load_state_dict(renamed)
    image, latent = torch.rand(1, 3, 32, 48) * 2 - 1, torch.randn(1, 4, 4, 6)
    with torch.no_grad():
        assert torch.allclose(vae.encode(image).mode, theirs.encode(image).latents, atol=1e-5)
        assert torch.allclose(vae.decode(latent), theirs.decode(latent).sample, atol=1e-5)
        rebuilt = vae.decode(vae.encode(image).mode)
    assert rebuilt.shape == image.shape


@needs_taesd
def test_taesd_of_other_latents() -> None:
    with pytest.raises(UserError, match="have 16 channels, the model's 4"):
        load_vae(TAESD / "taesd3_decoder.safetensors", SD)


def test_taesd_in_other_places(tmp_path: Path) -> None:
    tiny = TinyAutoencoder(TinyConfig(width=8))
    for half in ("encoder", "decoder"):
        state = {n.split(".", 1)[1]: v for n, v in tiny.state_dict().items() if n.startswith(half)}
        save_file(state, tmp_path / f"taesdxl_{half}.safetensors")
    pair = load_vae(tmp_path, SD)
    assert all(torch.equal(value, tiny.state_dict()[name]) for name, value in pair.state_dict().items())
    (tmp_path / "taesdxl_encoder.safetensors").unlink()
    with pytest.raises(UserError, match="must stand beside it"):
        load_vae(tmp_path / "taesdxl_decoder.safetensors", SD)
    from diffusers import AutoencoderTiny

    theirs = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    theirs.save_pretrained(tmp_path / "theirs")
    vae, latent = load_vae(tmp_path / "theirs", SD), torch.randn(1, 4, 4, 6)
    with torch.no_grad():
        assert torch.allclose(vae.decode(latent), theirs.decode(latent).sample, atol=1e-5)


def test_a_tiny_autoencoder_paints(folders: dict[str, Path], tmp_path: Path) -> None:
    tiny = TinyAutoencoder(TinyConfig(width=8))
    for half in ("encoder", "decoder"):
        state = {n.split(".", 1)[1]: v for n, v in tiny.state_dict().items() if n.startswith(half)}
        save_file(state, tmp_path / f"taesd_{half}.safetensors")
    painter = pipeline.load(str(folders["sd1"]), "cpu", vae=str(tmp_path))
    from ldm.recipe import Request

    assert painter.txt2img(Request("a red apple", steps=2, width=64, height=64)).shape == (1, 3, 64, 64)
    shutil.rmtree(tmp_path)
