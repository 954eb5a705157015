"""The samplers by name. ORDERS: the order of convergence each claims and a test measures, None where none applies."""

from ldm.diffusion.samplers.common import Sampler, Step
from ldm.diffusion.samplers.dpmpp import dpmpp_2m
from ldm.diffusion.samplers.first_order import ddim, euler, euler_a
from ldm.errors import UserError, nearest

__all__ = ["ORDERS", "SAMPLERS", "Sampler", "Step", "find_sampler"]

SAMPLERS: dict[str, Sampler] = {"ddim": ddim, "euler": euler, "euler_a": euler_a, "dpmpp_2m": dpmpp_2m}

ORDERS: dict[str, int | None] = {"ddim": 1, "euler": 1, "euler_a": 1, "dpmpp_2m": 2}


def find_sampler(name: str) -> Sampler:
    """The sampler of that name; UserError that names the nearest."""
    if name not in SAMPLERS:
        raise UserError(f"unknown sampler {name!r}{nearest(name, list(SAMPLERS))}: choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
