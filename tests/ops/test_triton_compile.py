"""The Triton operator to PyTorch: graphs, custom operators, what is kept; and where it may run."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from numerics import HOME, assert_bit_equal, cotangents, evaluate, leaves, make_inputs
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

pytest.importorskip("triton", reason="the kernels need triton: Linux, and the dev extra")

from gsa.ops import describe_impl, gated_slot_attention
from gsa.ops.triton import sizes
from gsa.ops.triton.plan import Plan

pytestmark = pytest.mark.usefixtures("kernels")
attention = partial(gated_slot_attention, impl="triton")
HOT, COLD = {"K": 8, "V": 16, "M": 8}, {"K": 5, "V": 3, "M": 3}
TOKENWISE = ("q", "k", "v", "log_forget", "write")


def packing(*bounds, dtype=torch.int32):
    return torch.tensor(bounds, device=HOME.device, dtype=dtype)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(**options):
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(attention, backend=counter, fullgraph=True, **options), counter


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_equals_eager():
    inputs = make_inputs(B=2, T=30, H=4, G=2, **HOT, write=True, memory=2)
    d = cotangents(inputs)
    function, counter = compiled(dynamic=False)
    assert_bit_equal(evaluate(function, inputs, d), evaluate(attention, inputs, d))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("packed", [False, True])
def test_few_graphs_serve_every_length(packed, monkeypatch):
    monkeypatch.setattr(sizes, "span_tokens", lambda: 128)  # so that 130 tokens have two
    function, counter = compiled()
    for T in (70, 2, 130):
        bounds = [0, *[T // 2] * (1 + T % 2), T]
        options = {"cu_seqlens": packing(*bounds, dtype=torch.int64)} if packed else {}
        options["recompute"] = False
        memories = len(bounds) - 1 if packed else 2
        inputs = make_inputs(B=1 if packed else 2, T=T, H=1, **COLD, memory=memories)
        d, arguments = cotangents(inputs, memories=memories), leaves(inputs)
        for name in ("q", "k", "v", "log_forget"):
            torch._dynamo.mark_dynamic(arguments[name], 1)
        if packed:
            for x in (options["cu_seqlens"], arguments["initial_memory"]):
                torch._dynamo.mark_dynamic(x, 0)
        got = function(**arguments, **options)
        grads = torch.autograd.grad(list(got), list(arguments.values()), list(d))
        actual = {"output": got.output.detach(), "memory": got.memory.detach()}
        actual |= {f"d_{name}": g for name, g in zip(arguments, grads, strict=True)}
        assert_bit_equal(actual, evaluate(attention, inputs, d, **options))
    assert counter.frame_count <= 2


@pytest.fixture
def deterministic():
    """Memory begins as torch fills it, not as it was left: what lies between parts is compared."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", ["bare", "packed"])
def test_custom_operators_are_honest(case, deterministic):
    """torch.library.opcheck on the forward and the backward operator."""
    inputs = leaves(make_inputs(T=5, H=2, G=1, **COLD, write=case != "bare", dtype=torch.bfloat16))
    initial = make_inputs(T=1, H=1, **COLD, memory=2)["initial_memory"]
    initial = initial[: 2 if case == "packed" else 1].requires_grad_() if case != "bare" else None
    cu_seqlens = packing(0, 0, 5) if case == "packed" else None
    tokens = (*(inputs[name] for name in TOKENWISE[:4]), inputs.get("write"))
    forward = torch.ops.gsa.triton_forward.default
    options = (0.7, "softmax", True, case != "packed")
    torch.library.opcheck(forward, (*tokens, initial, cu_seqlens, *options))
    plain = [x if x is None else x.detach() for x in (*tokens, initial, cu_seqlens)]
    output, memory, kept = forward(*plain, *options)
    d = (torch.ones_like(output), None if case == "bare" else torch.ones_like(memory))
    backward = torch.ops.gsa.triton_backward.default
    utilities = ("test_schema", "test_faketensor")  # it has no gradient itself
    arguments = (*plain, memory, kept, *d, 0.7, "softmax", options[3])
    torch.library.opcheck(backward, arguments, test_utils=utilities)


