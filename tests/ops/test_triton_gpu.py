"""What only a GPU can show of the operator's kernels: sizes, addresses, streams, graphs.

Run with `pytest -m gpu tests/ops`. Each test says what it needs beyond 2 GiB of GPU memory.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from numerics import (
    assert_bit_equal,
    assert_same,
    check,
    cotangents,
    evaluate,
    leaves,
    make_inputs,
)

pytest.importorskip("triton", reason="the kernels need triton: Linux, and the dev extra")

from gsa.ops import describe_impl, gated_slot_attention

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]
attention = partial(gated_slot_attention, impl="triton")
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
TOKENWISE = ("q", "k", "v", "log_forget", "write")


def random_inputs(B, T, H, G, K, V, M, dtype=torch.bfloat16, seed=0):
    """Made on the GPU: `make_inputs` would take minutes for these sizes."""
    rng = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=rng, device="cuda", dtype=dtype)

    inputs = {"q": normal(B, T, H, K), "k": normal(B, T, G, K), "v": normal(B, T, G, V)}
    gates = normal(B, T, G, M, dtype=torch.float32)
    inputs["log_forget"] = torch.nn.functional.logsigmoid(gates + 1) / 8
    return inputs


def random_cotangents(inputs, memories, seed=1):
    rng = torch.Generator("cuda").manual_seed(seed)
    (B, T, H, K), (G, V), M = (
        inputs["q"].shape,
        inputs["v"].shape[2:],
        inputs["log_forget"].shape[3],
    )
    d_output = torch.randn((B, T, H, V), generator=rng, device="cuda", dtype=inputs["q"].dtype)
    return d_output, torch.randn((memories, G, M, K + V), generator=rng, device="cuda")


def piece(tensors, tokens, memory):
    """The part of inputs or results that belongs to some tokens and to one memory."""
    return {
        name: x[memory : memory + 1] if "memory" in name else x[:, tokens]
        for name, x in tensors.items()
    }


@DTYPES
@pytest.mark.parametrize("gate", ["usual", "near_one", "mixed", "steep"])
def test_real_widths_within_the_budget(dtype, gate):
    inputs = make_inputs(B=2, T=600, H=8, G=2, K=128, V=64, M=64, dtype=dtype, gate=gate, memory=2)
    check("triton", inputs, cotangents(inputs), scale=128**-0.5)


@DTYPES
@pytest.mark.parametrize(
    "size",
    [(512, 512, 64), (64, 64, 256), (1000, 3, 200), (512, 128, 256), (64, 3, 128), (32, 16, 64)],
)
def test_widths_that_fill_a_program(dtype, size):
    """Registers and shared memory suffice for every block that is launched."""
    K, V, M = size
    inputs = make_inputs(T=300, H=2, G=1, K=K, V=V, M=M, dtype=dtype, write=True, memory=1)
    check("triton", inputs, cotangents(inputs), scale=K**-0.5)


@pytest.mark.parametrize("size", [(5, 128, 64), (8, 128, 64), (32, 512, 16)])
def test_many_query_heads_share_a_memory(size):
    """Also in two segments, and with a reset that goes token by token. About 8 GiB."""
    R, K, M = size
    T = 2304 if R < 32 else 256  # the oracle holds T² R numbers
    inputs = make_inputs(T=T, H=R, G=1, K=K, V=16, M=M, dtype=torch.bfloat16, memory=1)
    inputs["log_forget"] /= 8
    inputs["log_forget"][0, T - 128] = -1e4
    check("triton", inputs, cotangents(inputs), scale=K**-0.5)


@DTYPES
def test_long_sequences_in_segments(dtype):
    """About 16 GiB, for the oracle."""
    inputs = make_inputs(T=4500, H=2, G=1, K=64, V=64, M=16, dtype=dtype, memory=1)
    inputs["log_forget"] /= 8
    check("triton", inputs, cotangents(inputs), scale=0.125)


def test_the_model_of_1_3b_is_bit_equal_run_to_run_and_row_by_row():
    """About 6 GiB."""
    inputs = random_inputs(8, 2048, 4, 4, 512, 512, 64)
    d = random_cotangents(inputs, 8)
    first = evaluate(attention, inputs, d, scale=512**-0.5)
    for _ in range(3):
        assert_bit_equal(evaluate(attention, inputs, d, scale=512**-0.5), first)
    for b in (0, 5):
        row = {name: x[b : b + 1] for name, x in inputs.items()}
        alone = evaluate(attention, row, tuple(x[b : b + 1] for x in d), scale=512**-0.5)
        assert_bit_equal(alone, {name: x[b : b + 1] for name, x in first.items()})


@DTYPES
@pytest.mark.parametrize("size", [(64, 64, 64), (17, 5, 3)], ids=["hot", "cold"])
def test_a_row_has_the_same_bits_wherever_it_lies(dtype, size):
    """Row 1 of odd sizes starts at no multiple of 16 bytes, alone or beside others."""
    K, V, M = size
    inputs = make_inputs(B=3, T=333, H=3, G=1, K=K, V=V, M=M, dtype=dtype, write=True, memory=3)
    d = cotangents(inputs)
    together = evaluate(attention, inputs, d)
    for b in range(3):
        row = {name: x[b : b + 1] for name, x in inputs.items()}
        mine = {name: x[b : b + 1] for name, x in together.items()}
        assert_bit_equal(evaluate(attention, row, tuple(x[b : b + 1] for x in d)), mine)
        moved = {n: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x) for n, x in row.items()}
        assert_bit_equal(evaluate(attention, moved, tuple(x[b : b + 1] for x in d)), mine)


def test_300_thousand_packed_tokens():
    """About 8 GiB. Short sequences between long ones are what they are alone."""
    lengths = [100_000, 130, 0, 65_535, 1, 70_000, 64_204, 130]
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    T, S = 300_000, len(lengths)
    assert bounds[-1] == T
    inputs = random_inputs(1, T, 4, 2, 128, 128, 64)
    inputs["initial_memory"] = torch.randn(S, 2, 64, 256, device="cuda")
    d = random_cotangents(inputs, S)
    got = evaluate(attention, inputs, d, cu_seqlens=bounds, scale=128**-0.5)
    for s in (1, 4, 7):
        tokens = slice(int(bounds[s]), int(bounds[s + 1]))
        mine = piece(inputs, tokens, s)
        my_d = (d[0][:, tokens], d[1][s : s + 1])
        alone = evaluate(attention, mine, my_d, scale=128**-0.5)
        assert_same(piece(got, tokens, s), alone, mine, my_d, scale=128**-0.5)
    assert torch.equal(got["memory"][2], inputs["initial_memory"][2])
    assert all(x.isfinite().all() for x in got.values())


def test_70_thousand_sequences():
    """About 4 GiB: a memory for each, most of them of one token, every seventh empty."""
    S = 70_000
    lengths = torch.ones(S, dtype=torch.int64)
    lengths[::7], lengths[35_001], lengths[-2] = 0, 300, 130
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to("cuda")
    inputs = random_inputs(1, int(lengths.sum()), 2, 1, 32, 32, 16)
    inputs["initial_memory"] = torch.randn(S, 1, 16, 64, device="cuda")
    d = random_cotangents(inputs, S)
    got = evaluate(attention, inputs, d, cu_seqlens=bounds)
    for s in (1, 35_001, 69_998, 69_999):
        tokens = slice(int(bounds[s]), int(bounds[s + 1]))
        mine, my_d = piece(inputs, tokens, s), (d[0][:, tokens], d[1][s : s + 1])
        alone = evaluate(attention, mine, my_d)
        assert_same(piece(got, tokens, s), alone, mine, my_d)
    empty = (lengths == 0).to("cuda")
    assert torch.equal(got["memory"][empty], inputs["initial_memory"][empty])
    assert torch.equal(got["d_initial_memory"][empty], d[1][empty])


LARGE = {
    "queries": (1, 131_200, 32, 1, 512, 16),
    "outputs": (1, 131_200, 32, 1, 16, 512),
    "keys": (1, 65_600, 64, 64, 512, 16),
    "rows": (1025, 128, 32, 1, 512, 16),
}


@pytest.mark.parametrize("size", LARGE.values(), ids=LARGE.keys())
def test_more_than_two_to_the_31_numbers_in_a_tensor(size):
    """About 30 GiB. The last row forgets all that was before its last 128 tokens."""
    B, T, H, G, K, V = size
    inputs = random_inputs(B, T, H, G, K, V, 16)
    assert max(x.numel() for x in (inputs["q"], inputs["q"][..., :1].expand(B, T, H, V))) > 2**31
    last = slice(T - 128, T)
    inputs["log_forget"][-1, T - 128] = -1e4
    d = random_cotangents(inputs, B)
    d[0][-1, : T - 128] = 0
    got = evaluate(attention, inputs, d, scale=K**-0.5)
    mine = {name: x[-1:, last].clone() for name, x in inputs.items()}
    my_d = (d[0][-1:, last].clone(), d[1][-1:])
    alone = evaluate(attention, mine, my_d, scale=K**-0.5)
    actual = {name: x[-1:] if name == "memory" else x[-1:, last] for name, x in got.items()}
    assert_same(actual, alone, mine, my_d, scale=K**-0.5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_host_never_waits(packed, recompute):
    """Forward and backward run in a CUDA graph, which a replay repeats on new numbers."""
    inputs = make_inputs(T=1500, H=4, G=2, K=64, V=64, M=32, dtype=torch.bfloat16, memory=3)
    d = cotangents(inputs, memories=3)
    options = {"recompute": recompute}
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 3, 3, 1500], device="cuda", dtype=torch.int32)
    else:
        inputs["initial_memory"] = inputs["initial_memory"][:1].contiguous()
        d = (d[0], d[1][:1].contiguous())
    expected = evaluate(attention, inputs, d, **options)
    arguments = leaves(inputs)

    def run():
        got = attention(**arguments, **options)
        grads = torch.autograd.grad(list(got), list(arguments.values()), list(d))
        named = {f"d_{name}": g for name, g in zip(arguments, grads, strict=True)}
        return {"output": got.output.detach(), "memory": got.memory.detach(), **named}

    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    graph.replay()
    assert_bit_equal(results, expected)
    with torch.no_grad():
        arguments["q"].mul_(0.5)
    graph.replay()
    changed = evaluate(attention, {n: x.detach() for n, x in arguments.items()}, d, **options)
    assert_bit_equal(results, changed)
    assert not torch.equal(results["output"], expected["output"])


def test_a_new_thread_launches_what_another_compiled():
    """It has no CUDA context yet, and no memory to ask for that would give it one."""
    inputs = make_inputs(T=300, H=4, G=2, K=64, V=64, M=32, dtype=torch.bfloat16, memory=1)
    d = cotangents(inputs)
    expected = evaluate(attention, inputs, d)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(evaluate, attention, inputs, d).result()
        assert_bit_equal(found, expected)
        with torch.no_grad():
            output = pool.submit(attention, **inputs).result().output
    assert torch.equal(output, expected["output"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("packed", [None, (0, 70, 300)], ids=["rows", "packed"])
def test_a_second_gpu_has_the_bits_of_the_first(packed):
    """The current device is the first; the kernels are compiled, and loaded, for the second."""
    memories = 1 if packed is None else len(packed) - 1
    sizes = {"T": 300, "H": 4, "G": 2, "K": 48, "V": 80, "M": 24, "memory": memories}
    inputs = make_inputs(**sizes, dtype=torch.bfloat16)
    d = cotangents(inputs, memories)
    bounds = {} if packed is None else {"cu_seqlens": torch.tensor(packed, dtype=torch.int32)}
    there = {name: x.detach().to("cuda:1") for name, x in inputs.items()}
    found = evaluate(attention, there, tuple(x.to("cuda:1") for x in d), **bounds)
    assert all(x.device.index == 1 for x in found.values())
    expected = evaluate(attention, inputs, d, **bounds)
    assert_bit_equal({name: x.to("cuda:0") for name, x in found.items()}, expected)


def test_packing_described_on_either_side():
    inputs = make_inputs(T=300, H=4, G=2, K=64, V=64, M=32, dtype=torch.bfloat16)
    d = cotangents(inputs, memories=4)
    for dtype in (torch.int32, torch.int64):
        bounds = torch.tensor([0, 70, 70, 71, 300], dtype=dtype)
        here = evaluate(attention, inputs, d, cu_seqlens=bounds)
        assert_bit_equal(evaluate(attention, inputs, d, cu_seqlens=bounds.cuda()), here)
    lie = torch.tensor([0, 400, 20, 300])
    with pytest.raises(ValueError, match="cu_seqlens"):
        attention(**inputs, cu_seqlens=lie)
    attention(**inputs, cu_seqlens=lie.cuda())  # trusted: anything may come, but no error
    torch.cuda.synchronize()


def test_values_that_do_not_change_are_read_with_a_stride_of_zero():
    inputs = make_inputs(T=300, H=2, G=1, K=64, V=64, M=32, dtype=torch.bfloat16)
    inputs["v"] = inputs["v"][:, :1].expand(-1, 300, -1, -1)
    d = cotangents(inputs)
    plain = {name: x.contiguous() for name, x in inputs.items()}
    expected = evaluate(attention, plain, d)
    arguments = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    got = attention(**arguments)
    grads = torch.autograd.grad(list(got), list(arguments.values()), list(d))
    actual = {"output": got.output.detach(), "memory": got.memory.detach()}
    actual |= {f"d_{name}": g for name, g in zip(arguments, grads, strict=True)}
    assert_bit_equal(actual, expected)


def test_nan_in_the_last_value_reaches_no_output_before_it():
    """A segment is then read twice: what came first must not be what stays."""
    inputs = make_inputs(T=2048, H=4, G=1, K=64, V=128, M=64, dtype=torch.bfloat16)
    before = attention(**inputs).output
    inputs["v"][:, -1] = torch.nan
    for _ in range(50):
        after = attention(**inputs).output
        assert after[:, :-1].isfinite().all() and after[:, -1].isnan().all()
    past = {name: x[:, :-1] for name, x in inputs.items()}
    assert_same({"output": after[:, :-1]}, {"output": before[:, :-1]}, past)


def test_compiled_by_inductor_between_other_operations():
    """Strides at the operator's border are whatever the compiler's layout leaves."""

    def block(attend, q, k, v, log_forget, initial_memory):
        q, k = torch.nn.functional.silu(q), torch.nn.functional.silu(k)
        q = q.mT.contiguous().mT
        got = attend(q, k, v * 2, log_forget, initial_memory=initial_memory)
        return got[0].transpose(1, 2).relu(), got[1] + 1

    inputs = make_inputs(T=300, H=4, G=2, K=64, V=64, M=32, memory=1)
    d_output, d_memory = cotangents(inputs)
    d = (d_output.transpose(1, 2), d_memory)
    torch._dynamo.reset()
    function = torch.compile(partial(block, attention), fullgraph=True)
    actual, eager = (evaluate(f, inputs, d) for f in (function, partial(block, attention)))
    assert_same(actual, eager, inputs, d, around=lambda f: partial(block, f))


def test_auto_takes_the_kernels_for_what_they_can_do():
    assert describe_impl("auto", torch.device("cuda")) == ("triton", "the fastest form for cuda")
    inputs = make_inputs(T=70, H=2, G=1, memory=1)
    d = cotangents(inputs)
    assert_bit_equal(evaluate(gated_slot_attention, inputs, d), evaluate(attention, inputs, d))
    double = {name: x.double() for name, x in inputs.items()}
    wide = make_inputs(T=3, M=257)
    for beyond in (double, wide):
        by_chunks = gated_slot_attention(**beyond, impl="chunked")
        assert torch.equal(gated_slot_attention(**beyond).output, by_chunks.output)
