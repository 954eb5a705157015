"""Prompts of any length: nothing is dropped, weights follow a closed form, and a plain prompt is read as ever."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm import pipeline
from ldm.conditioning import Conditioning
from ldm.diffusion.editing import by_step, composed
from ldm.diffusion.guidance import mixed
from ldm.errors import UserError
from ldm.pipeline import Pipeline
from ldm.recipe import Request
from ldm.text.chunks import Piece, chunks, pieces, read
from ldm.text.prompt import Fragment, parse
from ldm.text.reader import Reader

LONG = "one two three, four five six seven eight nine ten eleven twelve thirteen"


@pytest.fixture(scope="module")
def painter(tiny_model: Path) -> Pipeline:
    return pipeline.load(str(tiny_model), "cpu")


@pytest.fixture
def reader(painter: Pipeline) -> Reader:
    return Reader(painter.conditioner)


def states(reader: Reader, *texts: str) -> Conditioning:
    made = [reader.chunks(parse(text).at(0, 1)[0]) for text in texts]
    with torch.no_grad():
        return read(reader.conditioner, made, (32, 32), scores=[6.0] * len(texts), embeddings=reader.embeddings)


def test_a_plain_prompt_is_read_as_ever(reader: Reader) -> None:
    texts = ["a red apple", "", "a dog, on a tree"]
    with torch.no_grad():
        expected = reader.conditioner(texts)
    assert torch.equal(states(reader, *texts).tokens, expected.tokens)


def test_no_token_is_lost(reader: Reader) -> None:
    made = reader.chunks(parse(LONG).at(0, 1)[0])
    tokens = reader.conditioner.tokenizer.encode(LONG)
    assert [piece.id for chunk in made for piece in chunk] == tokens
    assert len(made) == math.ceil(len(tokens) / 10) and all(len(chunk) <= 10 for chunk in made)
    cond = states(reader, LONG)
    assert cond.tokens.shape == (1, 12 * len(made), 16) and cond.mask is None


def test_each_chunk_is_read_by_itself(reader: Reader) -> None:
    both, first, second = (states(reader, text).tokens for text in ("a cat BREAK a dog", "a cat", "a dog"))
    torch.testing.assert_close(both, torch.cat([first, second], dim=1))


def test_a_chunk_ends_behind_a_near_comma(reader: Reader) -> None:
    comma = reader.conditioner.tokenizer.encode(",")[0]
    near = [Piece(i, 1.0) for i in (5, 5, 5, 5, 5, 5, 5, 5, comma, 5, 5, 5)]
    far = [Piece(i, 1.0) for i in (5, comma, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5)]
    assert [len(c) for c in chunks([near], reader.conditioner)] == [9, 3]
    assert [len(c) for c in chunks([far], reader.conditioner)] == [10, 2]
    assert chunks([[]], reader.conditioner) == [[]]


def test_company_of_another_length_changes_nothing(painter: Pipeline) -> None:
    requests = [Request("a cat", seed=1), Request(LONG, "a dog", seed=2), Request("a", LONG, seed=3)]
    together = painter.txt2img(*requests)
    alone = torch.cat([painter.txt2img(r) for r in requests])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


def test_what_stands_behind_the_first_chunk_is_heard(painter: Pipeline) -> None:
    a, b = (painter.txt2img(Request(f"{LONG} {word}", seed=1)) for word in ("cat", "dog"))
    assert not torch.equal(a, b)


def test_weights_by_closed_form(reader: Reader) -> None:
    """Each token's state times its weight, then all of the chunk times what restores its mean."""
    plain = states(reader, "a cat").tokens
    weighted = states(reader, "a (cat:1.5)").tokens
    first = len(reader.conditioner.tokenizer.encode("a"))
    count = len(reader.conditioner.tokenizer.encode("cat"))
    w = torch.ones(12)
    w[1 + first : 1 + first + count] = 1.5
    heavy = plain * w[None, :, None]
    torch.testing.assert_close(weighted, heavy * plain.mean() / heavy.mean())
    torch.testing.assert_close(weighted.mean(), plain.mean())
    assert torch.equal(states(reader, "(a cat:1.0)").tokens, plain)


def test_weights_change_only_their_own_prompt(reader: Reader) -> None:
    both = states(reader, "a cat", "a (cat:1.5)").tokens
    assert torch.equal(both[0], states(reader, "a cat", "a cat").tokens[0])


def write(path: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors, path)
    return path


def test_an_embedding_stands_for_its_vectors(painter: Pipeline, tmp_path: Path) -> None:
    """Learnt vectors that are those of real tokens give the states of these tokens."""
    ids = painter.conditioner.tokenizer.encode("red cat")
    rows = painter.conditioner.tower.token_embedding.weight[ids].detach().clone()
    fresh = pipeline.Pipeline(painter.model, painter.made)
    fresh.embed([write(tmp_path / "My-Style.safetensors", emb_params=rows)])
    fresh.embed([write(tmp_path / "file.safetensors", **{"<birb>": rows[0] + 1})])
    expected = states(Reader(painter.conditioner), "a red cat, a").tokens
    assert torch.equal(states(fresh.reader, "a my-style, a").tokens, expected)
    assert not torch.equal(states(fresh.reader, "a my-styles, a").tokens, expected)
    assert torch.equal(states(fresh.reader, "a <birb>").tokens, states(fresh.reader, "a file").tokens)
    assert not torch.equal(
        states(fresh.reader, "a <birb>").tokens, states(Reader(painter.conditioner), "a <birb>").tokens
    )
    assert torch.equal(painter.txt2img(Request("red cat")), fresh.txt2img(Request("my-style")))
    assert set(fresh.made.inputs) == {"embedding My-Style", "embedding file"}
    assert not painter.conditioner.tower.token_embedding._forward_hooks


