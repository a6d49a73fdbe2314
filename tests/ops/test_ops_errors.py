"""Every argument that is wrong is named, with what was expected and what came."""

import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from numerics import make_inputs

from gsa.ops import (
    check_cu_seqlens,
    gated_linear_attention,
    gated_slot_attention,
    gated_slot_step,
    selective_scan,
)

# B = 2, T = 6, H = 4, G = 2, K = 5, V = 6, M = 3, so every size differs from its neighbours.
SIZES = {"B": 2, "T": 6, "H": 4, "G": 2, "K": 5, "V": 6, "M": 3, "dtype": torch.float32}
DOUBLE = make_inputs(**{**SIZES, "dtype": torch.float64})


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def refused(function, argument: str, *got: str, **arguments: object) -> None:
    """`function` raises a ValueError that begins with the argument and says expected and got."""
    with pytest.raises(ValueError) as caught:
        function(**arguments)
    message = str(caught.value)
    assert re.match(rf"{argument}\b", message), message
    assert "expected" in message and "got" in message, message
    for word in got:
        assert word in message, f"{word!r} not in {message!r}"


WRONG = {
    "q of rank 3": ("q", ["[2, 6, 4]"], {"q": zeros(2, 6, 4)}),
    "q not a tensor": ("q", ["list"], {"q": [1.0]}),
    "q of integers": ("q", ["int64"], {"q": zeros(2, 6, 4, 5, dtype=torch.int64)}),
    "q complex": ("q", ["complex64"], {"q": zeros(2, 6, 4, 5, dtype=torch.complex64)}),
    "heads not divisible": ("q", ["multiple", "3"], {"q": zeros(2, 6, 3, 5)}),
    "fewer query than key heads": ("q", ["multiple", "1"], {"q": zeros(2, 6, 1, 5)}),
    "k of another length": ("k", ["[2, 7, 2, 5]", "6"], {"k": zeros(2, 7, 2, 5)}),
    "k of another width": ("k", ["[2, 6, 2, 4]"], {"k": zeros(2, 6, 2, 4)}),
    "k of another dtype": ("k", ["float16", "float32"], {"k": zeros(2, 6, 2, 5).half()}),
    "k elsewhere": ("k", ["meta", "cpu"], {"k": zeros(2, 6, 2, 5, device="meta")}),
    "v of other heads": ("v", ["[2, 6, 4, 6]"], {"v": zeros(2, 6, 4, 6)}),
    "v of another batch": ("v", ["[1, 6, 2, 6]"], {"v": zeros(1, 6, 2, 6)}),
    "v in double": ("v", ["float64"], {"v": zeros(2, 6, 2, 6, dtype=torch.float64)}),
    "v elsewhere": ("v", ["meta"], {"v": zeros(2, 6, 2, 6, device="meta")}),
    "log_forget of rank 3": ("log_forget", ["[2, 6, 3]"], {"log_forget": zeros(2, 6, 3)}),
    "log_forget head-first": (
        "log_forget",
        ["[2, 2, 6, 3]"],
        {"log_forget": zeros(2, 2, 6, 3)},
    ),
    "log_forget in bf16 for fp32": (
        "log_forget",
        ["bfloat16"],
        {"log_forget": zeros(2, 6, 2, 3, dtype=torch.bfloat16)},
    ),
    "log_forget missing": ("log_forget", ["NoneType"], {"log_forget": None}),
    "log_forget elsewhere": (
        "log_forget",
        ["meta"],
        {"log_forget": zeros(2, 6, 2, 3, device="meta")},
    ),
    "write of other slots": ("write", ["[2, 6, 2, 4]"], {"write": zeros(2, 6, 2, 4)}),
    "write of booleans": ("write", ["bool"], {"write": zeros(2, 6, 2, 3).bool()}),
    "write a number": ("write", ["float"], {"write": 1.0}),
    "write elsewhere": ("write", ["meta"], {"write": zeros(2, 6, 2, 3, device="meta")}),
    "memory of other slots": (
        "initial_memory",
        ["[2, 2, 4, 11]"],
        {"initial_memory": zeros(2, 2, 4, 11)},
    ),
    "memory of H heads": (
        "initial_memory",
        ["[2, 4, 3, 11]"],
        {"initial_memory": zeros(2, 4, 3, 11)},
    ),
    "memory of keys alone": (
        "initial_memory",
        ["[2, 2, 3, 5]"],
        {"initial_memory": zeros(2, 2, 3, 5)},
    ),
    "memory to broadcast": (
        "initial_memory",
        ["[1, 2, 3, 11]"],
        {"initial_memory": zeros(1, 2, 3, 11)},
    ),
    "memory in bf16": (
        "initial_memory",
        ["bfloat16"],
        {"initial_memory": zeros(2, 2, 3, 11, dtype=torch.bfloat16)},
    ),
    "memory in double for fp32": (
        "initial_memory",
        ["float64"],
        {"initial_memory": zeros(2, 2, 3, 11, dtype=torch.float64)},
    ),
    "memory elsewhere": (
        "initial_memory",
        ["meta"],
        {"initial_memory": zeros(2, 2, 3, 11, device="meta")},
    ),
    "memory a pair": ("initial_memory", ["tuple"], {"initial_memory": (zeros(1), zeros(1))}),
    "unknown activation": ("slot_activation", ["gelu", "softmax"], {"slot_activation": "gelu"}),
    "activation None": ("slot_activation", ["None"], {"slot_activation": None}),
    "unknown impl": ("impl", ["cuda", "chunked"], {"impl": "cuda"}),
    "impl in capitals": ("impl", ["Chunked"], {"impl": "Chunked"}),
    "triton for fp64": ("impl", ["triton", "float64"], {"impl": "triton", **DOUBLE}),
    "triton for 257 slots": (
        "impl",
        ["triton", "M = 257"],
        {"impl": "triton", "log_forget": zeros(2, 6, 2, 257)},
    ),
    "scale a string": ("scale", ["'1'"], {"scale": "1"}),
    "scale None": ("scale", ["None"], {"scale": None}),
    "scale NaN": ("scale", ["nan"], {"scale": float("nan")}),
    "recompute a level": ("recompute", ["2"], {"recompute": 2}),
    "packing with a batch": ("q", ["B = 1", "2"], {"cu_seqlens": torch.tensor([0, 6])}),
}


