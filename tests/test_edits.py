"""Edits of a whole pipeline: variations, upscaling, windows, inversion, and what was damaged."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image as Pillow
from safetensors.torch import save_file

from ldm import pipeline, start
from ldm.adapters.ip_adapter import IPAdapter
from ldm.canvas import Canvas
from ldm.errors import UserError
from ldm.painting import round_trip
from ldm.pipeline import Pipeline
from ldm.recipe import Request
from ldm.restore import DAMAGES, enlarged, parse
from ldm.text.open_clip import open_clip

APPLE = Request("a red apple", seed=5)


@pytest.fixture(scope="module")
def painter(tiny_model: Path) -> Pipeline:
    return pipeline.load(str(tiny_model), "cpu")


@pytest.fixture
def picture() -> Canvas:
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Canvas(torch.nn.functional.interpolate(coarse, (16, 16), mode="bilinear"))


def test_variations_lead_from_one_seed_to_another(painter: Pipeline) -> None:
    def paint(variation: float) -> torch.Tensor:
        return painter.txt2img(replace(APPLE, variation=variation, variation_seed=9))

    ends = painter.txt2img(APPLE), painter.txt2img(replace(APPLE, seed=9))
    assert torch.equal(paint(0.0), ends[0])
    torch.testing.assert_close(paint(1.0), ends[1], atol=1e-3, rtol=0)
    assert not torch.equal(paint(0.3), ends[0]) and not torch.equal(paint(0.3), ends[1])
    made = painter.requests(replace(APPLE, variation=0.3, variation_seed=9), ["a"], 2)
    assert [(r.seed, r.variation_seed) for r in made] == [(5, 9), (6, 10)]
    together, alone = painter.txt2img(*made), torch.cat([painter.txt2img(r) for r in made])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


def test_upscaling_paints_again_at_the_larger_size(painter: Pipeline) -> None:
    request = replace(APPLE, steps=5, upscale=1.5, upscale_strength=0.4, width=16, height=24)
    steps = list(painter.sample([request]))
    assert len(steps) == 5 + 2 == painter.steps(request)
    assert painter.decode(steps[4].x).shape == (1, 3, 24, 16)
    assert painter.finish(steps[-1].x).shape == (1, 3, 36, 24)
    first = list(painter.sample([replace(request, upscale=1.0)]))
    assert torch.equal(first[-1].x, steps[4].x)
    other = painter.txt2img(replace(request, upscale_strength=0.8))
    assert not torch.equal(other, painter.finish(steps[-1].x))


def test_windows_paint_what_is_larger_than_the_model(painter: Pipeline) -> None:
    wide = replace(APPLE, width=48, height=16, steps=2)
    tiled = painter.txt2img(replace(wide, tile=16))
    assert tiled.shape == (1, 3, 16, 48) and not torch.equal(tiled, painter.txt2img(wide))
    assert torch.equal(painter.txt2img(replace(wide, tile=64)), painter.txt2img(wide))


def test_an_inversion_starts_from_the_picture(painter: Pipeline, picture: Canvas) -> None:
    """The seed is not heard; the new prompt is; and the round trip is told."""
    request = replace(APPLE, invert="a blue sofa", strength=0.5)
    one = painter.paint(request, canvas=picture)
    assert torch.equal(one, painter.paint(replace(request, seed=6), canvas=picture))
    assert not torch.equal(one, painter.paint(replace(request, prompt="a cat"), canvas=picture))
    assert not torch.equal(one, painter.paint(replace(request, invert="a cat"), canvas=picture))
    (complete,) = painter.requests(replace(APPLE, invert="a blue sofa"), ["a"], 1, picture)
    assert complete.sampler == "ddim"
    told = round_trip(painter, complete, picture)
    assert told.startswith("inverted: 'a blue sofa' comes back at ")
    assert told == round_trip(painter, replace(complete, guidance="cfgpp", cfg_scale=0.5), picture)


@pytest.mark.parametrize("what", ["blur:1.5", "small:2", "grey"])
def test_what_was_damaged_is_met(painter: Pipeline, what: str) -> None:
    """The picture that comes out, damaged again, is nearer to what was measured than one that knew nothing of it."""
    damage = parse(what)
    whole = painter.txt2img(replace(APPLE, prompt="a sofa", seed=8)).clamp(-1, 1)  # what the decoder can paint
    measured = enlarged(Canvas(damage.apply(whole)), damage)
    request = replace(APPLE, restore=what, cfg_scale=1.0, steps=6)
    result = painter.paint(request, canvas=measured)
    blind = painter.txt2img(replace(APPLE, cfg_scale=1.0, steps=6, width=result.shape[3], height=result.shape[2]))
    near, far = (float((damage.apply(i) - damage.measured(measured.image)).norm()) for i in (result, blind))
    assert near < 0.8 * far  # of random weights: a factor from 0.38 to 0.63 was seen
    assert measured.request(request).strength == 1.0


def test_a_part_is_not_restored(picture: Canvas) -> None:
    with pytest.raises(UserError, match="of a whole picture"):
        enlarged(replace(picture, mask=torch.ones(1, 1, 16, 16)), parse("grey"))


def test_damages(picture: Canvas) -> None:
    image = picture.image
    flat = torch.full((1, 3, 8, 8), 0.3)
    for name in DAMAGES:
        torch.testing.assert_close(parse(name).apply(flat).mean(), torch.tensor(0.3))
    dot = torch.zeros(1, 3, 21, 21)
    dot[..., 10, 10] = 1
    spread = parse("blur:2").apply(dot)[0, 0]
    rows = torch.arange(21) - 10.0
    assert float(spread.sum()) == pytest.approx(1, abs=1e-3)
    assert float((spread.sum(1) * rows**2).sum()) == pytest.approx(4, rel=0.05)
    small = parse("small:4")
    torch.testing.assert_close(small.apply(image)[0, 0, 0, 0], image[0, 0, :4, :4].mean())
    torch.testing.assert_close(small.apply(enlarged(picture, small).image), image, atol=1e-5, rtol=0)
    grey = parse("grey").apply(image)
    assert torch.equal(grey[:, 0], grey[:, 2]) and torch.allclose(parse("grey").measured(grey), grey, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"variation": 1.5}, "variation is 1.5"),
        ({"variation_seed": -1}, "variation seed is -1"),
        ({"upscale": 0.5}, "upscale is 0.5"),
        ({"upscale": float("nan")}, "upscale is nan"),
        ({"upscale": 8.0, "width": 4096}, "the larger side is 32768"),
        ({"upscale": 2.0, "upscale_strength": 0.0}, "strength is 0"),
        ({"upscale": 2.0, "strength": 0.5}, "scale --init-image by"),
        ({"tile": 10}, "tile is 10: give a multiple of 4"),
        ({"tile": 4}, "tile is 4"),
        ({"tile": -8}, "tile is -8"),
        ({"invert": "a", "sampler": "euler_a"}, "goes back by ddim or euler, not euler_a"),
        ({"invert": "a", "restore": "grey"}, "ddim alone"),
        ({"restore": "blurr"}, "unknown damage 'blurr' .did you mean 'blur'"),
        ({"restore": "blur:x"}, "damage 'blur:x': give blur:2"),
        ({"restore": "small:2.5"}, "small:4, from 2 to 16"),
        ({"restore": "grey:3"}, "grey:1"),
    ],
    ids=str,
)
def test_edits_that_cannot_be(painter: Pipeline, change: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        painter.complete(replace(APPLE, **change))


@pytest.mark.parametrize("field", ["invert", "restore"])
def test_edits_that_need_a_picture(painter: Pipeline, field: str) -> None:
    with pytest.raises(UserError, match=f"{field} is of a picture to start from"):
        painter.requests(replace(APPLE, **{field: "grey"}), ["a"])


def test_large_pictures_go_through_the_autoencoder_in_stripes(
    painter: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    latent = torch.randn(1, 4, 20, 20, generator=torch.Generator().manual_seed(0))
    image = torch.rand(1, 3, 40, 40) * 2 - 1
    whole, moments = painter.decode(latent), start.encode(painter.model.autoencoder, image)
    monkeypatch.setattr(start, "LARGE", 30**2)
    calls = []
    inner = start.stripes.decode
    monkeypatch.setattr(start.stripes, "decode", lambda *a: calls.append(1) or inner(*a, rows=7))
    assert (painter.decode(latent) - whole).abs().max() < 1 / 255 and calls
    torch.testing.assert_close(start.encode(painter.model.autoencoder, image).mean, moments.mean, atol=1e-4, rtol=1e-4)


def test_a_large_picture_that_overflows_is_tried_again_in_stripes(
    painter: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole it would need twice the memory that stripes were there to save."""
    tried: list[torch.dtype] = []

    def overflow(autoencoder: torch.nn.Module, latent: torch.Tensor) -> torch.Tensor:
        tried.append(latent.dtype)
        return torch.full((1, 3, 40, 40), float("nan") if len(tried) == 1 else 0.5)

    monkeypatch.setattr(start, "LARGE", 30**2)
    monkeypatch.setattr(start.stripes, "decode", overflow)
    assert (painter.decode(torch.zeros(1, 4, 20, 20)) == 0.5).all() and len(tried) == 2


