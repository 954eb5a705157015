"""Quadrature weights of multistep solvers: integrate the polynomial through past evaluations against an exponential."""

import math
from collections.abc import Sequence
from itertools import accumulate


def exponential_moments(rate: float, h: float, n: int) -> list[float]:
    """The integrals of tau^i * exp(rate * tau) over [0, h], i < n."""
    z = rate * h
    if abs(z) < 1:  # the recursion below cancels, the series does not
        terms = list(accumulate(range(1, 18), lambda term, k: term * z / k, initial=1.0))
        return [h ** (i + 1) * sum(term / (i + 1 + k) for k, term in enumerate(terms)) for i in range(n)]
    moments = [math.expm1(z) / rate]
    for i in range(1, n):
        moments.append((h**i * math.exp(z) - i * moments[-1]) / rate)  # by parts
    return moments


def lagrange_weights(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """Weights w with sum(w_j * p(nodes_j)) = the integral of p, for all polynomials p of degree < len(nodes).

    The moments are the integrals of 1, tau, tau^2, ...
    """
    weights = []
    for j, node in enumerate(nodes):
        basis = [1.0]  # coefficients of the j-th Lagrange polynomial, lowest power first
        for other in (*nodes[:j], *nodes[j + 1 :]):
            scale = 1 / (node - other)
            basis = [(low - other * high) * scale for low, high in zip([0.0, *basis], [*basis, 0.0], strict=True)]
        weights.append(sum(c * moment for c, moment in zip(basis, moments, strict=False)))
    return weights
