"""A shard folder is checked when it is opened, and says what is wrong with it."""

import json
import shutil

import numpy as np
import pytest

from gsa.data import PackedRows, PrepareConfig, TokenShards, prepare

TEXTS = {"a.txt": "alpha", "b.txt": "be", "c.txt": "gamma ray"}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    (folder / "text").mkdir()
    for name, text in TEXTS.items():
        (folder / "text" / name).write_text(text)
    return prepare(PrepareConfig(inputs=(str(folder / "text"),), out=str(folder / "out"))).folder


@pytest.fixture
def folder(original, tmp_path):
    """A copy to break."""
    return shutil.copytree(original, tmp_path / "copy")


def test_contents(original):
    shards = TokenShards(original)
    assert shards.document_starts.tolist() == [0, 6, 9]
    assert shards.num_tokens == len(shards.tokens) == 19
    assert shards.num_documents == 3
    assert bytes(shards.document(2)[:-1].tolist()) == b"gamma ray"
    assert [shards.document_name(i) for i in range(3)] == list(TEXTS)
    assert shards.tokens.dtype == np.dtype("<u2")
    assert not shards.tokens.flags.writeable
    with pytest.raises(IndexError, match=r"expected 0 … 2, got 3"):
        shards.document_name(3)


def test_a_model_with_too_small_a_vocabulary_is_refused(original):
    shards = TokenShards(original)
    shards.require_vocab_size(258)
    shards.require_vocab_size(320)
    with pytest.raises(ValueError, match="ids below 258, the model a vocabulary of 257"):
        shards.require_vocab_size(257)


def test_a_model_with_another_tokenizer_is_refused(original, tmp_path):
    """Its own, none at all, or one with a token more are not another."""
    shards = TokenShards(original)
    shards.require_tokenizer(tmp_path)
    tokenizer = shards.load_tokenizer()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(tmp_path)
    shards.require_tokenizer(tmp_path)
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    definition["model"]["vocab"] |= {"a": 98, "b": 97}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(ValueError, match="another tokenizer than that in"):
        shards.require_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin", "tokenizer/tokenizer.json"])
def test_truncated_and_missing_files_are_named(folder, name):
    size = (folder / name).stat().st_size
    with (folder / name).open("r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(ValueError, match=rf"{name}: expected {size} bytes, got {size - 1}"):
        TokenShards(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"{name}: missing"):
        TokenShards(folder)


def test_a_folder_without_index_is_no_shard_folder(folder):
    (folder / "index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"not a shard folder \(index\.json is missing\)"):
        TokenShards(folder)
    with pytest.raises(FileNotFoundError, match="no such folder; make it with gsa data prepare"):
        TokenShards(folder / "absent")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not the index of a shard folder"),
        ({"version": 2}, "expected version 1, got 2"),
        ({"eos_id": None}, "expected int 'eos_id', got None"),
        ({"dtype": "uint32"}, "expected dtype uint16, got uint32"),
        ({"num_tokens": 20}, r"expected 40 bytes listed for tokens\.bin"),
        ({"sources": []}, "sources name 0 of 3 documents"),
        ({"sources": [{"name": "a"}]}, "expected name, documents, tokens in each of 'sources'"),
        ({"files": {"tokens.bin": {"sha256": ""}}}, "expected bytes, sha256 in each of 'files'"),
    ],
)
def test_a_changed_index_is_refused(folder, change, message):
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | change))
    with pytest.raises(ValueError, match=message):
        TokenShards(folder)


def test_an_index_that_is_not_json_is_refused(folder):
    (folder / "index.json").write_text('{"format": "gsa-tok')
    with pytest.raises(ValueError, match=r"index\.json: expected JSON"):
        TokenShards(folder)


def test_verify_finds_a_flipped_bit(folder):
    TokenShards(folder).verify()
    data = bytearray((folder / "tokens.bin").read_bytes())
    data[4] ^= 1
    (folder / "tokens.bin").write_bytes(data)
    with pytest.raises(ValueError, match=r"tokens\.bin: contents differ"):
        TokenShards(folder).verify()
    data[5] ^= 0x80
    (folder / "tokens.bin").write_bytes(data)
    with pytest.raises(
        ValueError, match=r"tokens\.bin: damaged: a token past the vocabulary of 258"
    ):
        PackedRows(TokenShards(folder), seq_len=4, seed=0).batch(0, 4)


def test_the_fingerprint_follows_the_contents(folder, original, tmp_path):
    assert TokenShards(folder).fingerprint == TokenShards(original).fingerprint
    (tmp_path / "a.txt").write_text("alphb")
    other = prepare(PrepareConfig(inputs=(str(tmp_path / "a.txt"),), out=str(tmp_path / "other")))
    assert other.fingerprint != TokenShards(original).fingerprint
