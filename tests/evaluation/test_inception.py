"""The Inception network equals torch-fidelity's: with random weights always, with the real ones where they lie."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.errors import UserError
from ldm.evaluation.inception import Inception
from ldm.text.open_clip import _torchvision_operators

WEIGHTS = Path(__file__).parents[2] / "weights/inception.safetensors"


@pytest.fixture(scope="module")
def theirs() -> Callable[[dict[str, Tensor]], Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """torch-fidelity's extractor with given weights, which it would else download."""
    _torchvision_operators()  # so that torchvision imports
    from torch_fidelity import feature_extractor_inceptionv3 as module

    def build(state: dict[str, Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        bias = {"fc.bias": torch.zeros(1008), "fc.weight": torch.zeros(1008, 2048)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: bias | state)
            return module.FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"])

    return build


@pytest.mark.parametrize("side", [32, 128, 300])
def test_equals_torch_fidelity(theirs, side: int, tmp_path: Path, random_inception: Path) -> None:
    state = load_file(random_inception)
    rng = torch.Generator().manual_seed(side)
    pixels = torch.randint(0, 256, (1, 3, side, side), generator=rng, dtype=torch.uint8)
    pool, logits = theirs(state)(pixels)
    found = Inception.load(random_inception)(pixels)
    assert pool.std() > 1e-3
    torch.testing.assert_close(found.pool, pool, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not WEIGHTS.is_file(), reason="no weights/inception.safetensors: make weights")
def test_the_real_weights_equal_torch_fidelity(theirs) -> None:
    pixels = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    torch.testing.assert_close(
        Inception.load(WEIGHTS)(pixels).pool, theirs(load_file(WEIGHTS))(pixels)[0], rtol=1e-4, atol=1e-5
    )


def test_other_files_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="make weights"):
        Inception.load(tmp_path / "none")
    save_file({"x": torch.zeros(1)}, tmp_path / "x")
    with pytest.raises(UserError, match="2015 Inception"):
        Inception.load(tmp_path / "x")
