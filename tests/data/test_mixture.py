"""Mixtures against counting in plain Python, and the order's promises."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gsa.data import (
    MixedRows,
    PackedRows,
    PrepareConfig,
    TokenShards,
    open_rows,
    prepare,
    save_byte_tokenizer,
)

SEQ_LEN = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Shards of a's, b's and c's, three documents each; their folders by name."""
    folder = tmp_path_factory.mktemp("mixture")
    for letter, rows in (("a", 21), ("b", 8), ("c", 51)):
        text = folder / f"{letter}-text"
        text.mkdir()
        for i in range(3):
            (text / f"{i}.txt").write_text(letter * (rows * SEQ_LEN // 3))
        prepare(PrepareConfig(inputs=(str(text),), out=str(folder / letter)))
    return {letter: folder / letter for letter in "abc"}


@pytest.fixture(scope="module")
def mix(folders):
    """mix("a:0.7,b:0.3", seed=0): rows of the folders of those letters."""

    def opened(data, seed=0):
        parts = (part.split(":") for part in data.split(","))
        named = ",".join(f"{folders[name]}:{weight}" for name, weight in parts)
        return open_rows(named, seq_len=SEQ_LEN, seed=seed)

    return opened


def assert_end_to_end(whole, parts):
    """The parts, one after another, are the whole batch."""
    for name in ("input_ids", "labels"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(b, name) for b in parts], 1))
    bounds, filled = [], 0
    for part in parts:
        bounds += [bound + filled for bound in part.cu_seqlens.tolist()[:-1]]
        filled += part.input_ids.numel()
    assert whole.cu_seqlens.tolist() == [*bounds, filled]


