"""Batches against a construction in plain Python, and the order's promises."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gsa.data import PackedRows, PrepareConfig, TokenShards, prepare, validation_batches
from gsa.data.byte_tokenizer import EOS_ID


def make_shards(folder: Path, lengths: list[int]) -> TokenShards:
    """Shards whose documents have these lengths, the end token counted, and random letters."""
    name = hashlib.sha256(repr(lengths).encode()).hexdigest()[:16]
    if not (folder / name).exists():
        random = np.random.default_rng(len(lengths))
        texts = folder / f"{name}-text"
        texts.mkdir()
        for i, length in enumerate(lengths):
            letters = random.integers(97, 123, length - 1).astype(np.uint8).tobytes()
            (texts / f"{i:04}.txt").write_bytes(letters)
        prepare(PrepareConfig(inputs=(str(texts),), out=str(folder / name)))
    return TokenShards(folder / name)


def naive(tokens: list[int], lengths: list[int], rows: list[tuple[int, int]]):
    """input_ids, labels, cu_seqlens for rows (start, end), one token at a time."""
    begins = {sum(lengths[:i]) for i in range(len(lengths))}
    ids, labels, boundaries = [], [], []
    for start, end in rows:
        for place in range(start, end):
            if place == start or place in begins:
                boundaries.append(len(ids))
                labels.append(-100)
            else:
                labels.append(tokens[place])
            ids.append(tokens[place])
    return ids, labels, [*boundaries, len(ids)]


def assert_is(batch, expected):
    ids, labels, boundaries = expected
    assert batch.input_ids.tolist() == [ids]
    assert batch.labels.tolist() == [labels]
    assert batch.cu_seqlens.tolist() == boundaries
    assert (batch.input_ids.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
    assert batch.cu_seqlens.dtype == torch.int32
    assert (batch.cu_seqlens.diff() > 0).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packing")


lengths_of_documents = st.lists(st.integers(2, 40), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(lengths_of_documents, st.integers(1, 17), st.integers(1, 5), st.integers(0, 40))
def test_batches_equal_the_naive_construction(folder, lengths, seq_len, rows, position):
    shards = make_shards(folder, lengths)
    if sum(lengths) < seq_len:
        return
    packed = PackedRows(shards, seq_len=seq_len, seed=3)
    chosen = packed.row_ids(position, rows) * seq_len
    expected = naive(shards.tokens.tolist(), lengths, [(s, s + seq_len) for s in chosen.tolist()])
    assert_is(packed.batch(position, rows), expected)


@settings(max_examples=40, deadline=None)
@given(lengths_of_documents, st.integers(1, 17), st.integers(1, 5))
def test_validation_covers_every_token_once_in_order(folder, lengths, seq_len, rows):
    shards = make_shards(folder, lengths)
    total = sum(lengths)
    starts = list(range(0, total, seq_len))
    batches = list(validation_batches(shards, seq_len=seq_len, rows=rows))
    for i, batch in enumerate(batches):
        own = [(s, min(s + seq_len, total)) for s in starts[i * rows : (i + 1) * rows]]
        assert_is(batch, naive(shards.tokens.tolist(), lengths, own))
    seen = torch.cat([batch.input_ids[0] for batch in batches])
    assert seen.tolist() == shards.tokens.tolist()


@pytest.mark.parametrize(
    "lengths",
    [[2, 2, 2, 2], [100], [8, 16, 24], [7, 9, 8, 2, 30]],
    ids=["shortest", "one document of many rows", "exact multiples", "mixed"],
)
def test_an_epoch_holds_every_whole_row_once(folder, lengths):
    shards = make_shards(folder, lengths)
    packed = PackedRows(shards, seq_len=8, seed=0)
    assert packed.num_rows == sum(lengths) // 8
    for epoch in range(3):
        rows = packed.row_ids(epoch * packed.num_rows, packed.num_rows)
        assert sorted(rows.tolist()) == list(range(packed.num_rows))
    batch = packed.batch(0, packed.num_rows)
    whole = shards.tokens[: packed.num_rows * 8]
    assert sorted(batch.input_ids[0].tolist()) == sorted(whole.tolist())


def test_the_order_does_not_depend_on_how_many_rows_are_asked(folder):
    packed = PackedRows(make_shards(folder, [33, 21, 50, 2, 90]), seq_len=5, seed=1)
    position = packed.num_rows - 2  # the four rows cross into the next epoch
    together = packed.batch(position, 4)
    alone = [packed.batch(position + i, 1) for i in range(4)]
    for name in ("input_ids", "labels"):
        parts = torch.cat([getattr(batch, name) for batch in alone], dim=1)
        assert torch.equal(getattr(together, name), parts)
    shifted = [batch.cu_seqlens[:-1] + 5 * i for i, batch in enumerate(alone)]
    assert torch.equal(together.cu_seqlens[:-1], torch.cat(shifted).to(torch.int32))
    assert packed.epoch(position + 1) == 0
    assert packed.epoch(position + 2) == 1


def test_epochs_and_seeds_have_orders_of_their_own(folder):
    shards = make_shards(folder, [400])
    first = PackedRows(shards, seq_len=4, seed=0)
    epochs = [first.row_ids(i * first.num_rows, first.num_rows).tolist() for i in range(3)]
    other = PackedRows(shards, seq_len=4, seed=1).row_ids(0, first.num_rows).tolist()
    assert len({tuple(order) for order in (*epochs, other)}) == 4


def test_an_end_token_alone_in_its_row_is_a_segment_without_a_label(folder):
    shards = make_shards(folder, [9, 8])  # the ninth token, an end, opens the second row
    batches = list(validation_batches(shards, seq_len=8, rows=3))
    assert batches[0].cu_seqlens.tolist() == [0, 8, 9, 16, 17]
    assert batches[0].input_ids[0, 8] == EOS_ID
    assert (batches[0].labels[0] == -100).nonzero().flatten().tolist() == [0, 8, 9, 16]


def test_too_few_tokens_say_how_many_are_needed(folder):
    with pytest.raises(ValueError, match=r"a row takes 51 tokens, but .* holds 50"):
        PackedRows(make_shards(folder, [50]), seq_len=51, seed=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: PackedRows(s, seq_len=0, seed=0), "seq_len: expected an integer of at least 1"),
        (lambda s: PackedRows(s, seq_len=5, seed=-1), "seed: expected an integer of at least 0"),
        (lambda s: PackedRows(s, seq_len=5, seed=0).batch(-1, 1), "position: expected"),
        (lambda s: PackedRows(s, seq_len=5, seed=0).batch(0, 0), "rows: expected"),
        (lambda s: PackedRows(s, seq_len=50, seed=0).batch(0, 2**26), "fewer than 2\\^31 tokens"),
        (lambda s: list(validation_batches(s, seq_len=5, rows=0)), "rows: expected"),
    ],
)
def test_bad_arguments_are_named(folder, call, message):
    with pytest.raises(ValueError, match=message):
        call(make_shards(folder, [50]))
