"""The operator by Triton kernels: within the error budget whatever sizes, gates and layouts.

On the GPU if there is one, else in Triton's interpreter, where bf16 factors are kept in fp32.
"hot" sizes go through tensor descriptors, which want multiples of 16 bytes; "cold" ones do not.
"""

from functools import partial

import pytest
import torch
from numerics import (
    HOME,
    assert_bit_equal,
    check,
    cotangents,
    evaluate,
    make_inputs,
)

pytest.importorskip("triton", reason="the kernels need triton: Linux, and the dev extra")

from gsa.ops import SLOT_ACTIVATIONS, gated_slot_attention
from gsa.ops.triton import launch, plan, run, sizes

# numpy, in the interpreter, remarks on what overflows on its way to being left out
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("kernels"),
]
attention = partial(gated_slot_attention, impl="triton")
HOT, COLD = {"K": 8, "V": 16, "M": 8}, {"K": 5, "V": 3, "M": 3}
PATHS = pytest.mark.parametrize("path", [HOT, COLD], ids=["hot", "cold"])


def packing(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths], device=HOME.device).cumsum(0).to(dtype)


def short_segments(monkeypatch, unit=256):
    monkeypatch.setattr(sizes, "segment_tokens", lambda packed: unit)


def test_hot_sizes_use_descriptors_and_cold_ones_do_not(monkeypatch):
    run.forward_tape.cache_clear()  # known calls make none
    run.backward_tape.cache_clear()
    made, descriptor = [], plan.descriptor
    monkeypatch.setattr(plan, "descriptor", lambda *x: made.append(descriptor(*x)) or made[-1])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for path, hot in ((HOT, True), (COLD, False)):
            made.clear()
            inputs = make_inputs(T=3, H=1, **path, dtype=dtype)
            evaluate(attention, inputs, cotangents(inputs))
            assert made and {tiles is not None for tiles in made} == {hot}


@pytest.mark.parametrize(
    "gate, path, dtype",
    [
        ("usual", COLD, torch.float32),
        ("near_one", HOT, torch.float32),
        ("usual", COLD, torch.float16),
        ("near_one", HOT, torch.bfloat16),
    ],
    ids=["usual-fp32", "near_one-fp32", "usual-fp16", "near_one-bf16"],
)
def test_gates_of_every_kind(gate, path, dtype):
    inputs = make_inputs(T=130, H=1, **path, dtype=dtype, gate=gate, memory=1)
    check("triton", inputs, cotangents(inputs), scale=0.5)


@pytest.mark.parametrize(
    "gate, path, dtype",
    [
        ("mixed", HOT, torch.float32),
        ("steep", COLD, torch.float32),
        ("mixed", HOT, torch.float16),
        ("steep", COLD, torch.bfloat16),
    ],
    ids=["mixed-fp32", "steep-fp32", "mixed-fp16", "steep-bf16"],
)
def test_gates_too_steep_for_whole_tiles(gate, path, dtype):
    inputs = make_inputs(T=66, H=1, **path, dtype=dtype, gate=gate, memory=1, write=True)
    check("triton", inputs, cotangents(inputs), scale=0.5)


@pytest.mark.parametrize(
    "log_forget",
    [-60.0, -12.0, -10.3, -5.3, -5.1, -0.95, -1e-6, 0.0],
)
def test_one_decay_for_every_token(log_forget):
    """-5.3 is shifted and -5.1 is not; -12 lies beyond what a chunk of 64 can factorise."""
    inputs = make_inputs(T=70, H=1, **HOT, write=True, memory=1)
    inputs["log_forget"].fill_(log_forget)
    check("triton", inputs, cotangents(inputs))


@pytest.mark.parametrize("position", [0, 63])
def test_one_hard_reset_inside_a_chunk(position):
    inputs = make_inputs(T=128, H=1, **COLD, gate="near_one", memory=1)
    inputs["log_forget"][0, position, :, 1] = -1e4
    inputs["log_forget"][0, 64 + position, :, 2] = -60
    check("triton", inputs, cotangents(inputs))


@pytest.mark.parametrize("R", [1, 2, 5])
def test_query_heads_share_a_memory(R):
    G = 2 if R == 2 else 1
    inputs = make_inputs(T=70, H=G * R, G=G, **(COLD if R == 2 else HOT), memory=1)
    check("triton", inputs, cotangents(inputs))


@pytest.mark.parametrize("slot_activation", SLOT_ACTIVATIONS)
def test_slot_activations(slot_activation):
    inputs = make_inputs(T=70, H=2, G=1, **COLD, memory=1, write=True)
    options = {"scale": -1.3, "slot_activation": slot_activation}
    check("triton", inputs, cotangents(inputs), **options)


