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
    config, names = conditioner.config, tuple[str, ...]([path.stem])
    if set(tensors) == {"clip_l", "clip_g"}:
        parts = [tensors["clip_l"], tensors["clip_g"]]
    elif len(tensors) == 1:
        ((key, vectors),) = tensors.items()
        parts, names = [vectors], names if key in SPELLINGS else (*names, key)
    else:
        raise UserError(f"{str(path)!r} is no textual inversion: it holds {', '.join(sorted(tensors)[:4])}")
    rows = [v.float().reshape(-1, v.shape[-1]) for v in parts if v.ndim in (1, 2)]
    widths, wanted = [v.shape[1] for v in rows], [tower.width for tower in config.towers]
    if widths != wanted or len({len(v) for v in rows}) > 1:
        theirs, ours = (" and ".join(map(str, each)) or "unknown" for each in (widths, wanted))
        said = f"is for a text tower of width {theirs}, this model's is {ours}: take one made for this family"
        raise UserError(f"{str(path)!r} {said}")
    room = config.context_length - 2
    if len(rows[0]) > room:
        raise UserError(f"{str(path)!r} is {len(rows[0])} vectors long: at most {room} fit into a chunk")
    return Embedding(names, *rows)