weights = st.lists(st.fractions(Fraction(1, 10**6), 10**3), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(weights, st.integers(0, 2**63), st.integers(0, 10**13), st.integers(1, 60))
def test_numbers_before_a_position_agree_with_counting(folders, weights, seed, position, rows):
    sources = [
        PackedRows(TokenShards(folder), seq_len=SEQ_LEN, seed=seed) for folder in folders.values()
    ][: len(weights)]
    mixed = MixedRows(sources, weights, seed=seed)
    assert mixed.counts(0) == [0] * len(weights)
    chosen = mixed.source_ids(position, rows)
    counted = np.bincount(chosen, minlength=len(weights)) + mixed.counts(position)
    assert counted.tolist() == mixed.counts(position + rows)
    for count, weight in zip(mixed.counts(position), mixed.weights, strict=True):
        off = abs(count - weight * position)
        assert off < len(weights) - 1 or off == 0, "shares are exact, however far training went"
    assert sum(mixed.counts(position)) == position


def test_each_source_keeps_the_order_it_has_alone(mix, folders):
    mixed = mix("a:0.5,b:0.2,c:0.3", seed=3)
    chosen, rows = mixed.source_ids(0, 400), mixed.row_ids(0, 400)
    own_rows = [source.num_rows for source in mixed.sources]
    assert own_rows == [21, 8, 51]
    assert mixed.epochs(400) == [200 // 21, 80 // 8, 120 // 51]
    for i, name in enumerate("abc"):
        alone = PackedRows(TokenShards(folders[name]), seq_len=SEQ_LEN, seed=3)
        own = rows[chosen == i]
        assert own.tolist() == alone.row_ids(0, len(own)).tolist()
        letters = {ord(name), 256}
        for position in np.flatnonzero(chosen == i)[:30].tolist():
            row = mixed.batch(position, 1).input_ids
            assert set(row[0].tolist()) <= letters, "a row is of one source"
            at = rows[position] * SEQ_LEN
            assert row[0].tolist() == alone.shards.tokens[at : at + SEQ_LEN].tolist()


@pytest.mark.parametrize("position", [0, 17, 10**12 + 5])
def test_the_order_does_not_depend_on_how_many_rows_are_asked(mix, position):
    mixed = mix("a:0.7,b:0.05,c:0.25")
    alone = [mixed.batch(position + i, 1) for i in range(4)]
    assert_end_to_end(mixed.batch(position, 4), alone)


@pytest.mark.parametrize("data", ["a:0.7,b:0.3", "c:1"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_shares_of_all_processes_are_the_batch_of_one(mix, data, world):
    rows = mix(data)
    for position in (0, 8, 10**9):
        shares = [rows.share(position, 8, rank, world) for rank in range(world)]
        assert {share.input_ids.numel() for share in shares} == {8 // world * SEQ_LEN}
        assert_end_to_end(rows.batch(position, 8), shares)


def test_shares_that_cannot_be_equal_are_refused(mix):
    rows = mix("a:1,b:1")
    with pytest.raises(ValueError, match=r"rows: 6 rows .* by 4 processes; use .* such as 8"):
        rows.share(0, 6, 0, 4)
    with pytest.raises(ValueError, match=r"rank: expected 0 … 1, got 2"):
        rows.share(0, 4, 2, 2)
    with pytest.raises(ValueError, match="world: expected an integer of at least 1"):
        rows.share(0, 4, 0, 0)


def test_the_order_is_of_seed_and_weights_alone(mix):
    first = mix("a:0.6,b:0.3,c:0.1").source_ids(10**10, 500)
    assert np.array_equal(mix("a:6,b:3,c:1").source_ids(10**10, 500), first), "only proportions"
    assert not np.array_equal(mix("a:0.6,b:0.3,c:0.1", seed=1).source_ids(10**10, 500), first)
    assert not np.array_equal(mix("a:0.6,b:0.2,c:0.2").source_ids(10**10, 500), first)


def test_the_order_stays_what_it_is(mix):
    """A run resumed with a later version goes on in the order it began with."""
    assert (
        "".join(map(str, mix("a:0.5,b:0.2,c:0.3").source_ids(0, 30)))
        == "102020102010202010201020201020"
    )


def test_the_fingerprint_covers_sources_weights_and_order(mix):
    names = ["a:0.7,b:0.3", "a:0.6,b:0.4", "b:0.3,a:0.7", "a:0.7,c:0.3", "a:1"]
    assert len({mix(name).shards.fingerprint for name in names}) == 5
    same = mix("a:7,b:3").shards
    assert same.fingerprint == mix("a:0.7,b:0.3").shards.fingerprint
    assert same.weights == (Fraction(7, 10), Fraction(3, 10))
    assert same.num_tokens == sum(part.num_tokens for part in same.parts)


def test_a_folder_that_exists_wins_over_parsing(folders, tmp_path):
    odd = tmp_path / "a:0.5,b:0.5"
    odd.symlink_to(folders["c"])
    rows = open_rows(str(odd), seq_len=SEQ_LEN, seed=0)
    assert isinstance(rows, PackedRows)
    assert rows.shards.fingerprint == TokenShards(folders["c"]).fingerprint
    alone = open_rows(str(folders["a"]), seq_len=SEQ_LEN, seed=4)
    assert torch.equal(
        alone.batch(0, 9).input_ids,
        PackedRows(TokenShards(folders["a"]), seq_len=SEQ_LEN, seed=4).batch(0, 9).input_ids,
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{a}:0.5,{b}", r"data: expected FOLDER:WEIGHT .*, got '[^',]*/b'; write for example"),
        ("{a}:0.5,", r"expected FOLDER:WEIGHT .*, got ''"),
        ("{a}:0.5,:0.5", r"expected FOLDER:WEIGHT .*, got ':0\.5'"),
        ("{a}:0,{b}:1", r"expected a finite weight above 0 .*, got '[^',]*/a:0'"),
        ("{a}:1,{b}:-1", r"expected a finite weight above 0 .*, got '[^',]*/b:-1'"),
        ("{a}:1,{b}:inf", r"expected a finite weight above 0 .*, got '[^',]*/b:inf'"),
        ("{a}:1,{b}:nan", r"expected a finite weight above 0 .*, got '[^',]*/b:nan'"),
        ("{a}:1,{b}:1e99999999", r"expected a finite weight above 0"),
        ("{a}:1,{b}:half", r"expected a finite weight above 0 .*, got '[^',]*/b:half'"),
        ("{a}:1,{a}:2", r"data: .*/a and .*/a hold the same tokens"),
    ],
)
def test_errors_name_the_part(folders, data, message):
    with pytest.raises(ValueError, match=message):
        open_rows(data.format(**folders), seq_len=SEQ_LEN, seed=0)


def test_missing_folders_and_short_texts_are_named(folders):
    with pytest.raises(FileNotFoundError, match="absent: no such folder"):
        open_rows(f"{folders['a']}:1,absent:1", seq_len=SEQ_LEN, seed=0)
    with pytest.raises(FileNotFoundError, match="absent: no such folder"):
        open_rows("absent", seq_len=SEQ_LEN, seed=0)
    with pytest.raises(ValueError, match=r"a row takes 100 tokens, but .*/b holds"):
        open_rows(f"{folders['a']}:1,{folders['b']}:1", seq_len=100, seed=0)


def test_sources_of_different_tokenizers_are_refused(folders, tmp_path):
    save_byte_tokenizer(tmp_path / "tokenizer")
    definition = tmp_path / "tokenizer/tokenizer.json"
    definition.write_text(definition.read_text().replace("<|pad|>", "<|rest|>"))
    config = tmp_path / "tokenizer/tokenizer_config.json"
    config.write_text(config.read_text().replace("<|pad|>", "<|rest|>"))
    (tmp_path / "text.txt").write_text("other " * 40)
    out, text = str(tmp_path / "other"), str(tmp_path / "text.txt")
    prepare(PrepareConfig(inputs=(text,), out=out, tokenizer=str(tmp_path / "tokenizer")))
    with pytest.raises(ValueError, match=r"data: .*/a and .*/other were made with different tok"):
        open_rows(f"{folders['a']}:1,{out}:1", seq_len=SEQ_LEN, seed=0)


def test_arguments_in_python_are_checked(folders):
    sources = [
        PackedRows(TokenShards(folders[name]), seq_len=length, seed=0)
        for name, length in (("a", 8), ("b", 8), ("c", 4))
    ]
    with pytest.raises(ValueError, match="weights: expected one for each of 2 sources, got 1"):
        MixedRows(sources[:2], [1], seed=0)
    with pytest.raises(ValueError, match=r"/b: expected a finite weight above 0, got nan"):
        MixedRows(sources[:2], [1, float("nan")], seed=0)
    with pytest.raises(ValueError, match="expected rows of one seq_len"):
        MixedRows(sources, [1, 1, 1], seed=0)
    mixed = MixedRows(sources[:2], [1, 1], seed=0)
    with pytest.raises(ValueError, match="position: expected an integer of at least 0, got -1"):
        mixed.batch(-1, 2)
    with pytest.raises(ValueError, match="rows: expected an integer of at least 1, got 0"):
        mixed.batch(0, 0)
