"""torch.compile sees whole graphs: the same numbers, static and dynamic lengths, few recompiles."""

import shutil

import pytest
import torch
from numerics import Tensors, assert_bit_equal, assert_close, cotangents, evaluate, make_inputs
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from gsa.ops import gated_slot_attention, gated_slot_step

HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, backend="aot_eager", **options):
    """(function compiled as one graph, counter of compilations)."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, backend=counter, fullgraph=True, **options), counter


def attend(q, k, v, log_forget, write=None, initial_memory=None, cu_seqlens=None, recompute=True):
    return gated_slot_attention(
        q,
        k,
        v,
        log_forget,
        write=write,
        initial_memory=initial_memory,
        cu_seqlens=cu_seqlens,
        recompute=recompute,
        scale=0.7,
    )


CASES = {
    "plain": {"T": 70},
    "groups": {"B": 2, "T": 70, "H": 6, "G": 2, "write": True, "memory": 2},
    "low": {"T": 130, "H": 4, "G": 2, "dtype": torch.bfloat16, "memory": 1},
}


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_compiled_equals_eager(case, recompute):
    inputs = make_inputs(**case)
    d = cotangents(inputs)
    function, counter = compiled(attend, dynamic=False)
    eager = evaluate(attend, inputs, d, recompute=recompute)
    assert_close(evaluate(function, inputs, d, recompute=recompute), eager, 1e-13)
    assert counter.frame_count == 1


@pytest.mark.skipif(not HAS_COMPILER, reason="inductor needs a C++ compiler; aot_eager runs above")
def test_compiled_by_inductor_between_other_operations():
    """Strides at the operator's border are whatever the compiler's layout leaves."""

    def block(q, k, v, log_forget, initial_memory):
        q, k = torch.nn.functional.silu(q), torch.nn.functional.silu(k)
        got = gated_slot_attention(
            q.mT.contiguous().mT, k, v * 2, log_forget, initial_memory=initial_memory
        )
        return got.output.transpose(1, 2).relu(), got.memory + 1

    inputs = make_inputs(T=70, H=4, G=2, dtype=torch.float32, memory=1)
    d_output, d_memory = cotangents(inputs)
    d = (d_output.transpose(1, 2), d_memory)
    function, counter = compiled(block, "inductor", dynamic=False)
    plain = {"cpp.simdlen": 1, "compile_threads": 1}  # scalar code: a look at the CPU takes longer
    with torch._inductor.config.patch(plain):
        assert_close(evaluate(function, inputs, d), evaluate(block, inputs, d), 1e-6)
    assert counter.frame_count == 1


def test_the_reference_compiles_at_a_fixed_length():
    inputs = make_inputs(T=5, memory=1)
    d = cotangents(inputs)

    def reference(**arguments):
        return gated_slot_attention(**arguments, impl="reference")

    function, _ = compiled(reference, dynamic=False)
    assert_close(evaluate(function, inputs, d), evaluate(reference, inputs, d), 1e-13)


def test_few_graphs_serve_every_length():
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(attend, backend=counter, fullgraph=True)
    for T in (70, 2, 64, 65, 300, 1000):
        inputs = make_inputs(B=2, T=T, H=4, G=2, K=3, V=3, M=2, memory=2)
        arguments = {name: x.requires_grad_() for name, x in inputs.items()}
        for name in ("q", "k", "v", "log_forget"):
            torch._dynamo.mark_dynamic(arguments[name], 1)
        d = cotangents(inputs)
        got = function(**arguments)
        grads = torch.autograd.grad(list(got), list(arguments.values()), list(d))
        results: Tensors = {"output": got.output.detach(), "memory": got.memory.detach()}
        results |= {f"d_{n}": g for n, g in zip(arguments, grads, strict=True)}
        assert_close(results, evaluate(attend, inputs, d), 1e-13)
    assert counter.frame_count <= 2, "at most one more, for what fits in a single segment"


def test_automatic_dynamic_shapes_settle():
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(attend, backend=counter, fullgraph=True)
    for T in (70, 71, 72, 200, 33):
        inputs = make_inputs(T=T, K=3, V=3, M=2)
        assert_close(evaluate(function, inputs), evaluate(attend, inputs), 1e-13)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_one_graph_serves_every_packing(dtype):
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(attend, backend=counter, fullgraph=True)
    for lengths in ([70, 0, 30], [5, 6, 64, 65], [1, 0, 0, 200, 7], [90, 10]):
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
        inputs = make_inputs(T=sum(lengths), H=4, G=2, K=3, V=3, M=2, memory=len(lengths))
        arguments = {name: x.requires_grad_() for name, x in inputs.items()}
        for name in ("q", "k", "v", "log_forget"):
            torch._dynamo.mark_dynamic(arguments[name], 1)
        for x in (cu_seqlens, arguments["initial_memory"]):
            torch._dynamo.mark_dynamic(x, 0)
        d = cotangents(inputs, memories=len(lengths))
        got = function(**arguments, cu_seqlens=cu_seqlens)
        grads = torch.autograd.grad(list(got), list(arguments.values()), list(d))
        results: Tensors = {"output": got.output.detach(), "memory": got.memory.detach()}
        results |= {f"d_{n}": g for n, g in zip(arguments, grads, strict=True)}
        assert_close(results, evaluate(attend, inputs, d, cu_seqlens=cu_seqlens), 1e-13)
    assert counter.frame_count == 1


def test_bad_packing_is_refused_under_compile_too():
    function, _ = compiled(attend)
    inputs = make_inputs(T=20)
    with pytest.raises(ValueError, match="cu_seqlens"):
        function(**inputs, cu_seqlens=torch.tensor([0, 15, 10, 20]))


def test_the_step_compiles():
    inputs = make_inputs(B=3, T=1, H=4, G=2, memory=3)
    memory = inputs.pop("initial_memory")

    def step(memory, **token):
        return gated_slot_step(**token, memory=memory)

    def step_inplace(memory, rows, **token):
        return gated_slot_step(**token, memory=memory, inplace=True, rows=rows).output

    function, _ = compiled(step)
    expected, got = step(memory, **inputs), function(memory, **inputs)
    assert_close(got._asdict(), expected._asdict(), 1e-14)
    pool = torch.cat([memory * 0 + 5, memory])
    rows = torch.tensor([3, 4, 5])
    function, _ = compiled(step_inplace)
    output = function(pool, rows, **inputs)
    torch.testing.assert_close(output, expected.output, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(pool[3:], expected.memory, rtol=1e-13, atol=1e-14)
    assert (pool[:3] == 5).all()


class Recorder(TorchDispatchMode):
    """Notes every call of one of our operators: (operator, arguments)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple, dict]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gsa":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def clone(x: object) -> object:
    return x.detach().clone() if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("case", ["dense", "packed", "low", "bare"])
