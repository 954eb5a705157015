"""The denoiser's loss, each switch of it, and what is exported."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm.checkpoints import native
from ldm.data.cache import cached
from ldm.errors import UserError
from ldm.families.convert import convert
from ldm.training.config import LdmRun
from ldm.training.tasks.autoencoder import AutoencoderTask
from ldm.training.tasks.denoising import DenoisingTask

CPU = torch.device("cpu")


def build(ldm, *overrides: str) -> DenoisingTask:
    torch.manual_seed(0)
    task = DenoisingTask(ldm(*overrides))
    rng = torch.Generator().manual_seed(0)
    for parameter in task.backbone.parameters():
        if not parameter.any():  # what starts at zero would hide all behind it
            torch.nn.init.normal_(parameter, std=0.1, generator=rng)
    task.to(CPU)
    return task


def loss(task: DenoisingTask, positions: range = range(8)) -> torch.Tensor:
    return loss_at(task, 0, positions)


def loss_at(task: DenoisingTask, step: int, positions: range = range(8)) -> torch.Tensor:
    return task.denoising_loss({"step": step} | task.dataset.__getitems__(positions))["loss"]


@pytest.mark.parametrize(
    "switch",
    [
        ("prediction", "eps"),
        ("prediction", "x0"),
        ("prediction", "flow"),
        ("prediction", "edm"),
        ("schedule.kind", "flow"),
        ("schedule.zero_snr", "true"),
        ("loss.weighting", "snr"),
        ("loss.weighting", "min_snr"),
        ("loss.weighting", "soft_min_snr"),
        ("loss.weighting", "p2"),
        ("loss.weighting", "edm"),
        ("loss.offset", "0.1"),
        ("loss.pyramid", "0.5"),
        ("loss.perturbation", "0.1"),
        ("loss.pairing", "8"),
        ("loss.caption_dropout", "1"),
        ("run.seed", "1"),
        ("text.tower.layers", "2"),
    ],
    ids=lambda switch: " ".join(switch),
)
def test_every_switch_changes_the_loss(ldm, switch: tuple[str, str]):
    assert loss(build(ldm)) != loss(build(ldm, f"--{switch[0]}", switch[1]))


def test_the_loss_is_the_mean_of_any_parts(ldm):
    task = build(ldm)
    parts = [loss(task, range(start, start + 2)) for start in range(0, 8, 2)]
    torch.testing.assert_close(loss(task), torch.stack(parts).mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "switch",
    [
        ["--loss.offset", "0.1"],
        ["--loss.pyramid", "0.5"],
        ["--loss.perturbation", "0.1"],
        ["--loss.pairing", "2"],
        ["--loss.importance", "true"],
        ["--backbone.out_channels", "8", "--loss.pyramid", "0.5", "--loss.offset", "0.1"],
    ],
)
def test_noise_belongs_to_the_sample_whatever_is_done_to_it(ldm, switch: list[str]):
    task = build(ldm, *switch)
    parts = [loss(task, range(start, start + 2)) for start in range(0, 8, 2)]
    torch.testing.assert_close(loss(task), torch.stack(parts).mean(), rtol=1e-5, atol=0)


def test_importance_learns_from_the_losses_and_is_kept(ldm, run, tmp_path: Path):
    task = build(ldm, "--loss.importance", "true")
    assert set(task.averaged) == {"backbone", "text"} and "importance" in task.networks
    even = loss_at(task, 1)
    assert even == loss_at(build(ldm), 1)
    task.importance.seen.fill_(10)
    task.importance.square.copy_(torch.linspace(0.1, 3, 100) ** 2)
    assert loss_at(task, 2) != even
    every = ["--run.checkpoint_every", "2", "--loss.importance", "true"]
    run(ldm("--run.steps", "2", *every), tmp_path / "run")
    kept = load_file(tmp_path / "run/checkpoints/00000002/state.safetensors")
    assert kept["networks.importance.pending"][1].sum() == 4  # the samples of the second step
    assert kept["networks.importance.seen"].sum() == 4  # and of the first


def test_a_learned_variance_trains_loads_and_paints(ldm, tmp_path: Path):
    task = build(ldm, "--backbone.out_channels", "8", "--loss.vlb", "2")
    value = loss(task)
    value.backward()
    assert task.backbone.conv_out.weight.grad[4:].any()
    assert value != loss(build(ldm, "--backbone.out_channels", "8", "--loss.vlb", "0"))
    with torch.no_grad():
        task.export(tmp_path / "model", {})
        assert task.sample()[0].shape == (2, 3, 32, 32)
    model = native.load(tmp_path / "model")
    assert model.spec.backbone.out_channels == 8
    x, sigma, cond = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 2.0]), model.conditioner(["a", "b"])
    both = [model.denoiser()(x[i : i + 1], sigma[i : i + 1], cond[i : i + 1]) for i in (0, 1)]
    torch.testing.assert_close(model.denoiser()(x, sigma, cond), torch.cat(both), rtol=1e-4, atol=1e-4)


def test_dropped_captions_are_the_empty_one(ldm):
    task = build(ldm, "--loss.caption_dropout", "1")
    batch = task.dataset.__getitems__(range(4))
    plain = loss(task, range(4))
    batch["tokens"] = task.text.tokenize(["something else"] * 4)
    assert task.denoising_loss({"step": 0} | batch)["loss"] == plain
    shares = [build(ldm, "--loss.caption_dropout", str(p)) for p in (0, 1)]
    assert loss(shares[0], range(4)) != plain


def test_cached_latents_are_the_encoded_ones(ldm, tmp_path: Path):
    plain, cached = build(ldm), build(ldm, "--cache", str(tmp_path / "latents"))
    assert "mean" in cached.dataset.__getitems__([0]) and list((tmp_path / "latents").iterdir())
    torch.testing.assert_close(loss(cached), loss(plain), rtol=2e-3, atol=0)  # kept in fp16
    a, b = (task.latent(task.dataset.__getitems__(range(4))) for task in (plain, cached))
    torch.testing.assert_close(a, b, rtol=0, atol=5e-3)


def test_a_frozen_tower_stays(ldm, tiny_model: Path):
    tower = ["--text.tower.layers", "2", "--text.weights", str(tiny_model)]
    task = build(ldm, "--text.train", "false", *tower)
    assert set(task.networks) == {"backbone"}
    loss(task).backward()
    assert all(p.grad is None and not p.requires_grad for p in task.text.parameters())
    source = native.load(tiny_model).conditioner.state_dict()
    assert all(torch.equal(source[name], value) for name, value in task.text.state_dict().items())
    trained = build(ldm, *tower)
    assert set(trained.networks) == set(trained.averaged) == {"backbone", "text"}
    loss(trained).backward()
    assert all(p.grad is not None for p in trained.text.parameters())


def test_what_is_frozen_stays(ldm, run, tmp_path: Path):
    task = build(ldm)
    task.export(tmp_path / "first", {})
    begin = ["--weights", str(tmp_path / "first"), "--text.weights", str(tmp_path / "first")]
    run(ldm(*begin, "--freeze", "[down.*, text.*, backbone.time.*]", "--run.steps", "1"), tmp_path / "run")
    before, after = (native.load(path) for path in (tmp_path / "first", tmp_path / "run/model.safetensors"))
    for name, parameter in [*after.backbone.named_parameters(), *after.conditioner.named_parameters()]:
        old = dict([*before.backbone.named_parameters(), *before.conditioner.named_parameters()])[name]
        assert torch.equal(parameter, old) == name.startswith(("down.", "time.", "tower.")), name


def test_a_unet_can_be_trained_further(ldm, tmp_path: Path):
    first = build(ldm)
    with torch.no_grad():
        first.backbone.conv_out.weight.add_(1)
    first.export(tmp_path / "model", {})
    second = build(ldm, "--weights", str(tmp_path / "model"))
    states = first.backbone.state_dict(), second.backbone.state_dict()
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    loss(second).backward()
    assert all(p.grad is not None for p in second.backbone.parameters())
    with pytest.raises(UserError, match="has the backbone"):
        DenoisingTask(ldm("--weights", str(tmp_path / "model"), "--backbone.groups", "2"))


@pytest.mark.parametrize("layout", ["diffusers", "compvis"])
def test_training_goes_on_from_a_model_of_any_layout(ldm, run, layout: str, tiny_model: Path, tmp_path: Path):
    """Everything from one file or folder, and nothing else said."""
    path = tmp_path / ("folder" if layout == "diffusers" else "single.safetensors")
    convert(tiny_model, path, layout)
    plain = ldm("--weights", str(path), "--run.steps", "1", "--cache", str(tmp_path / "cache"))
    blank = LdmRun(plain.run, plain.data)
    settings = replace(
        plain, autoencoder="", backbone=blank.backbone, text=blank.text, prediction="", defaults=blank.defaults
    )
    task, source = DenoisingTask(settings), native.load(tiny_model)
    for name, module in source.modules.items():
        found = getattr(task, name).state_dict()
        assert all(torch.equal(found[key], value) for key, value in module.state_dict().items())
    assert task.config.prediction == "v" and task.config.defaults == source.spec.defaults
    assert all(p.requires_grad for p in (*task.backbone.parameters(), *task.text.parameters()))
    assert not any(p.requires_grad for p in task.autoencoder.parameters())
    run(settings, tmp_path / "run")
    after = native.load(tmp_path / "run/model.safetensors")
    assert after.spec.backbone == source.spec.backbone and after.spec.autoencoder == source.spec.autoencoder
    assert not torch.equal(after.backbone.conv_out.weight, source.backbone.conv_out.weight)


def test_what_the_config_says_goes_before_what_the_file_says(ldm, tiny_model: Path):
    weights = ["--weights", str(tiny_model), "--text.tower.layers", "2"]
    spec = native.read_spec(tiny_model).backbone
    shape = [
        f"--backbone.{f.name}={list(v) if isinstance(v := getattr(spec, f.name), tuple) else v}" for f in fields(spec)
    ]
    task = DenoisingTask(ldm(*weights, *shape, "--prediction", "eps", "--schedule.shift", "2", "--defaults.steps", "7"))
    assert (task.config.prediction, task.config.schedule.shift, task.config.defaults.steps) == ("eps", 2, 7)
    with pytest.raises(UserError, match="has the text.tower"):
        DenoisingTask(ldm("--weights", str(tiny_model), *shape))


@pytest.mark.parametrize("network", ["backbone", "autoencoder"])
def test_recomputing_takes_less_memory_and_gives_the_same_gradients(ldm, vae, network: str):
    kept, gradients = [], []
    for on in ("false", "true"):
        task = (
            build(ldm, "--run.recompute", on) if network == "backbone" else AutoencoderTask(vae("--run.recompute", on))
        )
        task.to(CPU)
        if network == "autoencoder":
            torch.manual_seed(0)
            for parameter in task.autoencoder.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
        objective, sizes = task.objectives()[0], []

        def note(value: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(value.numel())
            return value

        with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
            value = objective.loss({"step": 0} | task.dataset.__getitems__(range(4)))["loss"]
        value.backward()
        kept.append(sum(sizes))
        gradients.append([p.grad for p in task.networks[network].parameters()])
    assert kept[1] < 0.6 * kept[0]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_validation_is_fixed_and_stratified(ldm):
    task = build(ldm)
    levels = []
    measure = task.losses

    def spy(x0, sigma, noise, cond, **rest):
        levels.append(sigma)
        return measure(x0, sigma, noise, cond, **rest)

    task.losses = spy
    with torch.no_grad():
        first, second = task.validate(), task.validate()
    assert first == second and first.keys() == {"seen_loss"}
    sigma = torch.cat(levels[:2]).sort().values
    torch.testing.assert_close(sigma, task.schedule.quantile((torch.arange(8) + 0.5) / 8))


def test_the_exported_model_paints_what_the_run_showed(ldm, tmp_path: Path):
    task = build(ldm, "--defaults.cfg_scale", "3")
    with torch.no_grad():
        task.export(tmp_path / "model.safetensors", {"steps": 3})
        shown, _ = task.sample()
    model = native.load(tmp_path / "model.safetensors")
    assert model.spec.prediction == "v" and model.spec.defaults == task.config.defaults
    assert model.spec.autoencoder == native.read_spec(task.config.autoencoder).autoencoder
    other = build(ldm)
    for name, module in model.modules.items():
        getattr(other, name).load_state_dict(module.state_dict())
    other.config = task.config
    with torch.no_grad():
        assert torch.equal(other.sample()[0], shown)
    assert shown.shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--text.train", "false"], "give text.weights"),
        (["--backbone.context_dim", "32"], "backbone.context_dim is 32: must be 16"),
        (["--backbone.vector_dim", "8"], "vector_dim is 8: must be 0"),
        (["--backbone.out_channels", "8", "--schedule.kind", "flow"], "learned variances are of the steps of vp"),
        (["--loss.gamma", "2"], "the weighting 'uniform' has no such number"),
        (["--backbone.in_channels", "8"], "in_channels 8 and out_channels 4 must both be 4"),
        (["--data.size", "30"], "data.size 30 is not a multiple of 4"),
        (["--weights", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--autoencoder", "nowhere.safetensors"], "nowhere.safetensors"),
    ],
)
def test_bad_settings(ldm, overrides: list[str], message: str):
    with pytest.raises(UserError, match=message):
        DenoisingTask(ldm(*overrides))


def test_a_tower_of_another_shape(ldm, tiny_model: Path):
    with pytest.raises(UserError, match="has the tower"):
        DenoisingTask(ldm("--text.weights", str(tiny_model)))


SIZED = ("--text.tower.projection", "16", "--text.tower.size_ids", "6", "--text.tower.id_width", "8")


def test_what_is_known_of_a_picture_reaches_the_network(ldm):
    """SDXL's size and crop (Podell et al. 2023, Sec. 2.2), each picture its own."""
    task = build(ldm, *SIZED, "--backbone.vector_dim", "64", "--loss.caption_dropout", "0")
    batch = task.dataset.__getitems__(range(4))
    cond = task.conditions(batch, torch.zeros(4, dtype=torch.bool))
    assert cond.vector is not None and cond.vector.shape == (4, 64)
    torch.testing.assert_close(cond.vector[:, 16:], task.text.about(batch["size_ids"], 4))
    other = task.conditions(batch | {"size_ids": batch["size_ids"] + 7}, torch.zeros(4, dtype=torch.bool))
    assert torch.equal(cond.vector[:, :16], other.vector[:, :16]) and not torch.equal(cond.vector, other.vector)
    whole = task.encode_text(batch["tokens"])
    side = task.config.data.size
    torch.testing.assert_close(
        whole.vector[:, 16:], task.text.about(torch.tensor([[side, side, 0, 0, side, side]] * 4), 4)
    )


def test_kept_states_know_of_the_picture_too(ldm, tmp_path):
    """A cache of text states holds no sizes: they come from each picture."""
    start = build(ldm, *SIZED, "--backbone.vector_dim", "64")
    start.export(tmp_path / "start.safetensors", {})
    frozen = (
        *SIZED,
        "--backbone.vector_dim",
        "64",
        "--weights",
        str(tmp_path / "start.safetensors"),
        "--text.train",
        "false",
    )
    plain = DenoisingTask(ldm(*frozen))
    plain.to(CPU)
    kept = plain.encoders(text=True, crops=1)
    cached(plain.pictures, kept, tmp_path / "kept")
    task = DenoisingTask(ldm(*frozen, "--cache", str(tmp_path / "kept")))
    task.to(CPU)
    batch = task.dataset.__getitems__(range(4))
    assert "states" in batch
    nothing = torch.zeros(4, dtype=torch.bool)
    again = plain.conditions(plain.dataset.__getitems__(range(4)), nothing)
    torch.testing.assert_close(task.conditions(batch, nothing).vector, again.vector, rtol=2e-2, atol=2e-3)
