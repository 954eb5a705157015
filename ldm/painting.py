"""A whole run, from what a command says to pictures in files: watched, stopped and begun again."""

import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from ldm import images, pipeline, recipe
from ldm.canvas import Canvas, read_canvas
from ldm.errors import UserError
from ldm.families.vae import load_vae
from ldm.files import replacing
from ldm.jobs import Job, read_jobs
from ldm.pipeline import Batch, Pipeline, batches, settings
from ldm.preview import Preview, projection
from ldm.recipe import Recipe
from ldm.request import Run
from ldm.restore import enlarged, parse
from ldm.shapes import Latent

Watch = Callable[[int, Latent], None]  # the number of a step, from 1, and the picture that it steers by


def run(run: Run, given: dict[str, Any]) -> Iterator[Path]:
    """Paint what is asked for, given: the fields of a Request that are said. The files, each as it is written."""
    old = recipe.read(run.from_image) if run.from_image else recipe.fresh(0 if run.jobs else secrets.randbelow(2**32))
    base, console = replace(old.request, **given), Console(stderr=True)
    first = run.mask, run.expand, (given.get("width"), given.get("height"))
    canvas = read_canvas(run.init_image, *first) if run.init_image else None
    if canvas and base.restore:
        canvas = enlarged(canvas, parse(base.restore))
    jobs = read_jobs(run.jobs, base if canvas is None else canvas.request(base)) if run.jobs else []
    device, precision = run.device or old.made.device, run.precision or old.made.precision
    painter = pipeline.load(run.model or pipeline.EMBEDDED, device, precision, run.vae, offload=run.offload)
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
        told += painter.check(old.made)
    if jobs:
        jobs = [replace(job, request=painter.complete(job.request)) for job in jobs]
        requests = [job.request for job in jobs]
    else:
        prompts = run.prompt or (recipe.read_prompts(run.prompts_file) if run.prompts_file else [old.request.prompt])
        requests = painter.requests(base, prompts, run.n, canvas)
    if canvas and base.invert:
        told.append(painter.round_trip(requests[0], canvas))
    out = images.folder(run.out)
    sys.stderr.write("".join(f"{line}\n" for line in [*told, *painter.notes(requests)]))
    preview = _preview(run, painter, console)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=0)

        def watch(number: int, x0: Latent) -> None:
            bar.advance(task)
            if preview:
                preview(number, x0)

        named = alike(jobs, run.batch_size)
        work = [batch for _, batch in named] or batches(requests, run.batch_size, old.made)
        bar.update(task, total=sum(painter.steps(batch.requests[0]) for batch in work))
        if jobs:
            yield from paint_jobs(painter, named, out, canvas, watch)
            return
        sheets = []
        for pixels, recipes in paint(painter, work, canvas, watch):
            sheets.append(pixels)
            for picture, how in zip(pixels, recipes, strict=True):
                yield images.save_next(images.png(picture, how.text()), out)
    if run.grid:
        columns_wanted = run.n if len(requests) > run.n else 0
        yield images.save_next(images.png(images.sheet(sheets, columns_wanted)), out, "grid-", 4)


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
    painter: Pipeline, work: Sequence[Batch], canvas: Canvas | None, watch: Watch
) -> Iterator[tuple[images.Pixels, list[Recipe]]]:
    """The pictures of each batch and their recipes. Stopped by Ctrl-C it gives the batch's state, marked as such."""
    for batch in work:
        recipes, number, step = painter.recipes(batch, canvas), 0, None
        try:
            for number, step in enumerate(painter.sample(batch.requests, canvas), 1):
                watch(number, step.x0)
            assert step is not None
            latents = step.x
        except KeyboardInterrupt:
            if step is None:
                raise
            whole = painter.steps(batch.requests[0])
            state = f"{number} of {whole} steps"
            marked = [replace(how, made=replace(how.made, unfinished=state)) for how in recipes]
            yield images.to_pixels(painter.finish(step.x0[batch.rows], canvas)), marked
            raise
        yield images.to_pixels(painter.finish(latents[batch.rows], canvas)), recipes


def alike(jobs: Sequence[Job], size: int) -> list[tuple[list[Job], Batch]]:
    """Jobs that follow one another with the same settings, in batches."""
    found = []
    for _, group in groupby(jobs, key=lambda job: settings(job.request)):
        rest = list(group)
        for batch in batches([job.request for job in rest], size):
            found.append((rest[: len(batch.requests)], batch))
            rest = rest[len(batch.requests) :]
    return found


def paint_jobs(
    painter: Pipeline, work: Sequence[tuple[list[Job], Batch]], out: Path, canvas: Canvas | None, watch: Watch
) -> Iterator[Path]:
    """Paint what is not yet in the folder, jobs being complete, and give the files that are written.

    A batch is painted whole, whatever of it is done already, so that a run that was stopped and begun again writes the
    same bytes. UserError where a name is taken by another picture.
    """
    missing = [
        [job for job in jobs if not job.done(out)] for jobs, _ in work
    ]  # all are looked at before any is painted
    for (jobs, batch), wanted in zip(work, missing, strict=True):
        for pixels, recipes in paint(painter, [batch] if wanted else [], canvas, watch):
            for job, picture, how in zip(jobs, pixels, recipes, strict=True):
                if job not in wanted or how.made.unfinished:
                    continue
                path = out / f"{job.name}.png"
                try:
                    with replacing(path, replace=False) as temporary:
                        temporary.write_bytes(images.png(picture, how.text()))
                except OSError as error:
                    raise UserError(f"cannot write {str(path)!r}: {error.strerror}") from None
                yield path
