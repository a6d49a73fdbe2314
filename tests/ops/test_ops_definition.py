"""Every implementation computes the paper's recurrence, with every gradient."""

import numpy as np
import pytest
import torch
from numerics import (
    assert_close,
    assert_same,
    cotangents,
    evaluate,
    leaves,
    make_inputs,
    oracle,
)

from gsa.ops import SLOT_ACTIVATIONS, gated_slot_attention


def paper_by_hand(q, k, v, f, scale):
    """Equations 4 to 7 as two gated linear passes joined by a softmax; one head, nested loops."""
    T, M = f.shape
    keys, values = np.zeros((M, k.shape[1])), np.zeros((M, v.shape[1]))
    rows = []
    for t in range(T):
        for m in range(M):
            keys[m] = f[t, m] * keys[m] + (1 - f[t, m]) * k[t]
            values[m] = f[t, m] * values[m] + (1 - f[t, m]) * v[t]
        score = np.array([scale * float(np.dot(keys[m], q[t])) for m in range(M)])
        p = np.exp(score - score.max())
        rows.append((p / p.sum()) @ values)
    return np.array(rows), np.concatenate([keys, values], 1)


def test_paper_written_out_by_hand(impl):
    inputs = make_inputs(T=70, H=1, K=3, V=4, M=5)
    tokens = (inputs[n][0, :, 0].double().cpu() for n in ("q", "k", "v", "log_forget"))
    q, k, v, log_f = (x.numpy() for x in tokens)
    output, memory = (torch.from_numpy(x) for x in paper_by_hand(q, k, v, np.exp(log_f), 0.7))
    exact = {"output": output[None, :, None].to(inputs["q"].device)}
    exact["memory"] = memory[None, None].to(inputs["q"].device)
    got = evaluate(gated_slot_attention, inputs, scale=0.7, impl=impl)
    assert_same(got, exact, inputs, tolerance=1e-13, scale=0.7)


SIZES = [
    {"T": 1, "H": 1, "K": 1, "V": 1, "M": 1},
    {"T": 15, "H": 3, "G": 1, "K": 3, "V": 1, "M": 17},
    {"T": 63, "H": 4, "G": 1, "K": 5, "V": 3, "M": 1},
    {"T": 64, "H": 8, "G": 2, "K": 1, "V": 17, "M": 3},
    {"T": 65, "H": 10, "G": 2, "K": 17, "V": 5, "M": 5},
    {"T": 127, "H": 2, "G": 2, "K": 3, "V": 5, "M": 3, "B": 3},
    {"T": 130, "H": 6, "G": 2, "K": 5, "V": 1, "M": 5, "B": 2},
    {"T": 300, "H": 9, "G": 3, "K": 3, "V": 3, "M": 2, "B": 5},
    {"T": 1000, "H": 1, "K": 3, "V": 5, "M": 3},
]


@pytest.mark.parametrize("extra", [False, True], ids=["plain", "write+memory"])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()))
def test_equals_the_oracle(impl, size, extra):
    inputs = make_inputs(**size, write=extra, memory=size.get("B", 1) if extra else None)
    d = cotangents(inputs)
    exact = evaluate(oracle, inputs, d, scale=0.5)
    actual = evaluate(gated_slot_attention, inputs, d, scale=0.5, impl=impl)
    assert_same(actual, exact, inputs, d, scale=0.5)


@pytest.mark.parametrize("slot_activation", SLOT_ACTIVATIONS)
def test_slot_activations(impl, slot_activation):
    inputs = make_inputs(T=67, H=4, G=2, memory=1, write=True)
    d, options = cotangents(inputs), {"scale": -1.3, "slot_activation": slot_activation}
    exact = evaluate(oracle, inputs, d, **options)
    actual = evaluate(gated_slot_attention, inputs, d, **options, impl=impl)
    assert_same(actual, exact, inputs, d, **options)


@pytest.mark.parametrize("gate", ["near_one", "mixed", "steep"])
@pytest.mark.parametrize("write", [False, True])
def test_chunked_equals_reference_at_extreme_gates(gate, write):
    inputs = make_inputs(B=2, T=200, H=4, G=2, gate=gate, write=write, memory=2)
    d = cotangents(inputs)
    reference = evaluate(gated_slot_attention, inputs, d, impl="reference")
    assert_close(evaluate(gated_slot_attention, inputs, d, impl="chunked"), reference, 1e-12)
    assert_close(reference, evaluate(oracle, inputs, d), 1e-12)


def test_write_is_apart_from_log_forget(impl):
    """Omitting `write` is the same as passing 1 - f, and its gradient then flows to log_forget."""
    inputs = make_inputs(T=70, memory=1)
    d = cotangents(inputs)
    implied = evaluate(gated_slot_attention, inputs, d, impl=impl)

    def spelled_out(**arguments):
        write = -torch.expm1(arguments["log_forget"])
        return gated_slot_attention(**arguments, write=write, impl=impl)

    assert_same(evaluate(spelled_out, inputs, d), implied, inputs, d, tolerance=1e-13)