def test_whoever_watches_sees_an_operator():
    """Not its kernels, nor what is made ready for them."""
    inputs, operator = make_inputs(T=5, H=1, **COLD), torch.ops.gsa.triton_forward.default
    names, seen = list(inputs), []

    def function(*tensors):
        return attention(**dict(zip(names, tensors, strict=True))).output

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            seen.append(function)
            return function(*arguments, **(options or {}))

    with Watch():
        function(*inputs.values())
    assert operator in seen
    for early in (False, True):  # whether what dispatch is about to take apart is noted whole
        graph = make_fx(function, pre_dispatch=early)(*inputs.values()).graph
        assert operator in {node.target for node in graph.nodes}


def kept_bytes(inputs, **options):
    """Bytes that the graph keeps beside inputs and results."""
    kept, arguments = {}, leaves(inputs)

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        got = attention(**arguments, **options)
    given = (*got, *arguments.values(), *(x for x in options.values() if torch.is_tensor(x)))
    own = {x.untyped_storage().data_ptr() for x in given}
    return sum(n for address, n in kept.items() if address not in own)


@pytest.mark.parametrize("packed", [False, True])
def test_little_is_kept_for_the_backward_pass(packed):
    T, sizes = 520, {"K": 32, "V": 32, "M": 16}
    inputs = make_inputs(T=T, H=2, G=1, **sizes)
    options = {"cu_seqlens": packing(0, 5, T)} if packed else {}
    less, more = (kept_bytes(inputs, recompute=flag, **options) for flag in (True, False))
    assert less < more, "memories on the way"
    assert more - less <= (T // 256) * 16 * 64 * 8, "a memory every 256 tokens"
    tokens = T * (2 * (16 + 1) + 16)  # scores of two query heads and what each token writes
    decays = (T // 32 + 2) * (2 * 16 + 1)
    assert less <= (tokens + decays) * 8


def test_keys_and_values_of_unlike_width_fit_shared_memory_together():
    """One kernel walks both: it may have no more stages than the wider of them leaves room for."""
    inputs = make_inputs(T=3, H=4, G=1, K=16, V=128, M=64, dtype=torch.bfloat16)
    recipe = Plan(**inputs, write=None, cu_seqlens=None).recipe
    narrow, wide = (recipe.tile("write_back", width) for width in (16, 128))
    assert narrow.stages > wide.stages, "or this shows nothing"
    assert recipe.walk_both("write_back")["num_stages"] == wide.stages


WITHOUT = """
import torch
from gsa.ops import describe_impl, gated_slot_attention, gated_slot_step
x = torch.zeros(1, 1, 1, 4)
assert describe_impl("auto", x.device)[0] == "chunked"
for call in (lambda: gated_slot_attention(x, x, x, x, impl="triton"),
             lambda: gated_slot_step(x, x, x, x, torch.zeros(1, 1, 4, 8), impl="triton")):
    try:
        call()
    except ValueError as error:
        print(error)
"""


def test_a_cpu_without_the_interpreter_is_refused():
    """By name; nothing falls back, and nothing is run in an interpreter unasked."""
    bare = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT], env=bare, capture_output=True, text=True, check=True
    )
    lines = ran.stdout.splitlines()
    assert len(lines) == 2, ran
    for line in lines:
        assert line.startswith("impl: expected") and "got 'triton'" in line and "CUDA" in line


def test_describe_impl_says_what_runs_here():
    device = torch.device(HOME.device)
    assert describe_impl("triton", device) == ("triton", "asked for by name")
    assert describe_impl("auto", torch.device("cpu"))[0] == "chunked"
    assert describe_impl("chunked", device)[0] == "chunked"
    with pytest.raises(ValueError, match=r"impl: expected .* got 'triton': .*meta"):
        describe_impl("triton", torch.device("meta"))
    with pytest.raises(ValueError, match=r"impl: .*'triton'.*M = 257"):
        attention(**make_inputs(T=1, M=257))
