"""LPIPS: the published example's figures, the key layout, and what training asks of it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm.errors import UserError
from ldm.models.perceptual import LPIPS, NETS
from ldm.text.open_clip import open_clip

EXAMPLE = Path(__file__).parents[3] / "shared/files/lpips"
WEIGHTS = Path(__file__).parents[2] / "weights"


@pytest.fixture(params=list(NETS))
def net(request: pytest.FixtureRequest) -> LPIPS:
    model = LPIPS(request.param)
    rng = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=rng).abs() / parameter[0].numel() ** 0.5)
    return model


def pictures(size: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return torch.rand(2, 2, 3, size, size, generator=rng).mul(2).sub(1).unbind()


def example(name: str) -> torch.Tensor:
    pixels = np.array(Image.open(EXAMPLE / f"ex_{name}.png").convert("RGB"), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]


def need(path):
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


def as_file(model: LPIPS, path):
    state = model.state_dict()
    for index in range(5):
        state[f"lin{index}.model.1.weight"] = state.pop(f"heads.{index}")[None, :, None, None]
    save_file(state, path)
    return path


def test_published_example_alex() -> None:
    model = LPIPS.load(need(EXAMPLE / "lpips_alexnet.safetensors"))
    reference = example("ref")
    assert model(example("p0"), reference).item() == pytest.approx(0.722, abs=1e-3)
    assert model(example("p1"), reference).item() == pytest.approx(0.138, abs=1e-3)


def test_fetched_weights_order_the_example() -> None:
    """AlexNet's figures are the published ones; VGG's are what the package lpips 0.1.4 gives for the same weights."""
    need(EXAMPLE)
    expected = {"alex": (0.722, 0.138), "vgg": (0.569, 0.422)}
    for name, figures in expected.items():
        model = LPIPS.load(need(WEIGHTS / f"lpips_{name}.safetensors"))
        found = [model(example(picture), example("ref")).item() for picture in ("p0", "p1")]
        assert found == pytest.approx(figures, abs=1e-3)


@pytest.mark.parametrize(("name", "build"), [("alex", "alexnet"), ("vgg", "vgg16")])
def test_layers_are_torchvisions(name: str, build: str) -> None:
    """The same state in torchvision's own network gives the same five features."""
    open_clip()  # makes torchvision importable
    from torchvision import models

    model, x = LPIPS(name), pictures(64)[0]
    theirs = getattr(models, build)(weights=None).features[: len(model.features)]
    model.features.load_state_dict(theirs.state_dict())
    x_normal = (x - model.shift) / model.scale
    for tap, ours in zip(NETS[name][1], model.compared(x), strict=True):
        torch.testing.assert_close(ours, theirs[: tap + 1](x_normal))


def test_distance_is_a_distance(net: LPIPS) -> None:
    x, y = pictures()
    assert net(x, y).shape == (2,)
    assert torch.equal(net(x, x), torch.zeros(2))
    torch.testing.assert_close(net(x, y), net(y, x))
    torch.testing.assert_close(net(x, y)[1:], net(x[1:], y[1:]), rtol=1e-4, atol=1e-6)


def test_gradient_reaches_the_picture_and_no_weight(net: LPIPS) -> None:
    x, y = pictures()
    x.requires_grad_()
    net(x, y).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in net.parameters())


def test_gradient_is_finite_where_the_features_are_zero() -> None:
    x = torch.zeros(1, 3, 48, 48, requires_grad=True)
    LPIPS("alex").requires_grad_(False)(x, pictures()[1][:1]).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_autocast_and_channels_last(net: LPIPS) -> None:
    x, y = pictures()
    exact = net(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert net.compared(x)[0].dtype == torch.bfloat16
        rough = net(x, y)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=1e-3)
    last = net.to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.to(memory_format=torch.channels_last), y), exact, rtol=1e-4, atol=1e-6)


def test_half_precision_module_takes_any_picture(net: LPIPS) -> None:
    x, y = pictures()
    exact = net(x, y)
    torch.testing.assert_close(net.bfloat16()(x, y), exact, rtol=0.05, atol=1e-3)


def test_file_round_trip_decides_the_network(net: LPIPS, tmp_path) -> None:
    again = LPIPS.load(as_file(net, tmp_path / "any.name"))
    assert again.taps == net.taps
    x, y = pictures()
    assert torch.equal(again(x, y), net(x, y))


def test_bad_files(net: LPIPS, tmp_path) -> None:
    with pytest.raises(UserError, match="make weights"):
        LPIPS.load(tmp_path / "absent")
    (tmp_path / "text").write_text("no tensors here")
    with pytest.raises(UserError, match="cannot read"):
        LPIPS.load(tmp_path / "text")
    path = as_file(net, tmp_path / "whole")
    state = load_file(path)
    del state["lin2.model.1.weight"]
    save_file(state, tmp_path / "short")
    with pytest.raises(UserError, match=r"heads\.2"):
        LPIPS.load(tmp_path / "short")
