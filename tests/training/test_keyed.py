"""Noise that is a pure function of the sample: what it is, and that it is random."""

import pytest
import torch

from ldm.training import keyed

POSITIONS = torch.arange(4096)


def test_mixing_is_splitmix64():
    golden = torch.tensor([keyed._GOLDEN])
    outputs = [keyed._mixed(golden * i).item() % 2**64 for i in (1, 2, 3)]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # of the published code, seed 0


def test_the_batch_a_sample_is_in_changes_nothing():
    whole = keyed.normal(1, "noise", POSITIONS[:24], (3, 5))
    for size in (1, 3, 8):
        parts = [keyed.normal(1, "noise", part, (3, 5)) for part in POSITIONS[:24].split(size)]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(keyed.uniform(1, "sigma", POSITIONS[7:8]), keyed.uniform(1, "sigma", POSITIONS)[7:8])


def test_normal_moments():
    z = keyed.normal(0, "noise", POSITIONS, (256,)).double()  # 2^20 numbers: standard error of the mean 0.001
    assert abs(z.mean()) < 4e-3
    assert abs(z.square().mean() - 1) < 6e-3
    assert abs((z**3).mean()) < 0.016
    assert abs((z**4).mean() - 3) < 0.04
    inside = (z.abs() < 1).double().mean()
    assert abs(inside - 0.682689) < 2e-3


def test_uniform_fills_the_open_interval():
    u = keyed.uniform(3, "sigma", torch.arange(2**16))
    assert u.min() > 0 and u.max() < 1 and u.dtype == torch.float32
    counts = torch.histc(u, 16, 0, 1)
    assert ((counts - 4096).square() / 4096).sum() < 44  # chi-squared with 15 degrees of freedom, p = 1e-4


@pytest.mark.parametrize(
    "other",
    [(1, "noise", 0), (0, "sigma", 0), (0, "noise", 1)],
    ids=["another seed", "another stream", "the next position"],
)
def test_streams_are_independent(other):
    seed, stream, shift = other
    a = keyed.normal(0, "noise", POSITIONS, (16,))
    b = keyed.normal(seed, stream, POSITIONS + shift, (16,))
    assert abs((a * b).mean()) < 4 / 2**8  # 2^16 products of deviation 1


def test_elements_of_a_sample_are_independent():
    z = keyed.normal(0, "noise", POSITIONS, (64,))
    assert abs((z[:, 1:] * z[:, :-1]).mean()) < 4 / 2**9
    correlation = z.T @ z / len(z) - torch.eye(64)
    assert correlation.abs().max() < 6 / len(z) ** 0.5
