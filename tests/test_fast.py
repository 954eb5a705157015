"""The flags that are about speed reach the networks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ldm import painting, pipeline
from ldm.errors import UserError
from ldm.models.attention import Attention, attend, fused
from ldm.request import Run


def test_networks_are_laid_out_for_speed_as_they_load(tiny_model: Path) -> None:
    painter = pipeline.load(str(tiny_model), "cpu")
    for network in (painter.model.backbone, painter.model.autoencoder):
        assert network is not None
        kernels = [p for p in network.parameters() if p.ndim == 4 and min(p.shape) > 1]
        assert kernels and all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
        assert {m.attend for m in network.modules() if isinstance(m, Attention)} <= {attend}


@pytest.mark.parametrize("given", [{"attention": "sdpa"}, {"compile": True}])
def test_attention_and_compile_are_passed_on(
    given: dict[str, Any], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[pipeline.Pipeline] = []
    prepare = pipeline.Pipeline.prepare

    def watched(self: pipeline.Pipeline, attention: str = "auto", compiled: bool = False) -> None:
        prepare(self, attention)  # what compiles is tested by itself
        if (attention, compiled) != ("auto", False):
            seen.append(self)
            assert (attention, compiled) == (given.get("attention", "auto"), given.get("compile", False))

    monkeypatch.setattr(pipeline.Pipeline, "prepare", watched)
    run = Run(prompt=("a red apple",), model=str(tiny_model), device="cpu", out=tmp_path, **given)
    (path,) = painting.run(run, {"steps": 1, "seed": 1})
    assert path.is_file() and len(seen) == 1
    assert seen[0].model.backbone is not None
    found = {m.attend for m in seen[0].model.backbone.modules() if isinstance(m, Attention)}
    assert found == {fused if "attention" in given else attend}


def test_an_attention_that_is_not_there_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    run = Run(prompt=("a red apple",), model=str(tiny_model), device="cpu", out=tmp_path, attention="flash")
    with pytest.raises(UserError, match="unknown attention 'flash'"):
        list(painting.run(run, {"steps": 1}))