@pytest.mark.parametrize("argument, got, changes", WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments(argument, got, changes):
    refused(gated_slot_attention, argument, *got, **{**make_inputs(**SIZES), **changes})


def test_triton_where_it_is_not_installed():
    """It is named in the error, and nothing else misses it."""
    code = """
import sys
from functools import partial
sys.modules["triton"] = None  # to Python, a module that is not there
import torch
from gsa.ops import describe_impl, gated_slot_attention
assert describe_impl("auto", torch.device("cpu"))[0] == "chunked"
x = torch.zeros(1, 2, 1, 4)
assert gated_slot_attention(x, x, x, x).output.shape == x.shape
gated_slot_attention(x, x, x, x, impl="triton")
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = ran.stderr.splitlines()[-1]
    assert ran.returncode == 1 and last.startswith("ValueError: impl: expected"), ran.stderr
    assert "got 'triton'" in last and "triton is not installed" in last


@pytest.mark.parametrize("name", ["q", "k", "v", "log_forget"])
def test_no_empty_width(name):
    """K, V, M and the numbers of heads are at least 1."""
    inputs = make_inputs(**SIZES)
    cut = {"q": ("q", "k"), "k": ("q", "k")}.get(name, (name,))
    for other in cut:
        inputs[other] = inputs[other][..., :0]
    with pytest.raises(ValueError, match=r"expected .*>= 1, got 0"):
        gated_slot_attention(**inputs)
    heads = make_inputs(**SIZES)
    heads = {n: x[:, :, :0] for n, x in heads.items()}
    with pytest.raises(ValueError, match=r"expected .*>= 1, got 0"):
        gated_slot_attention(**heads)


PACKINGS = {
    "float": (["float32"], torch.tensor([0.0, 6.0])),
    "int16": (["int16"], torch.tensor([0, 6], dtype=torch.int16)),
    "a list": (["list"], [0, 6]),
    "rank 2": (["[1, 2]"], torch.tensor([[0, 6]])),
    "rank 0": (["[]"], torch.tensor(6)),
    "no sequence": (["[1]"], torch.tensor([6])),
    "nothing": (["[0]"], torch.zeros(0, dtype=torch.int64)),
    "a late start": (["1"], torch.tensor([1, 6])),
    "a negative start": (["-1"], torch.tensor([-1, 6])),
    "an early end": (["6", "5"], torch.tensor([0, 5])),
    "a late end": (["6", "7"], torch.tensor([0, 3, 7])),
    "decreasing": (["4", "2"], torch.tensor([0, 4, 2, 6])),
    "above the end between": (["8", "6"], torch.tensor([0, 8, 6])),
}


@pytest.mark.parametrize("impl", ["reference", "chunked", "auto"])
@pytest.mark.parametrize("got, cu_seqlens", PACKINGS.values(), ids=PACKINGS.keys())
def test_wrong_cu_seqlens(impl, got, cu_seqlens):
    inputs = make_inputs(**{**SIZES, "B": 1})
    refused(gated_slot_attention, "cu_seqlens", *got, **inputs, cu_seqlens=cu_seqlens, impl=impl)
    refused(check_cu_seqlens, "cu_seqlens", *got, cu_seqlens=cu_seqlens, tokens=6)


def test_cu_seqlens_elsewhere():
    inputs = make_inputs(**{**SIZES, "B": 1})
    bounds = torch.zeros(2, dtype=torch.int64, device="meta")
    refused(gated_slot_attention, "cu_seqlens", "meta", **inputs, cu_seqlens=bounds)


@pytest.mark.parametrize("memories", [1, 2, 4])
def test_one_memory_per_sequence(memories):
    """An empty sequence has one too."""
    inputs = make_inputs(**{**SIZES, "B": 1}, memory=memories)
    bounds = torch.tensor([0, 2, 2, 6])
    refused(gated_slot_attention, "initial_memory", "3", str(memories), **inputs, cu_seqlens=bounds)


def test_unknown_arguments_are_errors():
    inputs = make_inputs(**SIZES)
    for name in ("mask", "output_final_state", "chunk_size", "g"):
        with pytest.raises(TypeError, match=name):
            gated_slot_attention(**inputs, **{name: None})
    with pytest.raises(TypeError, match="positional"):
        gated_slot_attention(*inputs.values(), None)


def step_arguments(dtype: torch.dtype = torch.float32, **changes: object) -> dict[str, object]:
    inputs = make_inputs(**{**SIZES, "T": 1, "dtype": dtype}, memory=2)
    inputs["memory"] = inputs.pop("initial_memory")
    return {**inputs, **changes}


POOL = {"memory": zeros(5, 2, 3, 11), "inplace": True}
STEP = {
    "memory missing": ("memory", ["NoneType"], {"memory": None}),
    "memory of other slots": ("memory", ["[2, 2, 4, 11]"], {"memory": zeros(2, 2, 4, 11)}),
    "memory of another batch": ("memory", ["[3, 2, 3, 11]"], {"memory": zeros(3, 2, 3, 11)}),
    "memory in bf16": ("memory", ["bfloat16"], {"memory": zeros(2, 2, 3, 11).bfloat16()}),
    "memory elsewhere": ("memory", ["meta"], {"memory": zeros(2, 2, 3, 11, device="meta")}),
    "k of another width": ("k", ["[2, 1, 2, 4]"], {"k": zeros(2, 1, 2, 4)}),
    "write of other slots": ("write", ["[2, 1, 2, 9]"], {"write": zeros(2, 1, 2, 9)}),
    "unknown impl": ("impl", ["fast"], {"impl": "fast"}),
    "triton for fp64": (
        "impl",
        ["triton", "float64"],
        {**step_arguments(dtype=torch.float64), "impl": "triton"},
    ),
    "unknown activation": ("slot_activation", ["exp"], {"slot_activation": "exp"}),
    "inplace a string": ("inplace", ["'no'"], {"inplace": "no"}),
    "rows without inplace": (
        "rows",
        ["inplace"],
        {"memory": zeros(5, 2, 3, 11), "rows": torch.tensor([0, 1])},
    ),
    "rows a list": ("rows", ["list"], {**POOL, "rows": [0, 1]}),
    "rows in int32": ("rows", ["int32"], {**POOL, "rows": torch.tensor([0, 1]).int()}),
    "rows as a mask": ("rows", ["bool"], {**POOL, "rows": torch.tensor([True, False])}),
    "too few rows": ("rows", ["[1]"], {**POOL, "rows": torch.tensor([0])}),
    "rows of rank 2": ("rows", ["[2, 1]"], {**POOL, "rows": torch.tensor([[0], [1]])}),
    "rows elsewhere": (
        "rows",
        ["meta"],
        {**POOL, "rows": torch.zeros(2, dtype=torch.int64, device="meta")},
    ),
    "rows twice": ("rows", ["distinct"], {**POOL, "rows": torch.tensor([3, 3])}),
    "rows past the pool": ("rows", ["5"], {**POOL, "rows": torch.tensor([0, 5])}),
    "rows below zero": ("rows", ["-1"], {**POOL, "rows": torch.tensor([0, -1])}),
    "pool of other slots": (
        "memory",
        ["[5, 2, 4, 11]"],
        {"memory": zeros(5, 2, 4, 11), "inplace": True, "rows": torch.tensor([0, 1])},
    ),
}


@pytest.mark.parametrize("argument, got, changes", STEP.values(), ids=STEP.keys())
def test_wrong_arguments_of_the_step(argument, got, changes):
    refused(gated_slot_step, argument, *got, **step_arguments(**changes))


@pytest.mark.parametrize("T", [0, 2])
def test_the_step_takes_one_token(T):
    inputs = make_inputs(**{**SIZES, "T": T})
    refused(gated_slot_step, "q", "T = 1", f"[2, {T}, 4, 5]", **inputs, memory=zeros(2, 2, 3, 11))


def test_a_refused_step_leaves_the_pool_alone():
    pool = torch.randn(5, 2, 3, 11)
    before = pool.clone()
    refused(
        gated_slot_step,
        "rows",
        **step_arguments(memory=pool, inplace=True, rows=torch.tensor([1, 9])),
    )
    assert torch.equal(pool, before)


@pytest.mark.parametrize("kind", ["slots", "linear", "scan"])
def test_tangents_come_from_the_reference_alone(kind):
    """Others know gradients; without an error, tangents were zeros."""
    x = make_inputs(T=5, H=1, K=4, V=4, M=4)
    q, k, v, log_forget = (x[name] for name in ("q", "k", "v", "log_forget"))

    def function(v, impl):
        if kind == "slots":
            return gated_slot_attention(q, k, v, log_forget, impl=impl).output
        if kind == "linear":
            return gated_linear_attention(q, k, v, log_forget, impl=impl).output
        rate = -torch.ones(4, 4, dtype=v.dtype)
        return selective_scan(v[:, :, 0], -log_forget[:, :, 0], rate, k[:, :, 0], q[:, :, 0],
                              impl=impl).output  # fmt: skip

    def tangent(impl):
        return torch.func.jvp(partial(function, impl=impl), (v,), (torch.ones_like(v),))[1]

    expected = function(v + 1, "reference") - function(v, "reference")  # it is linear in v
    torch.testing.assert_close(tangent("reference"), expected)
    for impl in ("chunked", "auto"):
        with pytest.raises(NotImplementedError, match=r"jvp.*impl='reference'"):
            tangent(impl)