@pytest.mark.parametrize("write", ["one-hot", 0.0, 1.0, 3.0])
def test_writes_by_hand(impl, write):
    """f = 1 makes slots plain sums; w picks what goes in."""
    inputs = make_inputs(T=70, H=2, M=70, K=3, V=4)
    inputs["log_forget"] = torch.zeros_like(inputs["log_forget"])
    one_hot = torch.eye(70)[None, :, None].expand(inputs["log_forget"].shape)
    inputs["write"] = one_hot if write == "one-hot" else torch.full_like(one_hot, write)
    inputs["write"] = inputs["write"].to(inputs["log_forget"])
    got = evaluate(gated_slot_attention, inputs, impl=impl)
    kv = torch.cat([inputs["k"], inputs["v"]], -1)[0].transpose(0, 1).double()
    memory = kv if write == "one-hot" else write * kv.sum(1, keepdim=True).expand(-1, 70, -1)
    if write == 0.0:
        assert not got["output"].any() and not got["memory"].any()
    elif write == "one-hot":  # softmax attention, over zeros in slots not yet filled
        q = inputs["q"][0].transpose(0, 1).double()
        p = (q @ kv[..., :3].mT).tril().softmax(-1).tril()
        exact = {"output": (p @ kv[..., 3:]).transpose(0, 1)[None], "memory": memory[None]}
        assert_same(got, exact, inputs)
    else:
        assert_same({"memory": got["memory"]}, {"memory": memory[None]}, inputs, tolerance=1e-13)


def test_zero_log_forget_keeps_everything_and_writes_nothing(impl):
    inputs = make_inputs(T=70, memory=1)
    inputs["log_forget"] = torch.zeros_like(inputs["log_forget"])
    got = gated_slot_attention(**inputs, impl=impl)
    assert torch.equal(got.memory, inputs["initial_memory"])


@pytest.mark.parametrize("memory", [None, 2])
def test_no_tokens_returns_a_copy_of_the_memory(impl, memory):
    inputs = make_inputs(B=2, T=0, H=4, G=2, memory=memory)
    got = gated_slot_attention(**inputs, impl=impl)
    assert got.output.shape == (2, 0, 4, 6) and got.memory.shape == (2, 2, 4, 11)
    if memory is None:
        assert not got.memory.any()
        return
    assert torch.equal(got.memory, inputs["initial_memory"])
    got.memory.zero_()
    assert inputs["initial_memory"].any(), "the result shares storage with the argument"
    start = inputs["initial_memory"].clone().requires_grad_()
    got = gated_slot_attention(**{**inputs, "initial_memory": start}, impl=impl)
    (gradient,) = torch.autograd.grad(got.memory.square().sum(), start)
    assert torch.equal(gradient, 2 * start)


@pytest.mark.parametrize("T", [1, 70])
def test_the_returned_memory_never_shares_storage(impl, T):
    inputs = make_inputs(T=T, memory=1)
    before = {name: x.clone() for name, x in inputs.items()}
    got = gated_slot_attention(**inputs, impl=impl)
    got.memory.fill_(7)
    got.output.fill_(7)
    for name, x in inputs.items():
        assert torch.equal(x, before[name]), name


def test_inputs_and_cotangents_are_never_modified(impl):
    inputs = leaves(make_inputs(B=2, T=70, H=4, G=2, write=True, memory=2, gate="mixed"))
    d = cotangents(inputs)
    before = {name: x.detach().clone() for name, x in inputs.items()}
    d_before = [x.clone() for x in d]
    got = gated_slot_attention(**inputs, impl=impl)
    torch.autograd.backward(list(got), list(d))
    for name, x in inputs.items():
        assert torch.equal(x, before[name]), name
    assert all(torch.equal(a, b) for a, b in zip(d, d_before, strict=True))


@pytest.mark.parametrize("only", ["output", "memory"])
def test_gradients_from_one_result_alone(impl, only):
    inputs = make_inputs(T=130, H=4, G=2, write=True, memory=1)
    d_output, d_memory = cotangents(inputs)
    d = (d_output, d_memory * 0) if only == "output" else (d_output * 0, d_memory)
    exact = evaluate(oracle, inputs, d)
    arguments = leaves(inputs)
    got = gated_slot_attention(**arguments, impl=impl)
    result, cotangent = (got.output, d_output) if only == "output" else (got.memory, d_memory)
    grads = torch.autograd.grad(result, list(arguments.values()), cotangent, allow_unused=True)
    got = {f"d_{name}": gradient for name, gradient in zip(arguments, grads, strict=True)}
    if only == "memory":
        d_q = got.pop("d_q")
        assert d_q is None or not d_q.any()
    assert_same(got, {name: exact[name] for name in got}, inputs, d)


@pytest.mark.parametrize("name", ["q", "k", "v", "log_forget", "write", "initial_memory"])
def test_gradient_of_one_input_alone(impl, name):
    inputs = make_inputs(T=70, H=4, G=2, write=True, memory=1)
    d = cotangents(inputs)
    full = evaluate(gated_slot_attention, inputs, d, impl=impl)
    one = inputs[name].clone().requires_grad_()
    got = gated_slot_attention(**{**inputs, name: one}, impl=impl)
    pairs = [(x, g) for x, g in zip(got, d, strict=True) if x.requires_grad]
    (gradient,) = torch.autograd.grad([x for x, _ in pairs], [one], [g for _, g in pairs])
    name = f"d_{name}"
    assert_same({name: gradient}, {name: full[name]}, inputs, d, tolerance=1e-13)


