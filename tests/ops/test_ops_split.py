"""A sequence cut anywhere, with the memory carried across, equals the whole."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import (
    assert_close,
    assert_same,
    assert_within_budget,
    cotangents,
    evaluate,
    make_inputs,
    oracle,
    yardstick,
)

from gsa.ops import gated_slot_attention, gated_slot_step


def in_pieces(cuts: list[int], attention):
    """The operator over consecutive pieces of the sequence; gradients flow through the memory."""

    def function(q, k, v, log_forget, write=None, initial_memory=None, **options):
        memory, outputs = initial_memory, []
        for start, stop in zip([0, *cuts], [*cuts, q.shape[1]], strict=True):
            part = slice(start, stop)
            output, memory = attention(
                q[:, part],
                k[:, part],
                v[:, part],
                log_forget[:, part],
                write=None if write is None else write[:, part],
                initial_memory=memory,
                **options,
            )
            outputs.append(output)
        return torch.cat(outputs, 1), memory

    return function


@pytest.mark.parametrize("gate", ["usual", "steep"])
def test_every_split_of_a_short_sequence(impl, gate):
    inputs = make_inputs(T=7, H=4, G=2, gate=gate, write=True, memory=1)
    d = cotangents(inputs)
    attention = partial(gated_slot_attention, impl=impl)
    whole = evaluate(attention, inputs, d)
    for bits in range(2**6):
        cuts = [t + 1 for t in range(6) if bits >> t & 1]
        actual = evaluate(in_pieces(cuts, attention), inputs, d)
        assert_same(actual, whole, inputs, d, around=partial(in_pieces, cuts))


@pytest.mark.parametrize("cuts", [[0], [200], [1], [63], [64], [65], [128, 128], [60, 70, 199]])
def test_splits_across_chunks(impl, cuts):
    inputs = make_inputs(B=2, T=200, H=4, G=2, gate="mixed", memory=2)
    d = cotangents(inputs)
    attention = partial(gated_slot_attention, impl=impl)
    whole = evaluate(attention, inputs, d)
    actual = evaluate(in_pieces(cuts, attention), inputs, d)
    assert_same(actual, whole, inputs, d, around=partial(in_pieces, cuts))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 150), max_size=4).map(sorted))
def test_any_split(cuts):
    inputs = make_inputs(T=150, H=2, G=1, K=3, V=3, M=3, gate="usual")
    d = cotangents(inputs)
    chunked = partial(gated_slot_attention, impl="chunked")
    whole = evaluate(chunked, inputs, d)
    assert_close(evaluate(in_pieces(cuts, chunked), inputs, d), whole, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_splits_stay_within_the_budget(impl, dtype):
    inputs = make_inputs(T=150, H=4, G=2, K=8, V=8, dtype=dtype, gate="near_one", memory=1)
    d = cotangents(inputs)
    exact, ruler = (evaluate(f, inputs, d) for f in (oracle, yardstick))
    for cuts in ([1], [64], [10, 75, 149]):
        got = evaluate(in_pieces(cuts, partial(gated_slot_attention, impl=impl)), inputs, d)
        assert_within_budget(got, exact, ruler, dtype, impl)


def test_token_by_token(impl):
    """Prefill, then decode: the step's outputs and memory are the operator's."""
    inputs = make_inputs(B=2, T=70, H=4, G=2, write=True, memory=2)
    whole = gated_slot_attention(**inputs, scale=0.6, impl=impl)
    names = ("q", "k", "v", "log_forget", "write")
    for prefill in (0, 1, 64, 69):
        first = {name: inputs[name][:, :prefill] for name in names}
        output, memory = gated_slot_attention(
            **first, initial_memory=inputs["initial_memory"], scale=0.6, impl=impl
        )
        outputs = [output]
        for t in range(prefill, 70):
            token = {name: inputs[name][:, t : t + 1] for name in names}
            output, memory = gated_slot_step(**token, memory=memory, scale=0.6, impl=impl)
            outputs.append(output)
        got = {"output": torch.cat(outputs, 1), "memory": memory}
        # a step rounds the memory after every token, like the reference
        assert_same(got, whole._asdict(), inputs, tolerance=1e-13, impl="reference", scale=0.6)


def test_detaching_the_carried_memory_cuts_the_gradient(impl):
    """Truncated backpropagation: the first piece gets no gradient from the second."""
    inputs = make_inputs(T=140, memory=1)
    q, k, v, log_forget, start = (x.clone().requires_grad_() for x in inputs.values())
    a, b = slice(0, 70), slice(70, 140)
    first = gated_slot_attention(
        q[:, a], k[:, a], v[:, a], log_forget[:, a], initial_memory=start, impl=impl
    )
    second = gated_slot_attention(
        q[:, b], k[:, b], v[:, b], log_forget[:, b], initial_memory=first.memory.detach(), impl=impl
    )
    (d_k,) = torch.autograd.grad(second.output.sum(), k)
    assert not d_k[:, a].any() and d_k[:, b].any()
