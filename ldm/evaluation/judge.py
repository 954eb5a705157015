"""Whether a picture shows what was asked: a small judge that names the object and its colour, and how it is made.

Two heads that are trained on a corpus: names are read from Inception's features, colours from a histogram.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ldm import config
from ldm.checkpoints import files
from ldm.errors import UserError, nearest
from ldm.evaluation.inception import Inception
from ldm.evaluation.store import Found, Pixels, Store, key
from ldm.files import sha256

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey", "teal")
_COLOUR = rf"({'|'.join(COLOURS)}|gray) "
_BEFORE = re.compile(r"(an? |the )?((photo|3d render|3d emoji|flat emoji|clipart|pixel art) of )?(an? |the )?")
_WORDS = re.compile(rf"\b({'|'.join(COLOURS)})\b")
_BINS = 6


@dataclass(frozen=True)
class JudgeSpec:
    """names: what it tells apart, each with a pattern for what the corpus calls it.

    inception: sha256 of the weights whose features it reads; detail: pixels a side that are left of a picture; side: of
    what Inception then sees. pairs: the colours of each name in the corpus; accuracy: its own, on held-back pictures.
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


@dataclass(frozen=True)
class JudgeRun:
    """names: patterns for what the corpus calls each; most: pictures of a name; side: at which Inception looks."""

    data: str
    validation: str
    names: dict[str, str]
    inception: str = "weights/inception.safetensors"
    most: int = 30
    side: int = 107
    size: int = 128
    seed: int = 0
    steps: int = 400


def labels(pictures: Found, spec: JudgeSpec) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"], list[set[str]]]:
    """Which name and which colour each picture shows, -1 for none; and all the colours that its captions speak of."""
    listed, found = list(spec.names), [spec.name(str(columns.get("name", ""))) for columns in pictures.columns]
    colours = [str(columns.get("colour", "")) for columns in pictures.columns]
    said = [" ".join([colour, *one["captions"]]) for colour, one in zip(colours, pictures.columns, strict=True)]
    return (
        torch.tensor([listed.index(name) if name else -1 for name in found]),
        torch.tensor([COLOURS.index(colour) if colour in COLOURS else -1 for colour in colours]),
        [set(_WORDS.findall(text.lower())) for text in said],
    )


def make_judge(run: JudgeRun, store: Store) -> Judge:
    """Train a judge and measure it on the held-back pictures. UserError for a name that no picture has."""
    inception, spec = Inception.load(run.inception), JudgeSpec(run.names, sha256(Path(run.inception)), run.side)
    corpus, held = Found(run.data, run.size), Found(run.validation, run.size)
    all_names, all_colours, spoken = labels(corpus, spec)

    def look(pictures: Found, rows: list[int], changed: bool = False) -> dict[str, Tensor]:
        def compute(part: range) -> dict[str, Tensor]:
            rng = torch.Generator().manual_seed(run.seed + part.start)
            pixels = pictures.read(rows[part.start : part.stop])
            if changed:
                pixels = blurred(pixels, rng)
                pixels[::2] = recoloured(pixels[::2], rng)
            return looks(pixels, inception, spec)

        name = key("looks", spec.detail, pictures.name, rows, changed, spec.inception, run.side, run.seed)
        return store.rows(name, len(rows), compute)

    rng, chosen, pairs = torch.Generator().manual_seed(run.seed), list[int](), dict[str, tuple[str, ...]]()
    for index, name in enumerate(spec.names):
        rows = (all_names == index).nonzero().flatten()
        if not len(rows):
            raise UserError(f"no picture of the corpus is called {name!r}: change its pattern or leave it out")
        chosen += rows[torch.randperm(len(rows), generator=rng)[: run.most]].tolist()
        pairs[name] = tuple(sorted(set().union(*(spoken[row] for row in rows.tolist()))))
    views = [look(corpus, chosen), look(corpus, chosen, changed=True)]
    features, histograms = (torch.cat([view[what] for view in views]) for what in ("features", "histogram"))
    names, colours = all_names[chosen].repeat(2), all_colours[chosen].repeat(2)
    colours[len(chosen) :: 2] = -1  # chunks are even, so these are the recoloured ones
    judge = Judge(replace(spec, pairs=pairs))
    fit(judge, features, histograms, names, colours, run)
    judge.spec = replace(judge.spec, accuracy=_accuracy(judge, held, look))
    return judge


