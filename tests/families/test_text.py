"""Text towers of each family against transformers on the weights of one folder: states, pooled text, clip skip."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm import pipeline
from ldm.errors import UserError
from ldm.families.load import load
from ldm.recipe import Request
from ldm.text import chunks
from ldm.text.prompt import Fragment
from ldm.text.tower import Conditioner

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
PROMPTS = ["a red apple", "", "a very long description of a living room, of its sofas and of what lies behind the end"]


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def both(folder: Path, dtype: torch.dtype) -> tuple[Conditioner, list]:  # type: ignore[type-arg]
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    theirs = [
        kind.from_pretrained(folder / part).to(dtype).eval() for part, kind in kinds.items() if (folder / part).exists()
    ]
    conditioner = load(folder, dtype=dtype).conditioner
    assert conditioner is not None
    return conditioner, theirs


def ids_of(folder: Path, part: str, prompts: list[str]) -> Tensor:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / part)
    return tokenizer(prompts, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids


def final_norm(model: torch.nn.Module) -> torch.nn.Module:
    return getattr(model, "text_model", model).final_layer_norm  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
def test_tokens_are_transformers(folders: dict[str, Path], name: str) -> None:
    conditioner, _ = both(folders[name], torch.float32)
    first = "tokenizer" if (folders[name] / "tokenizer").exists() else "tokenizer_2"
    assert torch.equal(conditioner.tokenize(PROMPTS), ids_of(folders[name], first, PROMPTS))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layer", [None, 1, 2, 3])
@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_states_of_one_tower(folders: dict[str, Path], name: str, layer: int | None, dtype: torch.dtype) -> None:
    conditioner, (theirs,) = both(folders[name], dtype)
    ids = ids_of(folders[name], "tokenizer", PROMPTS)
    with torch.no_grad():
        states = theirs(ids, output_hidden_states=True).hidden_states
        expected = final_norm(theirs)(states[-(layer or 1)])
        assert relative(conditioner.encode(ids, layer=layer).tokens, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layer", [None, 1, 3])
def test_states_of_two_towers(folders: dict[str, Path], layer: int | None, dtype: torch.dtype) -> None:
    folder = folders["sdxl"]
    conditioner, theirs = both(folder, dtype)
    prompts = [PROMPTS[0], PROMPTS[2]]
    with torch.no_grad():
        outs = [
            model(ids_of(folder, part, prompts), output_hidden_states=True)
            for model, part in zip(theirs, ("tokenizer", "tokenizer_2"), strict=True)
        ]
        cond = conditioner.encode(conditioner.tokenize(prompts), (96, 64), layer=layer)
    expected = torch.cat([out.hidden_states[-(layer or 2)] for out in outs], dim=2)
    assert relative(cond.tokens, expected) < TOLERANCE[dtype]
    assert cond.vector is not None and cond.vector.shape == (2, 48 + 6 * 8)
    assert relative(cond.vector[:, :48], outs[1].text_embeds) < TOLERANCE[dtype]
    from diffusers.models.embeddings import get_timestep_embedding

    sizes = get_timestep_embedding(
        torch.tensor([96, 64, 0, 0, 96, 64]), 8, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    assert relative(cond.vector[0, 48:], sizes.flatten().to(dtype)) < 1e-5


def test_no_words_are_zeros_where_the_family_has_it_so(folders: dict[str, Path]) -> None:
    conditioner = load(folders["sdxl"]).conditioner
    assert conditioner is not None
    with torch.no_grad():
        cond = conditioner(["", "a"], (32, 32))
        other = load(folders["sd1"]).conditioner([""])  # type: ignore[misc]
    assert cond.vector is not None
    assert not cond.tokens[0].any() and not cond.vector[0, :48].any() and cond.vector[0, 48:].any()
    assert cond.tokens[1].any() and other.tokens.any()


def test_the_refiner_is_told_a_score(folders: dict[str, Path]) -> None:
    conditioner = load(folders["sdxl-refiner"]).conditioner
    assert conditioner is not None
    fragments = [(Fragment(text),) for text in "abcd"]
    texts = [chunks.chunks(chunks.pieces(each, conditioner, ()), conditioner) for each in fragments]
    both = chunks.read(conditioner, texts, (32, 32), scores=[6.0, 6.0, 2.5, 2.5])
    cond, uncond = both[:2], both[2:]
    again = conditioner.encode(conditioner.tokenize(["a", "c"]), (32, 32), scores=[6.0, 2.5])
    assert cond.vector is not None and uncond.vector is not None and again.vector is not None
    assert torch.allclose(torch.stack([cond.vector[0], uncond.vector[0]]), again.vector, atol=1e-6)
    assert not torch.equal(cond.vector[0, 48:], uncond.vector[0, 48:])


def test_clip_skip_in_a_recipe(folders: dict[str, Path]) -> None:
    painter = pipeline.load(str(folders["sd1"]), "cpu")
    pictures = [painter.txt2img(Request("a red apple", steps=2, clip_skip=skip)) for skip in (None, 1, 2)]
    assert torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[1], pictures[2])
    with pytest.raises(UserError, match="clip skip is 4: choose between 1 and 3"):
        painter.complete(Request("a", clip_skip=4))
    batch = pipeline.Batch([painter.complete(Request("a", clip_skip=2))], slice(1))
    assert "Clip skip: 2" in painter.recipes(batch)[0].parameters()
