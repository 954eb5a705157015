"""Textual inversion (Gal et al. 2022, arXiv:2208.01618): vectors for a new word are learnt, and nothing else moves."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.data.cache import Encoders
from ldm.errors import UserError
from ldm.files import replacing
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
        ids = text.tokenizer.encode(start)
        if not ids:
            raise UserError(f"inversion.start {start!r} is no word: give one that comes near, such as cat")
        rows = torch.tensor([ids[i % len(ids)] for i in range(count)])
        towers = [text.tower] + ([text.second] if text.second is not None else [])
        self.tables = nn.ParameterList(tower.token_embedding.weight[rows].detach().float().clone() for tower in towers)

    def embedding(self, name: str) -> Embedding:
        first, *rest = self.tables
        return Embedding((name,), first, rest[0] if rest else None)


class InversionTask(DenoisingTask):
    """The denoising loss, moved by the vectors of `inversion.token` in the captions.

    UserError where no caption of the first pictures holds the token.
    """

    def __init__(self, config: InversionRun) -> None:
        self.token = config.inversion.token
        super().__init__(config)
        for network in (self.backbone, self.text):
            network.requires_grad_(False)
        self.trains_text = True
        self.word = Word(self.text, config.inversion.start, config.inversion.vectors)
        self.networks = {"word": self.word}
        self.averaged = ("word",)
        captions = self.held_back.batch["caption"]
        if not any(self.token in caption for caption in captions):
            raise UserError(
                f"no caption holds inversion.token {self.token!r}, the first is {captions[0]!r}: "
                f'prepare the pictures with --caption-template "a photo of {self.token}"'
            )

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.word.to(device)

    def tokenize(self, captions: Sequence[str]) -> TokenIds:
        """As the tower reads them, the vectors of the token as ids below 0; what does not fit is cut."""
        length, end = self.text.config.context_length, self.text.config.end
        ids = torch.full((len(captions), length), end if self.text.config.pad == "end" else 0)
        known = [Embedding((self.token,), torch.empty(self.config.inversion.vectors, 0))]  # type: ignore[attr-defined]
        for row, caption in zip(ids, captions, strict=True):
            (found,) = pieces([Fragment(caption, 1.0)], self.text, known)
            numbers = [end - 1, *[piece.id for piece in found][: length - 2], end]
            row[: len(numbers)] = torch.tensor(numbers)
        return ids

    def encoders(self, *, text: bool, crops: int) -> Encoders:
        """A cache holds the ids of the word's vectors: one with others is refused."""
        made, word = super().encoders(text=text, crops=crops), f"{self.token} of {self.config.inversion.vectors}"  # type: ignore[attr-defined]
        return replace(made, model=f"{made.model}, {word}")

    def encode_text(self, ids: TokenIds, sizes: Tensor | None = None) -> Conditioning:
        embeddings = [self.word.embedding(self.token)]
        with extended(self.text, embeddings):
            return super().encode_text(ids, sizes)

    def export(self, path: Path, provenance: dict[str, Any]) -> None:
        """Write the vectors under the token's name, as diffusers and AUTOMATIC1111's web UI read them."""
        names = ("clip_l", "clip_g") if len(self.word.tables) > 1 else (self.token,)
        tensors: dict[str, Tensor] = {
            n: t.detach().cpu().contiguous() for n, t in zip(names, self.word.tables, strict=True)
        }
        facts = {"token": self.token, "base": str(self.config.weights), "steps": str(provenance.get("steps", 0))}
        with replacing(path) as temporary:
            save_file(tensors, temporary, facts)