def _accuracy(judge: Judge, held: Found, look: Callable[[Found, list[int]], dict[str, Tensor]]) -> dict[str, float]:
    """The share of pictures whose name and whose colour it says rightly, and how many have one."""
    truth = torch.stack(labels(held, judge.spec)[:2])
    rows = (truth >= 0).any(0).nonzero().flatten()
    seen = look(held, rows.tolist())
    with torch.no_grad():
        found = judge(seen["features"], seen["histogram"])
    accuracy = dict[str, float]()
    for what, logits, right in zip(("name", "colour"), found, truth[:, rows], strict=True):
        told = right >= 0
        accuracy |= {what: float((logits.argmax(1) == right)[told].double().mean()), f"{what}s": float(told.sum())}
    return accuracy


def blurred(pixels: Pixels, rng: torch.Generator) -> Pixels:
    """Pictures moved, zoomed, perhaps mirrored and softened as a model's may be; the colours stay."""
    b, _, h, w = pixels.shape
    zoom = torch.empty(b).uniform_(0.85, 1.25, generator=rng)
    flip = torch.randint(2, (b,), generator=rng) * 2 - 1
    move = torch.empty(b, 2).uniform_(-0.1, 0.1, generator=rng)
    theta = torch.zeros(b, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = zoom * flip, zoom, move
    paper = 255 - pixels.float()  # beside the picture there is white
    moved = F.grid_sample(paper, F.affine_grid(theta, [b, 3, h, w], align_corners=False), align_corners=False)
    side = int(torch.randint(h // 5, h + 1, (), generator=rng))
    soft = F.interpolate(F.interpolate(moved, side, mode="area"), (h, w), mode="bilinear", align_corners=False)
    return (255 - soft).round().clamp(0, 255).byte()


def recoloured(pixels: Pixels, rng: torch.Generator) -> Pixels:
    """Pictures whose channels change places, each in its own way: a name is not to be read from a colour."""
    orders = torch.stack([torch.randperm(3, generator=rng) for _ in range(len(pixels))])
    return pixels[torch.arange(len(pixels))[:, None], orders]


def fit(judge: Judge, features: Tensor, histograms: Tensor, names: Tensor, colours: Tensor, run: JudgeRun) -> None:
    """Fit both heads; a rare name weighs more, but not as much more as it is rare."""
    share = torch.bincount(names[names >= 0], minlength=len(judge.spec.names)).clamp(min=1)
    weight = (share.float().mean() / share).sqrt()
    rng = torch.Generator().manual_seed(run.seed)
    with torch.no_grad():
        for parameter in judge.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * parameter[0].numel() ** -0.5)
        judge.names.weight.zero_()
    colours_rate: dict[str, Any] = {"params": judge.colours.parameters(), "lr": 1e-2}
    optimiser = torch.optim.AdamW([{"params": judge.names.parameters()}, colours_rate], lr=2e-3, weight_decay=0.1)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, run.steps)
    judge.train()
    for _ in range(run.steps):
        rows = torch.randint(len(names), (256,), generator=rng)
        named, coloured = judge(features[rows], histograms[rows])
        loss = F.cross_entropy(named, names[rows], weight, label_smoothing=0.05)
        told = colours[rows] >= 0
        if told.any():
            loss = loss + F.cross_entropy(coloured[told], colours[rows][told])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rate.step()
    judge.eval()
