"""Mistral's tokenizer against SentencePiece reading the model that it is made from."""

import random
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from gsa.data import PrepareConfig, TokenShards, prepare
from gsa.data.encoding import load_encoder
from gsa.data.mistral_tokenizer import load_mistral_tokenizer, mistral_model_file
from gsa.data.readers import Piece

HOSTILE = [
    "",
    " ",
    "The gate forgets; the slot remembers.",
    "  leading, trailing  and   inner   spaces   ",
    "\n\n\ttabs\r\nand\x0bbreaks\x85\u2028\u2029",
    "def f(x):\n        return x  # eight spaces\n",
    "naïve café, Ａ ﬁ, e\u0301 é, Ωμέγα, дом, 夢, हिन्दी, العربية",
    "😀👩‍👩‍👧 \U0010ffff \ue000 \u200b\ufeff",
    "</s><s><unk><0x0A>[INST]",
    "▁▁ the mark of a space ▁",
    "\0\x01\x1f\x7f",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaa==========-------1111111111",
]
PARTS = ["a", "the", " ", "  ", "     ", "\n", "\t", "é", "😀", "▁", "</s>", "==", "1", "ing", "夢"]


@pytest.fixture(scope="module")
def pieces():
    return SentencePieceProcessor(model_file=str(mistral_model_file()))


@pytest.fixture(scope="module")
def encoder():
    return load_encoder("mistral")


@pytest.fixture(scope="module")
def decoding():
    return load_mistral_tokenizer()


def ids_of(encoder, *texts):
    """Each text's ids, the end token left off."""
    encoded = list(encoder.encode(Piece(text, True) for text in texts))
    assert all(part.ends_document and part.ids[-1] == 2 for part in encoded)
    return [part.ids[:-1].tolist() for part in encoded]


def test_ids_and_texts_are_those_of_sentencepiece(pieces, encoder, decoding):
    for text, ids in zip(HOSTILE, ids_of(encoder, *HOSTILE), strict=True):
        assert ids == pieces.encode(text), repr(text)
        assert decoding.decode(ids) == pieces.decode(ids), repr(text)
        if "▁" not in text:  # which both read as a space
            assert decoding.decode(ids) == text
    assert (encoder.vocab_size, encoder.eos_id) == (32_000, 2)
    assert (decoding.bos_token_id, decoding.eos_token_id, decoding.unk_token_id) == (1, 2, 0)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=30))
def test_any_text(pieces, encoder, decoding, text):
    (ids,) = ids_of(encoder, text)
    assert ids == pieces.encode(text)
    assert decoding.decode(ids) == pieces.decode(ids)


def test_runs_and_mixtures_of_what_merges(pieces, encoder):
    rng = random.Random(0)
    texts = [part * n for part in PARTS for n in (2, 3, 7, 16, 17, 31, 100)]
    texts += ["".join(rng.choices(PARTS, k=rng.randint(1, 20))) for _ in range(3000)]
    assert ids_of(encoder, *texts) == [pieces.encode(text) for text in texts]


def test_shards_need_the_packages_no_more(tmp_path, pieces, monkeypatch):
    (tmp_path / "a.txt").write_text(text := "To be, or not to be:\n  that </s> is the question. 😀")
    given = PrepareConfig(
        inputs=(str(tmp_path / "a.txt"),), out=str(tmp_path / "shards"), tokenizer="mistral"
    )
    prepare(given).verify()
    for name in ("mistral_common", "sentencepiece"):
        monkeypatch.setitem(sys.modules, name, None)
    shards = TokenShards(tmp_path / "shards")
    assert (shards.vocab_size, shards.eos_id, shards.tokens.dtype.name) == (32_000, 2, "uint16")
    assert shards.document(0).tolist() == [*pieces.encode(text), 2]
    tokenizer = shards.load_tokenizer()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, 32_000)
    assert tokenizer("To be", add_special_tokens=False)["input_ids"] == pieces.encode("To be")
    assert tokenizer("To be")["input_ids"] == pieces.encode("To be"), "nothing is put before it"
    assert tokenizer.decode(shards.document(0), skip_special_tokens=True) == text


@pytest.mark.parametrize("name", ["mistral_common", "sentencepiece"])
def test_missing_packages_are_named(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "a.txt").write_text("text")
    given = PrepareConfig(
        inputs=(str(tmp_path / "a.txt"),), out=str(tmp_path / "x"), tokenizer="mistral"
    )
    with pytest.raises(ImportError, match=r"pip install 'gated-slots\[mistral\]'"):
        prepare(given)
    assert not (tmp_path / "x").exists()
