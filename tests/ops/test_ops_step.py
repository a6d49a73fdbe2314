"""One token at a time: what decoding uses."""

import pytest
import torch
from numerics import assert_same, errors, evaluate, make_inputs, oracle

from gsa.ops import SLOT_ACTIVATIONS, gated_slot_attention, gated_slot_step


def token(**sizes):
    """(token-wise arguments, memory) of a step."""
    inputs = make_inputs(T=1, **sizes)
    memory = inputs.pop("initial_memory")
    return inputs, memory


SIZES = [
    {"B": 1, "H": 1, "K": 1, "V": 1, "M": 1},
    {"B": 3, "H": 4, "G": 2},
    {"B": 5, "H": 15, "G": 3, "K": 17, "V": 3, "M": 5},
]


@pytest.mark.parametrize("slot_activation", SLOT_ACTIVATIONS)
@pytest.mark.parametrize("size", SIZES, ids=["ones", "groups", "odd"])
@pytest.mark.parametrize("write", [False, True])
def test_step_is_the_operator_at_one_token(impl, size, write, slot_activation):
    inputs, memory = token(**size, write=write, memory=size["B"])
    options = {"scale": 0.7, "slot_activation": slot_activation}
    arguments = {**inputs, "initial_memory": memory}
    exact = evaluate(oracle, arguments, **options)
    got = gated_slot_step(**inputs, memory=memory, impl=impl, **options)
    assert got._fields == ("output", "memory")
    assert_same(got._asdict(), exact, arguments, tolerance=1e-13, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_step_dtypes(impl, dtype):
    inputs, memory = token(B=2, H=4, G=2, K=16, V=16, M=8, dtype=dtype, memory=2)
    got = gated_slot_step(**inputs, memory=memory, impl=impl)
    assert got.output.dtype == dtype and got.memory.dtype == torch.float32
    exact = evaluate(oracle, {**inputs, "initial_memory": memory})
    eps = torch.finfo(dtype).eps
    assert max(errors(got.output, exact["output"])) <= 2 * max(eps, 2e-7)
    assert max(errors(got.memory, exact["memory"])) <= 1e-6


def test_by_default_nothing_is_modified(impl):
    inputs, memory = token(B=2, write=True, memory=2)
    before = {name: x.clone() for name, x in {**inputs, "memory": memory}.items()}
    got = gated_slot_step(**inputs, memory=memory, impl=impl)
    got.memory.zero_()
    for name, x in {**inputs, "memory": memory}.items():
        assert torch.equal(x, before[name]), name


@pytest.mark.parametrize("strided", [False, True])
def test_inplace_updates_the_memory_and_returns_it(impl, strided):
    inputs, memory = token(B=3, H=4, G=2, memory=3)
    if strided:
        memory = memory.mT.contiguous().mT
    expected = gated_slot_step(**inputs, memory=memory, impl=impl)
    address, version = memory.data_ptr(), {n: x.clone() for n, x in inputs.items()}
    got = gated_slot_step(**inputs, memory=memory, inplace=True, impl=impl)
    assert got.memory is memory and memory.data_ptr() == address
    assert torch.equal(memory, expected.memory) and torch.equal(got.output, expected.output)
    assert all(torch.equal(x, version[n]) for n, x in inputs.items())


def test_rows_pick_from_a_pool_and_leave_the_others(impl):
    inputs, pool = token(B=3, H=4, G=2, write=True, memory=7)
    rows = torch.tensor([5, 0, 3], device=pool.device)
    expected = gated_slot_step(**inputs, memory=pool[rows].clone(), impl=impl)
    before = pool.clone()
    got = gated_slot_step(**inputs, memory=pool, inplace=True, rows=rows, impl=impl)
    assert got.memory is pool
    assert torch.equal(got.output, expected.output)
    assert torch.equal(pool[rows], expected.memory)
    others = [1, 2, 4, 6]
    assert torch.equal(pool[others], before[others])
    assert rows.tolist() == [5, 0, 3]


def test_rows_of_poisoned_neighbours(impl):
    """Free rows of a pool may hold anything."""
    inputs, pool = token(B=1, memory=4)
    clean = gated_slot_step(**inputs, memory=pool[2:3], impl=impl)
    pool[[0, 1, 3]] = torch.nan
    rows = torch.tensor([2], device=pool.device)
    got = gated_slot_step(**inputs, memory=pool, inplace=True, rows=rows, impl=impl)
    assert torch.equal(got.output, clean.output) and torch.equal(pool[2:3], clean.memory)


def test_no_sequences_at_all(impl):
    inputs, pool = token(B=0, memory=3)
    before = pool.clone()
    rows = torch.zeros(0, dtype=torch.int64, device=pool.device)
    got = gated_slot_step(**inputs, memory=pool, inplace=True, rows=rows, impl=impl)
    assert got.output.shape == (0, 1, 2, 6) and torch.equal(pool, before)


def test_step_carries_no_gradient(impl):
    inputs, memory = token(B=2, write=True, memory=2)
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    got = gated_slot_step(**inputs, memory=memory.requires_grad_(), impl=impl)
    assert not got.output.requires_grad and not got.memory.requires_grad


def test_step_extreme_gates(impl):
    inputs, memory = token(B=1, dtype=torch.float32, M=4, memory=1)
    inputs["log_forget"][0, 0, 0] = torch.tensor([-1e4, 0.0, -60.0, -1e-6])
    exact = evaluate(oracle, {**inputs, "initial_memory": memory})
    got = gated_slot_step(**inputs, memory=memory, impl=impl)
    assert torch.isfinite(got.output).all()
    assert max(errors(got.memory, exact["memory"])) < 1e-6
    assert torch.equal(got.memory[0, 0, 1], memory[0, 0, 1])
    alone = gated_slot_attention(**inputs, initial_memory=memory, impl=impl)
    torch.testing.assert_close(alone.output, got.output, rtol=1e-5, atol=1e-6)


def test_step_under_autocast_is_bit_equal(impl):
    inputs, memory = token(B=2, H=4, G=2, dtype=torch.float32, memory=2)
    plain = gated_slot_step(**inputs, memory=memory, impl=impl)
    with torch.autocast(memory.device.type, dtype=torch.bfloat16):
        cast = gated_slot_step(**inputs, memory=memory, impl=impl)
    assert torch.equal(cast.output, plain.output) and torch.equal(cast.memory, plain.memory)
