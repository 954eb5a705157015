"""Textual inversion (Gal et al. 2022, arXiv:2208.01618): vectors for a new word are learnt, and nothing else moves."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints.files import save
from ldm.conditioning import Conditioning
from ldm.data.cache import Encoders
from ldm.errors import UserError
from ldm.shapes import TokenIds
from ldm.text.chunks import extended, pieces
from ldm.text.inversion import Embedding
from ldm.text.prompt import Fragment
from ldm.text.tower import Conditioner
from ldm.training.config import InversionRun
from ldm.training.tasks.denoising import DenoisingTask


class Word(nn.Module):
    """The vectors of the new word, one table a tower, each row beginning as the word that it starts from."""

    def __init__(self, text: Conditioner, start: str, count: int) -> None:
        super().__init__()
        if not (ids := text.tokenizer.encode(start)):
            raise UserError(f"inversion.start {start!r} is no word: give one that comes near, such as cat")
        rows = torch.tensor([ids[i % len(ids)] for i in range(count)])
        tables = [tower.token_embedding.weight[rows].detach().float() for tower in (text.tower, text.second) if tower]
        self.tables = nn.ParameterList(tables)

    def embedding(self, name: str) -> Embedding:
        return Embedding((name,), *self.tables)


class InversionTask(DenoisingTask):
    """The denoising loss, moved by the vectors of a word. UserError where no caption of the first pictures has it."""

    config: InversionRun

    def __init__(self, config: InversionRun) -> None:
        super().__init__(config)
        captions = self.held_back.batch["caption"]
        if not any(self.token in caption for caption in captions):
            raise UserError(
                f"no caption holds inversion.token {self.token!r}, the first is {captions[0]!r}: "
                f'prepare the pictures with --caption-template "a photo of {self.token}"'
            )

    def trained(self) -> dict[str, nn.Module]:
        self.freeze()
        self.trains_text = True
        about = self.config.inversion
        self.token, self.vectors, self.word = about.token, about.vectors, Word(self.text, about.start, about.vectors)
        return {"word": self.word}

    def tokenize(self, captions: Sequence[str]) -> TokenIds:
        """As the tower reads them, the vectors of the token as ids below 0; what does not fit is cut."""
        length, end = self.text.config.context_length, self.text.config.end
        ids = torch.full((len(captions), length), end if self.text.config.pad == "end" else 0)
        known = [Embedding((self.token,), torch.empty(self.vectors, 0))]
        for row, caption in zip(ids, captions, strict=True):
            (found,) = pieces([Fragment(caption, 1.0)], self.text, known)
            numbers = [end - 1, *[piece.id for piece in found][: length - 2], end]
            row[: len(numbers)] = torch.tensor(numbers)
        return ids

    def encoders(self, *, text: bool, crops: int) -> Encoders:
        """A cache holds the ids of the word's vectors: one with others is refused."""
        made = super().encoders(text=text, crops=crops)
        return replace(made, model=f"{made.model}, {self.token} of {self.vectors}")

    def encode_text(self, ids: TokenIds, sizes: Tensor | None = None) -> Conditioning:
        with extended(self.text, [self.word.embedding(self.token)]):
            return super().encode_text(ids, sizes)

    def export(self, path: Path, provenance: dict[str, Any]) -> None:
        """Write the vectors under the token's name, as diffusers and AUTOMATIC1111's web UI read them."""
        names = ("clip_l", "clip_g") if len(self.word.tables) > 1 else (self.token,)
        facts = {"token": self.token, "base": str(self.config.weights), "steps": str(provenance.get("steps", 0))}
        save(path, dict(zip(names, self.word.tables, strict=True)), facts)
