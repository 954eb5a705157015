"""Whether a picture shows what was asked: a small judge that names the object and its colour.

Two heads that are trained on a corpus: names are read from Inception's features, colours from a histogram.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ldm import config
from ldm.checkpoints import files
from ldm.errors import UserError, nearest
from ldm.evaluation.inception import Inception
from ldm.evaluation.store import Pixels

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey", "teal")
_COLOUR = rf"({'|'.join(COLOURS)}|gray) "
_BEFORE = re.compile(r"(an? |the )?((photo|3d render|3d emoji|flat emoji|clipart|pixel art) of )?(an? |the )?")
_BINS = 6


@dataclass(frozen=True)
class JudgeSpec:
    """names: what it tells apart, each with a pattern for what the corpus calls it.

    inception: sha256 of the weights whose features it reads; detail: pixels a side that are left of a picture; side: of
    what Inception then looks at. pairs: the colours each name has in the corpus; accuracy: of the judge itself on
    held-back pictures.
    """

    names: dict[str, str]
    inception: str = ""
    side: int = 107
    detail: int = 48
    pairs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=dict)

    def name(self, text: str) -> str:
        """Which of its names a text means, "" for none: `a 3d render of a red racing car` is a car."""
        text = _BEFORE.sub("", " ".join(text.lower().split()), count=1)
        for form in (text, re.sub(_COLOUR, "", text, count=1)):
            for name, pattern in self.names.items():
                if form == name or re.fullmatch(pattern, form):
                    return name
        return ""

    def asked(self, prompt: str) -> tuple[str, str]:
        """The name and the colour that a prompt asks for, "" for any colour. UserError for a name it does not know."""
        found = re.match(_COLOUR, _BEFORE.sub("", prompt.lower(), count=1))
        name = self.name(prompt)
        if not name:
            close = nearest(prompt.split()[-1], list(self.names))
            raise UserError(f"the judge knows no name in the prompt {prompt!r}{close}: ask for one of its names")
        return name, found[1].replace("gray", "grey") if found else ""


class Judge(nn.Module):
    """`judge(features, histogram)` -> logits of the names and of COLOURS."""

    def __init__(self, spec: JudgeSpec) -> None:
        super().__init__()
        self.spec = spec
        self.norm = nn.BatchNorm1d(2048, affine=False)
        self.names = nn.Linear(2048, len(spec.names))
        self.colours = nn.Sequential(nn.Linear(_BINS**3, 64), nn.ReLU(), nn.Linear(64, len(COLOURS)))

    def forward(
        self, features: Float[Tensor, "b 2048"], histogram: Float[Tensor, "b 216"]
    ) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b c"]]:
        return self.names(self.norm(features.clamp(min=0).sqrt())), self.colours(histogram)  # roots: counts are skew

    @torch.no_grad()
    def verdicts(self, features: Tensor, histogram: Tensor) -> list[tuple[str, str]]:
        """The name and the colour of each picture."""
        names, colours = (logits.argmax(1).tolist() for logits in self(features, histogram))
        listed = list(self.spec.names)
        return [(listed[n], COLOURS[c]) for n, c in zip(names, colours, strict=True)]

    def save(self, path: Path) -> None:
        files.save(path, self.state_dict(), {"judge": json.dumps(config.to_dict(self.spec))})

    @classmethod
    def load(cls, path: str | Path) -> "Judge":
        """UserError for a file that is not there or is no judge."""
        try:
            file = files.SafeFile(Path(path))
            judge = cls(config.from_dict(JudgeSpec, json.loads(file.metadata.get("judge", "{}"))))
            judge.load_state_dict(file.tensors())
        except (ValueError, RuntimeError) as error:
            hint = "scripts/train_judge.py makes one"
            raise UserError(f"cannot read a judge from {str(path)!r} ({hint}): {error}") from None
        return judge.eval().requires_grad_(False)


def histogram(pixels: Pixels) -> Float[Tensor, "b 216"]:
    """Shares of 6 x 6 x 6 colours in what is not white ground, as roots, so that small shares count."""
    place = torch.tensor([_BINS**2, _BINS, 1], device=pixels.device).view(3, 1, 1)
    bins = (pixels.long() * _BINS // 256 * place).sum(1)
    seen = (pixels.amin(1) < 245).float().flatten(1)
    counts = torch.zeros(len(pixels), _BINS**3, device=pixels.device).scatter_add_(1, bins.flatten(1), seen)
    return (counts / counts.sum(1, keepdim=True).clamp(min=1)).sqrt()


@torch.no_grad()
def looks(pixels: Pixels, inception: Inception, spec: JudgeSpec) -> dict[str, Tensor]:
    """What the judge sees: features without fine detail, in which a model's pictures differ from all others."""
    h, w = pixels.shape[-2:]
    coarse = F.interpolate(pixels.float(), (min(h, spec.detail), min(w, spec.detail)), mode="area")
    soft = F.interpolate(coarse, (h, w), mode="bilinear", align_corners=False).round().byte()
    with torch.autocast(pixels.device.type, torch.bfloat16):
        features = inception(soft, spec.side).pool
    return {"features": features.float(), "histogram": histogram(pixels)}
