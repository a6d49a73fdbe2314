"""The one-token step's kernels: on the GPU if there is one, else in Triton's interpreter."""

import subprocess
import sys

import pytest
import torch
from numerics import (
    assert_bit_equal,
    assert_within_budget,
    errors,
    evaluate,
    make_inputs,
    oracle,
    yardstick,
)

pytest.importorskip("triton", reason="the kernels need triton: Linux, and the dev extra")

from gsa.layers.rope import rope_frequencies, rotate
from gsa.ops import SLOT_ACTIVATIONS
from gsa.ops.triton import step
from gsa.ops.triton.step_op import triton_step

# numpy, in the interpreter, remarks on the NaN that some of these tests hand out
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps


def token(*, dtype=torch.float32, **sizes):
    """(q, k, v, log_forget and perhaps write by name; memory), on the CPU."""
    inputs = make_inputs(T=1, dtype=dtype, **sizes)
    return inputs, inputs.pop("initial_memory")


def run(inputs, memory, *, rows=None, inplace=False, scale=0.7, slot_activation="softmax"):
    """`triton_step` on copies on the device unless in place; returns output and memory by name."""
    given = {name: x.to(DEVICE) for name, x in inputs.items()}
    rows = None if rows is None else torch.as_tensor(rows, dtype=torch.int64, device=DEVICE)
    got = triton_step(
        *(given[name] for name in ("q", "k", "v", "log_forget")),
        given.get("write"),
        memory.to(DEVICE),
        scale,
        slot_activation,
        inplace,
        rows,
    )
    return got._asdict()


def cpu(results):
    return {name: x.cpu() for name, x in results.items()}


def check(inputs, memory, got, *, scale=0.7, slot_activation="softmax"):
    """Output and memory within the contract's budget of the fp64 oracle."""
    arguments = {**inputs, "initial_memory": memory}
    options = {"scale": scale, "slot_activation": slot_activation}
    exact = evaluate(oracle, arguments, **options)
    got, dtype = cpu(got), inputs["q"].dtype
    assert got["output"].dtype == dtype and got["memory"].dtype == torch.float32
    assert_within_budget(got, exact, evaluate(yardstick, arguments, **options), dtype)
    assert max(errors(got["memory"], exact["memory"])) <= 2 * EPS  # fp32 whatever q's dtype


SIZES = {
    "ones": {"B": 1, "H": 1, "K": 1, "V": 1, "M": 1},
    "groups": {"B": 3, "H": 4, "G": 2, "K": 8, "V": 12, "M": 16},
    "odd": {"B": 2, "H": 15, "G": 3, "K": 17, "V": 3, "M": 5},
    "blocks": {"B": 1, "H": 2, "K": 40, "V": 24, "M": 200},
    "odd_blocks": {"B": 1, "H": 3, "G": 1, "K": 129, "V": 70, "M": 130},
}


@pytest.mark.parametrize("slot_activation", SLOT_ACTIVATIONS)
@pytest.mark.parametrize("write", [False, True], ids=["derived", "given"])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_definition(size, write, slot_activation):
    inputs, memory = token(**SIZES[size], write=write, memory=SIZES[size]["B"])
    got = run(inputs, memory, slot_activation=slot_activation)
    check(inputs, memory, got, slot_activation=slot_activation)


