"""The byte tokenizer loses nothing, and loads where any tokenizer loads."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from gsa.data import decode_bytes, save_byte_tokenizer
from gsa.data.byte_tokenizer import EOS_ID, PAD_ID, VOCAB_SIZE, build_byte_tokenizer

TOKENIZER = build_byte_tokenizer()
HARD = ["", "  lead", "a\r\nb\n\n", "nul \0 in it", "😀 é \u200b ﬁ", "tab\tend ", "\ufeffmark"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("byte-tokenizer")
    save_byte_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: "<|" not in text))
def test_ids_are_the_utf8_bytes_and_decode_back(text):
    ids = TOKENIZER.encode(text).ids
    assert bytes(ids) == text.encode("utf-8")
    assert TOKENIZER.decode(ids) == text
    assert decode_bytes(ids) == text.encode("utf-8")


@pytest.mark.parametrize("text", HARD)
def test_auto_tokenizer_round_trips(loaded, text):
    ids = loaded(text)["input_ids"]
    assert ids == list(text.encode("utf-8"))
    assert loaded.decode(ids) == text


def test_auto_tokenizer_knows_the_special_tokens(loaded):
    assert len(loaded) == VOCAB_SIZE == 258
    assert (loaded.eos_token_id, loaded.pad_token_id) == (EOS_ID, PAD_ID) == (256, 257)
    assert loaded("a<|endoftext|>")["input_ids"] == [97, EOS_ID]
    assert loaded.decode([97, EOS_ID, PAD_ID], skip_special_tokens=True) == "a"


def test_auto_tokenizer_loads_beside_a_gsa_model_config(tmp_path):
    save_byte_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gsa"}))
    assert len(AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)) == VOCAB_SIZE


def test_batches_pad_on_the_left(loaded):
    padded = loaded(["abc", "d"], padding=True)
    assert padded["input_ids"] == [[97, 98, 99], [PAD_ID, PAD_ID, 100]]
    assert padded["attention_mask"] == [[1, 1, 1], [0, 0, 1]]


def test_bytes_that_are_not_utf8_decode_exactly():
    assert decode_bytes([0xFF, 0xC3, EOS_ID, 0x28, PAD_ID]) == b"\xff\xc3\x28"
    with pytest.raises(ValueError, match=r"0 … 257, got 258"):
        decode_bytes([258])
