"""Packed sequences: each is computed as if it were alone, empty ones included."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import (
    HOME,
    Tensors,
    assert_close,
    assert_same,
    cotangents,
    evaluate,
    make_inputs,
    oracle,
)

from gsa.ops import check_cu_seqlens, gated_slot_attention

LENGTHS = {
    "one": [70],
    "ones": [1, 1, 1, 1],
    "empty-ends": [0, 0, 5, 70, 0],
    "empty-middle": [64, 0, 0, 1, 65, 3],
    "chunks": [64, 128, 63, 1, 64],
    "short": [3, 1, 7, 2, 0, 9, 1],
    "all-empty": [0, 0, 0],
    "long-among-short": [2, 400, 1, 0, 130],
}


def bounds(lengths: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(HOME.device, dtype)


def one_by_one(impl: str, inputs: Tensors, d, lengths: list[int]) -> Tensors:
    """Results of running every sequence alone, put together again."""
    parts, start = [], 0
    for s, length in enumerate(lengths):
        piece = {
            name: x[s : s + 1] if name == "initial_memory" else x[:, start : start + length]
            for name, x in inputs.items()
        }
        alone = (d[0][:, start : start + length], d[1][s : s + 1])
        parts.append(evaluate(partial(gated_slot_attention, impl=impl), piece, alone))
        start += length
    by_sequence = {"memory", "d_initial_memory"}
    return {
        name: torch.cat([part[name] for part in parts], 0 if name in by_sequence else 1)
        for name in parts[0]
    }


def packing(impl: str, cu_seqlens: torch.Tensor):
    return partial(gated_slot_attention, cu_seqlens=cu_seqlens, impl=impl)


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_equals_each_sequence_alone(impl, lengths, memory):
    inputs = make_inputs(
        T=sum(lengths), H=4, G=2, write=True, memory=len(lengths) if memory else None
    )
    d = cotangents(inputs, memories=len(lengths))
    expected = one_by_one("reference", inputs, d, lengths)
    for dtype in (torch.int32, torch.int64):
        cu_seqlens = bounds(lengths, dtype)
        packed = evaluate(packing(impl, cu_seqlens), inputs, d)
        assert_same(packed, expected, inputs, d, cu_seqlens=cu_seqlens)


def test_equals_the_oracle(impl):
    lengths = LENGTHS["empty-middle"]
    inputs = make_inputs(T=sum(lengths), H=6, G=2, gate="mixed", memory=len(lengths))
    d = cotangents(inputs, memories=len(lengths))
    cu_seqlens = bounds(lengths)
    exact = evaluate(oracle, inputs, d, cu_seqlens=cu_seqlens)
    actual = evaluate(packing(impl, cu_seqlens), inputs, d)
    assert_same(actual, exact, inputs, d, cu_seqlens=cu_seqlens)


def test_empty_sequences_return_their_memory_and_its_gradient(impl):
    lengths = [0, 5, 0, 0, 66, 0]
    inputs = make_inputs(T=71, memory=6)
    d = cotangents(inputs, memories=6)
    got = evaluate(packing(impl, bounds(lengths)), inputs, d)
    for s, length in enumerate(lengths):
        if length == 0:
            assert torch.equal(got["memory"][s], inputs["initial_memory"][s])
            assert torch.equal(got["d_initial_memory"][s], d[1][s])
        else:
            assert not torch.equal(got["memory"][s], inputs["initial_memory"][s])
    bare = {name: x for name, x in inputs.items() if name != "initial_memory"}
    assert not gated_slot_attention(**bare, cu_seqlens=bounds(lengths), impl=impl).memory[0].any()


def test_many_sequences_in_a_row(impl):
    """More sequences than chunks, most of one token."""
    lengths = ([1] * 40 + [0] * 10 + [3] * 10 + [70]) * 2
    inputs = make_inputs(T=sum(lengths), H=1, K=2, V=2, M=2, memory=len(lengths))
    d = cotangents(inputs, memories=len(lengths))
    cu_seqlens = bounds(lengths)
    exact = evaluate(oracle, inputs, d, cu_seqlens=cu_seqlens)
    for recompute in (False, True):
        got = evaluate(packing(impl, cu_seqlens), inputs, d, recompute=recompute)
        assert_same(got, exact, inputs, d, cu_seqlens=cu_seqlens)


def test_no_sequence_sees_a_neighbour(impl):
    """NaN in one sequence stays there: values, memory and gradients of the others are untouched."""
    lengths = [40, 50, 0, 90]
    inputs = make_inputs(T=180, H=4, G=2, memory=4)
    d = cotangents(inputs, memories=4)
    clean = evaluate(packing(impl, bounds(lengths)), inputs, d)
    poisoned = {name: x.clone() for name, x in inputs.items()}
    for name in ("q", "k", "v"):
        poisoned[name][:, 40:90] = torch.nan
    poisoned["initial_memory"][1] = torch.inf
    got = evaluate(packing(impl, bounds(lengths)), poisoned, d)
    others = [s for s in range(4) if s != 1]
    for name, x in got.items():
        if name in ("memory", "d_initial_memory"):
            assert torch.equal(x[others], clean[name][others]), name
        else:
            assert torch.equal(x[:, :40], clean[name][:, :40]), name
            assert torch.equal(x[:, 90:], clean[name][:, 90:]), name


def test_a_strided_cu_seqlens(impl):
    inputs = make_inputs(T=71)
    plain = bounds([5, 66])
    strided = torch.stack([plain, plain], 1).flatten()[::2]
    assert not strided.is_contiguous()
    expected = evaluate(gated_slot_attention, inputs, cu_seqlens=plain, impl=impl)
    assert_close(
        evaluate(gated_slot_attention, inputs, cu_seqlens=strided, impl=impl), expected, 1e-15
    )
    assert torch.equal(strided, plain)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([0, 1, 2, 17, 63, 64, 65]), min_size=1, max_size=6))
def test_any_lengths(lengths):
    inputs = make_inputs(T=sum(lengths), H=2, G=1, K=2, V=3, M=2, memory=len(lengths))
    d = cotangents(inputs, memories=len(lengths))
    exact, actual = (
        evaluate(packing(name, bounds(lengths)), inputs, d) for name in ("reference", "chunked")
    )
    assert_close(actual, exact, 1e-12)


def test_check_cu_seqlens_accepts_what_the_operator_accepts():
    for lengths in LENGTHS.values():
        assert check_cu_seqlens(bounds(lengths, torch.int32), sum(lengths)) is None
