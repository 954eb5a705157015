"""A second model that takes over where little noise is left: by its own weights and text, in the recipe, refused where
its latents are others. That pictures equal diffusers' is tested with the families."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image as Pillow

from ldm import painting, pipeline, recipe
from ldm.canvas import Canvas
from ldm.checkpoints import native
from ldm.errors import UserError
from ldm.models.attention import fused
from ldm.pipeline import Pipeline
from ldm.recipe import Request
from ldm.request import Run

APPLE = Request("a red apple", seed=5, sampler="euler", schedule="trailing", steps=5)


def write(path: Path, spec: native.ModelSpec) -> Path:
    model, rng = native.build(spec), torch.Generator().manual_seed(1)
    for module in model.modules.values():
        for parameter in module.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=rng)
    native.save(path, spec, model.modules)
    return path


@pytest.fixture(scope="module")
def second(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Deeper than the first, so that pictures must be multiples of 8 in place of 4."""
    spec = native.read_spec(tiny_model)
    assert spec.backbone
    deeper = replace(spec.backbone, channels=(16, 32, 32), depth=(1, 1, 1), heads=(2, 2, 2))
    return write(tmp_path_factory.mktemp("second") / "second.safetensors", replace(spec, backbone=deeper))


def load(tiny_model: Path, second: Path, *, offload: bool = False) -> Pipeline:
    painter = pipeline.load(str(tiny_model), "cpu", "fp32", offload=offload)
    painter.refine(pipeline.load(str(second), "cpu", "fp32", offload=offload))
    return painter


def test_it_takes_over_at_its_level(tiny_model: Path, second: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The share is of the training steps: of 999, 799, 599, 399, 199 it is those below 200 after 0.8."""
    painter = load(tiny_model, second)
    labels: dict[str, list[int]] = {}
    for name, network in (("first", painter.model.backbone), ("second", painter._networks["refiner backbone"])):

        def spy(module: object, given: tuple[torch.Tensor, ...], name: str = name) -> None:
            labels.setdefault(name, []).append(round(float(given[1][0])))

        assert network is not None
        network.register_forward_pre_hook(spy)
    for start, first, last in ((None, [999, 799, 599, 399], [199]), (0.401, [999, 799, 599], [399, 199])):
        labels.clear()
        painter.txt2img(replace(APPLE, refiner_start=start))
        assert labels == {"first": first, "second": last}
    words = [replace(APPLE, prompt=prompt, refiner_start=0.001) for prompt in ("a red apple", "a blue sofa")]
    one, other = (painter.txt2img(request) for request in words)
    assert not torch.equal(one, other)
    labels.clear()
    painter.txt2img(replace(APPLE, upscale=2.0, tile=16))
    assert len(labels["second"]) > 2, "the larger picture is refined too, in windows"


def test_its_sizes_hold(tiny_model: Path, second: Path) -> None:
    painter = load(tiny_model, second)
    with pytest.raises(UserError, match="multiple of 8, which this model needs"):
        painter.complete(replace(APPLE, width=20))
    odd = Canvas(torch.zeros(1, 3, 22, 30))
    assert painter.paint(replace(APPLE, strength=0.5), canvas=odd).shape == (1, 3, 22, 30)


def test_it_stands_in_the_recipe(
    tiny_model: Path, second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "ASSETS", tiny_model.parent)
    monkeypatch.setattr(pipeline, "EMBEDDED", tiny_model.stem)
    run = Run(prompt=("a red apple",), device="cpu", precision="fp32", out=tmp_path, refiner=str(second))
    (path,) = painting.run(run, {"seed": 3, "steps": 5})
    made = recipe.read(path)
    assert made.request.refiner_start == 0.8
    digest = pipeline.digest(second)
    assert made.made.inputs == {"refiner second": digest}
    assert f"Refiner: second [{digest[:10]}], Refiner switch at: 0.8" in made.parameters()
    again = replace(run, prompt=(), from_image=path)
    (same,) = painting.run(again, {})
    assert same.read_bytes() == path.read_bytes()
    pixels = [Pillow.open(path).tobytes()]
    for flags, given in ((again, {"refiner_start": 0.3}), (replace(run, refiner=""), {"seed": 3, "steps": 5})):
        (other,) = painting.run(flags, given)
        pixels.append(Pillow.open(other).tobytes())
    assert len(set(pixels)) == 3
    with pytest.raises(UserError, match="was made with the refiner second .*give that file too"):
        list(painting.run(replace(again, refiner=""), {}))
    with pytest.raises(UserError, match=r"refiner start is 0\.8: give the model that then takes over as --refiner"):
        list(painting.run(replace(again, refiner="", model=str(tiny_model)), {}))


def test_flags_about_speed_reach_it(tiny_model: Path, second: Path) -> None:
    painter = load(tiny_model, second)
    painter.prepare("sdpa")
    found = {m.attend for m in painter._networks["refiner backbone"].modules() if hasattr(m, "attend")}
    assert found == {fused}


def test_what_cannot_be_refined(tiny_model: Path, second: Path, tmp_path: Path) -> None:
    painter = load(tiny_model, second)
    for start in (0.0, 1.0, float("nan")):
        with pytest.raises(UserError, match="refiner start is .*: choose between 0 and 1"):
            painter.complete(replace(APPLE, refiner_start=start))
    with pytest.raises(UserError, match="leaves none of 4 steps to the refiner"):
        painter.complete(replace(APPLE, steps=4))
    with pytest.raises(UserError, match="goes back by one model"):
        painter.complete(replace(APPLE, sampler="ddim", strength=0.5, invert="a cat"))
    spec = native.read_spec(tiny_model)
    assert spec.backbone
    wide = replace(spec.autoencoder, z_channels=8, mean=(0.0,), std=(1.0,))
    others = {
        "latents of 8 channels": (wide, replace(spec.backbone, in_channels=8, out_channels=8)),
        r"deviation 2\b": (replace(spec.autoencoder, std=(2.0,)), spec.backbone),
        "an inpainting model": (spec.autoencoder, replace(spec.backbone, in_channels=9)),
    }
    for says, (autoencoder, backbone) in others.items():
        path = write(tmp_path / "other", replace(spec, autoencoder=autoencoder, backbone=backbone))
        with pytest.raises(UserError, match=f"the refiner .*{says}"):
            load(tiny_model, path)


def test_only_the_network_that_works_is_on_the_device(
    tiny_model: Path, second: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load(tiny_model, second).txt2img(APPLE)
    painter = load(tiny_model, second, offload=True)
    where = dict.fromkeys(painter._networks, "cpu")
    seen: list[tuple[str, list[str]]] = []
    painter._made = replace(painter._made, device="far")
    for name, network in painter._networks.items():
        monkeypatch.setattr(network, "to", lambda device, name=name: where.update({name: str(device)}))
        method = {"text": "encode", "autoencoder": "decode"}.get(name.removeprefix("refiner "), "forward")
        inner = getattr(network, method)

        def call(*arguments: object, name: str = name, inner: object = inner, **more: object) -> object:
            seen.append((name, [n for n, device in where.items() if device == "far"]))
            return inner(*arguments, **more)  # type: ignore[operator]

        monkeypatch.setattr(network, method, call)
    assert torch.equal(painter.txt2img(APPLE), expected)
    assert {name for name, _ in seen} == set(painter._networks)
    assert all(there == [name] for name, there in seen)
