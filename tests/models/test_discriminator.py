"""The patch discriminator sees 70 x 70 pixels, and the losses are those of the papers."""

import pytest
import torch
from torch import nn

from ldm.config import from_dict
from ldm.errors import UserError
from ldm.models.discriminator import DiscriminatorConfig, PatchDiscriminator, adaptive_weight, hinge_d, hinge_g, r1


@pytest.mark.parametrize(("layers", "patch"), [(2, 34), (3, 70)])
def test_each_logit_sees_a_patch(layers: int, patch: int) -> None:
    image = torch.zeros(1, 3, 128, 128, requires_grad=True)
    logits = PatchDiscriminator(DiscriminatorConfig(channels=8, layers=layers, norm="none"))(image)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    assert image.grad is not None
    seen = image.grad[0].abs().sum(0).nonzero()
    assert ((seen.max(0).values - seen.min(0).values) + 1).tolist() == [patch, patch]


def test_map_of_the_paper_and_its_width() -> None:
    model = PatchDiscriminator(DiscriminatorConfig())
    assert [m.out_channels for m in model if isinstance(m, nn.Conv2d)] == [64, 128, 256, 512, 1]
    assert PatchDiscriminator(DiscriminatorConfig(channels=16))(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 6, 6)


def test_a_picture_is_judged_alone_and_the_norm_is_a_choice() -> None:
    image = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    norms = {}
    for norm in ("group", "none"):
        model = PatchDiscriminator(DiscriminatorConfig(channels=16, norm=norm))
        torch.testing.assert_close(model(image)[1:2], model(image[1:2]), rtol=1e-4, atol=1e-5)
        norms[norm] = sum(isinstance(m, nn.GroupNorm) for m in model)
    assert norms == {"group": 3, "none": 0}


def test_bad_settings() -> None:
    with pytest.raises(UserError, match="multiple of 16"):
        DiscriminatorConfig(channels=24)
    with pytest.raises(UserError, match="1 or more"):
        DiscriminatorConfig(layers=0)
    with pytest.raises(UserError, match="choose one of group, spectral, none"):
        from_dict(DiscriminatorConfig, {"norm": "batch"})


def test_hinge() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert hinge_d(real, fake).item() == pytest.approx(0.5 * (0.25 + 0.5))
    assert hinge_g(fake).item() == pytest.approx(1.5)


def test_adaptive_weight_equalises_the_gradients() -> None:
    gan = torch.tensor([3.0, 4.0])
    assert adaptive_weight(10 * gan, gan).item() == pytest.approx(10, rel=1e-5)
    assert adaptive_weight(gan, gan * 1e-9).item() == 1e4
    assert adaptive_weight(10 * gan, gan, limit=2.0).item() == 2
    assert adaptive_weight(gan, gan * 0).item() == 0


def test_r1_is_the_squared_slope_at_each_picture() -> None:
    weight = torch.randn(3, 8, 8, requires_grad=True)
    logits, penalty = r1(
        lambda x: (x.square() * weight).sum((1, 2, 3)).view(-1, 1, 1, 1), image := torch.rand(4, 3, 8, 8)
    )
    assert logits.shape == (4, 1, 1, 1)
    torch.testing.assert_close(penalty, (2 * image * weight).square().sum((1, 2, 3)).mean())
    (slope,) = torch.autograd.grad(penalty, weight)  # a second derivative: it can be trained on
    torch.testing.assert_close(slope, 8 * (image.square() * weight).mean(0), rtol=1e-4, atol=1e-5)


def test_spectral_norm_keeps_every_slope_at_one() -> None:
    model = PatchDiscriminator(DiscriminatorConfig(channels=16, layers=1, norm="spectral"))
    for _ in range(100):  # near singular values are told apart slowly
        model(torch.rand(1, 3, 16, 16))  # a power iteration each
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)
    assert not any(isinstance(layer, nn.GroupNorm) for layer in model)


def test_it_learns_to_tell_two_kinds_apart() -> None:
    rng = torch.Generator().manual_seed(0)
    real, fake = torch.rand(4, 3, 32, 32, generator=rng), -torch.rand(4, 3, 32, 32, generator=rng)
    model = PatchDiscriminator(DiscriminatorConfig(channels=16, layers=2))
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(30):
        optimiser.zero_grad()
        loss = hinge_d(model(real), model(fake))
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.3
