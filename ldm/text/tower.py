"""The text tower: CLIP's tokenizer and text transformer (Radford et al. 2021, arXiv:2103.00020), from open_clip."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn

from ldm.conditioning import Conditioning
from ldm.shapes import TokenIds
from ldm.text.open_clip import open_clip

FULL_VOCABULARY = 49408


@dataclass(frozen=True)
class TextConfig:
    """A text tower; the defaults are CLIP ViT-L/14's, as Stable Diffusion 1 uses it.

    vocab_size: below 49,408 only the first merges of CLIP's byte-pair encoding are used (any text still encodes, in more
    pieces). layer: which hidden state conditions the image, counted from the end (1 last, 2 penultimate). pad: what fills the
    rest of the context: token 0 (open_clip) or the end token (CLIP-L in SD 1 and SDXL).
    """

    width: int = 768
    heads: int = 12
    layers: int = 12
    context_length: int = 77
    vocab_size: int = FULL_VOCABULARY
    quickgelu: bool = True
    layer: int = 1
    final_norm: bool = True
    pad: Literal["zero", "end"] = "end"

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"text width {self.width} is not divisible by heads {self.heads}")
        if not 1 <= self.layer <= self.layers:
            raise ValueError(f"layer {self.layer} must be between 1 and layers {self.layers}")
        if not 514 < self.vocab_size <= FULL_VOCABULARY:
            raise ValueError(f"vocab_size {self.vocab_size} must be above 514 and at most {FULL_VOCABULARY}")


class Tokenizer:
    """CLIP's byte-pair encoding over the first `vocab_size - 514` merges; start and end are the last two ids."""

    def __init__(self, config: TextConfig) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        self.config = config
        self._bpe: Any = SimpleTokenizer(context_length=config.context_length)
        merges = list(self._bpe.bpe_ranks)[: config.vocab_size - 514]
        letters = list(self._bpe.byte_encoder.values())
        words = letters + [c + "</w>" for c in letters] + ["".join(m) for m in merges]
        self._bpe.bpe_ranks = {merge: rank for rank, merge in enumerate(merges)}
        self._bpe.encoder = {word: i for i, word in enumerate([*words, "<start_of_text>", "<end_of_text>"])}

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a text of any length, without start and end."""
        return self._bpe.encode(prompt)

    def __call__(self, prompts: Sequence[str]) -> tuple[TokenIds, list[int]]:
        """(b, context_length) ids, and how many tokens of each prompt did not fit and were cut off."""
        length, (start, end) = self.config.context_length, (self.config.vocab_size - 2, self.config.vocab_size - 1)
        ids = torch.full((len(prompts), length), end if self.config.pad == "end" else 0)
        cut = []
        for row, prompt in zip(ids, prompts, strict=True):
            tokens = self.encode(prompt)
            cut.append(max(0, len(tokens) - (length - 2)))
            tokens = [start, *tokens[: length - 2], end]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids, cut


class Conditioner(nn.Module):
    """prompts -> Conditioning: the hidden states of one text tower."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        transformer = open_clip().transformer
        self.config = config
        self.tower = transformer.TextTransformer(
            context_length=config.context_length,
            vocab_size=config.vocab_size,
            width=config.width,
            heads=config.heads,
            layers=config.layers,
            output_dim=None,
            act_layer=transformer.QuickGELU if config.quickgelu else nn.GELU,
        )
        with torch.device("cpu"):  # not a weight: filled here even where the weights still wait on the meta device
            self.tower.register_buffer("attn_mask", self.tower.build_causal_mask(), persistent=False)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.config)

    def tokenize(self, prompts: Sequence[str]) -> TokenIds:
        """(b, context_length) ids on the CPU; what does not fit is cut (`tokenizer` says how much)."""
        return self.tokenizer(prompts)[0]

    def encode(self, ids: TokenIds) -> Conditioning:
        """Hidden states (b, l, width) of token ids (b, l)."""
        states = self.tower.forward_intermediates(
            ids,
            indices=[self.config.layers - self.config.layer],
            stop_early=True,
            normalize_intermediates=self.config.final_norm,
            intermediates_only=True,
            output_fmt="NLC",
        )
        return Conditioning(tokens=states["text_intermediates"][0])

    def forward(self, prompts: Sequence[str]) -> Conditioning:
        """Conditions of prompts, on the device of the weights."""
        return self.encode(self.tokenize(prompts).to(self.tower.positional_embedding.device))
