"""The text side: CLIP's tokenizer and text transformer (Radford et al. 2021, arXiv:2103.00020), one tower or two."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.models.layers import sinusoid
from ldm.shapes import TokenIds, Tokens, Vector
from ldm.text.open_clip import part

FULL_VOCABULARY = 49408
_INSIDE_SPECIAL = re.compile(r"(?<=<)(?=(?:start|end)_of_text>)", re.IGNORECASE)


@dataclass(frozen=True)
class TextConfig:
    """A text tower; the defaults are CLIP ViT-L/14's, as Stable Diffusion 1 uses it.

    vocab_size: below 49,408 any text still encodes, by the first merges of CLIP's byte pairs alone. layer: the hidden
    state that conditions the image, counted from the end (1 last). pad: what fills the context: token 0 (open_clip) or
    the end token (CLIP-L in SD 1 and SDXL). mlp: width inside a block, 0 for 4 x.

    Stable Diffusion XL (Podell et al. 2023, Sec. 2.1-2.2) adds: second, a tower whose states stand beside the first's;
    projection, the width of the pooled text (0: none); size_ids, how many numbers about the picture join it, each as
    id_width features (6: original size, crop, target size; 5: a score for the target); zero_empty: no words, all zeros.
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
    mlp: int = 0
    projection: int = 0
    second: "TextConfig | None" = None
    size_ids: int = 0
    id_width: int = 256
    zero_empty: bool = False

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"text width {self.width} is not divisible by heads {self.heads}")
        if not 1 <= self.layer <= self.layers:
            raise ValueError(f"layer {self.layer} must be between 1 and layers {self.layers}")
        if not self.vocab_size > 514:
            raise ValueError(f"vocab_size {self.vocab_size} must be above 514: 512 letters, start and end")
        if self.size_ids not in (0, 5, 6) or (self.size_ids and not self.vector_width):
            raise ValueError(f"size_ids {self.size_ids} must be 0, or 5 or 6 beside a pooled projection")
        other = self.second
        if other and (
            other.second or (other.vocab_size, other.context_length) != (self.vocab_size, self.context_length)
        ):
            raise ValueError("the second tower must read the same tokens as the first, and have no second of its own")

    @property
    def states_width(self) -> int:
        """Width of the tokens that condition the image."""
        return sum(tower.width for tower in self.towers)

    @property
    def end(self) -> int:
        """The id of the end token; the start token stands before it, rows that a fine-tuning has added behind it."""
        return min(self.vocab_size, FULL_VOCABULARY) - 1

    @property
    def towers(self) -> "tuple[TextConfig, ...]":
        """The one or two towers whose states stand side by side."""
        return (self, self.second) if self.second else (self,)

    @property
    def vector_width(self) -> int:
        """Width of the conditioning vector, 0 without one."""
        pooled = self.second.projection if self.second else self.projection
        return pooled + (self.size_ids * self.id_width if pooled else 0)


