"""Feature weights at random, so that no test needs those of `make weights`."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm.evaluation.inception import Inception


@pytest.fixture(scope="session")
def random_inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inception weights, classifier and all, under which no layer fades out."""
    rng = torch.Generator().manual_seed(0)
    state = Inception(classifier=True).state_dict()
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            continue
        if value.dim() > 1:
            value.copy_((torch.rand(value.shape, generator=rng) - 0.5) * (24 / value[0].numel()) ** 0.5)
        elif key.endswith(("running_var", "bn.weight")):
            value.copy_(torch.rand(value.shape, generator=rng) * 0.4 + 0.8)
        else:
            value.copy_(torch.randn(value.shape, generator=rng) * 0.1)
    path = tmp_path_factory.mktemp("weights") / "inception.safetensors"
    save_file(state, path)
    return path
