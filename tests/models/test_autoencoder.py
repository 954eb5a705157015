"""The posterior's divergence and what of it is free."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ldm.models.autoencoder import Gaussian


def test_the_divergence_is_that_of_torch_and_free_bits_count_by_channel() -> None:
    mean, logvar = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    nats = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(Gaussian(mean, logvar).kl(), nats.sum((1, 2, 3)), rtol=1e-4, atol=1e-4)
    free = nats.mean((2, 3)).median().item()
    expected = sum(20 * max(free, v) for v in nats[1].mean((1, 2)).tolist())
    assert Gaussian(mean, logvar).kl(free)[1].item() == pytest.approx(expected, rel=1e-4)


def test_a_channel_below_its_free_bits_is_not_pushed() -> None:
    mean = torch.tensor([0.1, 3.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4).clone().requires_grad_()
    Gaussian(mean, torch.zeros(1, 2, 4, 4)).kl(0.5).sum().backward()
    assert not mean.grad[:, 0].any() and mean.grad[:, 1].all()