class Tokenizer:
    """CLIP's byte-pair encoding over the first `vocab_size - 514` merges; start and end are the last two ids."""

    def __init__(self, config: TextConfig) -> None:
        self.config = config
        self._bpe: Any = part("tokenizer").SimpleTokenizer(context_length=config.context_length)
        merges = list(self._bpe.bpe_ranks)[: config.vocab_size - 514]
        letters = list(self._bpe.byte_encoder.values())
        words = letters + [c + "</w>" for c in letters] + ["".join(m) for m in merges]
        self._bpe.bpe_ranks = {merge: rank for rank, merge in enumerate(merges)}
        self._bpe.encoder = {word: i for i, word in enumerate([*words, "<start_of_text>", "<end_of_text>"])}

    @property
    def merges(self) -> list[tuple[str, str]]:
        """The pairs that are joined, the most frequent first."""
        return list(self._bpe.bpe_ranks)

    @property
    def words(self) -> list[str]:
        """The word of each id."""
        return list(self._bpe.encoder)

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a text of any length, without start and end, also where it spells their names."""
        return [token for part in _INSIDE_SPECIAL.split(prompt) for token in self._bpe.encode(part)]

    def ids(self, texts: Sequence[Sequence[int]]) -> TokenIds:
        """(b, context_length): tokens between start and end, filled up; what does not fit is cut off."""
        length, end = self.config.context_length, self.config.end
        ids = torch.full((len(texts), length), end if self.config.pad == "end" else 0)
        for row, tokens in zip(ids, texts, strict=True):
            whole = [end - 1, *tokens[: length - 2], end]
            row[: len(whole)] = torch.tensor(whole)
        return ids

    def __call__(self, prompts: Sequence[str]) -> TokenIds:
        return self.ids([self.encode(prompt) for prompt in prompts])


class Conditioner(nn.Module):
    """prompts -> Conditioning: the hidden states of one text tower or two, and SDXL's vector."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.tower = _tower(config)
        self.second = _tower(config.second) if config.second else None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.config)

    def tokenize(self, prompts: Sequence[str]) -> TokenIds:
        """(b, context_length) ids on the CPU; what does not fit is cut."""
        return self.tokenizer(prompts)

    def encode(
        self,
        ids: TokenIds,
        size: tuple[int, int] | Tensor = (0, 0),
        *,
        scores: Sequence[float] = (),
        layer: int | None = None,
    ) -> Conditioning:
        """Conditions of token ids (b, l) for pictures of size (height, width) in pixels, whole and not enlarged.

        size: or, for SDXL, (b, 6) numbers about each picture: its original size, top and left of the crop, its size.
        scores: how beautiful each picture shall be, 0 to 10 (6 for all), for a model that asks: SDXL's refiner.
        layer: in place of the config's own, "clip skip".
        """
        config = self.config
        tokens, pooled = _read(self.tower, config, ids, layer)
        if self.second is not None and config.second is not None:
            more, pooled = _read(self.second, config.second, _pad(ids, config.second), layer)
            tokens = torch.cat([tokens, more], dim=2)
        if config.zero_empty:
            filled = (ids[:, 1] != config.end).to(tokens.dtype)
            tokens = tokens * filled[:, None, None]
            pooled = None if pooled is None else pooled * filled[:, None]
        if pooled is not None and config.size_ids:
            pooled = torch.cat([pooled, self.about(size, len(ids), scores).to(pooled)], dim=1)
        return Conditioning(tokens, vector=pooled)

    def about(self, size: tuple[int, int] | Tensor, n: int, scores: Sequence[float] = ()) -> Vector:
        """Features (n, size_ids * id_width) of the numbers about n pictures; see `encode`."""
        config, device = self.config, self.tower.positional_embedding.device
        if not isinstance(size, Tensor):
            size = torch.tensor([[*size, 0, 0, *size]] * n)
        numbers = size.to(device, torch.float32)
        if config.size_ids == 5:
            score = torch.tensor([*(scores or [6.0] * n)], device=device)
            numbers = torch.cat([numbers[:, :4], score[:, None]], dim=1)
        return sinusoid(numbers.flatten(), config.id_width).reshape(n, -1)

    def forward(self, prompts: Sequence[str], size: tuple[int, int] = (0, 0)) -> Conditioning:
        """Conditions of prompts, on the device of the weights; see `encode`."""
        return self.encode(self.tokenize(prompts).to(self.tower.positional_embedding.device), size)


def _tower(config: TextConfig) -> Any:
    """open_clip's TextTransformer of a config."""
    transformer = part("transformer")
    tower = transformer.TextTransformer(
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        width=config.width,
        heads=config.heads,
        layers=config.layers,
        mlp_ratio=(config.mlp or 4 * config.width) / config.width,
        output_dim=config.projection or None,
        act_layer=transformer.QuickGELU if config.quickgelu else nn.GELU,
        no_causal_mask=True,
    )
    del tower.attn_mask
    with torch.device("cpu"):  # not a weight: filled here even where the weights still wait on the meta device
        tower.register_buffer("attn_mask", tower.build_causal_mask(), persistent=False)
    return tower


def _read(tower: Any, config: TextConfig, ids: TokenIds, layer: int | None) -> tuple[Tokens, Vector | None]:
    """Hidden states of the layer asked for, and the projected last state of the end token where the config has it."""
    half = tower.positional_embedding.dtype in (torch.bfloat16, torch.float16)
    if half and ids.device.type == "cpu" and len(ids) > 1:
        # torch's attention swaps the first two axes before it projects; in half precision on the CPU a projection of
        # more than one row then takes a path a hundred times as slow.
        tokens, pooled = zip(*(_read(tower, config, row, layer) for row in ids.split(1)), strict=True)
        return torch.cat(tokens), None if pooled[0] is None else torch.cat(pooled)
    layer = config.layer if layer is None else layer
    if not 1 <= layer <= config.layers:
        raise ValueError(f"layer {layer} must be between 1 and layers {config.layers}")
    found = tower.forward_intermediates(
        ids,
        indices=[config.layers - layer],
        stop_early=not config.projection,
        normalize_intermediates=config.final_norm,
        intermediates_only=not config.projection,
        output_fmt="NLC",
    )
    # The end token has the largest id, and open_clip pools at the first of the largest: padding by it does no harm.
    return found["text_intermediates"][0], found.get("text_features")


def _pad(ids: TokenIds, config: TextConfig) -> TokenIds:
    """The same tokens, filled up behind the first end token as another tower wants it."""
    end = ids == config.end
    behind: Tensor = (end.cumsum(1) - end.int()) > 0
    return ids.masked_fill(behind, config.end if config.pad == "end" else 0)
