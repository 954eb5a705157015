"""A whole run, from what a command says to pictures in files: watched, stopped and begun again."""

import math
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from ldm import images, pipeline, recipe
from ldm.canvas import Canvas, read_canvas
from ldm.errors import UserError
from ldm.families.vae import load_vae
from ldm.files import replacing
from ldm.jobs import Batch, batches, done, read_jobs, share
from ldm.pipeline import Pipeline
from ldm.preview import Preview, projection
from ldm.recipe import Recipe
from ldm.request import Request, Run
from ldm.restore import enlarged, parse
from ldm.shapes import Latent
from ldm.start import encode

Watch = Callable[[int, Latent], None]  # the number of a step, from 1, and the picture that it steers by


def run(run: Run, given: dict[str, Any]) -> Iterator[Path]:
    """Paint what is asked for, given: the fields of a Request that are said. The files, each as it is written."""
    number, count = share(run, seeded="seed" in given)
    if count > 1 and torch.cuda.is_available():  # "cuda" then is this one, and recipes say the same in every process
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", number)) % torch.cuda.device_count())
    old = recipe.read(run.from_image) if run.from_image else recipe.fresh(0 if run.jobs else secrets.randbelow(2**32))
    base, console = replace(old.request, **given), Console(stderr=True)
    first = run.mask, run.expand, (given.get("width"), given.get("height"))
    canvas = read_canvas(run.init_image, *first) if run.init_image else None
    if canvas and base.restore:
        canvas = enlarged(canvas, parse(base.restore))
    jobs = read_jobs(run.jobs, base) if run.jobs else {}
    painter, told = _painter(run, old)
    if jobs:
        requests, names = [painter.ready(request, canvas) for request in jobs.values()], list(jobs)
    else:
        prompts = run.prompt or (recipe.read_prompts(run.prompts_file) if run.prompts_file else [old.request.prompt])
        requests = painter.requests(base, prompts, run.n, canvas)
        decided = run.prompts_file and "seed" in given  # so it can go on
        names = [f"{i:05d}" for i in range(len(requests))] if decided else []
    if canvas and base.invert:
        told.append(round_trip(painter, requests[0], canvas))
    out = images.folder(run.out)
    told += painter.notes(requests)
    work = batches(requests, run.batch_size, old.made)
    if names:
        rest = iter(names)
        mine = [batch._replace(names=list(islice(rest, len(batch.requests)))) for batch in work][number::count]
        work = missing(painter, mine, out, canvas)
        told = told if number == 0 else []
        left = sum(name is not None for batch in work for name in batch.names)
        if count > 1 or left != len(names):
            whole = f"{left} of {sum(len(batch.requests) for batch in mine)} pictures are not there yet"
            told.append(f"process {number + 1} of {count}: {whole}")
    sys.stderr.write("".join(f"{line}\n" for line in told))
    preview = _preview(run, painter, console) if number == 0 else None
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=number > 0 or not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=sum(painter.steps(batch.requests[0]) for batch in work))

        def watch(step: int, x0: Latent) -> None:
            bar.advance(task)
            if preview:
                preview(step, x0)

        written = []
        for path in paint_into(painter, work, out, canvas, watch):
            written.append(path)
            yield path
    if run.grid:
        paths = [out / f"{name}.png" for name in names] or written
        pixels = torch.cat([images.to_pixels(images.to_image(images.read_picture(path))) for path in paths])
        sheet = images.grid(pixels, run.n if 1 < run.n < len(requests) else 0)  # a row for each prompt
        yield images.save_next(images.png(sheet[0]), out, "grid-", 4)


def _painter(run: Run, old: Recipe) -> tuple[Pipeline, list[str]]:
    """The model, and all that is put into it; what there is to tell of that."""
    device, precision = run.device or old.made.device, run.precision or old.made.precision
    painter = pipeline.load(run.model or pipeline.EMBEDDED, device, precision, run.vae, offload=run.offload)
    # A GPU's convolutions are else in tf32, a thousandth off.
    torch.backends.cudnn.allow_tf32 = painter._made.precision != "fp32"
    if run.refiner:
        painter.refine(pipeline.load(run.refiner, device, precision, offload=run.offload))
    if run.attention != "auto" or run.compile:
        painter.prepare(run.attention, run.compile)
    painter.embed(run.embedding)
    painter.reader.wildcards = run.wildcards
    told = painter.adapt(run.lora)
    if run.control:
        painter.control(run.control, run.control_image, run.control_hint)
    if run.ip_adapter and run.ip_image and run.image_tower:
        painter.show(run.ip_adapter, run.ip_image, run.image_tower)
    if run.from_image and not run.model:
        told += painter.made.check(old.made)
    return painter, told


