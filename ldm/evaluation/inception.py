"""The Inception network of 2015 whose features FID is defined by (Szegedy et al. 2015, arXiv:1512.00567).

It is torchvision's but for places that change the figures: an average pool does not count the padding, the last block
pools by maximum, pictures are resized as TensorFlow 1 did. Keys are pytorch-fid's; a file without the 1,008-way
classifier `fc` gives features but no Inception score.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.checkpoints.files import SafeFile
from ldm.errors import UserError
from ldm.text.open_clip import _torchvision_operators

SIDE, LAST = 299, "Mixed_7c"


class Features(NamedTuple):
    """pool: (b, 2048); logits: (b, 1008), without the classifier's bias, None where the weights hold no classifier."""

    pool: Float[Tensor, "b 2048"]
    logits: Float[Tensor, "b 1008"] | None


class _Pools(TorchFunctionMode):
    """Within it, the average pools of torchvision's blocks are those of 2015."""

    largest = False  # in the last block

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.avg_pool2d:
            return func(*args, **(kwargs or {}))
        return F.max_pool2d(args[0], 3, 1, 1) if self.largest else F.avg_pool2d(args[0], 3, 1, 1, False, False)


class Inception(nn.Module):
    """`Inception.load(path)(pixels)`: features of pictures of any size, in fp32."""

    def __init__(self, classifier: bool = False) -> None:
        super().__init__()
        _torchvision_operators()
        from torchvision.models.inception import Inception3

        for name, block in Inception3(aux_logits=False, init_weights=False).named_children():
            self.add_module(name, block)
            if name == LAST:
                break
        self.fc = nn.Linear(2048, 1008, bias=False) if classifier else None
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, path: str | Path) -> "Inception":
        """Read a safetensors file. UserError where it is not there or holds other keys or shapes."""
        try:
            state = SafeFile(Path(path)).tensors()
        except UserError as error:
            raise UserError(f"Inception weights, get them by `make weights`: {error}") from None
        state.pop("fc.bias", None)
        with torch.device("meta"):
            model = cls("fc.weight" in state)
        counters = [key for key in model.state_dict() if key.endswith("num_batches_tracked")]
        try:
            model.load_state_dict(state | dict.fromkeys(counters, torch.tensor(0)), assign=True)
        except RuntimeError as error:
            raise UserError(f"{str(path)!r} does not hold the 2015 Inception's weights: {error}") from None
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pixels: UInt8[Tensor, "b 3 h w"], side: int = SIDE) -> Features:
        """side: what the pictures are resized to; FID's is 299, and less is faster."""
        x = ((resize(pixels.float(), side) - 128) / 128).contiguous(memory_format=torch.channels_last)
        with _Pools() as pools:
            for name, block in self.named_children():
                pools.largest = name == LAST
                x = block(x) if name != "fc" else x
        pool = x.float().mean((2, 3))
        return Features(pool, None if self.fc is None else self.fc(pool))


def resize(x: Float[Tensor, "b c h w"], side: int = SIDE) -> Float[Tensor, "b c {side} {side}"]:
    """Bilinear as in TensorFlow 1: the first pixels of both grids coincide, and nothing is smoothed before."""
    for dim in (2, 3):
        size = x.shape[dim]
        scale = torch.tensor(size / side, dtype=torch.float32)  # as there: the last bit decides at whole numbers
        place = torch.arange(side, device=x.device, dtype=torch.float32) * scale
        low = place.long()
        share = (place - low).view(-1, *[1] * (3 - dim))
        left = x.index_select(dim, low)
        x = left + (x.index_select(dim, (low + 1).clamp(max=size - 1)) - left) * share
    return x
