"""Painting and training on a GPU that is not there: nothing mixes its tensors with the CPU's, and little waits for it.

In a process of its own, for what it does to torch cannot be undone.
"""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakecuda
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from PIL import Image as Pillow
from torch import Tensor, nn
from training.conftest import LDM, VAE

from ldm import config, pipeline
from ldm.canvas import Canvas
from ldm.diffusion.samplers import find_sampler
from ldm.errors import UserError
from ldm.models.controlnet import ControlNet
from ldm.recipe import Request
from ldm.steering import Control
from ldm.training.config import LdmRun, VaeRun
from ldm.training.ema import Ema
from ldm.training.guard import Guard
from ldm.training.learner import Learner
from ldm.training.loop import _moved
from ldm.training.meter import Meter
from ldm.training.optim import named
from ldm.training.tasks.autoencoder import AutoencoderTask
from ldm.training.tasks.denoising import DenoisingTask

THERE = os.environ.get("LDM_TESTS_FAKE_CUDA") == "1"
if THERE:
    fakecuda.know_cuda()


@pytest.mark.skipif(THERE, reason="this is that process")
def test_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"LDM_TESTS_FAKE_CUDA": "1"}
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout


def painter(tiny_model: Path) -> pipeline.Pipeline:
    """Within a fakecuda.gpu."""
    with torch.utils._python_dispatch._disable_current_modes():
        made = pipeline.load(str(tiny_model), "cpu", "fp32")
    for network in made.model.modules.values():
        network.to(fakecuda.CUDA)
    made._made = replace(made._made, device=str(fakecuda.CUDA))
    return made


class There(Accelerator):
    """One process, that GPU."""

    device, mixed_precision = fakecuda.CUDA, "no"  # type: ignore[assignment]

    def __init__(self) -> None:
        pass

    def prepare_model(self, model: nn.Module, **_: Any) -> nn.Module:
        if self.mixed_precision == "fp16":
            model.forward = convert_outputs_to_fp32(torch.autocast("cuda", torch.float16)(model.forward))  # type: ignore
        return model


