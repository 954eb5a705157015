"""Prompts of any length: tokens in chunks that the tower reads one by one, their states side by side, and weighted."""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.text.inversion import Embedding
from ldm.text.prompt import Fragment
from ldm.text.tower import Conditioner

LOOK_BACK = 20 / 75  # of a chunk: how far a comma may lie back for the chunk to end behind it, as in A1111's web UI


class Piece(NamedTuple):
    """One place in a chunk: a token's id, or -1 - k for row k of the embeddings' table, and its weight."""

    id: int
    weight: float
    whole: int = 1  # pieces that stay together, of which this is the first


def pieces(
    fragments: Sequence[Fragment], conditioner: Conditioner, embeddings: Sequence[Embedding]
) -> list[list[Piece]]:
    """The pieces of a prompt, a list for each BREAK-free stretch."""
    first, rows = 0, dict[str, tuple[int, int]]()
    for embedding in embeddings:
        rows |= {name.lower(): (first, len(embedding.vectors)) for name in embedding.names}
        first += len(embedding.vectors)
    names = "|".join(re.escape(name) for name in sorted(rows, key=len, reverse=True))
    known = re.compile(rf"(?<![\w-])({names})(?![\w-])", re.IGNORECASE) if names else None
    stretches: list[list[Piece]] = [[]]
    for text, weight in fragments:
        if text is None:
            stretches.append([])
            continue
        for i, part in enumerate(known.split(text) if known else [text]):
            if i % 2:
                start, length = rows[part.lower()]
                stretches[-1] += [Piece(-1 - start - k, weight, length - k) for k in range(length)]
            elif part.strip():
                stretches[-1] += [Piece(token, weight) for token in conditioner.tokenizer.encode(part)]
    return stretches


def chunks(stretches: Sequence[Sequence[Piece]], conditioner: Conditioner) -> list[list[Piece]]:
    """Pieces in chunks that fit the tower, at least one; it ends behind a near comma, never inside an embedding."""
    room = conditioner.config.context_length - 2
    commas, back = conditioner.tokenizer.encode(","), int(room * LOOK_BACK)
    made: list[list[Piece]] = []
    for stretch in stretches:
        rest = list(stretch)
        while len(rest) > room:
            cut = room
            while rest[cut].whole < rest[cut - 1].whole:  # inside an embedding
                cut -= 1
            near = [i + 1 for i in range(max(cut - back, 0), cut) if [rest[i].id] == commas]
            cut = near[-1] if near else cut
            made.append(rest[:cut])
            rest = rest[cut:]
        made.append(rest)
    return made


def read(
    conditioner: Conditioner,
    texts: Sequence[Sequence[Sequence[Piece]]],
    size: tuple[int, int],
    *,
    scores: Sequence[float],
    layer: int | None = None,
    embeddings: Sequence[Embedding] = (),
) -> Conditioning:
    """Conditions of texts, each in its chunks; a mask hides what the shorter ones have not, so company changes none.

    Weights multiply states, and a chunk's mean is restored (A1111's way). The pooled vector is the first chunk's.
    """
    device = conditioner.tower.positional_embedding.device
    flat = [chunk for text in texts for chunk in text]
    ids = conditioner.tokenizer.ids([[piece.id for piece in chunk] for chunk in flat])
    weights = torch.ones(ids.shape)
    for weight, chunk in zip(weights, flat, strict=True):
        weight[1 : len(chunk) + 1] = torch.tensor([piece.weight for piece in chunk])
    each = [score for score, text in zip(scores, texts, strict=True) for _ in text]
    with extended(conditioner, embeddings if bool((ids < 0).any()) else ()):
        states = conditioner.encode(ids.to(device), size, scores=each, layer=layer)
    tokens = _weigh(states.tokens, weights.to(device), [tower.width for tower in conditioner.config.towers])
    counts = [len(text) for text in texts]
    if max(counts) == 1:
        return Conditioning(tokens, vector=states.vector)
    split = [part.flatten(0, 1) for part in tokens.split(counts)]
    joined = nn.utils.rnn.pad_sequence(split, batch_first=True)
    place = torch.arange(joined.shape[1], device=device)
    mask = place < torch.tensor([len(part) for part in split], device=device)[:, None]
    firsts = torch.tensor([sum(counts[:i]) for i in range(len(counts))], device=device)
    vector = None if states.vector is None else states.vector[firsts]
    return Conditioning(joined, mask=None if bool(mask.all()) else mask, vector=vector)


def _weigh(tokens: Tensor, weights: Tensor, widths: list[int]) -> Tensor:
    """States times their weights, each tower's then scaled back to its mean over the chunk."""
    rows = (weights != 1).any(1)
    if not bool(rows.any()):
        return tokens
    parts = []
    for part in tokens.float().split(widths, dim=2):
        heavy = part * weights[:, :, None]
        mended = heavy * (part.mean((1, 2), keepdim=True) / heavy.mean((1, 2), keepdim=True))
        parts.append(torch.where(rows[:, None, None], mended, part))
    return torch.cat(parts, dim=2).to(tokens.dtype)


@contextmanager
def extended(conditioner: Conditioner, embeddings: Sequence[Embedding]) -> Iterator[None]:
    """Towers that read the embeddings' rows where an id is below 0."""
    with ExitStack() as stack:
        for tower, kind in (conditioner.tower, "vectors"), (conditioner.second, "second"):
            if embeddings and tower is not None:
                stack.enter_context(_table(tower, torch.cat([getattr(e, kind) for e in embeddings])))
        yield


@contextmanager
def _table(tower: Any, rows: Tensor) -> Iterator[None]:
    asked: list[Tensor] = []

    def before(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        asked.append(args[0])
        return (args[0].clamp(min=0),)

    def after(_: Any, __: Any, out: Tensor) -> Tensor:
        ids = asked.pop()
        return torch.where((ids < 0)[..., None], rows.to(out)[(-1 - ids).clamp(min=0)], out)

    with tower.token_embedding.register_forward_pre_hook(before), tower.token_embedding.register_forward_hook(after):
        yield
