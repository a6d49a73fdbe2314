"""Floors by bytes and the list of cases, against figures worked out by hand."""

import pytest
import torch

from gsa.benchmark.cases import ALL_CASES, ATTENTION_CASES, STEP_CASES, Case, select
from gsa.benchmark.contenders import attention_heads, make_inputs
from gsa.benchmark.cost import (
    attention_bytes,
    input_bytes,
    memory_bytes,
    output_bytes,
    set_count,
    step_bytes,
)

SMALL = Case(group="x", name="x", H=6, G=3, K=5, V=7, M=4, B=2, T=9)


def named(name):
    return next(case for case in ALL_CASES if case.name == name)


def test_floor_of_the_1_3b_shape_at_16384_tokens():
    # q, k, v, output: 16384 x 2048 x 2 bytes; gate: 16384 x 256 x 4; memory: 4 x 64 x 1024 x 4
    numbers, gate, memory = 67_108_864, 16_777_216, 1_048_576
    moved = attention_bytes(named("1.3B 1x16384"))
    assert moved.forward == 4 * numbers + gate + memory
    assert moved.backward == 4 * numbers + gate + 3 * numbers + gate
    assert moved.forward / 3.0e12 * 1e3 == pytest.approx(0.095, abs=0.001)
    assert moved.forward_backward / 3.0e12 * 1e3 == pytest.approx(0.263, abs=0.001)
    eight = attention_bytes(named("1.3B 8x2048"))
    assert eight.forward - moved.forward == 7 * memory
    assert eight.backward == moved.backward


def test_grouped_heads_are_counted_once():
    # Mistral: q and output 4096 wide, k and v 1024, gate 8 x 64 in fp32
    per_token = 2 * (4096 + 1024 + 1024) + 4 * 512
    case = named("Mistral-7B 1x16384")
    assert input_bytes(case) == 16384 * per_token
    assert attention_bytes(case).backward == 16384 * (2 * per_token + 2 * 4096)


def test_bytes_are_those_of_the_tensors():
    one = make_inputs(SMALL, torch.device("cpu"), cache_bytes=0)[0]
    inputs = (one.q, one.k, one.v, one.log_forget)
    assert input_bytes(SMALL) == sum(x.numel() * x.element_size() for x in inputs)
    assert output_bytes(SMALL) == one.d_output.numel() * one.d_output.element_size()
    assert memory_bytes(SMALL) == torch.zeros(2, 3, 4, 12).numel() * 4


def test_a_step_reads_and_writes_the_memory():
    by_name = {case.name: step_bytes(case) for case in STEP_CASES}
    assert by_name == {"step B=1": 2 * 2**20, "step B=64": 128 * 2**20}


@pytest.mark.parametrize(
    ("set_bytes", "cache", "sets"),
    [(270 * 2**20, 50 * 2**20, 1), (2**20, 50 * 2**20, 100), (30, 50, 4), (100, 50, 1), (1, 0, 1)],
)
def test_sets_exceed_the_cache_twice_over(set_bytes, cache, sets):
    assert set_count(set_bytes, cache) == sets


def test_every_attention_case_needs_one_set_on_an_h100():
    assert all(set_count(input_bytes(case), 50 * 2**20) == 1 for case in ATTENTION_CASES)


def test_cases_are_2048_or_4096_wide_and_named_once():
    assert len({case.name for case in ALL_CASES}) == len(ALL_CASES) == 19
    for case in ATTENTION_CASES:
        width = 4096 if case.group == "Mistral-7B" else 2048
        assert width == case.H * case.K and case.K == case.V
        assert case.B * case.T in (16384, 131072)
    table = [(case.M, case.K) for case in ATTENTION_CASES if case.group == "table"]
    assert table == [(M, K) for M in (32, 64, 128) for K in (64, 128, 256)]


def test_softmax_attention_has_heads_of_128():
    heads = {case.name: attention_heads(case) for case in ATTENTION_CASES}
    assert heads["1.3B 8x2048"] == heads["M=32 K=V=64"] == (16, 16, 128)
    assert heads["Mistral-7B 8x2048"] == (32, 8, 128)


def test_selection_by_group_and_by_name():
    assert select(()) == list(ALL_CASES)
    chosen = [case.name for case in select(("Mistral-7B", "1.3B 2x8192", "step"))]
    expected = "step B=1", "step B=64", "1.3B 2x8192", "Mistral-7B 8x2048", "Mistral-7B 1x16384"
    assert chosen == list(expected)
    with pytest.raises(ValueError, match=r"cases: expected groups \(cold-start, step, 1.3B"):
        select(("1.3B", "2.7B"))


def test_inputs_rotate_and_gates_are_as_the_model_makes_them():
    torch.manual_seed(0)
    sets = make_inputs(SMALL, torch.device("cpu"), cache_bytes=3 * input_bytes(SMALL))
    assert len(sets) == 6 and not torch.equal(sets[0].q, sets[1].q)
    gates = torch.cat([one.log_forget.flatten() for one in sets])
    assert gates.dtype == torch.float32 and bool((gates < 0).all())
    assert float(torch.sigmoid(torch.tensor(1.0)).log() / 8) == pytest.approx(
        float(gates.median()), abs=0.01
    )
    assert {x.dtype for x in (sets[0].q, sets[0].k, sets[0].v, sets[0].d_output)} == {
        torch.bfloat16
    }
