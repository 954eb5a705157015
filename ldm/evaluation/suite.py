"""The evaluation of a model or of ready pictures: which pictures each metric needs, made once and kept."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ldm.checkpoints.native import Model
from ldm.errors import UserError, nearest, unknown
from ldm.evaluation import statistics
from ldm.evaluation.clip import load_clip
from ldm.evaluation.inception import Inception
from ldm.evaluation.judge import Judge, looks
from ldm.evaluation.reconstruction import compare
from ldm.evaluation.statistics import Estimates, mean
from ldm.evaluation.store import Found, Kept, Pictures, Pixels, Store, key, paint
from ldm.families.load import load as load_model
from ldm.files import digest, read_text, sha256
from ldm.images import to_pixels
from ldm.models.perceptual import LPIPS
from ldm.pipeline import Pipeline, choose, find
from ldm.pipeline import load as load_painter
from ldm.request import Request
from ldm.request import kinds as request_kinds

Look = Callable[[Pixels, range], dict[str, Tensor]]  # what it sees in pictures, and their numbers


@dataclass(frozen=True)
class Plan:
    """What is measured, of what; `scripts/evaluate.py --help` tells of each field. 0: as many or as large as there is.

    model: a name or path, or "" with images, a folder of ready pictures. data: the real pictures; train: those it was
    trained on. prompts: a YAML of groups of prompts. rounds: of the bootstrap. The last are files of weights.
    """

    metrics: tuple[str, ...]
    model: str = ""
    images: str = ""
    data: str = ""
    train: str = ""
    train_n: int = 1000
    prompts: str = "configs/evaluate/prompts.yaml"
    per_prompt: int = 4
    n: int = 0
    seed: int = 0
    size: int = 0
    rounds: int = 200
    device: str = "auto"
    precision: str = "auto"
    inception: str = "weights/inception.safetensors"
    lpips: str = "weights/lpips_alex.safetensors"
    judge: str = "weights/judge.safetensors"
    clip: str = ""
    clip_model: str = "ViT-B-32"

    def __post_init__(self) -> None:
        for name in self.metrics:
            if name not in METRICS:
                raise unknown("metric", name, METRICS)
        if bool(self.model) == bool(self.images):
            raise UserError("give either a model that paints or --images, a folder of ready pictures")
        for name in self.metrics:
            if self.images and METRICS[name].autoencoder:
                raise UserError(f"{name} measures an autoencoder: give --model in place of --images")
            if missing := [needed for needed in METRICS[name].needs if not getattr(self, needed)]:
                raise UserError(f"the metric {name} needs --{missing[0]}")


class Suite:
    """A plan, and what is the same for all settings: networks and real pictures, loaded when first needed."""

    def __init__(self, plan: Plan, store: Store) -> None:
        self.plan, self.store = plan, store
        self.rounds = plan.rounds if store.rank == 0 else 0  # the others help to paint, and need no intervals
        self.notes: list[str] = []
        for weights in [weights for metric in plan.metrics for weights in METRICS[metric].weights]:
            getattr(self, weights)  # now: a file that is missing shall not be missed after an hour of painting

    @cached_property
    def painter(self) -> Pipeline:
        return load_painter(self.plan.model, self.plan.device, self.plan.precision)

    @cached_property
    def model(self) -> Model:
        """The painter's, or what may be an autoencoder alone where nothing is painted."""
        paints = any(not METRICS[name].autoencoder for name in self.plan.metrics)
        return self.painter.model if paints else load_model(find(self.plan.model), self.device)

    @cached_property
    def device(self) -> torch.device:
        return choose(self.plan.device)[0]

    @cached_property
    def inception(self) -> Inception:
        return Inception.load(self.plan.inception).to(self.device)

    @cached_property
    def lpips(self) -> LPIPS:
        return LPIPS.load(self.plan.lpips).to(self.device)

    @cached_property
    def judge(self) -> Judge:
        judge = Judge.load(self.plan.judge)
        if judge.spec.inception != sha256(Path(self.plan.inception)):
            raise UserError(f"the judge {self.plan.judge!r} was trained on other features than {self.plan.inception!r}")
        return judge

    @cached_property
    def size(self) -> int:
        return self.plan.size if self.plan.size or self.plan.images else self.model.spec.image_size

    @cached_property
    def real(self) -> Found:
        return Found(self.plan.data, self.size or self.ready.size)

    @cached_property
    def ready(self) -> Found:
        return Found(self.plan.images, self.plan.size, self.plan.n or None)

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        path = self.plan.prompts
        try:
            groups = yaml.safe_load(read_text(path, "prompts from "))
        except yaml.YAMLError as error:
            raise UserError(f"cannot read prompts from {path!r}: {error}") from None
        if not isinstance(groups, dict) or not all(isinstance(g, list) and g for g in groups.values()):
            raise UserError(f"{path!r} must hold groups of prompts, such as `seen: [a red apple]`")
        return {str(name): [str(prompt) for prompt in group] for name, group in groups.items()}

    def seen(self, pictures: Pictures, look: Look, *by: Any) -> dict[str, Tensor]:
        """What `look` sees in the pictures of each chunk, kept under a name of the pictures and of what it looks by."""

        @torch.no_grad()
        def compute(part: range) -> dict[str, Tensor]:
            return look(pictures.read(part).to(self.device), part)

        return self.store.rows(key(pictures.name, *by), len(pictures.texts), compute)

    def features(self, pictures: Pictures) -> dict[str, Tensor]:
        """Inception's `pool` and, where its weights have a classifier, `logits`."""

        def look(pixels: Pixels, _: range) -> dict[str, Tensor]:
            return {name: value for name, value in self.inception(pixels)._asdict().items() if value is not None}

        return self.seen(pictures, look, "inception", sha256(Path(self.plan.inception)))

    @cached_property
    def reconstructed(self) -> tuple[Pictures, dict[str, Tensor]]:
        """The real pictures after the autoencoder, and what each lost."""
        real, lpips = self.real, self.lpips if "lpips" in self.plan.metrics else None

        def compute(part: range) -> dict[str, Tensor]:
            again, lost = compare(self.model.autoencoder, real.read(part).to(self.device) / 127.5 - 1, lpips)
            return lost | {"pixels": to_pixels(again).permute(0, 3, 1, 2)}

        weights = sha256(Path(self.plan.lpips)) if lpips else ""
        name = key("reconstructed", digest(find(self.plan.model)), self.plan.precision, real.name, weights)
        lost = self.store.rows(name, len(real.texts), compute)
        return Kept(name, real.texts, self.store.make(name, len(real.texts), compute), self.store.chunk), lost

    def measure(self, settings: Mapping[str, Any]) -> "Measured":
        """All metrics of the plan, of pictures painted with these fields of a Request."""
        measured = Measured(self, settings)
        for metric in self.plan.metrics:
            measured.metrics |= METRICS[metric].measure(measured)
        return measured


