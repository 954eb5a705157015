"""CLIP score: how well pictures fit their texts (Hessel et al. 2021, arXiv:2104.08718), by weights that are given."""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ldm.checkpoints import pickled
from ldm.checkpoints.files import SafeFile
from ldm.errors import UserError, nearest
from ldm.evaluation.store import Pixels
from ldm.text.open_clip import open_clip

Score = Callable[[Pixels, Sequence[str]], Float[Tensor, " b"]]


def load_clip(path: Path, model: str) -> Score:
    """100 * max(cosine, 0) of each picture and its text. model: a name that open_clip knows, or its JSON config.

    path: open_clip's weights as safetensors, or as a pickle, which is not run. UserError for what does not fit.
    """
    package = open_clip()
    if model.endswith(".json"):
        package.add_model_config(model)
        model = Path(model).stem
    if model not in package.list_models():
        raise UserError(f"open_clip has no model {model!r}{nearest(model, package.list_models())}: see --clip-model")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            state = SafeFile(pickled.unpacked(path, Path(scratch))).tensors()
        network = package.create_model(model, load_weights=False).eval().requires_grad_(False)
        network.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    except (OSError, UserError, RuntimeError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read CLIP weights {str(path)!r} as {model}: {error}") from None
    tokenize = package.get_tokenizer(model)
    size = network.visual.image_size
    side = size if isinstance(size, int) else size[0]
    mean, std = (torch.tensor(v)[:, None, None] for v in (network.visual.image_mean, network.visual.image_std))

    @torch.no_grad()
    def score(pixels: Pixels, texts: Sequence[str]) -> Tensor:
        x = F.interpolate(pixels.float() / 255, (side, side), mode="bicubic", antialias=True, align_corners=False)
        shown = network.encode_image((x.clamp(0, 1) - mean) / std, normalize=True)
        said = network.encode_text(tokenize(list(texts)), normalize=True)
        return 100 * (shown * said).sum(1).clamp(min=0)

    return score
