"""Painting as a library: every picture its own, defaults filled in, and nothing painted that cannot be."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldm import pipeline
from ldm.checkpoints import native
from ldm.diffusion.samplers import SAMPLERS
from ldm.errors import UserError
from ldm.jobs import Batch, batches
from ldm.models.autoencoder import Autoencoder
from ldm.pipeline import Pipeline
from ldm.recipe import Made, Request


@pytest.fixture(scope="module")
def painter(tiny_model: Path) -> Pipeline:
    return pipeline.load(str(tiny_model), "cpu")


APPLE = Request("a red apple", seed=5)


def test_defaults_are_the_models(painter: Pipeline) -> None:
    assert painter.complete(APPLE) == Request(
        "a red apple",
        "",
        5,
        sampler="dpmpp_2m",
        schedule="trailing",
        steps=4,
        cfg_scale=3.0,
        width=32,
        height=32,
        guidance="",
    )
    chosen = replace(
        APPLE, sampler="ddim", schedule="karras", steps=2, cfg_scale=0.0, width=16, height=24, guidance="apg"
    )
    assert painter.complete(chosen) == chosen


def test_a_picture_has_the_size_asked_for(painter: Pipeline) -> None:
    image = painter.txt2img(replace(APPLE, width=16, height=24))
    assert image.shape == (1, 3, 24, 16)
    assert image.isfinite().all()
    assert image.std() > 0.01


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in pipeline.ALONE])
def test_company_changes_nothing(painter: Pipeline, sampler: str) -> None:
    """The same picture alone, in a batch, and at another place of a batch, up to arithmetic."""
    requests = [
        Request("a red apple", seed=5, sampler=sampler),
        Request("a sofa", seed=6, sampler=sampler),
        Request("a cat", "a dog", seed=7, sampler=sampler),
    ]
    alone = torch.cat([painter.txt2img(r) for r in requests])
    together = painter.txt2img(*requests)
    backwards = painter.txt2img(*requests[::-1]).flip(0)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
    torch.testing.assert_close(backwards, alone, rtol=0, atol=1e-4)
    assert (alone[0] - alone[1]).abs().mean() > 0.01


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a blue sofa"},
        {"negative": "a dog"},
        {"seed": 6},
        {"sampler": "euler"},
        {"schedule": "karras"},
        {"steps": 5},
        {"cfg_scale": 4.0},
        {"guidance": "rescale:0.7"},
        {"guidance": "apg:1"},
        {"guidance": "cfgpp", "cfg_scale": 0.6},
        {"guidance": "threshold:0.9-0.5"},
        {"guidance": "threshold:0.9-0.5", "cfg_scale": 1.0},
        {"guidance": "interval:0.3-5"},
        {"guidance": "interval:0.3-5", "prompt": "a cat AND a dog"},
    ],
    ids=str,
)
def test_every_field_of_a_request_is_heard(painter: Pipeline, change: dict[str, object]) -> None:
    without = replace(APPLE, **change | {"guidance": None}) if "guidance" in change else APPLE
    assert not torch.equal(painter.txt2img(without), painter.txt2img(replace(APPLE, **change)))


def test_the_noise_of_a_picture_is_its_seeds_alone(painter: Pipeline) -> None:
    """The first state is randn of a CPU generator with the seed of the picture, as diffusers draws it."""
    seen = []

    def spy(x: torch.Tensor, sigma: torch.Tensor, cond: object) -> torch.Tensor:
        seen.append((x, sigma))
        return painter.denoiser(x, sigma, cond)

    watched = copy.copy(painter)
    watched.denoiser = spy  # type: ignore[assignment]
    spy.schedule = painter.denoiser.schedule  # type: ignore[attr-defined]
    next(iter(watched.sample([replace(APPLE, cfg_scale=1.0), replace(APPLE, seed=6, cfg_scale=1.0)])))
    x, sigma = seen[0]
    expected = torch.cat([torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(s)) for s in (5, 6)])
    torch.testing.assert_close(x, expected * math.hypot(1, float(sigma[0])))


def test_steps_can_be_watched_and_left(painter: Pipeline) -> None:
    steps = painter.sample([APPLE])
    first = next(steps)
    assert painter.decode(first.x0).shape == (1, 3, 32, 32)
    steps.close()
    assert torch.is_grad_enabled()
    assert len(list(painter.sample([APPLE]))) == 4


def test_a_batch_agrees_in_all_but_prompt_and_seed(painter: Pipeline) -> None:
    with pytest.raises(ValueError, match="differ in more than prompt"):
        list(painter.sample([APPLE, replace(APPLE, steps=3)]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"sampler": "euler_b"}, "unknown sampler 'euler_b' .did you mean 'euler_a'"),
        ({"schedule": "karas"}, "'karas' .did you mean 'karras'"),
        ({"steps": 0}, "steps is 0: choose between 1 and 1000"),
        ({"steps": 1001}, "steps is 1001"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"cfg_scale": math.nan}, "cfg scale is nan"),
        ({"cfg_scale": math.inf}, "cfg scale is inf"),
        ({"guidance": "cfgpp"}, "CFG.. scale is 3: needs"),
        ({"guidance": "apt"}, "guidance 'apt' cannot be read .did you mean 'apg'"),
        ({"guidance": "interval:0.3"}, "guidance 'interval:0.3' cannot be read: write"),
        ({"guidance": "threshold:0.9-nan"}, "guidance 'threshold:0.9-nan' cannot be read: write"),
        ({"guidance": "interval:5-0.3"}, "guidance interval .5.0, 0.3."),
        ({"guidance": "apg+rescale:0.7"}, "joins rescale and apg: choose one"),
        ({"width": 33}, "width 33 is not a multiple of 4, which this model needs: try 32 or 36"),
        ({"height": 2}, "height is 2: choose between 4 and 8192"),
        ({"height": 2**40}, "height is 1099511627776"),
    ],
    ids=str,
)
def test_what_cannot_be_painted(painter: Pipeline, change: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        painter.complete(replace(APPLE, **change))


def test_requests_number_the_seeds_through_all_prompts(painter: Pipeline) -> None:
    made = painter.requests(Request("", seed=10, steps=2), ["a", "b"], 2)
    assert [(r.prompt, r.seed) for r in made] == [("a", 10), ("a", 11), ("b", 12), ("b", 13)]
    assert all(r.steps == 2 and r.sampler == "dpmpp_2m" for r in made)


def test_batches_keep_the_order_and_lose_nothing() -> None:
    requests = [Request("x", seed=i) for i in range(5)]
    parts = batches(requests, 2)
    assert [r for b in parts for r in b.requests[b.rows]] == requests
    assert [len(b.requests) for b in parts] == [2, 2, 1]
    assert batches(requests[:1], 4) == [Batch(requests[:1], slice(1))]


def test_a_sampler_that_steps_by_its_batch_paints_one_at_a_time(painter: Pipeline) -> None:
    requests = [replace(APPLE, sampler="dpm_adaptive", seed=seed) for seed in (5, 6)]
    assert [len(b.requests) for b in batches(requests, 4)] == [1, 1]
    with pytest.raises(ValueError, match="one picture at a time"):
        list(painter.sample(requests))


def test_one_picture_made_again_takes_its_old_place() -> None:
    batch = batches([APPLE], 4, Made(batch=3, row=2))[0]
    assert batch.requests == [APPLE] * 3
    assert batch.requests[batch.rows] == [APPLE] and batch.rows.start == 2


class Overflowing(Autoencoder):
    """An autoencoder whose decoder overflows in half precision, or always."""

    always = False

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        wide = super().decode(latent)
        return wide * math.nan if self.always or latent.dtype != torch.float32 else wide


@pytest.mark.parametrize("always", [False, True])
def test_a_decoder_that_overflows_is_tried_in_fp32(tiny_model: Path, always: bool) -> None:
    painter = pipeline.load(str(tiny_model), "cpu", "bf16")
    painter.model.autoencoder = Overflowing(painter.model.spec.autoencoder).bfloat16()
    painter.model.autoencoder.always = always
    latents = torch.zeros(2, 4, 2, 2)
    if always:
        with pytest.raises(UserError, match="NaN, in fp32 too: nothing was written"):
            painter.decode(latents)
    else:
        assert painter.decode(latents).isfinite().all()
        assert next(painter.model.autoencoder.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_paints_nearly_the_same(painter: Pipeline, tiny_model: Path, precision: str) -> None:
    half = pipeline.load(str(tiny_model), "cpu", precision)
    assert next(half.denoiser.backbone.parameters()).dtype == pipeline.PRECISIONS[precision]
    assert (half.txt2img(APPLE) - painter.txt2img(APPLE)).abs().mean() < 0.1


def test_auto_is_bf16_where_the_cpu_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pipeline.choose() == (torch.device("cpu"), "fp32")  # conftest.py: as on a CPU without
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert pipeline.choose() == (torch.device("cpu"), "bf16")
    assert pipeline.choose("cpu", "fp32") == (torch.device("cpu"), "fp32")
    assert pipeline.choose("cpu", "bf16") == (torch.device("cpu"), "bf16")


@pytest.mark.parametrize(
    ("device", "precision", "says"),
    [
        ("gpu", "auto", "device 'gpu' cannot be used here"),
        ("cuda:99", "auto", "device 'cuda:99' cannot be used here"),
        ("cpu", "fp23", "unknown precision 'fp23' .did you mean 'fp32'"),
    ],
)
def test_devices_and_precisions_that_are_not_here(device: str, precision: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        pipeline.choose(device, precision)


def test_a_model_is_found_by_name_or_path(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pipeline.find(str(tiny_model)) == tiny_model
    monkeypatch.setattr(pipeline, "ASSETS", tiny_model.parent)
    assert pipeline.find("tiny") == tiny_model
    with pytest.raises(UserError, match=r"no model 'tinny' .did you mean 'tiny'"):
        pipeline.find("tinny")
    with pytest.raises(UserError, match="no model"):
        pipeline.find(str(tmp_path))


def test_an_autoencoder_alone_does_not_paint(tiny_model: Path, tmp_path: Path) -> None:
    model = native.load(tiny_model)
    spec = replace(model.spec, backbone=None, text=None)
    native.save(tmp_path / "vae.safetensors", spec, {"autoencoder": model.autoencoder})
    with pytest.raises(UserError, match="autoencoder alone"):
        pipeline.load(str(tmp_path / "vae.safetensors"), "cpu")


def test_notes_tell_of_what_is_not_read(painter: Pipeline) -> None:
    lines = painter.notes(
        [painter.complete(replace(APPLE, prompt="one two three four five six seven eight nine " * 3))]
    )
    assert "seed 5" in lines[0] and "cpu in fp32" in lines[0] and "4 steps" in lines[0]
    assert len(lines) == 2 and "'one two" in lines[1] and "tokens in" in lines[1] and "chunks of 10" in lines[1]
    assert painter.notes([painter.complete(APPLE)])[1].startswith("tokens: ")