def test_custom_operators_are_honest(case):
    """torch.library.opcheck on the real calls of a forward and a backward pass."""
    sizes = {"T": 70, "H": 4, "G": 2, "K": 3, "V": 4, "M": 2}
    cu_seqlens = torch.tensor([0, 0, 30, 70]) if case == "packed" else None
    inputs = make_inputs(
        **sizes,
        dtype=torch.bfloat16 if case == "low" else torch.float32,
        write=case != "bare",
        memory={"packed": 3, "bare": None}.get(case, 1),
    )
    recorder = Recorder()
    d = cotangents(inputs, memories=3 if case == "packed" else None)
    with recorder:
        evaluate(attend, inputs, d, cu_seqlens=cu_seqlens)
    assert {call[0].namespace for call in recorder.calls} == {"gsa"}
    assert len({call[0] for call in recorder.calls}) >= 2, "a forward and a backward operator"
    for operator, args, kwargs in recorder.calls:
        fresh = tuple(clone(x) for x in args)
        torch.library.opcheck(operator, fresh, {n: clone(x) for n, x in kwargs.items()})


def test_no_stray_state_between_calls():
    """Two interleaved graphs, their backwards in the opposite order."""
    first, second = make_inputs(T=70, seed=1), make_inputs(T=130, seed=2)
    expected = [evaluate(attend, x, cotangents(x)) for x in (first, second)]
    graphs = []
    for inputs in (first, second):
        arguments = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        graphs.append((arguments, attend(**arguments), cotangents(inputs)))
    for (arguments, got, d), wanted in reversed(list(zip(graphs, expected, strict=True))):
        grads = torch.autograd.grad(list(got), list(arguments.values()), list(d))
        actual = {f"d_{n}": g for n, g in zip(arguments, grads, strict=True)}
        assert_bit_equal(actual, {n: wanted[n] for n in actual})