class Measured:
    """One setting: its pictures and figures."""

    def __init__(self, suite: Suite, settings: Mapping[str, Any]) -> None:
        self.suite, self.settings, self.metrics = suite, settings, Estimates()

    def _paint(self, prompts: Sequence[str]) -> Pictures:
        base = replace(Request("", seed=self.suite.plan.seed), **self.settings)
        return paint(self.suite.painter, self.suite.painter.requests(base, prompts), self.suite.store)

    @cached_property
    def captioned(self) -> Pictures:
        """What is compared with the data: painted from its captions, or ready."""
        plan, suite = self.suite.plan, self.suite
        return suite.ready if plan.images else self._paint(suite.real.captions(plan.n or len(suite.real.texts)))

    @cached_property
    def prompted(self) -> Pictures:
        """Several pictures of each prompt, or the ready ones."""
        if self.suite.plan.images:
            return self.suite.ready
        prompts = [prompt for group in self.suite.groups.values() for prompt in group]
        return self._paint([prompt for prompt in prompts for _ in range(self.suite.plan.per_prompt)])

    @cached_property
    def features(self) -> tuple[Tensor, Tensor]:
        """Inception's, of the pictures and of the data."""
        return self.suite.features(self.captioned)["pool"], self.suite.features(self.suite.real)["pool"]

    @cached_property
    def verdicts(self) -> list[tuple[str, str]]:
        """What the judge says that each prompted picture shows."""
        judge, suite = self.suite.judge, self.suite
        by = ("judged", judge.spec.inception, judge.spec.side, judge.spec.detail)
        seen = suite.seen(self.prompted, lambda pixels, _: looks(pixels, suite.inception, judge.spec), *by)
        return judge.verdicts(seen["features"], seen["histogram"])

    @cached_property
    def right(self) -> list[tuple[bool, bool]]:
        """Whether the name and the colour of each prompted picture are those asked for; any colour where none was."""
        asked = [self.suite.judge.spec.asked(text) for text in self.prompted.texts]
        return [(n == name, c in (colour, "")) for (name, colour), (n, c) in zip(self.verdicts, asked, strict=True)]

    @cached_property
    def neighbours(self) -> tuple[Found, Tensor, Tensor, Tensor]:
        """Training pictures; distances and indices (n, 4) of the nearest to each picture; held-back ones' distances."""
        train = Found(self.suite.plan.train, self.suite.size, self.suite.plan.train_n)
        known, (made, real) = self.suite.features(train)["pool"], self.features
        return train, *statistics.nearest(made, known, 4), statistics.nearest(real, known)[0][:, 0]


