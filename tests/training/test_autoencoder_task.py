"""The autoencoder's losses, each switch of them, and what is exported."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from ldm.checkpoints import native
from ldm.data.dataset import to_image
from ldm.errors import UserError
from ldm.evaluation.inception import Inception
from ldm.models.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.discriminator import adaptive_weight, hinge_g
from ldm.models.perceptual import LPIPS
from ldm.training import keyed
from ldm.training.tasks.autoencoder import AutoencoderTask

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lpips_weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """LPIPS with random weights in the published layout."""
    torch.manual_seed(0)
    state = LPIPS("alex").state_dict()
    heads = {f"lin{i}.model.1.weight": state.pop(f"heads.{i}").abs().add(0.1).view(1, -1, 1, 1) for i in range(5)}
    path = tmp_path_factory.mktemp("weights") / "lpips.safetensors"
    save_file(state | heads, path)
    return str(path)


def build(vae, *overrides: str) -> AutoencoderTask:
    torch.manual_seed(0)
    task = AutoencoderTask(vae(*overrides))
    task.to(CPU)
    return task


def batch(task: AutoencoderTask, step: int = 0) -> dict:
    return {"step": step} | task.dataset.__getitems__(range(4))


def gradients(task: AutoencoderTask) -> list[torch.Tensor]:
    """Of the second step: the adaptive weight is that of the step before."""
    task.autoencoder_loss(batch(task, 0))
    task.autoencoder.zero_grad()
    task.autoencoder_loss(batch(task, 1))["loss"].backward()
    return [p.grad.clone() for p in task.autoencoder.parameters()]


def test_the_gradient_is_that_of_the_plain_sum(vae, lpips_weights):
    """Differentiating at the pixels is the same as writing down the whole loss and going back once."""
    weight = ["--loss.lpips", "0.7", "--loss.lpips_weights", lpips_weights, "--loss.kl", "0.1"]
    task = build(vae, *weight)
    ours, value = gradients(task), task.autoencoder_loss(batch(task, 1))["loss"]

    image = to_image(batch(task)["image"])
    posterior = task.autoencoder.encode(image)
    noise = keyed.normal(0, "posterior", torch.arange(4), tuple(posterior.mean.shape[1:]))
    again = task.autoencoder.decode(posterior.sample(noise))
    total = (again - image).abs().mean() + 0.7 * task.perceptual(again, image).mean()
    gan = hinge_g(task.discriminator(again))
    last = task.autoencoder.decoder.conv_out.weight
    scale = adaptive_weight(*(torch.autograd.grad(t, last, retain_graph=True)[0] for t in (total, gan)))
    total = total + 0.5 * scale * gan + 0.1 * posterior.kl().mean() / (3 * 32 * 32)
    plain = torch.autograd.grad(total, list(task.autoencoder.parameters()))
    torch.testing.assert_close(value, total)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "switch",
    [
        ("pixel", "l2"),
        ("kl", "0.5"),
        ("lpips", "1"),
        ("adversarial", "0"),
        ("adversarial_start", "1"),
        ("adaptive", "false"),
        ("free_bits", "3"),
    ],
    ids=lambda switch: switch[0],
)
def test_every_switch_changes_the_step(vae, lpips_weights, switch: tuple[str, str]):
    weights = ["--loss.lpips_weights", lpips_weights]
    weights += ["--loss.kl", "0.1"]
    plain, switched = build(vae, *weights), build(vae, *weights, f"--loss.{switch[0]}", switch[1])
    assert not all(torch.equal(a, b) for a, b in zip(gradients(plain), gradients(switched), strict=True))


def test_the_discriminator_starts_when_it_should(vae):
    task = build(vae, "--loss.adversarial_start", "3")
    assert [objective.start for objective in task.objectives()] == [0, 3]
    assert "gan" not in task.autoencoder_loss(batch(task, 2)) and "gan" in task.autoencoder_loss(batch(task, 3))
    assert "discriminator" not in build(vae, "--loss.adversarial", "0").networks
    assert len(build(vae, "--loss.adversarial", "0").objectives()) == 1


def test_each_objective_moves_its_own_networks_only(vae):
    task = build(vae)
    task.autoencoder_loss(one := batch(task))["loss"].backward()
    assert all(p.grad is None for p in task.discriminator.parameters())
    before = [p.grad.clone() for p in task.autoencoder.parameters()]
    task.discriminator_loss(one)["loss"].backward()
    assert all(p.grad is not None for p in task.discriminator.parameters())
    assert all(torch.equal(a, p.grad) for a, p in zip(before, task.autoencoder.parameters(), strict=True))


def test_the_adaptive_weight_is_that_of_the_whole_step_before(vae):
    whole, parts = build(vae), build(vae)
    assert whole.autoencoder_loss(batch(whole, 0))["gan_weight"] == 0  # nothing is known yet
    for start in (0, 2):
        parts.autoencoder_loss({"step": 0} | parts.dataset.__getitems__(range(start, start + 2)))
    again = build(vae)
    again.balance.load_state_dict(parts.balance.state_dict())
    first, second = (task.balance.at(1).item() for task in (whole, parts))
    assert first == pytest.approx(second, rel=1e-4) and first > 0
    assert again.balance.at(9) == second


def test_r1_and_spectral_norm_reach_the_discriminator(vae):
    plain, steep = build(vae), build(vae, "--loss.r1", "10")
    for task in (plain, steep):
        task.autoencoder_loss(one := batch(task))
        losses = task.discriminator_loss(one)
        losses["loss"].backward()
    assert losses["r1"] > 0 and "r1" not in plain.discriminator_loss(batch(plain))
    pairs = zip(plain.discriminator.parameters(), steep.discriminator.parameters(), strict=True)
    assert not all(torch.equal(a.grad, b.grad) for a, b in pairs)
    assert any(
        "parametrizations" in name for name in build(vae, "--discriminator.norm", "spectral").discriminator.state_dict()
    )


def test_a_discriminator_that_teaches_nothing_is_said_once(vae):
    task = build(vae)
    task.autoencoder_loss(one := batch(task))
    losses = task.discriminator_loss(one)
    real, fake = (task.discriminator(to_image(one["image"])), task.discriminator(task._reconstruction))
    assert losses["accuracy_real"] == (real > 0).float().mean() and losses["accuracy_fake"] == (fake < 0).float().mean()
    fine = {"discriminator_accuracy_real": 0.8, "discriminator_accuracy_fake": 0.7, "discriminator_real": 0.9}
    wins = fine | {"discriminator_accuracy_real": 1.0, "discriminator_accuracy_fake": 1.0}
    dead = fine | {"discriminator_fake": 0.9}
    assert task.remarks({"loss": 1.0}) == task.remarks(fine) == []
    assert "tells every picture" in task.remarks(wins)[0] and task.remarks(wins) == []
    assert "the same to all pictures" in task.remarks(dead)[0]
    assert task.remarks(fine) == [] and task.remarks(wins) != []


def test_a_codebook_is_learned_kept_and_used(vae, run, tmp_path: Path):
    settings = vae("--model.codebook", "16", "--loss.adversarial", "0", "--run.steps", "3")
    run(settings, tmp_path / "run")
    line = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])
    assert 1 <= line["perplexity"] <= 16 and 0 < line["codes_used"] <= 1 and "kl" not in line
    torch.manual_seed(0)
    fresh, model = AutoencoderTask(settings), native.load(tmp_path / "run/model.safetensors").autoencoder
    assert not torch.equal(model.decoder.codebook.codes, fresh.autoencoder.decoder.codebook.codes)
    z = torch.randn(2, 2, 4, 4)
    distances = torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, 2), model.decoder.codebook.codes)
    ids = model.decoder.codebook.ids(z).flatten()
    assert torch.equal(ids, distances.argmin(1))
    rounded = model.decoder.codebook(z).permute(0, 2, 3, 1).reshape(-1, 2)
    torch.testing.assert_close(rounded, model.decoder.codebook.codes[ids])
    task = build(vae, "--model.codebook", "16", "--loss.commit", "0.5")
    losses = task.autoencoder_loss(batch(task))
    assert losses["codebook"] == losses["commit"] > 0
    torch.testing.assert_close(losses["loss"], losses["pixel"] + 1.5 * losses["codebook"])
    losses["loss"].backward()
    assert all(
        p.grad is not None and p.grad.any()
        for p in (task.autoencoder.decoder.codebook.codes, task.autoencoder.encoder.conv_in.weight)
    )


def test_exported_latents_have_unit_statistics(vae, tmp_path: Path):
    task = build(vae, "--statistics", "60")
    path = tmp_path / "model.safetensors"
    with torch.no_grad():
        task.export(path, {"steps": 0})
    model = native.load(path)
    assert model.spec.provenance == {"steps": 0} and model.backbone is None and model.spec.image_size == 32
    positions = torch.arange(60)
    image = to_image(task.dataset.__getitems__(positions.tolist())["image"])
    posterior = model.autoencoder.encode(image)
    z = posterior.sample(torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(2), atol=0.04, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(2), atol=0.04, rtol=0)
    decoded = model.autoencoder.decode(posterior.mode)
    torch.testing.assert_close(
        decoded, task.autoencoder.decode(task.autoencoder.encode(image).mode), atol=1e-4, rtol=1e-4
    )


def test_statistics_of_a_model_that_had_some(vae):
    plain = build(vae).measured()
    again = build(vae, "--model.mean", "[0.3, -0.2]", "--model.std", "[2.0, 0.5]")
    again.autoencoder.load_state_dict(build(vae).autoencoder.state_dict())
    assert again.measured().mean == pytest.approx(plain.mean, abs=1e-5)
    assert again.measured().std == pytest.approx(plain.std, rel=1e-5)


def test_a_decoder_alone_is_trained_further(vae, run, tmp_path: Path):
    first = build(vae)
    first.export(tmp_path / "first", {})
    settings = vae("--weights", str(tmp_path / "first"), "--freeze", "[encoder.*]", "--run.steps", "1")
    run(settings, tmp_path / "run")
    before, after = native.load(tmp_path / "first"), native.load(tmp_path / "run/model.safetensors")
    assert after.spec.autoencoder == before.spec.autoencoder != settings.model  # its statistics too
    for name, value in after.autoencoder.state_dict().items():
        assert torch.equal(value, before.autoencoder.state_dict()[name]) == name.startswith("encoder."), name


def test_training_starts_from_a_file(vae, tmp_path: Path):
    first = build(vae)
    with torch.no_grad():
        first.autoencoder.decoder.conv_out.bias.add_(1)
        first.export(tmp_path / "first", {})
    second = AutoencoderTask(vae("--weights", str(tmp_path / "first")))
    states = first.autoencoder.state_dict(), second.autoencoder.state_dict()
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    assert all(p.requires_grad for p in second.autoencoder.parameters()) and second.autoencoder.training
    with pytest.raises(UserError, match="has the autoencoder"):
        AutoencoderTask(vae("--weights", str(tmp_path / "first"), "--model.groups", "2"))
    plain = replace(vae("--weights", str(tmp_path / "first")), model=AutoencoderConfig())
    assert AutoencoderTask(plain).model.channels == first.model.channels  # said nowhere but in the file


def test_validation_is_of_the_shards_held_back(vae, lpips_weights):
    shards = vae().data.shards
    first, second = shards.replace("{00000..00001}", "00000"), shards.replace("{00000..00001}", "00001")
    task = build(vae, "--data.shards", first, "--data.validation", second, "--loss.lpips_weights", lpips_weights)
    with torch.no_grad():
        report = task.validate()
    assert report.keys() == {"validation_psnr", "validation_ssim", "validation_lpips"}
    assert set(task.held_back.batch["key"]).isdisjoint(task.dataset.__getitems__(range(len(task.dataset)))["key"])
    assert set(build(vae, "--run.validate_on", "3").validate()) == {"seen_psnr", "seen_ssim"}


def test_rfid_is_measured_where_there_are_weights(vae, monkeypatch: pytest.MonkeyPatch):
    class Colours(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> SimpleNamespace:
            assert not torch.is_autocast_enabled("cpu")
            return SimpleNamespace(pool=pixels.float().mean((2, 3)))

    monkeypatch.setattr(Inception, "load", lambda path: Colours() if path == "some.safetensors" else None)
    task = build(vae, "--loss.fid_weights", "some.safetensors", "--run.validate_on", "4")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert task.validate()["seen_rfid"] > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--loss.fid_weights", "nowhere.safetensors"], "Inception weights.*cannot read 'nowhere.safetensors'"),
        (["--loss.lpips", "1"], "give loss.lpips_weights a file"),
        (["--loss.lpips", "1", "--loss.lpips_weights", "nowhere.safetensors"], "make weights"),
        (["--weights", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--freeze", "[encodr.*]"], "freeze: no parameter is named 'encodr"),
        (["--freeze", "[decoder.conv_out.*]"], "loss.adaptive looks at decoder.conv_out.weight"),
        (["--data.size", "33"], "data.size 33 is not a multiple of the model's factor 2"),
    ],
)
def test_bad_settings(vae, overrides: list[str], message: str):
    with pytest.raises(UserError, match=message):
        AutoencoderTask(vae(*overrides))


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    """An autoencoder of other widths, with the same latents' shape and statistics of its own."""
    torch.manual_seed(5)
    config = AutoencoderConfig(
        z_channels=2,
        channels=(16,),
        patch=2,
        res_blocks=1,
        mid_attention=False,
        groups=4,
        mean=(0.5, 0.1),
        std=(2.0, 0.5),
    )
    native.save(tmp_path / "teacher.safetensors", native.ModelSpec(config, 32), {"autoencoder": Autoencoder(config)})
    return str(tmp_path / "teacher.safetensors")


