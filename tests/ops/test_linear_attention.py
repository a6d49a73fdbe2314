"""Gated linear attention: every implementation computes the recurrence, with every gradient."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from numerics import (
    HOME,
    assert_bit_equal,
    assert_close,
    assert_within_budget,
    cotangents,
    evaluate,
    gates,
    leaves,
    left_of_writes,
    yardstick,
)

from gsa.ops import gated_linear_attention, gated_linear_step

IMPLS = ("reference", "chunked")


def make_inputs(
    *, B=1, T=16, H=2, G=None, K=5, V=6, dtype=torch.float64, gate="usual", memory=None, seed=0
):
    """Arguments of the operator by name; `memory` is the number of initial memories, if any."""
    G, rng = G or H, torch.Generator().manual_seed(seed)
    internal = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    inputs = {"q": normal(B, T, H, K), "k": normal(B, T, G, K), "v": normal(B, T, G, V)}
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    if gate == "none":
        inputs["log_decay"] = torch.zeros(B, T, G, K, dtype=internal)
    else:
        inputs["log_decay"] = gates(gate, (B, T, G, K), rng).to(internal)
    if memory is not None:
        inputs["initial_memory"] = normal(memory, G, K, V).to(internal)
    return inputs


def cotangents_of(inputs, memories=None):
    """Random gradients for (output, memory)."""
    as_slots = inputs | {"k": inputs["k"][..., :0], "log_forget": inputs["log_decay"]}
    as_slots["q"] = inputs["q"][..., :0]
    return cotangents(as_slots, memories)


def oracle(q, k, v, log_decay, *, scale=1.0, initial_memory=None, cu_seqlens=None):
    """Attention over all past tokens, each faded by the product of its decays since; in fp64."""
    q, k, v, log_decay = (x.double() for x in (q, k, v, log_decay))
    (B, T, H, K), (G, V) = q.shape, v.shape[2:]
    pieces = [(b, 0, T) for b in range(B)]
    if cu_seqlens is not None:
        pieces = [(0, a, b) for a, b in pairwise(cu_seqlens.tolist())]
    outputs, memories = [], []
    group = torch.arange(H) // (H // G)
    for index, (row, start, stop) in enumerate(pieces):
        first = q.new_zeros(G, K, V) if initial_memory is None else initial_memory[index].double()
        alive, faded = left_of_writes(log_decay[row, start:stop])
        query, key, value = (x[row, start:stop] for x in (q, k, v))
        alive = alive * key
        likeness = torch.einsum("thk,tjhk->tjh", query, alive[:, :, group])
        read = torch.einsum("tjh,jhv->thv", likeness, value[:, group])
        past = torch.einsum("thk,hkv->thv", query * faded[:, group], first[group])
        outputs.append(scale * (read + past))
        if start < stop:
            first = faded[-1, ..., None] * first + torch.einsum("jgk,jgv->gkv", alive[-1], value)
        memories.append(first)
    output = torch.cat(outputs) if cu_seqlens is not None else torch.stack(outputs)
    return output.view(B, T, H, V), torch.stack(memories)


def ruler(q, k, v, log_decay, **options):
    return yardstick(q, k[..., :0], v, log_decay, write=k, slot_activation="identity", **options)


def check(impl, inputs, d, **options):
    """The results have their dtypes and are within the error budget."""
    exact, rounded = (evaluate(f, inputs, d, scale=0.5, **options) for f in (oracle, ruler))
    got = evaluate(gated_linear_attention, inputs, d, scale=0.5, impl=impl, **options)
    for name, x in inputs.items():
        assert got[f"d_{name}"].dtype == x.dtype, name
    assert got["output"].dtype == inputs["q"].dtype and got["memory"].dtype == torch.float32
    assert_within_budget(got, exact, rounded, inputs["q"].dtype, impl)


SIZES = [
    {"T": 0, "memory": 1},
    {"T": 1, "H": 1, "K": 1, "V": 1},
    {"T": 63, "H": 4, "G": 1, "K": 3, "V": 5, "B": 2, "memory": 2},
    {"T": 130, "H": 6, "G": 2, "K": 5, "V": 1, "memory": 1},
    {"T": 300, "H": 1, "K": 17, "V": 3, "B": 2},
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("gate", ["usual", "near_one", "mixed", "steep", "none"])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"T{s['T']}")
def test_equals_attention_over_the_past(impl, gate, size):
    inputs = make_inputs(gate=gate, **size)
    d = cotangents_of(inputs)
    exact = evaluate(oracle, inputs, d, scale=0.7)
    assert_close(evaluate(gated_linear_attention, inputs, d, scale=0.7, impl=impl), exact, 1e-11)


@pytest.mark.parametrize("impl", IMPLS)
def test_packed_sequences_know_nothing_of_each_other(impl):
    bounds = torch.tensor([0, 0, 3, 70, 71, 140, 140])
    inputs = make_inputs(T=140, H=4, G=2, memory=6)
    d = cotangents_of(inputs, memories=6)
    exact = evaluate(oracle, inputs, d, cu_seqlens=bounds)
    got = evaluate(gated_linear_attention, inputs, d, cu_seqlens=bounds, impl=impl)
    assert_close(got, exact, 1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_are_those_of_the_function(impl):
    inputs = leaves(make_inputs(T=6, H=2, G=1, K=2, V=3, memory=1))
    run = partial(gated_linear_attention, scale=0.5, impl=impl)
    names = list(inputs)

    def by_position(*tensors):
        return tuple(run(**dict(zip(names, tensors, strict=True))))

    assert torch.autograd.gradcheck(by_position, tuple(inputs.values()))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("gate", ["usual", "near_one", "mixed", "steep"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_within_the_budget(dtype, gate, impl):
    inputs = make_inputs(B=2, T=200, H=4, G=2, K=16, V=8, dtype=dtype, gate=gate, memory=2)
    check(impl, inputs, cotangents_of(inputs))


def test_one_decay_for_all_keys_may_be_expanded():
    inputs = make_inputs(T=70, H=2, K=4)
    per_head = inputs["log_decay"][:, :1, :, :1].clone().requires_grad_()
    got, _ = gated_linear_attention(*(inputs[n] for n in "qkv"), per_head.expand(1, 70, 2, 4))
    whole = per_head.expand(1, 70, 2, 4).contiguous()
    expected, _ = gated_linear_attention(*(inputs[n] for n in "qkv"), whole)
    assert torch.equal(got, expected)
    assert torch.autograd.grad(got.sum(), per_head)[0].shape == per_head.shape


@pytest.mark.parametrize("impl", IMPLS)
def test_a_split_sequence_is_the_whole(impl):
    inputs = make_inputs(B=2, T=150, H=4, G=2)
    whole = gated_linear_attention(**inputs, impl=impl)
    outputs, memory = [], None
    for part in (slice(0, 1), slice(1, 70), slice(70, 150)):
        some = {name: x[:, part] for name, x in inputs.items()}
        output, memory = gated_linear_attention(**some, initial_memory=memory, impl=impl)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 1), whole.output, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(memory, whole.memory, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_step_is_one_token(inplace):
    inputs = make_inputs(B=3, T=1, H=4, G=2, memory=3)
    expected = gated_linear_attention(**inputs, scale=0.3)
    memory = inputs.pop("initial_memory")
    before = memory.clone()
    got = gated_linear_step(**inputs, memory=memory, scale=0.3, inplace=inplace)
    torch.testing.assert_close(got.output, expected.output)
    torch.testing.assert_close(got.memory, expected.memory)
    assert (got.memory is memory) == inplace
    assert torch.equal(memory, before) != inplace


@pytest.mark.parametrize("impl", IMPLS)
def test_the_future_never_leaks(impl):
    inputs = make_inputs(T=100, dtype=torch.float32)
    expected = gated_linear_attention(**inputs, impl=impl).output
    for name in ("k", "v"):
        changed = inputs | {name: inputs[name].clone()}
        changed[name][:, 50:] = float("nan")
        got = gated_linear_attention(**changed, impl=impl).output
        torch.testing.assert_close(got[:, :50], expected[:, :50])


def test_compiles_whole():
    inputs = make_inputs(T=70, dtype=torch.float32)
    d = cotangents_of(inputs)
    compiled = torch.compile(gated_linear_attention, fullgraph=True, backend="aot_eager")
    expected = evaluate(gated_linear_attention, inputs, d)
    assert_close(evaluate(compiled, inputs, d), expected, 1e-6)


WRONG = {
    "k": (lambda x: x["k"][..., :3], "k: expected shape [B, T, G, K] = [1, 16, 2, 5]"),
    "log_decay": (lambda x: x["v"], "log_decay: expected shape [B, T, G, K] = [1, 16, 2, 5]"),
    "initial_memory": (
        lambda x: torch.zeros(1, 2, 6, 5).double(),
        "initial_memory: expected shape [B, G, K, V] = [1, 2, 5, 6]",
    ),
    "scale": (lambda x: "rsqrt", "scale: expected a number"),
    "impl": (lambda x: "fast", "impl: expected one of"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument(name):
    inputs = make_inputs()
    make, expected = WRONG[name]
    with pytest.raises(ValueError) as raised:
        gated_linear_attention(**(inputs | {name: make(inputs)}))
    assert expected in str(raised.value)


HOT, COLD = {"K": 8, "V": 16}, {"K": 5, "V": 3}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.usefixtures("kernels")
class TestKernels:
    """On the GPU if there is one, else in Triton's interpreter."""

    CASES = {  # noqa: RUF012
        "bf16": dict(T=130, H=2, G=1, **HOT, dtype=torch.bfloat16, memory=1),
        "fp16": dict(T=70, H=1, **COLD, dtype=torch.float16),
        "fp32": dict(T=70, H=2, **HOT, memory=1),
        "mixed": dict(T=66, H=1, **HOT, gate="mixed", dtype=torch.bfloat16),
        "steep": dict(T=66, H=1, **COLD, gate="steep", memory=1),
        "none": dict(T=65, H=1, **COLD, gate="none", dtype=torch.bfloat16),
        "segments": dict(T=300, H=2, G=1, **HOT, dtype=torch.bfloat16, memory=1),
    }

    @pytest.mark.parametrize("case", CASES)
    def test_equal_attention_over_the_past(self, case, monkeypatch):
        pytest.importorskip("triton")
        from gsa.ops.triton import sizes

        monkeypatch.setattr(sizes, "segment_tokens", lambda packed: 256)
        inputs = on_home(make_inputs(**{"dtype": torch.float32, **self.CASES[case]}))
        check("triton", inputs, cotangents_of(inputs))

    def test_packed_sequences_know_nothing_of_each_other(self):
        pytest.importorskip("triton")
        bounds = torch.tensor([0, 0, 3, 70, 71, 100]).to(HOME.device)
        inputs = on_home(make_inputs(T=100, H=2, G=1, **HOT, dtype=torch.bfloat16, memory=5))
        check("triton", inputs, cotangents_of(inputs, memories=5), cu_seqlens=bounds)

    def test_compile_whole(self):
        pytest.importorskip("triton")
        inputs = on_home(make_inputs(T=70, H=2, G=1, **HOT, dtype=torch.bfloat16))
        d, run = cotangents_of(inputs), partial(gated_linear_attention, impl="triton")
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        assert_bit_equal(evaluate(compiled, inputs, d), evaluate(run, inputs, d))

    def test_keys_wider_than_the_kernels_take(self):
        inputs = make_inputs(T=1, K=257, dtype=torch.float32)
        with pytest.raises(ValueError, match="K = 257"):
            gated_linear_attention(**inputs, impl="triton")


def on_home(inputs):
    return {name: x.to(HOME.device) for name, x in inputs.items()}