def round_trip(painter: Pipeline, request: Request, canvas: Canvas) -> str:
    """How well a picture comes back from the noise that an inversion finds: a line with the PSNR."""
    source, multiple = request.unguided(), painter.limits.multiple
    *_, last = painter.sample([source], canvas)
    height, width = canvas.image.shape[2:]
    padded = canvas.padded(*(math.ceil(side / multiple) * multiple for side in (height, width)))
    known = painter.decode(encode(painter.model.autoencoder, padded.image).mode)
    error = float((painter.decode(last.x).clamp(-1, 1) - known.clamp(-1, 1)).square().mean())
    return f"inverted: {request.invert[:40]!r} comes back at {10 * math.log10(4 / max(error, 1e-10)):.1f} dB"


def _preview(run: Run, painter: Pipeline, console: Console) -> Preview | None:
    if run.preview is None:
        return None
    painter.place("autoencoder")
    if run.preview_vae is None:
        return Preview(projection(painter.model.autoencoder), run.preview, run.preview_every, console)
    parameter = next(painter.model.autoencoder.parameters())
    tiny = load_vae(run.preview_vae, painter.model.spec.autoencoder, painter.made.device, parameter.dtype)
    return Preview(lambda x0: tiny.decode(x0.to(parameter.dtype)).float(), run.preview, run.preview_every, console)


def paint(
    painter: Pipeline, batch: Batch, canvas: Canvas | None, watch: Watch
) -> Iterator[tuple[images.Pixels, list[Recipe]]]:
    """The pictures of a batch and their recipes. Stopped by Ctrl-C it gives the batch's state, marked as such."""
    recipes, number, step = painter.recipes(batch, canvas), 0, None
    try:
        for number, step in enumerate(painter.sample(batch.requests, canvas), 1):
            watch(number, step.x0)
        assert step is not None
        latents = step.x
    except KeyboardInterrupt:
        if step is None:
            raise
        state = f"{number} of {painter.steps(batch.requests[0])} steps"
        marked = [replace(how, made=replace(how.made, unfinished=state)) for how in recipes]
        yield images.to_pixels(painter.finish(step.x0[batch.rows], canvas)), marked
        raise
    yield images.to_pixels(painter.finish(latents[batch.rows], canvas)), recipes


def missing(painter: Pipeline, named: Sequence[Batch], out: Path, canvas: Canvas | None) -> list[Batch]:
    """The batches, being complete, of which not all is in the folder yet; names are left of what is not.

    A batch is painted whole, whatever of it is done already, so that a run that was stopped and begun again writes the
    same bytes. All are looked at before any is painted: UserError where a name is taken by another picture.
    """
    looked = []
    for batch in named:
        pairs = zip(batch.names, painter.recipes(batch, canvas), strict=True)
        names = [None if done(out / f"{name}.png", how) else name for name, how in pairs]
        looked.append(batch._replace(names=names))
    return [batch for batch in looked if any(batch.names)]


def paint_into(
    painter: Pipeline, work: Sequence[Batch], out: Path, canvas: Canvas | None, watch: Watch
) -> Iterator[Path]:
    """Paint, and give the files that are written. What was stopped takes no job's name."""
    for batch in work:
        for pixels, recipes in paint(painter, batch, canvas, watch):
            for picture, how, name in zip(pixels, recipes, batch.names or [""] * len(recipes), strict=True):
                data = images.png(picture, how.text())
                if name == "":
                    yield images.save_next(data, out)
                elif name is not None and not how.made.unfinished:
                    yield _save(data, out / f"{name}.png")


def _save(data: bytes, path: Path) -> Path:
    try:
        with replacing(path, replace=False) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {error.strerror}") from None
    return path