class TestThere:
    __test__ = THERE

    def test_it_knows_a_mistake(self) -> None:
        with fakecuda.gpu() as device:
            here, there = torch.ones(2), torch.ones(2, device=fakecuda.CUDA)
            assert float((here * 3).sum()) == 6 and not device.waits
            with pytest.raises(RuntimeError, match="at least two devices"):
                here + there
            for wait in (
                lambda: float(there[0]),
                lambda: bool((there > 1).any()),
                there.cpu,
                lambda: here.to("cuda:0"),
            ):
                wait()
            assert len(device.waits) == 4
            there.to("cpu", non_blocking=True)
            here.to(there.device, non_blocking=True)
            assert len(device.waits) == 4

    @pytest.mark.parametrize(
        "asked",
        [
            {"sampler": "unipc"},
            {"sampler": "euler_a"},
            {"prompt": "a [red:green:0.5] apple AND a (pear:1.2)"},
            {"tile": 16, "width": 40, "height": 32, "cfg_scale": 1.0},
        ],
        ids=str,
    )
    def test_no_step_waits(self, tiny_model: Path, asked: dict[str, Any]) -> None:
        with fakecuda.gpu() as device:
            made = painter(tiny_model)
            device.waits.clear()
            waits, request = [], made.complete(Request(**{"prompt": "a red apple", "seed": 1, "steps": 3} | asked))
            for step in made.sample([request]):
                assert step.x.device == fakecuda.CUDA
                waits.append(device.waits[:])
                device.waits.clear()
            assert len(waits) == 3 and not any(waits[1:]), waits[1:]
            assert len(waits[0]) < 16, waits[0]  # the text and the first noise have to get there
            assert made.finish(step.x).shape == (1, 3, request.height, request.width)
            assert len(device.waits) <= 4, device.waits  # whether the picture is finite

    def test_an_answer_that_is_not_finite_is_told_one_step_later(self) -> None:
        with fakecuda.gpu() as device:
            x = torch.empty(1, 2, device=fakecuda.CUDA)
            run = find_sampler("euler")(lambda x, sigma: x, x, [3.0, 2.0, 1.0, 0.0], lambda x: x)
            next(run)
            device.number = math.nan
            with pytest.raises(UserError, match="not finite at step 1 of 3, sigma 3:"):
                next(run)
            device.number = 1.0
            run = find_sampler("euler")(lambda x, sigma: x, x, [3.0, 2.0, 0.0], lambda x: x)
            next(run), next(run)
            device.number = math.nan
            with pytest.raises(UserError, match="not finite at step 2 of 2, sigma 2:"):  # the last one as well
                next(run)

    def test_of_a_picture(self, tiny_model: Path) -> None:
        """From a picture, inpainted, inverted, enlarged, under a control."""
        mask = torch.zeros(1, 1, 32, 32)
        mask[..., 8:24, 8:24] = 1
        canvas = Canvas(torch.rand(1, 3, 32, 32) * 2 - 1)
        with fakecuda.gpu() as device:
            made = painter(tiny_model)
            for asked, where in (
                ({"strength": 0.6}, canvas),
                ({"strength": 0.8}, replace(canvas, mask=mask)),
                ({"invert": "a red apple", "strength": 0.9}, canvas),
                ({"upscale": 2.0}, None),
            ):
                request = made.ready(Request("a pear", seed=1, steps=4, **asked), where)
                *_, last = made.sample([request], where)
                assert made.finish(last.x, where).isfinite().all()
            assert made.model.backbone is not None
            control = ControlNet(made.model.backbone.config, hint_widths=(4, 4)).to(fakecuda.CUDA)
            made.controls.append(Control(Path("c"), control, Pillow.new("RGB", (32, 32)), end=0.7))
            steps: list[list[str]] = []
            device.waits.clear()
            for _ in made.sample([made.ready(Request("a pear", seed=1, steps=3))]):
                steps.append(device.waits[:])
                device.waits.clear()
            assert not any(steps[1:]), steps

    @pytest.mark.parametrize("precision", ["no", "fp16"])
    @pytest.mark.parametrize("kind", ["vae", "ldm"])
    def test_a_training_step(
        self, kind: str, precision: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All of it but the backward pass, which torch takes on a device that is there: gradients are any."""
        path = tmp_path / "run.yaml"
        path.write_text(VAE if kind == "vae" else LDM)
        settings: Any = config.load(
            VaeRun if kind == "vae" else LdmRun, path, [] if kind == "vae" else ["--autoencoder", str(tiny_model)]
        )
        task: Any = AutoencoderTask(settings) if kind == "vae" else DenoisingTask(settings)
        read = task.dataset.__getitems__(range(4))
        with fakecuda.gpu() as device:
            task.to(fakecuda.CUDA)
            accelerator = There()
            accelerator.mixed_precision = precision
            learners = [Learner(o, settings.optim, accelerator, main=not i) for i, o in enumerate(task.objectives())]
            trained = [p for learner in learners for p in learner.parameters]
            monkeypatch.setattr(
                Tensor, "backward", lambda self: [setattr(p, "grad", torch.empty_like(p)) for p in trained]
            )
            monkeypatch.setattr(torch.autograd, "grad", lambda loss, leaf, **_: [torch.empty_like(leaf)])
            averaged = named({name: task.networks[name] for name in task.averaged})
            ema = Ema({name: p for name, p in averaged.items() if p.requires_grad}, settings.run.ema)
            guard, meter = Guard(fakecuda.CUDA, 5), Meter(fakecuda.CUDA)
            for step in range(2):
                device.waits.clear()
                batch = {"step": step} | {name: _moved(value, fakecuda.CUDA) for name, value in read.items()}
                guard.look(batch)
                losses = [learner.backward(batch, 1, last=True) for learner in learners]
                norms = [learner.clip() for learner in learners]
                skip = guard.see(step, [learner.loss for learner in learners], norms)
                for learner in learners:
                    learner.step(1e-3, skip)
                ema.update(step, 1 - skip)
                for values in losses:
                    meter.add(values, 1.0, skip)
            assert not device.waits, device.waits
