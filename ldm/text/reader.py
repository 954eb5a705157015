"""From the prompts of requests to a denoiser that is guided by them, step by step."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ldm.conditioning import Conditioning
from ldm.diffusion.editing import by_step, composed
from ldm.diffusion.guidance import Conditional, Denoise, Guidance, bind, guided, mixed
from ldm.errors import UserError
from ldm.request import Request
from ldm.shapes import Latent, Sigmas
from ldm.text.chunks import Piece, chunks, pieces, read
from ldm.text.inversion import Embedding
from ldm.text.prompt import Part, Prompt, fill, parse, plain
from ldm.text.tower import Conditioner

Asked = tuple[tuple[Part, ...], tuple[Part, ...]]  # what a picture wants at one step, and what it keeps away from


@dataclass
class Reader:
    """A text side, the embeddings that prompts may name, and the folder of their wildcards."""

    conditioner: Conditioner
    embeddings: list[Embedding] = field(default_factory=list)
    wildcards: Path | None = None
    show: Callable[[Conditioning, Conditioning], tuple[Conditioning, Conditioning]] | None = None  # adds a picture

    def fill(self, prompt: str, seed: int) -> str:
        """The prompt with a line of FOLDER/name.txt in place of each __name__, drawn by the picture's seed."""
        return prompt if self.wildcards is None else fill(prompt, self.wildcards, random.Random(seed))

    def parsed(self, request: Request) -> tuple[Prompt, Prompt]:
        """A request's prompt and negative. UserError, with the place, for syntax that is none."""
        understand = plain if request.plain_prompt else parse
        prompt, negative = understand(request.prompt), understand(request.negative)
        if len(negative.sides) > 1:
            raise UserError(f"AND is of the prompt, not of the negative {request.negative[:40]!r}")
        return prompt, negative

    def chunks(self, part: Part) -> list[list[Piece]]:
        return chunks(pieces(part.fragments, self.conditioner, self.embeddings), self.conditioner)

    def notes(self, requests: Sequence[Request]) -> list[str]:
        """How many tokens the prompts have, and in how many chunks: the longest, and each that takes several."""
        room, counts = self.conditioner.config.context_length - 2, {}
        for request in requests:
            for text, prompt in zip((request.prompt, request.negative), self.parsed(request), strict=True):
                made = [self.chunks(part) for part in prompt.at(0, request.steps or 1)]
                counts[text] = sum(len(c) for part in made for c in part), max(len(part) for part in made)
        long = [f"{text[:40]!r}...: {n} tokens in {k} chunks of {room}" for text, (n, k) in counts.items() if k > 1]
        return long or [f"tokens: {max(n for n, _ in counts.values())} of {room}"]

    def guide(
        self, denoiser: Conditional, requests: Sequence[Request], sigmas: Sigmas, concat: Latent | None = None
    ) -> Denoise:
        """The denoiser of a batch of complete requests, its conditions bound. concat: see Conditioning, for all."""
        steps = len(sigmas) - 1
        prompts = [self.parsed(request) for request in requests]
        asked = [tuple((p.at(i, steps), n.at(i, steps)) for p, n in prompts) for i in range(steps)]
        bound = {each: self._bind(denoiser, requests[0], each, sigmas, concat) for each in dict.fromkeys(asked)}
        return bound[asked[0]] if len(bound) == 1 else by_step(sigmas, [bound[each] for each in asked])

    def _bind(
        self, denoiser: Conditional, r: Request, asked: Sequence[Asked], sigmas: Sigmas, concat: Latent | None
    ) -> Denoise:
        assert r.cfg_scale is not None and r.guidance is not None
        parts = [(row, part) for row, (wanted, _) in enumerate(asked) for part in wanted]
        texts = [self.chunks(part) for _, part in parts] + [self.chunks(part) for _, (part,) in asked]
        m, n = len(parts), len(asked)
        scores = [6.0] * m + [2.5] * n  # of beauty, for a model that asks: as its makers do
        size = (r.height or 0, r.width or 0)
        both = read(self.conditioner, texts, size, scores=scores, layer=r.clip_skip, embeddings=self.embeddings)
        owner = torch.tensor([row for row, _ in parts], device=both.tokens.device)
        cond = replace(both[:m], concat=None if concat is None else concat[owner])
        uncond = replace(both[m:], concat=concat)
        if self.show is not None:
            cond, uncond = self.show(cond, uncond)
        weights = torch.tensor([part.weight for _, part in parts])
        guidance = Guidance(r.guidance, r.cfg_scale, sigmas)
        if m > n or bool((weights != 1).any()):
            plain = composed(denoiser, cond, uncond, weights, owner, mixed(1.0))
            return guidance.limit(composed(denoiser, cond, uncond, weights, owner, guidance.combine), plain)
        bound = bind(denoiser, cond)
        towards = bound if guidance.alone else guided(denoiser, cond, uncond, guidance.combine)
        return guidance.limit(towards, bound)
