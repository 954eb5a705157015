"""Tokens and hidden states: open_clip's vocabulary, cut short or whole, and what reaches the backbone."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ldm.text.open_clip import open_clip
from ldm.text.tower import Conditioner, TextConfig, Tokenizer

PROMPTS = ["a red apple", "", "Ünïcödé, 漢字 & emoji 🍎!", "l'été; don't  stop   1234 times", "a " * 200]
TINY = TextConfig(width=32, heads=2, layers=3, context_length=16, vocab_size=700)


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return Tokenizer(TINY)


def test_the_full_vocabulary_is_open_clips() -> None:
    theirs = open_clip().get_tokenizer("ViT-L-14")(PROMPTS)
    ids = Tokenizer(TextConfig(pad="zero"))(PROMPTS)
    # open_clip ends a text that it cuts with the end token, as we do
    assert torch.equal(ids, theirs)


def test_padding_with_the_end_token() -> None:
    config = TextConfig()
    ids = Tokenizer(config)(["a red apple"])
    assert ids[0, 0] == 49406 and (ids[0, 4:] == 49407).all()
    zeros = Tokenizer(TextConfig(pad="zero"))(["a red apple"])
    assert zeros[0, 4] == 49407 and (zeros[0, 5:] == 0).all()


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=40))
@example("<START_OF_TEXT>")
@example("a <end_of_text> b")
def test_a_smaller_vocabulary_encodes_any_text(small: Tokenizer, text: str) -> None:
    assert all(0 <= token < TINY.vocab_size - 2 for token in small.encode(text))


def test_a_smaller_vocabulary_loses_nothing(small: Tokenizer) -> None:
    words = {i: word for word, i in small._bpe.encoder.items()}
    text = "".join(words[i] for i in small.encode("a lighthouse by the sea")).replace("</w>", " ")
    assert text.strip() == "a lighthouse by the sea"


def test_rows_that_a_fine_tuning_added_change_no_token() -> None:
    wider = TextConfig(**{**vars(TINY), "vocab_size": 49411})
    plain = TextConfig(**{**vars(TINY), "vocab_size": 49408})
    assert torch.equal(Tokenizer(wider)(PROMPTS), Tokenizer(plain)(PROMPTS))
    assert wider.end == 49407


def test_what_does_not_fit_is_cut(small: Tokenizer) -> None:
    long = "zebra " * 30
    ids = small(["a", long])
    assert ids.shape == (2, 16) and ids[1, 1:-1].tolist() == small.encode(long)[:14]
    assert ids[1, -1] == TINY.vocab_size - 1


def test_states_follow_layer_and_norm() -> None:
    towers = {}
    for layer, final_norm in ((1, True), (2, True), (2, False)):
        torch.manual_seed(0)
        conditioner = Conditioner(TextConfig(**{**vars(TINY), "layer": layer, "final_norm": final_norm})).eval()
        with torch.no_grad():
            towers[layer, final_norm] = conditioner(["a red apple"]).tokens
    assert towers[1, True].shape == (1, 16, 32)
    assert not torch.allclose(towers[1, True], towers[2, True])
    assert not torch.allclose(towers[2, True], towers[2, False])
    norm = torch.nn.functional.layer_norm(towers[2, False], (32,))  # fresh norms scale by 1 and add 0
    assert torch.allclose(norm, towers[2, True], atol=1e-5)


def test_half_precision_reads_one_row_at_a_time() -> None:
    conditioner = Conditioner(TextConfig(**{**vars(TINY), "projection": 8})).to(torch.bfloat16).eval()
    ids = conditioner.tokenize(["a red apple", "two blue sofas"])
    with torch.no_grad():
        both, one = conditioner.encode(ids), conditioner.encode(ids[1:])
    assert both.vector is not None and one.vector is not None
    assert torch.equal(both.tokens[1:], one.tokens) and torch.equal(both.vector[1:], one.vector)


def test_attention_is_causal() -> None:
    conditioner = Conditioner(TINY).eval()
    ids = conditioner.tokenize(["a red apple"])
    other = ids.clone()
    other[0, 5:] = 1
    with torch.no_grad():
        a, b = conditioner.encode(ids).tokens, conditioner.encode(other).tokens
    assert torch.allclose(a[:, :5], b[:, :5], atol=1e-6) and not torch.allclose(a[:, 5:], b[:, 5:])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("heads", 5, "not divisible by heads 5"),
        ("layer", 0, "layer 0"),
        ("layer", 4, "layer 4"),
        ("vocab_size", 514, "514"),
    ],
)
def test_settings_that_cannot_be(field: str, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextConfig(**{**vars(TINY), field: value})