@pytest.mark.parametrize("write", [False, True], ids=["derived", "given"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_gates_in_the_inputs_dtype(dtype, write):
    inputs = make_inputs(T=70, H=2, **HOT, dtype=dtype, gate_dtype=dtype, write=write)
    check("triton", inputs, cotangents(inputs))


@pytest.mark.parametrize("T", [1, 63, 64, 65, 300])
def test_any_length(T):
    inputs = make_inputs(T=T, H=1, **(HOT if T % 2 else COLD), write=T > 64)
    check("triton", inputs, cotangents(inputs))


@pytest.mark.parametrize("size", [(1, 1, 1), (33, 40, 17), (8, 8, 130), (64, 1, 64)], ids=str)
def test_any_width(size):
    """Several programs side by side, the last with a rest, and more slots than one looks at."""
    K, V, M = size
    inputs = make_inputs(T=66, H=1, K=K, V=V, M=M, memory=1)
    check("triton", inputs, cotangents(inputs), scale=K**-0.5)


@PATHS
@pytest.mark.parametrize("memory", [None, 2])
def test_no_tokens_returns_a_copy_of_the_memory(path, memory):
    inputs = make_inputs(B=2, T=0, H=2, G=1, **path, memory=memory)
    d = cotangents(inputs)
    got = evaluate(attention, inputs, d)
    assert got["output"].shape == (2, 0, 2, path["V"])
    if memory is None:
        assert not got["memory"].any()
    else:
        assert torch.equal(got["memory"], inputs["initial_memory"])
        assert torch.equal(got["d_initial_memory"], d[1])


def test_no_rows_at_all():
    inputs = make_inputs(B=0, T=5, H=2, G=1, **HOT, memory=0)
    got = evaluate(attention, inputs, cotangents(inputs))
    assert got["memory"].shape == (0, 1, 8, 24) and got["d_k"].shape == (0, 5, 1, 8)


@pytest.mark.parametrize("only", ["output", "memory"])
def test_gradients_from_one_result_alone(only):
    inputs = make_inputs(T=70, H=2, G=1, **COLD, write=True, memory=1)
    d_output, d_memory = cotangents(inputs)
    d = (d_output, d_memory * 0) if only == "output" else (d_output * 0, d_memory)
    whole = check("triton", inputs, d)
    arguments = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    got = attention(**arguments)
    result, cotangent = (got.output, d_output) if only == "output" else (got.memory, d_memory)
    grads = torch.autograd.grad(result, list(arguments.values()), cotangent)
    assert_bit_equal(
        {f"d_{n}": g for n, g in zip(arguments, grads, strict=True)},
        {f"d_{n}": whole[f"d_{n}"] for n in arguments},
    )


@pytest.mark.parametrize("name", ["q", "log_forget", "initial_memory"])
def test_the_gradient_of_one_input_alone(name):
    inputs = make_inputs(T=40, H=2, G=1, **COLD, write=True, memory=1)
    d = cotangents(inputs)
    full = evaluate(attention, inputs, d)
    one = inputs[name].clone().requires_grad_()
    got = attention(**{**inputs, name: one})
    pairs = [(x, g) for x, g in zip(got, d, strict=True) if x.requires_grad]
    (gradient,) = torch.autograd.grad([x for x, _ in pairs], [one], [g for _, g in pairs])
    assert torch.equal(gradient, full[f"d_{name}"])


@pytest.mark.parametrize("recompute", [True, False])
@PATHS
def test_memories_kept_or_made_again(path, recompute):
    """Beyond 256 tokens the backward pass looks at memories on the way."""
    inputs = make_inputs(T=270, H=1, **path, memory=1)
    if path is COLD:
        inputs["log_forget"][0, 200, 0, 0] = -200.0  # a steep chunk that ends with one of them
    check("triton", inputs, cotangents(inputs), recompute=recompute)


@PATHS
def test_segments_side_by_side_equal_one_after_another(path, monkeypatch):
    inputs = make_inputs(T=300, H=1, **path, gate="near_one", memory=1)
    whole = attention(**inputs).output
    short_segments(monkeypatch)
    run.forward_tape.cache_clear()
    starts, find_starts = [], launch.find_starts
    monkeypatch.setattr(
        launch, "find_starts", lambda *x: starts.append(find_starts(*x)) or starts[-1]
    )
    cut = check("triton", inputs, cotangents(inputs))["output"]
    assert torch.equal(cut[:, :256], whole[:, :256])
    assert {x.shape[0] for x in starts} == {2}, "two segments forwards and backwards"


PACKED = {
    "empty ends": ([0, 0, 5, 70, 0], HOT),
    "empty middle": ([64, 0, 1, 65], COLD),
    "chunks": ([64, 0, 64], HOT),
    "ones": ([1, 1, 1], COLD),
    "all empty": ([0, 0, 0], HOT),
}


@pytest.mark.parametrize("lengths, path", PACKED.values(), ids=PACKED.keys())
def test_packed_sequences(lengths, path):
    dtype = torch.int32 if path is HOT else torch.int64
    inputs = make_inputs(T=sum(lengths), H=2, G=1, **path, write=True, memory=len(lengths))
    d = cotangents(inputs, memories=len(lengths))
    got = check("triton", inputs, d, cu_seqlens=packing(lengths, dtype))
    for s, length in enumerate(lengths):
        if length == 0:
            assert torch.equal(got["memory"][s], inputs["initial_memory"][s])
            assert torch.equal(got["d_initial_memory"][s], d[1][s])


def test_packed_sequences_in_segments(monkeypatch):
    short_segments(monkeypatch)
    lengths = [0, 270, 1, 300, 0]
    inputs = make_inputs(T=571, H=1, **HOT, gate="near_one", memory=5)
    d = cotangents(inputs, memories=5)
    check("triton", inputs, d, cu_seqlens=packing(lengths))


def test_packing_may_be_described_from_the_cpu():
    lengths = [3, 0, 67]
    inputs = make_inputs(T=70, H=1, **COLD)
    d = cotangents(inputs, memories=3)
    expected = evaluate(attention, inputs, d, cu_seqlens=packing(lengths))
    spaced = packing(lengths, torch.int64).cpu().repeat_interleave(2)[::2]
    assert_bit_equal(evaluate(attention, inputs, d, cu_seqlens=spaced), expected)


def test_strides_do_not_matter():
    inputs = make_inputs(B=2, T=20, H=4, G=2, **HOT, write=True, memory=2)
    inputs["v"] = inputs["v"][:, :1].expand(-1, 20, -1, -1)
    d = cotangents(inputs)
    expected = evaluate(attention, {n: x.contiguous() for n, x in inputs.items()}, d)
    odd = {name: x.mT.contiguous().mT for name, x in inputs.items()}
    odd["k"] = torch.stack([inputs["k"]] * 2, -1).flatten(-2)[..., ::2]
    odd["q"] = inputs["q"].transpose(0, 3).contiguous().transpose(0, 3)
    odd["v"] = inputs["v"]
    assert not any(x.is_contiguous() for x in odd.values())
    arguments = {name: x.detach().requires_grad_() for name, x in odd.items()}
    got = attention(**arguments)
    odd_d = [x.mT.contiguous().mT for x in d]
    grads = torch.autograd.grad(list(got), list(arguments.values()), odd_d)
    actual = {"output": got.output.detach(), "memory": got.memory.detach()}
    actual |= {f"d_{name}": g for name, g in zip(arguments, grads, strict=True)}
    assert_bit_equal(actual, expected)


@pytest.mark.parametrize(
    "path, packed", [(HOT, False), (COLD, False), (HOT, True)], ids=["hot", "cold", "packed"]
)
def test_slices_of_a_fused_projection_are_taken_as_they_lie(path, packed, monkeypatch):
    """q, k, v side by side in one tensor, the layout that a layer leaves: nothing is copied."""
    inputs = make_inputs(B=1 if packed else 2, T=66, H=2, G=1, **path)
    d = cotangents(inputs, memories=2)
    options = {"cu_seqlens": packing([0, 66])} if packed else {}
    expected = evaluate(attention, inputs, d, **options)
    parts = [inputs[name].flatten(2) for name in "qkv"]
    fused = torch.cat(parts, -1)
    q, k, v = fused.split([x.shape[2] for x in parts], -1)
    sliced = {"q": q.unflatten(2, (2, -1)), "k": k.unflatten(2, (1, -1))}
    sliced |= {"v": v.unflatten(2, (1, -1)), "log_forget": inputs["log_forget"]}
    arguments = {name: x.detach().requires_grad_() for name, x in sliced.items()}
    assert all(plan.token_rows(arguments[n])[0] is arguments[n] for n in "qkv")
    got = attention(**arguments, **options)
    grads = torch.autograd.grad(list(got), list(arguments.values()), list(d))
    actual = {"output": got.output.detach(), "memory": got.memory.detach()}
    actual |= {f"d_{name}": g for name, g in zip(arguments, grads, strict=True)}
    assert_bit_equal(actual, expected)


def test_gradients_are_linear_in_the_cotangent():
    inputs = make_inputs(T=70, H=1, **HOT, memory=1)
    inputs["log_forget"] -= 0.4
    d = cotangents(inputs)
    plain = evaluate(attention, inputs, d)
    for factor in (2.0**-30, 2.0**30):
        scaled = evaluate(attention, inputs, tuple(x * factor for x in d))
        for name in inputs:
            assert torch.equal(scaled[f"d_{name}"] / factor, plain[f"d_{name}"]), name


@pytest.mark.parametrize("size", [2.0**-30, 2.0**20])
@pytest.mark.parametrize("name", ["k", "v"])
def test_keys_and_values_of_any_size(name, size):
    inputs = make_inputs(T=70, H=1, **COLD)
    inputs["log_forget"] -= 0.4
    inputs[name] *= size
    if name == "k":
        inputs["q"] /= size
    d = cotangents(inputs)
    check("triton", inputs, (d[0], d[1] * 0) if name == "k" else d)
