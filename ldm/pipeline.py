"""From a prompt to a picture: load a model once, then complete, sample and decode requests.

pipeline = load("embedded")
image = pipeline.txt2img(Request("a red apple", seed=1))  # (1, 3, h, w), -1 is black and 1 white
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ldm.canvas import Canvas
from ldm.checkpoints import lora, native
from ldm.checkpoints.files import SafeFile
from ldm.diffusion.editing import consistent, invert, windows
from ldm.diffusion.guidance import Conditional, Denoise, interval
from ldm.diffusion.noise import SeededNoise
from ldm.diffusion.samplers import Step, find_sampler
from ldm.errors import UserError, nearest, unknown
from ldm.families.load import load as load_model
from ldm.families.source import INDEX
from ldm.files import digest, digest_beside
from ldm.jobs import ALONE, Batch, settings
from ldm.limits import Limits
from ldm.models.processor import native_bf16
from ldm.models.speed import prepare
from ldm.recipe import Made, Recipe, Request, versions
from ldm.restore import Damage
from ldm.restore import parse as parse_damage
from ldm.shapes import Image, Latent, Sigma, Sigmas
from ldm.start import begin, decode
from ldm.steering import Control, controlled, read_controls, read_picture_prompt
from ldm.text import inversion
from ldm.text.prompt import WILDCARD
from ldm.text.reader import Reader

ASSETS = Path(__file__).parent / "assets"
EMBEDDED = "embedded"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    """Resolve `auto`: CUDA where there is one; bf16 where a device computes in it. UserError for what is not here."""
    try:
        chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        torch.empty(1, device=chosen).add(1)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"device {device!r} cannot be used here: try auto or cpu") from None
    if precision == "auto":
        precision = "bf16" if native_bf16(chosen) else "fp32"
    if precision not in PRECISIONS:
        raise unknown("precision", precision, ["auto", *PRECISIONS])
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
    first, own, layout = "cpu" if offload else where, Path(vae) if vae else None, torch.channels_last
    loaded = load_model(path, first, PRECISIONS[precision], own, layout=layout)
    made = Made(path.stem, "", str(where), precision, versions(), torch.get_num_threads(), vae=Path(vae).stem)
    painter = Pipeline(loaded, made, digest_beside(path))
    painter.prepare()
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
        self.refiner: Pipeline | None = None
        self.offload = False
        multiple = model.autoencoder.factor * model.backbone.config.factor
        self.limits = Limits(model.spec, self.denoiser.schedule, self.reader, multiple)

    @property
    def made(self) -> Made:
        """By what its pictures are made. The first to ask may wait until the digest of the model's file is known."""
        if self._digested is not None:
            self._made, self._digested = replace(self._made, model_hash=self._digested()), None
        refined = {} if self.refiner is None else {f"refiner {self.refiner.made.model}": self.refiner.made.model_hash}
        return replace(self._made, inputs=self._made.inputs | refined)

    def prepare(self, attention: str = "auto", compiled: bool = False) -> None:
        """Lay its networks out for speed: see `ldm.models.speed`. UserError for what cannot be here."""
        for name, network in self._networks.items():
            prepare(network, attention, compiled and not name.endswith("text"))

    def complete(self, request: Request) -> Request:
        """Fill in the model's defaults. UserError, with the value and a remedy, for what the model cannot paint."""
        return self.limits.complete(request)

    def requests(
        self, base: Request, prompts: Sequence[str], n: int = 1, canvas: Canvas | None = None
    ) -> list[Request]:
        """Complete requests for n pictures of each prompt, in order; picture i of the run has seed base.seed + i."""
        wanted = []
        for i, prompt in enumerate(prompt for prompt in prompts for _ in range(n)):
            other = base.variation_seed + (i if base.variation else 0)
            wanted.append(replace(base, prompt=prompt, seed=base.seed + i, variation_seed=other))
        return [self.ready(request, canvas) for request in wanted]

    def ready(self, request: Request, canvas: Canvas | None = None) -> Request:
        """`complete`, with wildcards filled in, and for the picture to start from. UserError where that is missing."""
        if canvas is not None:
            request = canvas.request(request)
        elif request.strength is not None or request.invert or request.restore:
            what = "strength" if request.strength is not None else "invert" if request.invert else "restore"
            raise UserError(f"{what} is of a picture to start from: give that as --init-image")
        return self.complete(replace(request, prompt=self.reader.fill(request.prompt, request.seed)))

    def steps(self, request: Request) -> int:
        """How many steps a request's run has."""
        r = self.complete(request)
        passes = [r, self.limits.larger(r)] if r.upscale > 1 else [r]
        return sum(len(self.limits.levels(each)) - 1 for each in passes)

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
        noise, step = SeededNoise([o.seed for o in requests]), None
        for step in self._pass(requests, noise, canvas):
            yield step
        if r.upscale > 1:
            assert step is not None
            larger = [self.limits.larger(o) for o in requests]
            size = (larger[0].height or 0, larger[0].width or 0)
            grown = F.interpolate(self.decode(step.x).cpu(), size, mode="bicubic", antialias=True).clamp(-1, 1)
            yield from self._pass(larger, noise, Canvas(grown))

    def _pass(self, requests: Sequence[Request], noise: SeededNoise, canvas: Canvas | None) -> Iterator[Step]:
        r = requests[0]
        assert r.sampler and r.height and r.width
        sigmas = self.limits.levels(r)
        if canvas is not None and canvas.image.shape[2:] != (r.height, r.width):
            raise UserError(f"size {r.width}x{r.height} is not that of the picture to start from: leave it out")
        self.place("autoencoder")
        start = begin(self.model, requests, noise, float(sigmas[0]), multiple=self.limits.multiple, canvas=canvas)
        denoiser = controlled(self.denoiser, self.controls, sigmas, (r.height, r.width))
        if r.tile and self.controls:
            raise UserError("--tile does not go with a control: its hint is of the whole picture")
        x, denoise = start.x, self._guided(self, denoiser, requests, sigmas, start.concat)
        if r.invert:
            before = [o.unguided() for o in requests]
            x = invert(self._guided(self, denoiser, before, sigmas, start.concat), x, sigmas)
        if self.refiner is not None:
            last = self._guided(self.refiner, self.refiner.denoiser, requests, sigmas)
            denoise = interval(last, denoise, 0.0, self.limits.handover(r))
        denoise = start.hold(denoise)
        if r.restore and canvas is not None:
            denoise = self._restored(denoise, parse_damage(r.restore), canvas)
        yield from find_sampler(r.sampler)(denoise, x, sigmas, noise)

    def _guided(
        self,
        by: "Pipeline",
        denoiser: Conditional,
        requests: Sequence[Request],
        sigmas: Sigmas,
        concat: Latent | None = None,
    ) -> Denoise:
        """A denoiser bound to requests by the text side of its own model: this one's, or the refiner's."""
        of, tile = "" if by is self else "refiner ", requests[0].tile
        denoiser = windows(denoiser, tile // self.model.autoencoder.factor) if tile else denoiser
        self.place(f"{of}text")
        guided = by.reader.guide(denoiser, requests, sigmas, concat)

        def denoise(x: Latent, sigma: Sigma) -> Latent:
            self.place(f"{of}backbone")  # at each step again, as a preview may have moved it away
            return guided(x, sigma)

        return denoise

    def _restored(self, denoise: Denoise, damage: Damage, canvas: Canvas) -> Denoise:
        """The denoiser, held to what was measured of the picture."""
        height, width = canvas.image.shape[2:]
        weight = next(self.model.autoencoder.parameters())
        measured = damage.measured(canvas.image).to(self._made.device)

        def measure(z: Latent) -> Image:
            self.place("autoencoder")
            return damage.apply(self.model.autoencoder.decode(z.to(weight.dtype)).float()[:, :, :height, :width])

        return consistent(denoise, measure, measured)

    @property
    def _networks(self) -> dict[str, nn.Module]:
        second = {} if self.refiner is None else self.refiner.model.modules
        return self.model.modules | {f"refiner {name}": n for name, n in second.items() if name != "autoencoder"}

    def place(self, name: str) -> None:
        """Where memory is short, move a network to the device and the others off it: see `load`."""
        if self.offload:
            for other, network in sorted(self._networks.items(), key=lambda item: item[0] == name):
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
        image = decode(autoencoder, latent.to(PRECISIONS[self._made.precision])).float()
        if not image.isfinite().all():  # half precision overflows in some decoders
            image = decode(copy.deepcopy(autoencoder).float(), latent.float())
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
            file = SafeFile(path)
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
            prepare(c.network)
            self._put_in("control", c.path, f":{c.weight:g}:{c.start:g}-{c.end:g}:{c.hint}")

    def refine(self, refiner: "Pipeline") -> None:
        """Let another model take over where little noise is left (Balaji et al. 2022; SDXL, Podell et al. 2023).

        UserError where its latents are not this one's. It decodes nothing: its own autoencoder is let go.
        """
        self.limits = self.limits.joined(refiner.limits)
        self.refiner, refiner.model.autoencoder = refiner, self.model.autoencoder

    def show(self, spec: str, picture: Path, tower: Path) -> None:
        """Let every picture from now on resemble this one, by an IP-Adapter, given as FILE or FILE:WEIGHT."""
        path, weight = lora.parse(spec)
        self.reader.show = read_picture_prompt(self.model, path, weight, picture, tower)
        self._put_in("ip-adapter", path, f":{weight:g}")
        self._put_in("ip-image", picture)

    def _put_in(self, kind: str, path: Path, how: str = "") -> None:
        self._made = replace(self._made, inputs=self._made.inputs | {f"{kind} {path.stem}{how}": digest(path)})

    def notes(self, requests: Sequence[Request]) -> list[str]:
        """What a person wants to know before it starts: one line for the run, one for each prompt that is too long."""
        r, made, n = requests[0], self._made, len(requests)
        what = "1 picture, seed" if n == 1 else f"{n} pictures, seeds {r.seed} to"
        how = f"{r.width}x{r.height}, {r.sampler}, {r.schedule}, {r.steps} steps, cfg {r.cfg_scale:g}"
        by = f"{made.model} on {made.device} in {made.precision}"
        by += f", from {r.refiner_start:g} on {self.refiner._made.model}" if self.refiner is not None else ""
        lines = [f"{what} {requests[-1].seed}: {how}; model {by}"]
        if wild := [name[0] for r in requests if not r.plain_prompt and (name := WILDCARD.search(r.prompt))]:
            lines.append(f"{wild[0]} is painted as it stands: give the folder of its lines as --wildcards")
        return lines + self.reader.notes(requests)
