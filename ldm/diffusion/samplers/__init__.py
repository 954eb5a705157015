"""The samplers by name: what each is, the order of convergence that it claims and a test measures, and its source.

A stochastic sampler claims the order that it has without its noise, None where there is no such limit. Multistep
solvers that start with fewer points claim the second: one first-order step leaves an error of h^2, whatever follows.
"""

from functools import partial
from typing import NamedTuple

from ldm.diffusion.samplers.analytic import analytic_dpm
from ldm.diffusion.samplers.common import Sampler, Step, planned, sampler
from ldm.diffusion.samplers.first_order import ddim, lcm, tcd
from ldm.diffusion.samplers.multistep import deis, dpmpp, er_sde, ipndm, lms, sa_solver, unipc
from ldm.diffusion.samplers.singlestep import dpm_adaptive, dpm_solver, dpmpp_sde, heun, pseudo, restart, two_stages
from ldm.errors import unknown

__all__ = ["ORDERS", "SAMPLERS", "SOLVERS", "Sampler", "Step", "find_sampler"]


class Solver(NamedTuple):
    """A sampler, its order, and the paper or program that it is from."""

    run: Sampler
    order: int | None
    source: str


on_noise = partial(planned, of_noise=True)
_dpm2, _dpmpp_2s = partial(two_stages, unit=lambda s, half: half), partial(two_stages, unit=lambda s, half: s)
SOLVERS: dict[str, Solver] = {
    "ddim": Solver(planned(ddim), 1, "Song et al. 2021, Eq. 12"),
    "ddpm": Solver(planned(partial(ddim, eta=1.0)), None, "Ho et al. 2020, algorithm 2"),
    "euler": Solver(planned(ddim), 1, "Karras et al. 2022, algorithm 1 without its correction"),
    "euler_a": Solver(planned(partial(ddim, eta=1.0)), 1, "Crowson's k-diffusion, 2022"),
    "heun": Solver(planned(heun), 2, "Karras et al. 2022, algorithm 2"),
    "dpm2": Solver(planned(partial(_dpm2, eta=0.0)), 2, "Karras et al. 2022, after Lu et al. 2022a"),
    "dpm2_a": Solver(planned(_dpm2), 2, "Crowson's k-diffusion, 2022"),
    "lms": Solver(on_noise(lms), 2, "Crowson's k-diffusion, 2022"),
    "plms": Solver(on_noise(partial(pseudo, starts=1)), 2, "Liu et al. 2022"),
    "pndm": Solver(on_noise(partial(pseudo, starts=3)), 2, "Liu et al. 2022, algorithm 2"),
    "ipndm": Solver(on_noise(ipndm), 2, "Zhang & Chen 2023, appendix"),
    "deis": Solver(on_noise(deis), 2, "Zhang & Chen 2023, Eq. 15"),
    "dpm_solver": Solver(planned(dpm_solver), 3, "Lu et al. 2022a, algorithms 1 and 2"),
    "dpm_adaptive": Solver(sampler(dpm_adaptive), None, "Lu et al. 2022a, appendix C"),  # it keeps a tolerance
    "dpmpp_2s_a": Solver(planned(_dpmpp_2s), 2, "Lu et al. 2022b, algorithm 1; ancestral as in k-diffusion"),
    "dpmpp_2m": Solver(planned(partial(dpmpp, rule="midpoint")), 2, "Lu et al. 2022b, algorithm 2"),
    "dpmpp_3m": Solver(planned(partial(dpmpp, points=3)), 2, "Lu et al. 2022b"),
    "dpmpp_sde": Solver(sampler(dpmpp_sde), 2, "Lu et al. 2022b, appendix"),
    "dpmpp_2m_sde": Solver(planned(partial(dpmpp, rule="midpoint", eta=1.0)), 2, "Lu et al. 2022b, appendix"),
    "dpmpp_3m_sde": Solver(planned(partial(dpmpp, points=3, eta=1.0)), 2, "Crowson's k-diffusion, 2023"),
    "unipc": Solver(planned(unipc), 3, "Zhao et al. 2023, algorithms 1 and 2"),
    "sa_solver": Solver(planned(sa_solver), 2, "Xue et al. 2023, algorithm 1"),
    "restart": Solver(planned(restart), 2, "Xu et al. 2023, algorithm 1"),
    "lcm": Solver(planned(lcm), None, "Luo et al. 2023, algorithm 3"),
    "tcd": Solver(planned(tcd), 1, "Zheng et al. 2024, algorithm 4"),
    "analytic_dpm": Solver(sampler(analytic_dpm), None, "Bao et al. 2022, theorem 1"),
    "er_sde": Solver(planned(er_sde), 2, "Cui et al. 2023, algorithms 1 to 3"),
}
SAMPLERS: dict[str, Sampler] = {name: solver.run for name, solver in SOLVERS.items()}
ORDERS: dict[str, int | None] = {name: solver.order for name, solver in SOLVERS.items()}


def find_sampler(name: str) -> Sampler:
    """The sampler of that name; UserError that names the nearest."""
    if name not in SAMPLERS:
        raise unknown("sampler", name, SAMPLERS)
    return SAMPLERS[name]