def _inception_score(m: Measured) -> Estimates:
    logits = m.suite.features(m.captioned).get("logits")
    if logits is None:
        m.suite.notes.append("no Inception score: its weights hold no classifier (`fc.weight`)")
        return {}
    return {"inception_score": statistics.inception_scores(logits, m.suite.rounds)}


def _manifold(m: Measured, *wanted: str) -> Estimates:
    try:
        found = statistics.manifold(*m.features)
    except ValueError as error:
        raise UserError(f"precision, recall, density and coverage: {error}; paint more (--n)") from None
    return {name: mean(found[name]) for name in wanted}


def _clip(m: Measured) -> Estimates:
    plan, pictures = m.suite.plan, m.captioned
    if not all(pictures.texts):
        raise UserError("CLIP score needs a text for each picture: a .txt beside it, or pictures that ldm painted")
    score = load_clip(Path(plan.clip), plan.clip_model)

    def look(pixels: Pixels, part: range) -> dict[str, Tensor]:
        return {"score": score(pixels.cpu(), [pictures.texts[i] for i in part])}

    by = ("clip", pictures.texts, sha256(Path(plan.clip)), plan.clip_model)
    return {"clip": mean(m.suite.seen(pictures, look, *by)["score"])}


def _diversity(m: Measured) -> Estimates:
    """Mean LPIPS between the pictures of one prompt, over prompts."""
    pictures, lpips = m.prompted, m.suite.lpips
    rows = dict[str, list[int]]()
    for i, text in enumerate(pictures.texts):
        rows.setdefault(text, []).append(i)
    several = [same for same in rows.values() if len(same) > 1]
    if not several:
        raise UserError("diversity needs two pictures or more of a prompt: see --per-prompt")

    @torch.no_grad()
    def compute(part: range) -> dict[str, Tensor]:
        found = []
        for same in several[part.start : part.stop]:
            images = pictures.read(same).float().to(m.suite.device) / 127.5 - 1
            left, right = torch.combinations(torch.arange(len(same))).T
            found.append(lpips(images[left], images[right]).mean())
        return {"lpips": torch.stack(found)}

    name = key("diversity", pictures.name, several, sha256(Path(m.suite.plan.lpips)))
    return {"diversity": mean(m.suite.store.rows(name, len(several), compute)["lpips"])}


