"""Mamba's selective scan: each implementation is gated linear attention with a head per channel."""

import pytest
import torch

from gsa.ops import gated_linear_attention, selective_scan, selective_step
from gsa.ops.selective_scan import SEGMENT

INPUTS = ("x", "delta", "rate", "write", "read", "initial_memory")
PACKED = torch.tensor([0, 0, 17, 18, 18, 37], dtype=torch.int32)


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_inputs(B, T, E, K, memories=None):
    """In fp64; step sizes from a thousandth to ten, so that some tokens forget all."""
    inputs = {"x": normal(B, T, E, seed=0), "write": normal(B, T, K, seed=1)}
    inputs["read"] = normal(B, T, 2 * K, seed=2)[..., K:]
    inputs["delta"] = torch.exp(2.5 * normal(B, T, E, seed=3) - 2)
    inputs["rate"] = -torch.exp(normal(E, K, seed=4))
    if memories:
        inputs["initial_memory"] = normal(memories, E, K, seed=5)
    return inputs


def as_linear_attention(x, delta, rate, write, read, initial_memory=None, cu_seqlens=None):
    """The definition: q = read, k = write, v = delta x, log_decay = delta rate, V = 1."""
    E = x.shape[2]
    q, k = (one[:, :, None].expand(-1, -1, E, -1) for one in (read, write))
    memory = None if initial_memory is None else initial_memory[..., None]
    log_decay = delta[..., None] * rate
    output, memory = gated_linear_attention(
        q, k, (delta * x)[..., None], log_decay, initial_memory=memory, cu_seqlens=cu_seqlens,
        impl="reference",
    )  # fmt: skip
    return output[..., 0], memory[..., 0]


def evaluate(function, inputs, **options):
    """Results, and gradients of all inputs from both, by name."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    output, memory = function(**leaves, **options)
    d = normal(*output.shape, seed=7), normal(*memory.shape, seed=8)
    grads = torch.autograd.grad((output, memory), tuple(leaves.values()), d)
    return {"output": output, "memory": memory} | dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("impl", ["reference", "chunked", "triton"])
@pytest.mark.parametrize(
    ("shape", "memories", "bounds"),
    [((2, 37, 5, 3), 2, None), ((1, 37, 3, 4), 5, PACKED), ((1, 18, 1, 1), None, None)],
    ids=["rows", "packed", "bare"],
)
def test_it_is_linear_attention_of_a_head_per_channel(impl, shape, memories, bounds):
    """To fp64's rounding: sums of at most 37 · K numbers, each of a few rounded products."""
    if impl == "triton":
        pytest.importorskip("triton", reason="the kernels need triton: Linux, and the dev extra")
        if torch.cuda.is_available():
            pytest.skip("the kernels take fp64 in the interpreter only")
    inputs = make_inputs(*shape, memories)
    expected = evaluate(as_linear_attention, inputs, cu_seqlens=bounds)
    got = evaluate(selective_scan, inputs, cu_seqlens=bounds, impl=impl)
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        assert (got[name] - x).abs().max() <= 1e-13 * max(1.0, x.abs().max()), name