def test_strides_do_not_matter(impl):
    """Transposed, sliced, expanded and reversed-layout inputs and cotangents."""
    inputs = make_inputs(B=2, T=70, H=4, G=2, write=True, memory=2)
    d_output, d_memory = cotangents(inputs)
    inputs["v"] = inputs["v"][:, :1].expand(-1, 70, -1, -1)  # stride 0 over tokens
    inputs["write"] = inputs["write"][..., :1].expand(-1, -1, -1, 4)  # stride 0 over slots
    plain = {name: x.contiguous() for name, x in inputs.items()}
    expected = evaluate(gated_slot_attention, plain, (d_output, d_memory), impl=impl)

    def strange(function):
        def on_odd_strides(q, k, v, log_forget, write, initial_memory, **options):
            odd = {
                "q": q.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
                "k": torch.stack([k, k], -1).flatten(-2)[..., ::2],
                "v": v[:, :1].expand(-1, 70, -1, -1),
                "log_forget": log_forget.transpose(1, 2).contiguous().transpose(1, 2),
                "write": write[..., :1].expand(-1, -1, -1, 4),
                "initial_memory": initial_memory.mT.contiguous().mT,
            }
            assert not any(x.is_contiguous() for x in odd.values())
            return function(**odd, **options)

        return on_odd_strides

    odd_d = (d_output.mT.contiguous().mT, d_memory.mT.contiguous().mT)
    actual = evaluate(strange(gated_slot_attention), plain, odd_d, impl=impl)
    for name in ("v", "write"):  # expanding sums the gradient into the first token / slot
        axis = 1 if name == "v" else 3
        total = expected[f"d_{name}"].sum(axis, keepdim=True)
        expected[f"d_{name}"] = torch.zeros_like(plain[name])
        expected[f"d_{name}"].narrow(axis, 0, 1).copy_(total)
    assert_same(actual, expected, plain, odd_d, tolerance=1e-13, around=strange)
    broadcast = d_output.new_ones(()).expand(d_output.shape)
    ones = evaluate(gated_slot_attention, plain, (broadcast.contiguous(), d_memory), impl=impl)
    d = (broadcast, d_memory)
    actual = evaluate(gated_slot_attention, plain, d, impl=impl)
    assert_same(actual, ones, plain, d, tolerance=1e-13)


@pytest.mark.parametrize("packed, write", [(False, True), (True, False)])
def test_gradcheck(impl, packed, write):
    sizes = {"B": 1 if packed else 2, "T": 5, "H": 4, "G": 2, "K": 1, "V": 2, "M": 2}
    memories = 3 if packed else 2
    inputs = make_inputs(**sizes, dtype=torch.float64, write=write, memory=memories)
    cu_seqlens = torch.tensor([0, 3, 3, 5]) if packed else None
    names = list(inputs)

    def function(*tensors):
        named = dict(zip(names, tensors, strict=True))
        return tuple(gated_slot_attention(**named, scale=0.8, cu_seqlens=cu_seqlens, impl=impl))

    assert torch.autograd.gradcheck(function, tuple(leaves(inputs).values()))


def test_gradcheck_over_chunks(impl):
    """Across chunk boundaries, where finite differences meet the carried memory."""
    inputs = make_inputs(T=66, H=1, K=1, V=1, M=2, dtype=torch.float64, memory=1)
    names = list(inputs)

    def function(*tensors):
        return tuple(gated_slot_attention(**dict(zip(names, tensors, strict=True)), impl=impl))

    assert torch.autograd.gradcheck(function, tuple(leaves(inputs).values()), fast_mode=True)


@pytest.mark.parametrize("gate", ["usual", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_recompute_changes_no_number(impl, dtype, gate):
    inputs = make_inputs(B=2, T=700, H=4, G=2, dtype=dtype, gate=gate, memory=2)
    d = cotangents(inputs)
    kept, redone = (
        evaluate(gated_slot_attention, inputs, d, recompute=flag, impl=impl)
        for flag in (False, True)
    )
    if impl == "triton":  # its memories are made again by another kernel
        assert_same(redone, kept, inputs, d)
    else:
        assert_close(redone, kept, 4 * torch.finfo(dtype).eps)


def test_no_gradient_asked_none_tracked(impl):
    inputs = make_inputs(T=70, memory=1)
    got = gated_slot_attention(**inputs, impl=impl)
    assert not got.output.requires_grad and not got.memory.requires_grad
    with torch.no_grad():
        quiet = gated_slot_attention(**leaves(inputs), impl=impl)
    assert not quiet.output.requires_grad and torch.equal(quiet.output, got.output)


def test_result_is_a_named_pair(impl):
    got = gated_slot_attention(**make_inputs(), impl=impl)
    assert got._fields == ("output", "memory")
    assert got.output is got[0] and got.memory is got[1]
