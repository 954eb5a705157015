"""From a prompt to a picture: load a model once, then complete, sample and decode requests.

pipeline = load("embedded")
image = pipeline.txt2img(Request("a red apple", seed=1))  # (1, 3, h, w) in [-1, 1]
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import torch

from ldm.canvas import Canvas
from ldm.checkpoints import lora, native
from ldm.checkpoints.files import open_safetensors
from ldm.diffusion.noise import SeededNoise
from ldm.diffusion.samplers import Step, find_sampler
from ldm.errors import UserError, nearest
from ldm.families.load import load as load_model
from ldm.families.source import INDEX
from ldm.files import digest, digest_beside
from ldm.recipe import Made, Recipe, Request, versions
from ldm.shapes import Image, Latent, Sigmas
from ldm.start import begin
from ldm.steering import Control, controlled, parse, read_controls, read_picture_prompt
from ldm.text import inversion
from ldm.text.reader import Reader

ASSETS = Path(__file__).parent / "assets"
EMBEDDED = "embedded"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ALONE = {"dpm_adaptive"}  # it steps as the hardest picture of its batch asks, so company would change a picture
MAX_SIDE, MAX_STEPS, MAX_SEED = 8192, 1000, 2**63 - 1


class Batch(NamedTuple):
    """Pictures made at once, and the rows of them that are wanted."""

    requests: list[Request]
    rows: slice


def settings(request: Request) -> Request:
    """What requests of one batch must share: all but prompt, negative and seeds."""
    return replace(request, prompt="", negative="", seed=0, variation_seed=0)


def batches(requests: Sequence[Request], size: int, made: Made | None = None) -> list[Batch]:
    """Split the requests of a run into batches. A single one takes the place in a batch that `made` tells of.

    There it is among as many others as when it was first made, and so the same to the last bit.
    """
    size = 1 if requests[0].sampler in ALONE else size
    if made and len(requests) == 1:
        return [Batch([*requests] * made.batch, slice(made.row, made.row + 1))]
    parts = [list(requests[i : i + size]) for i in range(0, len(requests), size)]
    return [Batch(part, slice(len(part))) for part in parts]


def find(model: str) -> Path:
    """The file of a model: one in the package by its name, else a path. UserError where there is none."""
    packaged = {path.stem: path for path in ASSETS.glob("*.safetensors")}
    path = packaged.get(model, Path(model))
    if not (path.is_file() or (path / INDEX).is_file()):
        known = ", ".join(packaged) or "none in this copy"
        raise UserError(
            f"no model {model!r}{nearest(model, list(packaged))}: give a file or folder, or a packaged one ({known})"
        )
    return path


def choose(device: str = "auto", precision: str = "auto") -> tuple[torch.device, str]:
    """Resolve `auto`: CUDA where there is one; bf16 on CUDA, fp32 elsewhere. UserError for what is not here."""
    try:
        chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        torch.empty(1, device=chosen).add(1)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"device {device!r} cannot be used here: try auto or cpu") from None
    if precision == "auto":
        precision = "bf16" if chosen.type == "cuda" else "fp32"
    if precision not in PRECISIONS:
        known = ", ".join(["auto", *PRECISIONS])
        raise UserError(f"unknown precision {precision!r}{nearest(precision, list(PRECISIONS))}: choose one of {known}")
    return chosen, precision


def load(
    model: str = EMBEDDED, device: str = "auto", precision: str = "auto", vae: str = "", *, offload: bool = False
) -> "Pipeline":
    """Load a model by its name in the package or its path: a file of ours, of CompVis's layout, or a diffusers folder.

    vae: the path of an autoencoder to use in place of its own. offload: only the network that works is on the device.
    UserError for a file that is no model, or one that holds an autoencoder alone.
    """
    path = find(model)
    where, precision = choose(device, precision)
    loaded = load_model(path, "cpu" if offload else where, PRECISIONS[precision], Path(vae) if vae else None)
    made = Made(path.stem, "", str(where), precision, versions(), torch.get_num_threads(), vae=Path(vae).stem)
    painter = Pipeline(loaded, made, digest_beside(path))
    painter.offload = offload
    return painter


class Pipeline:
    """A model that paints. One Request is one picture, its seed its own: company in a batch does not change it."""

    def __init__(self, model: native.Model, made: Made, digested: Callable[[], str] | None = None) -> None:
        """digested: gives the digest of the model's file, which `made` is still without, and may take its time."""
        self.model = model
        self._made, self._digested = made, digested
        self.denoiser = model.denoiser()
        assert model.backbone is not None and model.conditioner is not None  # a denoiser has both
        self.conditioner = model.conditioner
        self.reader = Reader(model.conditioner)
        self.controls: list[Control] = []
        self.offload = False
        self.multiple = model.autoencoder.factor * model.backbone.config.factor

    @property
    def made(self) -> Made:
        """By what its pictures are made. The first to ask may wait until the digest of the model's file is known."""
        if self._digested is not None:
            self._made, self._digested = replace(self._made, model_hash=self._digested()), None
        return self._made

    def complete(self, request: Request) -> Request:
        """Fill in the model's defaults. UserError, with the value and a remedy, for what the model cannot paint."""
        spec = self.model.spec
        size = {"width": spec.image_size, "height": spec.image_size}
        defaults = size | {f.name: getattr(spec.defaults, f.name) for f in fields(spec.defaults)}
        r = replace(request, **{name: value for name, value in defaults.items() if getattr(request, name) is None})
        assert r.steps is not None and r.cfg_scale is not None and r.width is not None and r.height is not None
        if not r.prompt.strip():
            raise UserError("the prompt is empty: say what to paint")
        self.reader.parsed(r)
        find_sampler(str(r.sampler))
        _between("steps", r.steps, 1, MAX_STEPS)
        self.denoiser.schedule.steps(r.steps, str(r.schedule))
        _between("seed", r.seed, 0, MAX_SEED)
        _between("variation seed", r.variation_seed, 0, MAX_SEED)
        if not 0 <= r.variation <= 1:
            raise UserError(f"variation is {r.variation:g}: choose between 0, this seed's noise, and 1, the other's")
        if not math.isfinite(r.cfg_scale):
            raise UserError(f"cfg scale is {r.cfg_scale}: give a number such as {spec.defaults.cfg_scale:g}")
        if r.clip_skip is not None:
            text = self.conditioner.config
            _between("clip skip", r.clip_skip, 1, min(t.layers for t in (text, text.second or text)))
        if r.strength is not None:
            self._levels(r)
        for name, side in (("width", r.width), ("height", r.height)):
            _between(name, side, self.multiple if r.strength is None else 1, MAX_SIDE)
            if r.strength is None and side % self.multiple:
                low = side // self.multiple * self.multiple
                raise UserError(
                    f"{name} {side} is not a multiple of {self.multiple}, which this model needs: "
                    f"try {low} or {low + self.multiple}"
                )
        return r

    def requests(
        self, base: Request, prompts: Sequence[str], n: int = 1, canvas: Canvas | None = None
    ) -> list[Request]:
        """Complete requests for n pictures of each prompt, in order; picture i of the run has seed base.seed + i."""
        if canvas is not None:
            base = canvas.request(base)
        elif base.strength is not None:
            raise UserError(f"strength {base.strength:g} is of a picture to start from: give that as --init-image")
        wanted = [prompt for prompt in prompts for _ in range(n)]
        made = []
        for i, prompt in enumerate(wanted):
            seed, other = base.seed + i, base.variation_seed + (i if base.variation else 0)
            filled = self.reader.fill(prompt, seed)
            made.append(self.complete(replace(base, prompt=filled, seed=seed, variation_seed=other)))
        return made

    def _levels(self, r: Request) -> Sigmas:
        """The noise levels of a run: all, or the last ones where it starts from a picture. UserError where none are."""
        assert r.steps and r.schedule
        sigmas = self.denoiser.schedule.steps(r.steps, r.schedule)
        if r.strength is None:
            return sigmas
        if not 0 < r.strength <= 1:
            raise UserError(f"strength is {r.strength:g}: choose above 0, little changes, to 1, all does")
        count = int(r.steps * r.strength)
        if count == 0:
            raise UserError(f"strength {r.strength:g} of {r.steps} steps leaves none to do: give more steps")
        return sigmas[r.steps - count :]

    def steps(self, request: Request) -> int:
        """How many steps a request's run has."""
        return len(self._levels(self.complete(request))) - 1

    @torch.no_grad()
    def sample(self, requests: Sequence[Request], canvas: Canvas | None = None) -> Iterator[Step]:
        """The steps of one batch; `decode(step.x0)` is a preview, `finish(step.x, canvas)` of the last the pictures.

        The requests may differ in prompt, negative and seed alone (ValueError). canvas: what they start from.
        """
        requests = [self.complete(request) for request in requests]
        r = requests[0]
        if any(settings(o) != settings(r) for o in requests):
            raise ValueError("requests of one batch differ in more than prompt, negative and seed")
        if r.sampler in ALONE and len(requests) > 1:
            raise ValueError(f"{r.sampler} makes one picture at a time: see `batches`")
        if (r.strength is None) != (canvas is None):
            raise ValueError(f"strength {r.strength} with canvas {canvas}: see `Canvas.request`")
        assert r.sampler and r.height and r.width
        sigmas, noise = self._levels(r), SeededNoise([o.seed for o in requests])
        if canvas is not None and canvas.image.shape[2:] != (r.height, r.width):
            raise UserError(f"size {r.width}x{r.height} is not that of the picture to start from: leave it out")
        self.place("autoencoder")
        start = begin(self.model, requests, noise, float(sigmas[0]), canvas)
        denoiser = controlled(self.denoiser, self.controls, sigmas, (r.height, r.width))
        self.place("text")
        denoise = start.hold(self.reader.guide(denoiser, requests, sigmas, start.concat))
        steps = find_sampler(r.sampler)(denoise, start.x, sigmas, noise)
        while True:
            self.place("backbone")  # again after each step, as a preview may have moved it away
            step = next(steps, None)
            if step is None:
                return
            yield step

    def place(self, name: str) -> None:
        """Where memory is short, move a network to the device and the others off it: see `load`."""
        if self.offload:
            for other, network in sorted(self.model.modules.items(), key=lambda item: item[0] == name):
                network.to(self._made.device if other == name else "cpu")

    @torch.no_grad()
    def decode(self, latents: Latent) -> Image:
        """Pictures of latents, one at a time to keep memory small; UserError where they are not finite even in fp32."""
        return torch.cat([self._decode(latent) for latent in latents.split(1)])

    def finish(self, latents: Latent, canvas: Canvas | None = None) -> Image:
        """The pictures of a run's last state: those of `decode`, and what a canvas keeps as it was."""
        pictures = self.decode(latents)
        return pictures if canvas is None else canvas.finish(pictures)

    def _decode(self, latent: Latent) -> Image:
        self.place("autoencoder")
        autoencoder = self.model.autoencoder
        image = autoencoder.decode(latent.to(PRECISIONS[self._made.precision])).float()
        if not image.isfinite().all():  # half precision overflows in some decoders
            image = copy.deepcopy(autoencoder).float().decode(latent.float())
        if not image.isfinite().all():
            raise UserError("the picture came out as NaN, in fp32 too: nothing was written; try --precision fp32")
        return image

    def paint(self, *requests: Request, canvas: Canvas | None = None) -> Image:
        """(b, 3, h, w) in [-1, 1]: a picture for each request, made as one batch; canvas: what they start from."""
        *_, last = self.sample([canvas.request(r) for r in requests] if canvas else requests, canvas)
        return self.finish(last.x, canvas)

    def txt2img(self, *requests: Request) -> Image:
        """Pictures from noise alone: see `paint`."""
        return self.paint(*requests)

    def recipes(self, batch: Batch, canvas: Canvas | None = None) -> list[Recipe]:
        """The recipe of each wanted picture of a batch."""
        size, inputs = len(batch.requests), self.made.inputs | ({"canvas": canvas.digest} if canvas else {})
        made = [replace(self.made, batch=size, row=row, inputs=inputs) for row in range(size)]
        return [Recipe(self.complete(r), m) for r, m in zip(batch.requests, made, strict=True)][batch.rows]

    def embed(self, paths: Sequence[Path]) -> None:
        """Add textual inversions, by the names of their files. UserError for what is none, or of another family."""
        for path in paths:
            with open_safetensors(path) as file:
                tensors = {name: file.tensor(name) for name in file.entries}
            self.reader.embeddings.append(inversion.from_tensors(path, tensors, self.conditioner))
            self._put_in("embedding", path)

    def adapt(self, specs: Sequence[str]) -> list[str]:
        """Inject LoRA files, each given as FILE or FILE:WEIGHT, and tell what of each fitted. UserError: see `lora`."""
        told = []
        for spec in specs:
            path, weight = lora.parse(spec)
            told.append(str(lora.inject(self.model, lora.read(path), weight)))
            self._put_in("lora", path, f":{weight:g}")
        return told

    def control(self, specs: Sequence[str], pictures: Sequence[Path], drawn: Sequence[str] = ()) -> None:
        """Let ControlNets and T2I-Adapters steer every picture from now on: see `read_controls`."""
        self.controls += (controls := read_controls(self.model, specs, pictures, drawn))
        for c in controls:
            self._put_in("control", c.path, f":{c.weight:g}:{c.start:g}-{c.end:g}:{c.hint}")

    def show(self, spec: str, picture: Path, tower: Path) -> None:
        """Let every picture from now on resemble this one, by an IP-Adapter: see `read_picture_prompt`."""
        self.reader.show = read_picture_prompt(self.model, spec, picture, tower).show
        self._put_in("ip-adapter", *parse(spec)[:1], f":{parse(spec)[1]:g}")
        self._put_in("ip-image", picture)

    def _put_in(self, kind: str, path: Path, how: str = "") -> None:
        self._made = replace(self._made, inputs=self._made.inputs | {f"{kind} {path.stem}{how}": digest(path)})

    def check(self, made: Made) -> list[str]:
        """UserError where a picture was made with another model than this; a note where another program made it."""
        if made.program:
            return [
                f"the picture is {made.program}'s, of the model {made.model or 'unknown'!r}: it will be another one"
            ]
        if made.model_hash != self.made.model_hash:
            theirs, ours = (f"{m.model!r} ({m.model_hash[:10]})" for m in (made, self.made))
            raise UserError(f"the picture was made with the model {theirs}, not {ours}: give that file as --model")
        if missing := sorted(
            set(made.inputs.items()) - set(self.made.inputs.items()) - {("canvas", made.inputs.get("canvas", ""))}
        ):
            raise UserError(f"the picture was made with the {missing[0][0]} ({missing[0][1][:10]}): give that file too")
        if made.vae != self.made.vae:
            raise UserError(
                f"the picture was decoded by the autoencoder {made.vae or 'of the model'!r}: give that as --vae"
            )
        return []

    def notes(self, requests: Sequence[Request]) -> list[str]:
        """What a person wants to know before it starts: one line for the run, one for each prompt that is too long."""
        r, made, n = requests[0], self._made, len(requests)
        what = "1 picture, seed" if n == 1 else f"{n} pictures, seeds {r.seed} to"
        how = f"{r.width}x{r.height}, {r.sampler}, {r.schedule}, {r.steps} steps, cfg {r.cfg_scale:g}"
        by = f"{made.model} on {made.device} in {made.precision}"
        lines = [f"{what} {requests[-1].seed}: {how}; model {by}"]
        return lines + self.reader.notes(requests)


def _between(what: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise UserError(f"{what} is {value}: choose between {least} and {most}")