@pytest.mark.parametrize("gates", ["fp32", "like_q"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype, gates):
    gate_dtype = dtype if gates == "like_q" else torch.float32
    sizes = {"H": 4, "G": 2, "K": 16, "V": 36, "M": 8}
    inputs, memory = token(
        B=2, **sizes, dtype=dtype, gate_dtype=gate_dtype, write=gates == "like_q", memory=2
    )
    check(inputs, memory, run(inputs, memory))


# slots, key columns, value columns, warps: loops over columns, with a rest; many and few blocks
TILES = [(1, 16, 8, 1), (4, 8, 16, 2), (8, 32, 4, 1), (16, 4, 32, 1), (32, 32, 32, 4)]


@pytest.mark.parametrize("slot_activation", ["softmax", "swish"])
@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_however_the_memory_is_cut(monkeypatch, tiles, slot_activation):
    monkeypatch.setattr(step, "step_tiles", lambda *_: step.StepTiles(*tiles))
    inputs, memory = token(B=1, H=3, G=1, K=20, V=28, M=19, memory=1)
    got = run(inputs, memory, slot_activation=slot_activation)
    check(inputs, memory, got, slot_activation=slot_activation)


GROUP = {"B": 2, "H": 3, "G": 1, "K": 20, "V": 28, "M": 5}
WIDE = {"B": 1, "H": 1, "K": 4, "V": 540, "M": 5}
ONE_KERNEL = [("softmax", WIDE), *((kind, GROUP) for kind in SLOT_ACTIVATIONS)]


@pytest.mark.parametrize(("slot_activation", "sizes"), ONE_KERNEL)
def test_one_kernel_does_it_all(monkeypatch, sizes, slot_activation):
    """Token after token with the same counters, which each launch leaves as it found them."""
    # a program takes half the slots: 3 programs, the last not full; 512 columns are added at once
    monkeypatch.setattr(step, "step_tiles", lambda *_: step.StepTiles(4, 16, 256, 1))
    monkeypatch.setattr(step, "combine_kernel", None)
    inputs, memory = token(**sizes, write=True, memory=sizes["B"])
    arrivals = inputs["k"].new_zeros(inputs["k"].shape[::2], dtype=torch.int32, device=DEVICE)
    given = {name: x.to(DEVICE) for name, x in inputs.items()}
    given = tuple(given[name] for name in ("q", "k", "v", "log_forget", "write"))

    def advance(memory):
        held = memory.clone().to(DEVICE)
        output = step.launch(given, held, held, None, 0.7, slot_activation, True, arrivals)
        assert not arrivals.any()
        return {"output": output, "memory": held}

    first = advance(memory)
    check(inputs, memory, first, slot_activation=slot_activation)
    check(inputs, first["memory"].cpu(), advance(first["memory"]), slot_activation=slot_activation)
    assert_bit_equal(cpu(advance(memory)), cpu(first))


# not bf16: the interpreter cuts its digits off instead of rounding
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_queries_and_keys_are_turned_on_their_way(monkeypatch, dtype):
    """As the layer turns them, in pieces: 8 columns at once of 20."""
    monkeypatch.setattr(step, "step_tiles", lambda *_: step.StepTiles(4, 8, 32, 1))
    inputs, memory = token(B=2, H=6, G=2, K=20, V=12, M=7, memory=2, dtype=dtype)
    positions = torch.tensor([[7007], [3]], device=DEVICE)
    scaling = {"rope_type": "linear", "factor": 2.0, "attention_factor": 1.5}
    given = {name: x.to(DEVICE) for name, x in inputs.items()}
    turn = step.Turn(positions, rope_frequencies(20, 1e4, scaling, DEVICE), 1.5)
    held, arrivals = memory.clone().to(DEVICE), torch.zeros(2, 2, dtype=torch.int32, device=DEVICE)
    vectors = (given["q"], given["k"], given["v"], given["log_forget"], None)
    output = step.launch(vectors, held, held, None, 0.7, "softmax", True, arrivals, turn)
    turned = {name: rotate(given[name], positions, 1e4, scaling).cpu() for name in "qk"}
    check(inputs | turned, memory, {"output": output, "memory": held})


def test_tiles_are_powers_of_two_that_fit_a_program():
    for K, V, M in [(1, 1, 1), (512, 512, 64), (17, 3, 256), (64, 64, 64), (5000, 9, 200)]:
        for R in (1, 2, 3, 8, 64):
            tiles = step.step_tiles(K, V, M, R)
            assert all(n >= 1 and n & (n - 1) == 0 for n in tiles)
            assert tiles.slots < 2 * M and tiles.warps <= 16
            assert tiles.slots * max(tiles.key_columns, tiles.value_columns) <= 8192
            assert tiles.key_columns < 2 * K and tiles.value_columns < 2 * V


def test_extreme_gates():
    inputs, memory = token(B=1, H=2, M=5, memory=1)
    inputs["log_forget"][0, 0, 0] = torch.tensor([-1e4, 0.0, -60.0, -1e-6, -127.9])
    got = run(inputs, memory)
    check(inputs, memory, got)
    assert torch.equal(got["memory"].cpu()[0, 0, 1], memory[0, 0, 1])  # keeps everything


def test_each_gate_is_exact_to_an_ulp():
    """What a slot keeps and what it is given, each alone, over the whole range of gates."""
    inputs, memory = token(B=1, H=1, K=1, V=1, M=256, memory=1)
    x = -torch.logspace(-8, 1.93, 256)
    inputs["log_forget"][0, 0, 0] = x
    kept = run({**inputs, "k": inputs["k"] * 0}, torch.ones_like(memory))["memory"].cpu()
    given = run({**inputs, "k": inputs["k"] * 0 + 1}, memory * 0)["memory"].cpu()
    for got, exact in ((kept, x.double().exp()), (given, -torch.expm1(x.double()))):
        error = (got[0, 0, :, 0].double() - exact).abs() / exact
        assert error.max() <= 1.5 * EPS


@pytest.mark.parametrize("slot_activation", SLOT_ACTIVATIONS)
def test_scores_of_any_size(slot_activation):
    """Blocks whose scores are all far below another's, and sums that only fp32's range holds."""
    inputs, memory = token(B=1, H=2, K=40, V=24, M=200, memory=1)
    memory[:, :, :150, :40] *= 1e6
    got = run(inputs, memory, slot_activation=slot_activation)
    check(inputs, memory, got, slot_activation=slot_activation)
    if slot_activation == "softmax":
        memory[:, :, :150, 0], inputs["q"][..., 0] = -torch.inf, 1.0
        got = run(inputs, memory, slot_activation=slot_activation)
        finite = {**inputs, "log_forget": inputs["log_forget"][..., 150:]}
        rest = run(finite, memory[:, :, 150:])
        torch.testing.assert_close(got["output"], rest["output"], rtol=1e-5, atol=1e-6)


def test_from_nothing_an_output_is_no_larger_than_its_values():
    inputs, memory = token(B=2, H=4, G=2, K=8, V=12, M=16, memory=2)
    got = run(inputs, memory * 0)["output"].cpu()
    bound = inputs["v"].abs().amax() * (1 + 8 * EPS)
    assert (got.abs() <= bound).all()


def test_by_default_nothing_is_modified():
    inputs, memory = token(B=2, H=2, write=True, memory=2)
    given, held = {n: x.to(DEVICE).clone() for n, x in inputs.items()}, memory.to(DEVICE).clone()
    got = run(given, held)
    assert got["memory"].data_ptr() != held.data_ptr() and got["memory"].is_contiguous()
    got["memory"].zero_()
    assert_bit_equal(cpu({**given, "memory": held}), {**inputs, "memory": memory})


def lay(memory, kind):
    """The same numbers on the device, lying otherwise."""
    memory = memory.to(DEVICE)
    B, G, M, X = memory.shape
    if kind == "layers":  # row by row far apart: the kernel takes it as it is
        return memory.new_zeros(B, 3, G, M, X)[:, 1].copy_(memory)
    if kind == "transposed":
        return memory.mT.contiguous().mT
    if kind == "slots_first":
        return memory.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "wider":
        return memory.new_zeros(B, G, M, X + 3)[..., :X].copy_(memory)
    if kind == "unaligned":
        return memory.new_zeros(memory.numel() + 1)[1:].view(B, G, M, X).copy_(memory)
    assert kind == "contiguous", kind
    return memory.clone()


LAYOUTS = ["contiguous", "layers", "transposed", "slots_first", "wider", "unaligned"]


@pytest.mark.parametrize("sizes", [(8, 12), (5, 6)], ids=["fours", "any"])
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("rows", [None, [4, 0, 3]], ids=["batch", "rows"])
def test_inplace_on_any_memory(kind, rows, sizes):
    inputs, pool = token(
        B=3, H=4, G=2, K=sizes[0], V=sizes[1], M=16, memory=3 if rows is None else 5
    )
    picked = pool if rows is None else pool[rows]
    expected = run(inputs, picked.contiguous())
    memory = lay(pool, kind)
    assert_bit_equal(run(inputs, memory) if rows is None else expected, expected)
    address, version = memory.data_ptr(), memory._version
    spaced = None if rows is None else torch.tensor(rows, device=DEVICE).repeat_interleave(2)[::2]
    got = run(inputs, memory, inplace=True, rows=spaced)
    assert got["memory"] is memory and memory.data_ptr() == address
    assert memory._version > version
    assert torch.equal(got["output"], expected["output"])
    if rows is None:
        assert torch.equal(memory, expected["memory"])
    else:
        assert torch.equal(memory[rows], expected["memory"])
        assert torch.equal(memory[[1, 2]].cpu(), pool[[1, 2]])


def test_tokens_of_any_strides():
    inputs, memory = token(B=3, H=4, G=2, K=8, V=12, M=16, write=True, memory=3)
    given = {name: x.to(DEVICE) for name, x in inputs.items()}
    strided = {name: x.transpose(0, 3).contiguous().transpose(0, 3) for name, x in given.items()}
    shifted = {
        name: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)
        for name, x in given.items()
    }
    sliced = {name: torch.cat([x, x], 1)[:, :1] for name, x in given.items()}
    expected = run(inputs, memory)
    for variant in (strided, shifted, sliced):
        assert_bit_equal(run(variant, memory), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", ["groups", "odd", "odd_blocks"])
def test_a_row_gives_the_same_bits_whatever_stands_beside_it(size, dtype):
    inputs, memory = token(**{**SIZES[size], "B": 3}, dtype=dtype, memory=3)
    together = cpu(run(inputs, memory))
    assert_bit_equal(cpu(run(inputs, memory)), together)
    for b in (0, 2):
        mine = {name: x[b : b + 1] for name, x in together.items()}
        row = {name: x[b : b + 1].to(DEVICE) for name, x in inputs.items()}
        held = memory[b : b + 1].to(DEVICE)
        assert_bit_equal(cpu(run(row, held)), mine)  # as a view of the batch, perhaps unaligned
        poisoned = {name: torch.full_like(x, torch.nan) for name, x in inputs.items()}
        for name, x in inputs.items():
            poisoned[name][b] = x[b]
        around = torch.full_like(memory, torch.nan)
        around[b] = memory[b]
        got = {name: x[b : b + 1] for name, x in cpu(run(poisoned, around)).items()}
        assert_bit_equal(got, mine)


def test_a_pool_of_poisoned_neighbours():
    """Free rows may hold anything, and keep it."""
    inputs, pool = token(B=1, H=2, K=40, V=24, M=200, memory=4)
    clean = run(inputs, pool[2:3].clone())
    pool[[0, 1, 3]] = torch.nan
    pool = pool.to(DEVICE)
    got = run(inputs, pool, inplace=True, rows=[2])
    assert torch.equal(got["output"], clean["output"])
    assert torch.equal(pool[2:3], clean["memory"]) and pool[[0, 1, 3]].isnan().all()


@pytest.mark.parametrize("slot_activation", SLOT_ACTIVATIONS)
def test_a_row_outside_the_pool_is_seen_and_does_no_harm(slot_activation):
    inputs, pool = token(B=3, H=2, K=8, V=12, M=16, memory=4)
    held = pool.to(DEVICE)[1:3].clone()
    got = run(inputs, held, inplace=True, rows=[-1, 1, 2], slot_activation=slot_activation)
    assert got["output"][[0, 2]].isnan().all() and got["output"][1].isfinite().all()
    assert torch.equal(held[0].cpu(), pool[1]) and not torch.equal(held[1].cpu(), pool[2])


def test_no_sequences_at_all():
    inputs, pool = token(B=0, H=2, memory=3)
    before = pool.clone()
    got = run(inputs, pool.to(DEVICE), inplace=True, rows=[])
    assert got["output"].shape == (0, 1, 2, 6) and torch.equal(got["memory"].cpu(), before)
    got = run(inputs, pool[:0])
    assert got["output"].shape == (0, 1, 2, 6) and got["memory"].shape == (0, 2, 4, 11)


@pytest.mark.parametrize("size", ["odd", "blocks"])
def test_every_number_of_a_result_is_written(monkeypatch, size):
    inputs, memory = token(**SIZES[size], memory=SIZES[size]["B"])
    expected = run(inputs, memory)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    assert_bit_equal(run(inputs, memory), expected)


def test_autocast_changes_nothing():
    inputs, memory = token(B=2, H=4, G=2, memory=2)
    expected = run(inputs, memory)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert_bit_equal(run(inputs, memory), expected)


def test_in_inference_mode():
    inputs, memory = token(B=2, H=4, G=2, memory=2)
    expected = run(inputs, memory)
    with torch.inference_mode():
        assert_bit_equal(run(inputs, memory.clone(), inplace=True), expected)
        held = memory.to(DEVICE).clone()
    assert_bit_equal(run(inputs, held, inplace=True), expected)


def on_device(inputs, memory):
    names = ("q", "k", "v", "log_forget")
    return (*(inputs[name].to(DEVICE) for name in names), None, memory.to(DEVICE))


def test_compiles_whole():
    inputs, pool = token(B=2, H=4, G=2, K=8, V=12, M=16, memory=3)
    rows = torch.tensor([2, 0], device=DEVICE)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def both(q, k, v, log_forget, write, memory, pool, rows):
        token = (q * 1, k, v, log_forget, write)
        output, after = triton_step(*token, memory, 0.7, "softmax", False, None)
        second, _ = triton_step(*token, after, 0.7, "softmax", True, None)
        third, _ = triton_step(*token, pool, 0.7, "softmax", True, rows)
        return output, second, after, third

    *arguments, memory = on_device(inputs, pool[:2])
    held = pool.to(DEVICE).clone()
    output, second, after, third = both(*arguments, memory.clone(), held, rows)
    first = run(inputs, memory)
    again = run(inputs, first["memory"])
    pooled = run(inputs, pool[[2, 0]])
    assert torch.equal(output, first["output"]) and torch.equal(second, again["output"])
    assert torch.equal(after, again["memory"]) and torch.equal(third, pooled["output"])
    assert torch.equal(held[[2, 0]], pooled["memory"]) and torch.equal(held[1].cpu(), pool[1])


@pytest.mark.parametrize("size", [{"K": 5, "V": 6, "M": 4}, {"K": 40, "V": 24, "M": 200}])
def test_operators_say_what_they_do(size):
    inputs, pool = token(B=2, H=2, **size, memory=3)
    *arguments, memory = on_device(inputs, pool)
    rows = torch.tensor([2, 0], device=DEVICE)
    ops = torch.ops.gsa
    torch.library.opcheck(ops.triton_step, (*arguments, memory[:2].clone(), 0.7, "softmax"))
    torch.library.opcheck(ops.triton_step_, (*arguments, memory, rows, 0.7, "softmax"))
    torch.library.opcheck(ops.triton_step_, (*arguments, memory[1:], None, 0.7, "relu"))


def test_the_operators_load_no_triton():
    code = "import sys, gsa.ops.triton.step_op; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.gpu
@pytest.mark.parametrize("one_kernel", [False, True])
def test_a_captured_step_advances_the_memory_at_every_replay(one_kernel):
    inputs, memory = token(B=2, H=4, G=2, K=256, V=256, M=64, memory=2)
    *arguments, held = on_device(inputs, memory)
    arrivals = torch.zeros(2, 2, dtype=torch.int32, device=DEVICE)

    def advance(memory):
        if one_kernel:  # the copy comes between kernels of which each writes what the next asks for
            options = (None, 0.7, "softmax", True, arrivals)
            return step.launch(tuple(arguments), memory, memory, *options).clone()
        return triton_step(*arguments, memory, 0.7, "softmax", True, None).output

    expected = held.clone()
    outputs = [advance(expected) for _ in range(20)]
    advance(held.clone())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = advance(held)
    for wanted in outputs:
        graph.replay()
        assert torch.equal(output, wanted)
    assert torch.equal(held, expected) and not arrivals.any()


@pytest.mark.gpu
@pytest.mark.parametrize("B", [1, 3])
def test_rows_beyond_two_to_the_31_numbers(B):
    inputs, memory = token(B=B, H=2, K=64, V=64, M=64, memory=B)
    expected = run(inputs, memory)
    size, apart = memory[0].numel(), 4 * (2**29 // B + 2**10)
    numbers = torch.empty(apart * B + size, device=DEVICE)
    pool = numbers.as_strided((B + 1, *memory.shape[1:]), (apart, *memory.stride()[1:]))
    pool[1:] = memory.to(DEVICE)
    got = run(inputs, pool, inplace=True, rows=list(range(1, B + 1)))
    assert torch.equal(got["output"], expected["output"])
    assert torch.equal(pool[1:], expected["memory"])


@pytest.mark.gpu
def test_a_batch_beyond_two_to_the_31_numbers():
    B, H, K, M = 4104, 4, 512, 128
    rng = torch.Generator(DEVICE).manual_seed(0)
    q, k, v = torch.randn(3, B, 1, H, K, device=DEVICE, generator=rng).unbind()
    log_forget = -torch.rand(B, 1, H, M, device=DEVICE, generator=rng)
    memory = torch.randn(B, H, M, 2 * K, device=DEVICE, generator=rng)
    assert memory.numel() > 2**31
    token, options = (q, k, v, log_forget, None), (1.0, "softmax", True, None)
    alone = [x if x is None else x[-1:].clone() for x in (*token, memory)]
    expected = triton_step(*alone, *options)
    got = triton_step(*token, memory, *options)
    assert torch.equal(got.output[-1:], expected.output)
    assert torch.equal(memory[-1:], expected.memory)