def test_an_embedding_is_never_cut(painter: Pipeline, tmp_path: Path) -> None:
    fresh = pipeline.Pipeline(painter.model, painter.made)
    fresh.embed([write(tmp_path / "four.safetensors", emb_params=torch.randn(4, 16))])
    made = fresh.reader.chunks(parse("a a a a a a a a four a").at(0, 1)[0])
    assert [[piece.id < 0 for piece in chunk] for chunk in made] == [[False] * 8, [True] * 4 + [False]]


def test_embeddings_that_are_none(painter: Pipeline, tmp_path: Path) -> None:
    cases = {
        "is for a text tower of width 768, this model's is 16": {"emb_params": torch.zeros(2, 768)},
        "is no textual inversion: it holds a, b": {"a": torch.zeros(1, 16), "b": torch.zeros(1, 16)},
        "width 16 and 16, this model's is 16": {"clip_l": torch.zeros(1, 16), "clip_g": torch.zeros(1, 16)},
        "width unknown": {"emb_params": torch.zeros(2, 2, 16)},
        "11 vectors long: at most 10": {"emb_params": torch.zeros(11, 16)},
    }
    fresh = pipeline.Pipeline(painter.model, painter.made)
    for says, tensors in cases.items():
        with pytest.raises(UserError, match=says):
            fresh.embed([write(tmp_path / "x.safetensors", **tensors)])
    assert not fresh.reader.embeddings


def test_composition_is_a_weighted_sum() -> None:
    def denoiser(x: torch.Tensor, sigma: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        return x * 0 + cond.tokens[:, :1, :1, None]

    def conds(*values: float) -> Conditioning:
        return Conditioning(torch.tensor(values).float()[:, None, None])

    x, sigma = torch.zeros(2, 1, 1, 1), torch.ones(2)
    denoise = composed(
        denoiser, conds(5, 7, 11), conds(1, 2), torch.tensor([1, 0.5, 2]), torch.tensor([0, 1, 1]), mixed(3.0)
    )
    assert denoise(x, sigma).flatten().tolist() == [1 + 3 * 4, 2 + 3 * (0.5 * 5 + 2 * 9)]


def test_and_of_one_prompt_with_itself_is_a_higher_scale(painter: Pipeline) -> None:
    twice = painter.txt2img(Request("a cat AND a cat", cfg_scale=2.0, sampler="ddim"))
    once = painter.txt2img(Request("a cat", cfg_scale=4.0, sampler="ddim"))
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-3)


def test_each_step_has_its_own_denoiser() -> None:
    choose = by_step([4.0, 2.0, 1.0, 0.0], [lambda x, s, i=i: x + i for i in range(3)])
    x = torch.zeros(1)
    asked = [4.0, 3.0, 2.0, 1.5, 1.0, 0.5, 1e-9]
    assert [float(choose(x, torch.tensor([s]))) for s in asked] == [0, 0, 1, 1, 2, 2, 2]


def test_a_schedule_changes_the_prompt_on_the_way(painter: Pipeline) -> None:
    def paint(prompt: str, **more: object) -> torch.Tensor:
        return painter.txt2img(Request(prompt, seed=1, steps=4, **more))  # type: ignore[arg-type]

    assert torch.equal(paint("a [cat:dog:0]"), paint("a dog"))
    assert torch.equal(paint("a [cat:dog:1.0]"), paint("a cat"))
    middle = paint("a [cat:dog:2]")
    assert not torch.equal(middle, paint("a cat")) and not torch.equal(middle, paint("a dog"))
    assert torch.equal(paint("a [cat:dog:0.5]"), middle)
    assert not torch.equal(paint("a [cat|dog]"), paint("a [dog|cat]"))
    torch.testing.assert_close(paint("a", negative="[cat:dog:1.0]"), paint("a", negative="cat"))


def test_plain_prompt_takes_signs_as_they_are(painter: Pipeline) -> None:
    smile = Request("a smile :)", plain_prompt=True)
    assert not torch.equal(painter.txt2img(smile), painter.txt2img(replace(smile, prompt="a smile :")))
    with pytest.raises(UserError, match="closes nothing"):
        painter.complete(Request("a smile :)"))
    with pytest.raises(UserError, match="AND is of the prompt"):
        painter.complete(Request("a", "b AND c"))


def test_wildcards_are_drawn_by_each_pictures_seed(painter: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "n.txt").write_text("\n".join(map(str, range(50))))
    fresh = pipeline.Pipeline(painter.model, painter.made)
    assert [r.prompt for r in fresh.requests(Request(""), ["__n__"])] == ["__n__"]
    fresh.reader.wildcards = tmp_path
    drawn = [r.prompt for r in fresh.requests(Request("", seed=5), ["__n__"], 4)]
    assert len(set(drawn)) > 1
    assert [fresh.requests(Request("", seed=5 + i), ["__n__"])[0].prompt for i in range(4)] == drawn


def test_pieces_know_their_fragments(reader: Reader) -> None:
    stretches = pieces([Fragment("a"), Fragment(None), Fragment("b", 2.0)], reader.conditioner, ())
    assert [[piece.weight for piece in stretch] for stretch in stretches] == [[1.0], [2.0]]