def _judge(m: Measured) -> Estimates:
    """How often the judge names what was asked, by group of prompts."""
    right, spec, groups = torch.tensor(m.right).double(), m.suite.judge.spec, m.suite.groups
    group_of = {prompt: name for name, group in groups.items() for prompt in group}
    of = [group_of.get(text, "other") for text in m.prompted.texts]
    found = Estimates()
    for group in dict.fromkeys(of):
        mine = right[[i for i, name in enumerate(of) if name == group]]
        for what, values in {"accuracy": mine.prod(1), "name": mine[:, 0], "colour": mine[:, 1]}.items():
            found[f"{what}_{group}"] = mean(values)
    asked = {prompt: spec.asked(prompt) for prompt in groups.get("new", [])}
    met = [prompt for prompt, (name, colour) in asked.items() if colour in ("", *spec.pairs.get(name, ()))]
    if met and not m.suite.plan.images:
        m.suite.notes.append(f"not new, for the corpus shows them: {', '.join(met)}")
    return found


def _neighbours(m: Measured) -> Estimates:
    """How near the nearest training picture is, also to held-back pictures, which cannot be copies.

    copied: the share that is nearer than 99 % of the held-back pictures are.
    """
    _, distances, _, held = m.neighbours
    near, copied = distances[:, 0], (distances[:, 0] < torch.quantile(held, 0.01)).double()
    return {"nearest_train": mean(near), "nearest_train_of_held_back": mean(held), "copied": mean(copied)}


def _rfid(m: Measured) -> Estimates:
    again, real = (m.suite.features(pictures)["pool"] for pictures in (m.suite.reconstructed[0], m.suite.real))
    return {"rfid": statistics.fid(again, real, m.suite.rounds)}


def _lost(what: str, *weights: str) -> "Metric":
    return Metric(lambda m: {what: mean(m.suite.reconstructed[1][what])}, weights, _DATA, autoencoder=True)


@dataclass(frozen=True)
class Metric:
    """measure: its figures. weights, needs: the networks and the fields of a Plan that it cannot do without.

    autoencoder: whether that is what it measures; then nothing is painted.
    """

    measure: Callable[[Measured], Estimates]
    weights: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    autoencoder: bool = False


_INCEPTION, _DATA = ("inception",), ("data",)
METRICS = {
    "fid": Metric(lambda m: {"fid": statistics.fid(*m.features, m.suite.rounds)}, _INCEPTION, _DATA),
    "kid": Metric(lambda m: {"kid": statistics.kid(*m.features, m.suite.rounds)}, _INCEPTION, _DATA),
    "is": Metric(_inception_score, _INCEPTION),
    "pr": Metric(lambda m: _manifold(m, "precision", "recall"), _INCEPTION, _DATA),
    "dc": Metric(lambda m: _manifold(m, "density", "coverage"), _INCEPTION, _DATA),
    "clip": Metric(_clip, needs=("clip",)),
    "diversity": Metric(_diversity, ("lpips",)),
    "judge": Metric(_judge, ("inception", "judge")),
    "neighbours": Metric(_neighbours, _INCEPTION, ("train", "data")),
    "rfid": Metric(_rfid, _INCEPTION, _DATA, autoencoder=True),
    "psnr": _lost("psnr"),
    "ssim": _lost("ssim"),
    "lpips": _lost("lpips", "lpips"),
}


WAYS = ("steps", "cfg_scale", "width", "height", "clip_skip", "sampler", "schedule", "guidance", "negative")


def settings(texts: Sequence[str]) -> dict[str, list[Any]]:
    """`steps=4,8` as {"steps": [4, 8]}: fields of a Request that say how to paint. UserError for other ones."""
    kinds = {name: kind for name, kind in request_kinds(Request).items() if name in WAYS}
    found: dict[str, list[Any]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        if name not in kinds:
            hint = nearest(name, list(kinds))
            raise UserError(f"no way of painting is called {name!r}{hint}: use {', '.join(kinds)}")
        try:
            found[name] = [kinds[name](value) for value in values.split(",")]
        except ValueError:
            raise UserError(f"{text!r} cannot be read: write it as steps=4,8,16") from None
    return found
