"""The patch discriminator sees 70 x 70 pixels, and the losses are those of the papers."""

import pytest
import torch
from torch import nn

from ldm.config import from_dict
from ldm.errors import UserError
from ldm.models.discriminator import DiscriminatorConfig, PatchDiscriminator, adaptive_weight, hinge_d, hinge_g


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
    with pytest.raises(UserError, match="choose one of group, none"):
        from_dict(DiscriminatorConfig, {"norm": "batch"})


def test_hinge() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert hinge_d(real, fake).item() == pytest.approx(0.5 * (0.25 + 0.5))
    assert hinge_g(fake).item() == pytest.approx(1.5)


def test_adaptive_weight_equalises_the_gradients() -> None:
    layer = nn.Parameter(torch.tensor([3.0, 4.0]))
    rec, gan = 10 * layer.square().sum(), layer.square().sum()
    weight = adaptive_weight(rec, gan, layer)
    assert weight.item() == pytest.approx(10, rel=1e-5) and not weight.requires_grad
    assert adaptive_weight(rec, gan * 0, layer).item() == 1e4
    assert adaptive_weight(rec, gan, layer, limit=2.0).item() == 2
    (rec + weight * gan).backward()  # both graphs are still there
    assert layer.grad is not None


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
