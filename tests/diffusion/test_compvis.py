"""Parity with CompVis' own DDIM and PLMS code, float64 to 1e-9: solver, levels, guidance and noise.

As the registry's stable-diffusion-sdkit carries it (SD 2's copy, with v-prediction). `make` puts that beside the
environment's packages, in .venv/compvis, for its top package is called ldm too. Skipped where it is not there.
"""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import cfg
from ldm.diffusion.predictions import PREDICTIONS
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedules import ScheduleConfig, alphas_bar, make_schedule

pytestmark = pytest.mark.filterwarnings("ignore")  # of numpy's deprecations
CONFIG = ScheduleConfig()
SCALE, STEPS = 5.0, 20
COND, UNCOND = (torch.full((2, 1, 1), value, dtype=torch.float64) for value in (1.5, 0.5))


@pytest.fixture(scope="module")
def compvis() -> Iterator[dict[str, Any]]:
    """Their modules ddim and plms, loaded from their files under other names; nothing stays behind in sys.modules."""
    folder = Path(sys.prefix) / "compvis" / "ldm"
    if not folder.is_dir():
        pytest.skip("CompVis' code is not there: pip install --no-deps --target .venv/compvis stable-diffusion-sdkit")

    def load(path: str) -> Any:
        spec = importlib.util.spec_from_file_location("compvis_" + Path(path).stem, folder / path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    with pytest.MonkeyPatch.context() as patch:
        for name in ("ldm", "ldm.util", "ldm.modules", "ldm.modules.diffusionmodules", "ldm.models.diffusion"):
            patch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["ldm.util"].instantiate_from_config = None  # type: ignore[attr-defined]
        patch.setitem(sys.modules, "ldm.models", ModuleType("ldm.models"))
        patch.setitem(sys.modules, "ldm.modules.diffusionmodules.util", load("modules/diffusionmodules/util.py"))
        patch.setitem(sys.modules, "ldm.models.diffusion.sampling_util", load("models/diffusion/sampling_util.py"))
        modules = {name: load(f"models/diffusion/{name}.py") for name in ("ddim", "plms")}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # they make their coefficients in the default dtype
    yield modules
    torch.set_default_dtype(before)


class Model:
    """What their samplers ask of a LatentDiffusion."""

    device, num_timesteps = torch.device("cpu"), 1000

    def __init__(self, net: Any, prediction: str) -> None:
        self.net, self.parameterization = net, prediction
        self.alphas_cumprod = alphas_bar(CONFIG)
        self.alphas_cumprod_prev = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        self.betas = 1 - self.alphas_cumprod / self.alphas_cumprod_prev

    def apply_model(self, z: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return self.net(z, t) * cond[..., None]

    def _factors(self, t: Tensor) -> tuple[Tensor, Tensor]:
        abar = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return abar.sqrt(), (1 - abar).sqrt()

    def predict_start_from_z_and_v(self, z: Tensor, t: Tensor, v: Tensor) -> Tensor:
        signal, noise = self._factors(t)
        return signal * z - noise * v

    def predict_eps_from_z_and_v(self, z: Tensor, t: Tensor, v: Tensor) -> Tensor:
        signal, noise = self._factors(t)
        return signal * v + noise * z


@pytest.mark.parametrize(
    ("name", "prediction", "eta"),
    [
        ("ddim", "eps", 0.0),
        ("ddim", "eps", 0.6),
        ("ddim", "eps", 1.0),
        ("ddim", "v", 0.0),
        ("ddim", "v", 0.6),
        ("plms", "eps", 0.0),  # their PLMS does not know v
    ],
)
def test_samplers_equal_compvis(
    name: str, prediction: str, eta: float, net: Any, compvis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, schedule = compvis[name], make_schedule(CONFIG)
    z = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rng = torch.Generator().manual_seed(7)
    monkeypatch.setattr(module, "noise_like", lambda shape, *_: torch.randn(shape, generator=rng, dtype=z.dtype))
    sampler = getattr(module, f"{name.upper()}Sampler")(Model(net, prediction))
    wanted, _ = sampler.sample(
        STEPS, 2, z.shape[1:], COND, eta=eta, x_T=z, verbose=False,
        unconditional_guidance_scale=SCALE, unconditional_conditioning=UNCOND,
    )  # fmt: skip

    steps = torch.tensor([*range(1 + 1000 - 1000 // STEPS, 0, -1000 // STEPS), 0], dtype=torch.float64)
    grid = schedule.at(steps)
    assert torch.equal(schedule.steps(STEPS, "leading")[:-1], grid[:-1])  # ours then goes to 0, theirs to step 0
    rng.manual_seed(7)
    denoiser = Denoiser(
        lambda z, label, cond: net(z, label) * cond.tokens[..., None], PREDICTIONS[prediction], schedule
    )
    denoise = cfg(denoiser, Conditioning(COND), Conditioning(UNCOND), SCALE)
    noise = lambda x: torch.randn(x.shape, generator=rng, dtype=x.dtype)  # noqa: E731
    options = {"eta": eta} if eta else {}
    got = list(SAMPLERS[name](denoise, z * grid[0].square().add(1).sqrt(), grid, noise, **options))[-1].x
    got = got / grid[-1].square().add(1).sqrt()
    assert (got - wanted).abs().max() < 1e-9 * wanted.abs().max()