def test_a_teacher_gives_the_latents_that_are_decoded_and_learnt(vae, teacher: str, tmp_path: Path):
    task = build(vae, "--teacher", teacher, "--loss.adversarial", "0")
    first = task.autoencoder_loss(batch(task))
    first["loss"].backward()
    image = to_image(batch(task)["image"])
    wanted = native.load(teacher).autoencoder.encode(image)
    torch.testing.assert_close(first["latent"], (task.autoencoder.encode(image).mean - wanted.mean).square().mean())
    noise = keyed.normal(0, "posterior", batch(task)["position"], tuple(wanted.mean.shape[1:]))
    seen = task.autoencoder.decode(wanted.sample(noise))
    torch.testing.assert_close(first["pixel"], (seen - image).abs().mean())
    optimizer = torch.optim.Adam(task.autoencoder.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss = task.autoencoder_loss(batch(task))
        loss["loss"].backward()
        optimizer.step()
    assert loss["latent"] < 0.7 * first["latent"], "the encoder learns from the teacher"
    task.export(tmp_path / "student.safetensors", {})
    spec = native.read_spec(tmp_path / "student.safetensors")
    assert spec.autoencoder.mean == (0.5, 0.1) and spec.autoencoder.std == (2.0, 0.5), "its latents are the teacher's"


def test_a_teacher_of_other_latents_is_refused(vae, teacher: str):
    with pytest.raises(UserError, match="must be an autoencoder of 3 channels and factor 2"):
        build(vae, "--teacher", teacher, "--model.z_channels", "3")
