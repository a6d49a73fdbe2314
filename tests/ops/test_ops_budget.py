"""fp32, bf16 and fp16 against the fp64 oracle, never worse than twice the yardstick plus eps."""

import pytest
import torch
from numerics import (
    assert_bit_equal,
    assert_within_budget,
    check,
    cotangents,
    errors,
    evaluate,
    make_inputs,
    oracle,
    yardstick,
)

from gsa.ops import SLOT_ACTIVATIONS, gated_slot_attention

LOW = [torch.float32, torch.bfloat16, torch.float16]
GATES = ["usual", "near_one", "mixed", "steep"]


def names(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def test_the_yardstick_is_the_operator():
    """In fp64 nothing is rounded, so the yardstick must be exact itself."""
    inputs = make_inputs(B=2, T=130, H=4, G=2, gate="mixed", write=True, memory=2)
    d = cotangents(inputs)
    exact, ruler = evaluate(oracle, inputs, d), evaluate(yardstick, inputs, d)
    assert max(max(errors(ruler[name], exact[name])) for name in exact) < 1e-12


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", LOW, ids=names)
def test_within_budget(impl, dtype, gate):
    inputs = make_inputs(B=2, T=130, H=4, G=2, K=17, V=16, M=8, dtype=dtype, gate=gate, memory=2)
    check(impl, inputs, cotangents(inputs), scale=0.5)


@pytest.mark.parametrize("dtype", LOW, ids=names)
@pytest.mark.parametrize("T", [1, 15, 63, 64, 65, 1000])
def test_within_budget_at_any_length(impl, dtype, T):
    inputs = make_inputs(T=T, H=3, G=1, K=8, V=5, M=3, dtype=dtype, write=True)
    check(impl, inputs, cotangents(inputs), scale=0.5)


@pytest.mark.parametrize("gate", ["usual", "mixed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=names)
def test_gates_in_the_inputs_dtype(impl, dtype, gate):
    inputs = make_inputs(
        T=130, H=4, G=2, dtype=dtype, gate_dtype=dtype, gate=gate, write=True, memory=1
    )
    check(impl, inputs, cotangents(inputs))


@pytest.mark.parametrize("slot_activation", SLOT_ACTIVATIONS)
def test_activations_within_budget(impl, slot_activation):
    """In bf16; ReLU's slope jumps where a score is rounded across 0, which is rare in fp32."""
    dtype = torch.float32 if slot_activation == "relu" else torch.bfloat16
    inputs = make_inputs(T=130, H=4, G=2, dtype=dtype, gate="usual", memory=1)
    check(impl, inputs, cotangents(inputs), slot_activation=slot_activation, scale=0.5)


@pytest.mark.parametrize("gate", ["usual", "steep"])
def test_packed_within_budget(impl, gate):
    inputs = make_inputs(T=150, H=4, G=2, dtype=torch.float32, gate=gate, write=True, memory=6)
    cu_seqlens = torch.tensor([0, 0, 1, 66, 66, 149, 150], dtype=torch.int32)
    check(impl, inputs, cotangents(inputs, memories=6), cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("log_forget", [-60.0, -1e4, -1e-6, 0.0, -0.95, -1.0, -10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=names)
def test_one_decay_for_every_token(impl, dtype, log_forget):
    """-0.95 and -1 lie on both sides of what a chunk of 64 can factorise in fp32."""
    inputs = make_inputs(T=130, H=2, G=1, dtype=dtype, write=True, memory=1)
    inputs["log_forget"].fill_(log_forget)
    check(impl, inputs, cotangents(inputs))


@pytest.mark.parametrize("position", [0, 31, 32, 63])
def test_one_hard_reset_inside_a_chunk(impl, position):
    """One slot forgets everything at one token while its neighbours keep all."""
    inputs = make_inputs(T=128, dtype=torch.float32, gate="near_one", memory=1)
    inputs["log_forget"][0, position, :, 1] = -1e4
    inputs["log_forget"][0, 64 + position, :, 2] = -60
    check(impl, inputs, cotangents(inputs))


@pytest.mark.parametrize("log_forget", [-0.4, -0.9, -1.5])
@pytest.mark.parametrize("factor", [2.0**-30, 2.0**30])
def test_gradients_are_linear_in_the_cotangent(impl, factor, log_forget):
    """A mean over many tokens makes cotangents tiny: no factor inside may underflow for that."""
    inputs = make_inputs(T=192, H=2, G=1, K=8, V=8, dtype=torch.float32, memory=1)
    inputs["log_forget"].fill_(log_forget)
    d = cotangents(inputs)
    exact, ruler = (evaluate(f, inputs, d) for f in (oracle, yardstick))
    small = tuple(x * factor for x in d)
    actual = evaluate(gated_slot_attention, inputs, small, impl=impl)
    for name in inputs:
        actual[f"d_{name}"] = actual[f"d_{name}"] / factor
    assert_within_budget(actual, exact, ruler, torch.float32, impl)


@pytest.mark.parametrize("size", [2.0**-30, 2.0**20])
@pytest.mark.parametrize("name", ["k", "v"])
def test_keys_and_values_of_any_size(impl, name, size):
    inputs = make_inputs(T=130, dtype=torch.float32, gate="usual")
    inputs["log_forget"] -= 0.4
    inputs[name] *= size
    if name == "k":
        inputs["q"] /= size
    d = cotangents(inputs)
    d = (d[0], d[1] * 0) if name == "k" else d
    check(impl, inputs, d)


def test_large_fp16_values_do_not_overflow_inside(impl):
    """Sums and scores beyond fp16's 65504 stay finite: they are never held in fp16."""
    inputs = make_inputs(T=130, K=16, V=16, dtype=torch.float16, gate="near_one", write=True)
    inputs["write"].fill_(1.0)
    inputs["k"] *= 200
    inputs["q"] *= 200
    got = evaluate(gated_slot_attention, inputs, scale=1e-5, impl=impl)
    exact = evaluate(oracle, inputs, scale=1e-5)
    assert got["memory"].abs().max() > 200 and torch.isfinite(got["output"]).all()
    assert max(errors(got["output"], exact["output"])) < 2e-3


def test_gates_near_one_still_write(impl):
    """At gate logit 5, 1 - f is 8e-4: formed in bf16 it would be exactly zero."""
    inputs = make_inputs(T=100, dtype=torch.bfloat16)
    logit = torch.full_like(inputs["log_forget"], 5.0)
    inputs["log_forget"] = torch.nn.functional.logsigmoid(logit) / 8
    assert (1 - inputs["log_forget"].to(torch.bfloat16).exp()).abs().max() == 0
    got, exact = evaluate(gated_slot_attention, inputs, impl=impl), evaluate(oracle, inputs)
    # The kernels round to bf16, to half of its last bit: what they write, and for the output the
    # memory, the weights and the output too.
    of_memory, of_output = (2**-9, 4 * 2**-9) if impl == "triton" else (1e-5, 4e-3)
    assert max(errors(got["memory"], exact["memory"])) < of_memory
    assert max(errors(got["output"], exact["output"])) < of_output


@pytest.mark.parametrize("dtype", LOW, ids=names)
def test_bit_equal_run_to_run(impl, dtype):
    inputs = make_inputs(B=2, T=130, H=4, G=2, dtype=dtype, gate="mixed", memory=2)
    d = cotangents(inputs)
    first = evaluate(gated_slot_attention, inputs, d, impl=impl)
    for _ in range(2):
        assert_bit_equal(evaluate(gated_slot_attention, inputs, d, impl=impl), first)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=names)
@pytest.mark.parametrize("dtype", LOW, ids=names)
def test_autocast_changes_nothing(impl, dtype, low):
    """Forward under autocast, backward after it, as PyTorch asks."""
    inputs = make_inputs(T=130, H=4, G=2, dtype=dtype, memory=1)
    d = cotangents(inputs)
    plain = evaluate(gated_slot_attention, inputs, d, impl=impl)

    def under_autocast(**arguments):
        with torch.autocast(d[0].device.type, dtype=low):
            return gated_slot_attention(**arguments, impl=impl)

    assert_bit_equal(evaluate(under_autocast, inputs, d), plain)


@pytest.mark.parametrize("dtype", LOW, ids=names)
def test_a_backward_under_autocast_changes_nothing_either(dtype):
    inputs = make_inputs(T=130, H=4, G=2, dtype=dtype, memory=1)
    d = cotangents(inputs)
    plain = evaluate(gated_slot_attention, inputs, d, impl="chunked")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_bit_equal(evaluate(gated_slot_attention, inputs, d, impl="chunked"), plain)


@pytest.mark.parametrize("log_forget", [-1.2, -1.8, -2.5])
def test_one_steep_slot_beside_mild_ones(impl, log_forget):
    """What trained gates look like: to -1.87 a slot is shifted within a whole tile, then not."""
    inputs = make_inputs(T=150, H=2, G=1, K=8, V=8, dtype=torch.float32, memory=1)
    inputs["log_forget"][..., 1] = log_forget
    check(impl, inputs, cotangents(inputs))
