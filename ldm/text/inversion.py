"""Textual inversion (Gal et al. 2022, arXiv:2208.01618): a name in the prompt that stands for vectors learnt for it."""

from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from ldm.errors import UserError
from ldm.text.tower import Conditioner

Vectors = Float[Tensor, "n d"]
SPELLINGS = ("emb_params", "*")  # under which AUTOMATIC1111's files keep the vectors; others keep their own name


@dataclass(frozen=True)
class Embedding:
    """vectors: what one tower reads in place of tokens; second: the same for the other tower, where there is one."""

    names: tuple[str, ...]
    vectors: Vectors
    second: Vectors | None = None


def from_tensors(path: Path, tensors: dict[str, Tensor], conditioner: Conditioner) -> Embedding:
    """The embedding that a file's tensors are, named after the file and, in diffusers' files, after its token.

    UserError where they are none, or made for another text tower.
    """
    config = conditioner.config
    names: tuple[str, ...]
    if set(tensors) == {"clip_l", "clip_g"}:
        vectors, second, names = tensors["clip_l"], tensors["clip_g"], (path.stem,)
    elif len(tensors) == 1:
        ((key, vectors),) = tensors.items()
        second, names = None, (path.stem,) if key in SPELLINGS else (path.stem, key)
    else:
        raise UserError(f"{str(path)!r} is no textual inversion: it holds {', '.join(sorted(tensors)[:4])}")
    rows = [v if v is None or v.ndim == 2 else v[None] if v.ndim == 1 else None for v in (vectors, second)]
    widths = [v.shape[1] for v in rows if v is not None]
    wanted = [tower.width for tower in config.towers]
    if rows[0] is None or widths != wanted or (rows[1] is not None and len(rows[0]) != len(rows[1])):
        raise UserError(
            f"{str(path)!r} is for a text tower of width {' and '.join(map(str, widths)) or 'unknown'}, "
            f"this model's is {' and '.join(map(str, wanted))}: take one made for this family"
        )
    room = config.context_length - 2
    if len(rows[0]) > room:
        raise UserError(f"{str(path)!r} is {len(rows[0])} vectors long: at most {room} fit into a chunk")
    return Embedding(names, rows[0].float(), None if rows[1] is None else rows[1].float())
