"""Figures that compare two sets of features, and how sure they are.

FID (Heusel et al. 2017), KID (Binkowski et al. 2018), Inception score (Salimans et al. 2016), precision and recall
(Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Rows = Float[Tensor, "_ d"]
PerRow = Float[Tensor, "_"]


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % bootstrap interval. n: the pictures (or prompts) it was taken over."""

    value: float
    low: float
    high: float
    n: int


Estimates = dict[str, Estimate]


def frechet(x: Rows, y: Rows) -> float:
    """The Frechet distance of the Gaussians with the means and covariances of two sets of rows.

    tr (S_x S_y)^1/2 is the nuclear norm of A B^T, where S_x = A^T A and S_y = B^T B: no square root of a matrix that is
    nearly singular, and cheap where there are fewer rows than columns.
    """
    (mean_x, a), (mean_y, b) = _root(x), _root(y)
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return float((mean_x - mean_y).square().sum() + a.square().sum() + b.square().sum() - 2 * cross)


def _root(x: Rows) -> tuple[Tensor, Tensor]:
    """The mean, and A of few rows with A^T A the covariance. ValueError for less than two rows."""
    if len(x) < 2:
        raise ValueError("a covariance needs two rows or more")
    x = x.double()
    centred = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    return x.mean(0), torch.linalg.qr(centred, "r").R if len(x) > x.shape[1] else centred


def kernels(x: Rows, y: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """KID's kernel (x.y / d + 1)^3 within x, between, and within y."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.double() @ b.double().T / a.shape[1] + 1) ** 3

    return kernel(x, x), kernel(x, y), kernel(y, y)


def mmd(xx: Tensor, xy: Tensor, yy: Tensor, times_x: PerRow, times_y: PerRow) -> float:
    """The squared maximum mean discrepancy, unbiased, of rows taken several times: no row is compared with itself."""

    def within(k: Tensor, times: Tensor) -> Tensor:
        pairs = times.sum() ** 2 - times.square().sum()
        return (times @ k @ times - (times.square() * k.diagonal()).sum()) / pairs

    between = times_x @ xy @ times_y / (times_x.sum() * times_y.sum())
    return float(within(xx, times_x) + within(yy, times_y) - 2 * between)


def inception_score(logits: Rows) -> float:
    """exp of the mean divergence of the classes of each picture from those of all, in one split."""
    log_p = logits.double().log_softmax(1)
    log_q = log_p.logsumexp(0) - torch.tensor(len(logits)).log()
    return float((log_p.exp() * (log_p - log_q)).sum(1).mean().exp())


def manifold(x: Rows, y: Rows, k: int = 3, k_density: int = 5) -> dict[str, PerRow]:
    """What generated rows x add to `precision` and `density`, each, and real rows y to `recall` and `coverage`.

    By balls around each row that reach to its k-th neighbour. ValueError where a set has no k-th neighbour.
    """
    if min(len(x), len(y)) <= max(k, k_density):
        raise ValueError(f"{max(k, k_density)} neighbours need more pictures than {len(x)} and {len(y)}")
    between = torch.cdist(x.double(), y.double())
    dense: Bool[Tensor, "x y"] = between <= _reach(y, k_density)
    return {
        "precision": (between <= _reach(y, k)).any(1).double(),
        "recall": (_reach(x, k) >= between.T).any(1).double(),
        "density": dense.double().sum(1) / k_density,
        "coverage": dense.any(0).double(),
    }


def _reach(x: Rows, k: int) -> PerRow:
    return torch.cdist(x.double(), x.double()).kthvalue(k + 1).values  # the nearest is the row itself


def nearest(x: Rows, y: Rows, k: int = 1) -> tuple[Float[Tensor, "_ k"], Int[Tensor, "_ k"]]:
    """Distances and indices of the k nearest rows of y, by angle: 1 - cosine."""
    unit_x, unit_y = torch.nn.functional.normalize(x.double()), torch.nn.functional.normalize(y.double())
    found = (1 - unit_x @ unit_y.T).topk(min(k, len(y)), largest=False)
    return found.values, found.indices


def mean(values: PerRow, rounds: int = 1000) -> Estimate:
    """The mean of what each picture says."""
    picked = torch.randint(len(values), (rounds, len(values)), generator=torch.Generator().manual_seed(0))
    return _interval(float(values.double().mean()), values.double().cpu()[picked].mean(1), len(values))


def resampled(statistic: Callable[[Tensor, Tensor], float], n_x: int, n_y: int, rounds: int) -> Estimate:
    """A statistic of the chosen rows of two sets, over sets drawn again with replacement."""
    rng = torch.Generator().manual_seed(0)
    draws = zip(*(torch.randint(n, (rounds, n), generator=rng) for n in (n_x, n_y)), strict=True)
    found = torch.tensor([statistic(x, y) for x, y in draws], dtype=torch.float64)
    return _interval(statistic(torch.arange(n_x), torch.arange(n_y)), found, n_x)


def _interval(value: float, found: PerRow, n: int) -> Estimate:
    """The middle 95 %, moved so that their mean is the value: a set drawn with replacement is poorer, a bias."""
    if not len(found):
        return Estimate(value, value, value, n)
    low, high = torch.quantile(found, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    shift = value - float(found.mean())
    return Estimate(value, low + shift, high + shift, n)


def fid(x: Rows, y: Rows, rounds: int) -> Estimate:
    return resampled(lambda i, j: frechet(x[i], y[j]), len(x), len(y), rounds)


def inception_scores(logits: Rows, rounds: int) -> Estimate:
    n = len(logits)
    return resampled(lambda i, _: inception_score(logits[i]), n, n, rounds)


def kid(x: Rows, y: Rows, rounds: int) -> Estimate:
    xx, xy, yy = kernels(x, y)

    def statistic(i: Tensor, j: Tensor) -> float:
        times = [torch.bincount(rows, minlength=n).double() for rows, n in ((i, len(x)), (j, len(y)))]
        return mmd(xx, xy, yy, *times)

    return resampled(statistic, len(x), len(y), rounds)
