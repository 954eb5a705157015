"""The figures equal their closed forms, and torch-fidelity's on the same features."""

import math
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.evaluation import statistics
from ldm.text.open_clip import _torchvision_operators


def rows(n: int, d: int = 12, seed: int = 0, shift: float = 0.0) -> Tensor:
    return torch.randn((n, d), generator=torch.Generator().manual_seed(seed)) * (1 + torch.arange(d) / d) + shift


def exactly(mean: Tensor, deviation: Tensor, n: int) -> Tensor:
    """n rows with just this mean and a diagonal covariance."""
    x = torch.linalg.qr(rows(n, len(mean)).double() - rows(n, len(mean)).double().mean(0))[0]
    return x * (n - 1) ** 0.5 * deviation + mean


@pytest.fixture(scope="module")
def fidelity() -> ModuleType:
    _torchvision_operators()  # so that torchvision imports
    import torch_fidelity.metric_fid
    import torch_fidelity.metric_isc
    import torch_fidelity.metric_kid
    import torch_fidelity.metric_prc

    return torch_fidelity


@pytest.mark.parametrize("n", [40, 400])
def test_frechet_of_known_gaussians(n: int) -> None:
    d = 8
    means, deviations = (torch.zeros(d), torch.linspace(-1, 2, d)), (torch.linspace(0.5, 2, d), torch.ones(d))
    x, y = (exactly(m.double(), s.double(), n) for m, s in zip(means, deviations, strict=True))
    exact = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    assert statistics.frechet(x, y) == pytest.approx(exact.item(), rel=1e-6)
    assert statistics.frechet(x, x) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="two rows"):
        statistics.frechet(x[:1], y)


@pytest.mark.parametrize(("n", "m", "d"), [(50, 60, 12), (10, 9, 32), (80, 8, 16)])
def test_frechet_equals_torch_fidelity(fidelity: ModuleType, n: int, m: int, d: int) -> None:
    x, y = rows(n, d), rows(m, d, 1, 0.3)
    module = fidelity.metric_fid
    theirs = module.fid_statistics_to_metric(*map(module.fid_features_to_statistics, (x.double(), y.double())), False)
    assert statistics.frechet(x, y) == pytest.approx(theirs[module.KEY_METRIC_FID], abs=1e-3)


def test_kernel_distance_equals_torch_fidelity(fidelity: ModuleType) -> None:
    x, y = rows(40), rows(40, seed=1, shift=0.2)
    theirs = fidelity.metric_kid.kid_features_to_metric(
        x.double(), y.double(), kid_subsets=1, kid_subset_size=40, verbose=False
    )
    found = statistics.kid(x, y, 20)
    assert found.value == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-6)
    assert found.low < found.value < found.high and found.n == 40


def test_kernel_distance_compares_no_row_with_itself() -> None:
    x, y = rows(6).double(), rows(7, seed=1).double()
    times = torch.tensor([2.0, 0, 1, 3, 0, 1], dtype=torch.float64)
    xx, xy, yy = statistics.kernels(x, y)
    drawn = torch.arange(6).repeat_interleave(times.long())
    pairs = [(i, j) for a, i in enumerate(drawn) for b, j in enumerate(drawn) if a != b]
    kept = [xx[i, j].item() for i, j in pairs if i != j]
    within_y = (yy.sum() - yy.trace()) / 42
    exact = np.mean(kept) + within_y - 2 * xy[drawn].mean()
    ones = torch.ones(7, dtype=torch.float64)
    assert statistics.mmd(xx, xy, yy, times, ones) == pytest.approx(exact.item())


def test_inception_score(fidelity: ModuleType) -> None:
    logits = rows(30, 10) * 3
    theirs = fidelity.metric_isc.isc_features_to_metric(logits, splits=1, shuffle=False)["inception_score_mean"]
    assert statistics.inception_score(logits) == pytest.approx(theirs)
    sure = torch.eye(5).repeat(4, 1) * 100  # each picture sure of its class, the classes even
    assert statistics.inception_score(sure) == pytest.approx(5)
    assert statistics.inception_score(torch.zeros(20, 5)) == pytest.approx(1)


def test_precision_and_recall_equal_torch_fidelity(fidelity: ModuleType) -> None:
    x, y = rows(60, 4), rows(50, 4, 1, 0.8)
    theirs = fidelity.metric_prc.calculate_precision_recall_full(x.double(), y.double(), 3)
    found = statistics.manifold(x, y)
    assert (found["precision"].mean().item(), found["recall"].mean().item()) == pytest.approx(theirs)
    assert 0 < found["precision"].mean() < 1


def test_density_and_coverage_by_the_book() -> None:
    x, y, k = rows(20, 3), rows(15, 3, 1), 5
    reach = [sorted(math.dist(a, b) for b in y.tolist())[k] for a in y.tolist()]
    inside = np.array([[math.dist(a, b) <= r for b, r in zip(y.tolist(), reach, strict=True)] for a in x.tolist()])
    found = statistics.manifold(x, y)
    assert found["density"].mean().item() == pytest.approx(inside.sum() / (k * len(x)))
    assert found["coverage"].mean().item() == pytest.approx(inside.any(0).mean())
    with pytest.raises(ValueError, match="neighbours need more pictures"):
        statistics.manifold(x[:5], y)


def test_the_interval_of_a_mean_is_two_standard_errors_wide() -> None:
    values = rows(400, 1)[:, 0]
    found = statistics.mean(values, 4000)
    error = values.std().item() / 20
    assert found.value == pytest.approx(values.mean().item(), abs=1e-6)
    assert (found.high - found.value) / error == pytest.approx(1.96, rel=0.1)
    assert (found.value - found.low) / error == pytest.approx(1.96, rel=0.1)


def test_the_interval_of_fid_holds_the_value_it_would_else_miss() -> None:
    """Sets drawn with replacement are further apart than the sets themselves: all of them lie above the value."""
    x, y = rows(30, 24), rows(30, 24, 1)
    rng = torch.Generator().manual_seed(0)
    drawn = [statistics.frechet(x[torch.randint(30, (30,), generator=rng)], y) for _ in range(20)]
    assert min(drawn) > statistics.frechet(x, y)
    found = statistics.fid(x, y, 50)
    assert found.low < found.value < found.high
    assert statistics.fid(x, y, 0) == statistics.Estimate(found.value, found.value, found.value, 30)
    assert statistics.fid(x, y, 50) == found


def test_nearest() -> None:
    y = torch.eye(4)
    distances, indices = statistics.nearest(torch.tensor([[0.0, 3.0, 1.0, 0.0]]), y, 2)
    assert indices.tolist() == [[1, 2]]
    assert distances[0, 0].item() == pytest.approx(1 - 3 / 10**0.5)
