"""Parity with k-diffusion 0.1.1, float64 to 1e-9: the solvers. Skipped where it is not installed.

Only its sampling.py is loaded, with stand-ins for what that imports and these solvers do not use.
"""

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import bind
from ldm.diffusion.predictions import PREDICTIONS
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedules import ScheduleConfig, make_schedule

Net = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(scope="module")
def k_diffusion() -> Any:
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or spec.origin is None:
        pytest.skip("k-diffusion is not installed: pip install --no-deps k-diffusion==0.1.1.post1")
    stubs = {name: ModuleType(name) for name in ("torchsde", "torchdiffeq", "k_diffusion", "k_diffusion.utils")}
    stubs["torchdiffeq"].odeint = None  # type: ignore[attr-defined]
    stubs["k_diffusion"].utils = stubs["k_diffusion.utils"]  # type: ignore[attr-defined]
    stubs["k_diffusion.utils"].append_dims = lambda x, n: x.view(-1, *[1] * (n - 1)) if x.ndim else x  # type: ignore[attr-defined]
    path = spec.origin.replace("__init__.py", "sampling.py")
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stubs.items():
            patch.setitem(sys.modules, name, module)
        loaded = importlib.util.spec_from_file_location("k_diffusion.sampling", path)
        assert loaded is not None and loaded.loader is not None
        module = importlib.util.module_from_spec(loaded)
        loaded.loader.exec_module(module)
    return module


def denoiser(net: Net, prediction: str) -> Callable[[Tensor, Tensor], Tensor]:
    schedule = make_schedule(ScheduleConfig())
    return bind(Denoiser(lambda z, label, cond: net(z, label), PREDICTIONS[prediction], schedule), None)


CASES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("euler", "euler", {}, {}),
    ("euler_a", "euler_ancestral", {}, {}),
    ("euler_a", "euler_ancestral", {"eta": 0.4}, {"eta": 0.4}),
    ("heun", "heun", {}, {}),
    ("heun", "heun", {"s_churn": 5.0, "s_range": (0.1, 9.0), "s_noise": 1.1},
     {"s_churn": 5.0, "s_tmin": 0.1, "s_tmax": 9.0, "s_noise": 1.1}),
    ("dpm2", "dpm_2", {}, {}),
    ("dpm2_a", "dpm_2_ancestral", {}, {}),
    ("lms", "lms", {}, {}),
    ("dpmpp_2s_a", "dpmpp_2s_ancestral", {}, {}),
    ("dpmpp_sde", "dpmpp_sde", {}, {}),
    ("dpmpp_sde", "dpmpp_sde", {"eta": 0.5}, {"eta": 0.5}),
    ("dpmpp_2m", "dpmpp_2m", {}, {}),
    ("dpmpp_2m_sde", "dpmpp_2m_sde", {}, {}),
    ("dpmpp_2m_sde", "dpmpp_2m_sde", {"eta": 0.5, "rule": "exact"}, {"eta": 0.5, "solver_type": "heun"}),
    ("dpmpp_3m_sde", "dpmpp_3m_sde", {"rule": "published"}, {}),
    ("dpmpp_3m_sde", "dpmpp_3m_sde", {"eta": 0.5, "rule": "published"}, {"eta": 0.5}),
]  # fmt: skip


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize(("ours", "theirs", "options", "settings"), CASES)
def test_samplers_equal_k_diffusion(
    ours: str, theirs: str, options: Any, settings: Any, prediction: str, net: Net, k_diffusion: Any, monkeypatch: Any
) -> None:
    grid = k_diffusion.get_sigmas_karras(12, 0.03, 14.6).double()
    x = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 14.6
    # It draws even where it adds nothing, so the draws would not pair up: one noise serves for all.
    churn = torch.randn(x.shape, generator=torch.Generator().manual_seed(7), dtype=x.dtype)
    monkeypatch.setattr(k_diffusion.torch, "randn_like", lambda x: churn)
    if "ancestral" in theirs or "sde" in theirs:
        settings = {**settings, "noise_sampler": lambda s, t: churn}
    denoise = denoiser(net, prediction)
    if theirs == "dpmpp_sde":  # a Brownian path as ours has it: each step's noise contains that of its first half

        def path(s: Tensor, t: Tensor) -> Tensor:
            share = (t / (s + t)).sqrt()
            whole = any(torch.isclose(t, level) for level in grid)
            return churn * (share + (1 - share**2).sqrt()) if whole else churn

        settings = {**settings, "noise_sampler": path}
    wanted = getattr(k_diffusion, f"sample_{theirs}")(denoise, x, grid, disable=True, **settings)
    got = list(SAMPLERS[ours](denoise, x, grid, lambda x: churn, **options))[-1].x
    # their quadrature for lms is asked for 1e-4
    assert (got - wanted).abs().max() < (1e-6 if ours == "lms" else 1e-9) * wanted.abs().max()


@pytest.mark.parametrize("order", [2, 3])
def test_dpm_solver_equals_k_diffusion(order: int, net: Net, k_diffusion: Any) -> None:
    """Their stages lie evenly in log sigma; ours on the run's levels, so the levels are laid there."""
    denoise = denoiser(net, "eps")
    x = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 14.6
    ends = torch.linspace(2.68, -3.5, 6, dtype=torch.float64)
    grid = torch.linspace(2.68, -3.5, 5 * order + 1, dtype=torch.float64).exp()
    solver, wanted = k_diffusion.DPMSolver(denoise), x
    for s, t in zip(-ends, -ends[1:], strict=False):
        wanted, _ = getattr(solver, f"dpm_solver_{order}_step")(wanted, s, t)
    got = list(SAMPLERS["dpm_solver"](denoise, x, grid, torch.zeros_like, order=order))[-1].x
    assert (got - wanted).abs().max() < 1e-9 * wanted.abs().max()


@pytest.mark.parametrize("order", [2, 3])
def test_dpm_adaptive_equals_k_diffusion_to_its_tolerance(order: int, net: Net, k_diffusion: Any) -> None:
    """One image: their error is a norm over the batch, ours the greatest of its images."""
    denoise = denoiser(net, "eps")
    x = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 14.6
    wanted, info = k_diffusion.sample_dpm_adaptive(denoise, x, 0.03, 14.6, disable=True, order=order, return_info=True)
    steps = list(SAMPLERS["dpm_adaptive"](denoise, x, [14.6, 0.03], torch.zeros_like, order=order))
    assert len(steps) == info["n_accept"]
    assert (steps[-1].x - wanted).abs().max() < 1e-6 * wanted.abs().max()  # their tolerances are fp32