@pytest.mark.parametrize("sampler", ["lcm", "tcd", "euler"])
def test_few_steps_without_guidance_cost_one_evaluation_each(
    painter: Pipeline, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    """As distilled models are sampled: guidance 1, trailing steps, no negative is read for nothing."""
    calls: list[int] = []
    inner = painter.model.backbone.forward  # type: ignore[union-attr]

    def count(z: torch.Tensor, *more: object) -> torch.Tensor:
        calls.append(len(z))
        return inner(z, *more)

    monkeypatch.setattr(painter.model.backbone, "forward", count)
    painter.txt2img(replace(APPLE, sampler=sampler, schedule="trailing", steps=4, cfg_scale=1.0))
    assert calls == [1, 1, 1, 1]
    calls.clear()
    painter.txt2img(replace(APPLE, sampler=sampler, schedule="trailing", steps=4, cfg_scale=1.5))
    assert calls == [2, 2, 2, 2]


def ip_adapter(folder: Path, painter: Pipeline, width: int = 24) -> tuple[Path, Path, Path]:
    """The files of an adapter for a model, of a picture, and of an image tower whose embeddings are so wide."""
    open_clip()  # declares torchvision's operators, which transformers asks for
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    adapter, rng = IPAdapter(painter.model.backbone, 24), torch.Generator().manual_seed(3)
    named = {f"image_proj.{name}": value for name, value in adapter.projection.state_dict().items()}
    for i, (keys, values) in enumerate(zip(adapter.keys, adapter.values, strict=True)):
        named |= {f"ip_adapter.{2 * i + 1}.to_k_ip.weight": keys.weight}
        named |= {f"ip_adapter.{2 * i + 1}.to_v_ip.weight": values.weight}
    save_file({name: torch.randn(v.shape, generator=rng) for name, v in named.items()}, folder / "ip.safetensors")
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    tower = CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=width)
    CLIPVisionModelWithProjection(tower).save_pretrained(folder / f"tower{width}")
    Pillow.new("RGB", (16, 16), "red").save(folder / "red.png")
    return folder / "ip.safetensors", folder / "red.png", folder / f"tower{width}"


def test_a_picture_to_resemble(tiny_model: Path, tmp_path: Path) -> None:
    painter = pipeline.load(str(tiny_model), "cpu")
    plain = painter.txt2img(APPLE)
    adapter, picture, tower = ip_adapter(tmp_path, painter)
    painter.show(f"{adapter}:0.8", picture, tower)
    shown = painter.txt2img(APPLE)
    assert not torch.allclose(shown, plain, atol=0.01)
    assert set(painter.made.inputs) == {"ip-adapter ip:0.8", "ip-image red"}
    Pillow.new("RGB", (16, 16), "blue").save(picture)
    other = pipeline.load(str(tiny_model), "cpu")
    other.show(f"{adapter}:0.8", picture, tower)
    assert not torch.allclose(other.txt2img(APPLE), shown, atol=1e-4)
    fresh = pipeline.load(str(tiny_model), "cpu")
    with pytest.raises(UserError, match="reads embeddings of 24 numbers, .* gives 16: another tower"):
        fresh.show(str(adapter), picture, ip_adapter(tmp_path, fresh, 16)[2])
    with pytest.raises(UserError, match="0-0.5"):  # only a control steers a part of the run
        fresh.show(f"{adapter}:0.8:0-0.5", picture, tower)
