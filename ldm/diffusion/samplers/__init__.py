"""The samplers by name, and the order of convergence that each claims and a test measures.

A stochastic sampler claims the order it has as a solver of the probability-flow ODE, its noise set to 0; None where
there is no such limit. Multistep solvers that start with fewer points claim the second order that users get: one
first-order step leaves an error of h^2, whatever follows.
"""

from ldm.diffusion.samplers.adams import deis, ipndm, lms, plms, pndm
from ldm.diffusion.samplers.analytic import analytic_dpm
from ldm.diffusion.samplers.common import Sampler, Step
from ldm.diffusion.samplers.dpm_solver import dpm_adaptive, dpm_solver
from ldm.diffusion.samplers.er_sde import er_sde
from ldm.diffusion.samplers.exponential import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, dpmpp_3m_sde, sa_solver, unipc
from ldm.diffusion.samplers.first_order import ddim, ddpm, euler, euler_a, lcm, tcd
from ldm.diffusion.samplers.second_order import dpm2, dpm2_a, dpmpp_2s_a, dpmpp_sde, heun, restart
from ldm.errors import UserError, nearest

__all__ = ["ORDERS", "SAMPLERS", "Sampler", "Step", "find_sampler"]

SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "euler": euler,
    "euler_a": euler_a,
    "heun": heun,
    "dpm2": dpm2,
    "dpm2_a": dpm2_a,
    "lms": lms,
    "plms": plms,
    "pndm": pndm,
    "ipndm": ipndm,
    "deis": deis,
    "dpm_solver": dpm_solver,
    "dpm_adaptive": dpm_adaptive,
    "dpmpp_2s_a": dpmpp_2s_a,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_sde": dpmpp_sde,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "unipc": unipc,
    "sa_solver": sa_solver,
    "restart": restart,
    "lcm": lcm,
    "tcd": tcd,
    "analytic_dpm": analytic_dpm,
    "er_sde": er_sde,
}

ORDERS: dict[str, int | None] = {
    "ddim": 1,
    "ddpm": None,
    "euler": 1,
    "euler_a": 1,
    "heun": 2,
    "dpm2": 2,
    "dpm2_a": 2,
    "lms": 2,
    "plms": 2,
    "pndm": 2,
    "ipndm": 2,
    "deis": 2,
    "dpm_solver": 3,
    "dpm_adaptive": None,  # it keeps a tolerance, not a number of steps
    "dpmpp_2s_a": 2,
    "dpmpp_2m": 2,
    "dpmpp_3m": 2,
    "dpmpp_sde": 2,
    "dpmpp_2m_sde": 2,
    "dpmpp_3m_sde": 2,
    "unipc": 3,
    "sa_solver": 2,
    "restart": 2,
    "lcm": None,
    "tcd": 1,
    "analytic_dpm": None,
    "er_sde": 2,
}


def find_sampler(name: str) -> Sampler:
    """The sampler of that name; UserError that names the nearest."""
    if name not in SAMPLERS:
        raise UserError(f"unknown sampler {name!r}{nearest(name, list(SAMPLERS))}: choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
