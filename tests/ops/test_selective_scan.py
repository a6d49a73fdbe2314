"""Mamba's selective scan: each implementation is gated linear attention with a head per channel."""

import pytest
import torch

from gsa.ops import gated_linear_attention, selective_scan, selective_step
from gsa.ops.api import HAS_TRITON
from gsa.ops.selective_scan import SEGMENT, scan_backward, scan_forward

INPUTS = ("x", "delta", "rate", "write", "read", "initial_memory")
PACKED = torch.tensor([0, 0, 9, 10, 13], dtype=torch.int32)


@pytest.fixture
def kernels(request, monkeypatch):
    """The kernels, in the interpreter with spans of 8 tokens and blocks of 2 channels (K <= 4)."""
    pytest.importorskip("triton", reason="the kernels need triton: Linux, and the dev extra")
    from gsa.ops.triton import selective_scan as kernels

    if not torch.cuda.is_available():
        request.getfixturevalue("in_bounds")
        monkeypatch.setattr(kernels, "SPAN", 8)
        monkeypatch.setattr(kernels, "NUMBERS", 8)


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
    d = normal(*output.shape, seed=7, dtype=torch.bfloat16), normal(*memory.shape, seed=8)
    d = d[0].to(output), d[1].float().to(memory)  # of few digits, so that all get the same
    grads = torch.autograd.grad((output, memory), tuple(leaves.values()), d)
    return {"output": output, "memory": memory} | dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("impl", ["reference", "chunked", "triton"])
@pytest.mark.parametrize(
    ("shape", "memories", "bounds"),
    [((2, 13, 2, 3), 2, None), ((1, 13, 3, 4), 4, PACKED), ((1, 18, 1, 1), None, None)],
    ids=["rows", "packed", "bare"],
)
def test_it_is_linear_attention_of_a_head_per_channel(impl, shape, memories, bounds, request):
    """To fp64's rounding: sums of at most 18 · K numbers, each of a few rounded products."""
    if impl == "triton":
        request.getfixturevalue("kernels")
        if torch.cuda.is_available():
            pytest.skip("the kernels take fp64 in the interpreter only")
    inputs = make_inputs(*shape, memories)
    expected = evaluate(as_linear_attention, inputs, cu_seqlens=bounds)
    got = evaluate(selective_scan, inputs, cu_seqlens=bounds, impl=impl)
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        assert (got[name] - x).abs().max() <= 1e-13 * max(1.0, x.abs().max()), name


def low_precision(inputs, dtype):
    """x, write and read in a dtype, the rest in fp32, as layers have them; and the same in fp64."""
    wide = ("delta", "rate", "initial_memory")
    low = {n: x.to(torch.float32 if n in wide else dtype) for n, x in inputs.items()}
    return low, {name: x.double() for name, x in low.items()}


def assert_near(got, exact, dtype):
    """Results are rounded once to their dtype; what comes before is fp32, within 64 of its eps."""
    for name, x in exact.items():
        eps = torch.finfo(got[name].dtype).eps + 64 * torch.finfo(torch.float32).eps
        error = (got[name].double() - x).abs().max() / x.abs().max()
        assert error <= eps, (name, float(error))


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_inside_all_is_fp32(impl, dtype, request):
    if impl == "triton":
        request.getfixturevalue("kernels")
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    low, exact = low_precision(make_inputs(1, 10, 2, 2, 1), dtype)
    low = {name: x.to(device) for name, x in low.items()}
    got = {name: x.cpu() for name, x in evaluate(selective_scan, low, impl=impl).items()}
    assert got["output"].dtype == got["x"].dtype == got["write"].dtype == dtype
    assert got["memory"].dtype == got["delta"].dtype == got["rate"].dtype == torch.float32
    assert_near(got, evaluate(as_linear_attention, exact), dtype)


def test_autocast_changes_nothing_forward_or_backward():
    low, _ = low_precision(make_inputs(1, SEGMENT + 3, 3, 4, 1), torch.float32)
    plain = evaluate(selective_scan, low, impl="chunked")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = evaluate(selective_scan, low, impl="chunked")
    assert all(torch.equal(got[name], x) for name, x in plain.items())


def test_a_segment_s_end_and_a_step_go_on_with_the_memory():
    """The torch form across its segments, cut anywhere, and token by token."""
    T = 2 * SEGMENT + 5
    inputs = make_inputs(2, T, 3, 2, 2)
    whole = selective_scan(**inputs)
    exact = as_linear_attention(**inputs)
    torch.testing.assert_close(tuple(whole), exact, rtol=1e-11, atol=1e-12)
    tokens = {name: x for name, x in inputs.items() if x.dim() == 3 and name != "initial_memory"}
    rate, memory = inputs["rate"], inputs["initial_memory"]
    for part in (slice(0, SEGMENT), slice(SEGMENT, SEGMENT), slice(SEGMENT, T - 2)):
        some = {name: x[:, part] for name, x in tokens.items()}
        output, memory = selective_scan(**some, rate=rate, initial_memory=memory)
        torch.testing.assert_close(output, whole.output[:, part], rtol=1e-11, atol=1e-12)
    for t in (T - 2, T - 1):
        one = {name: x[:, t : t + 1] for name, x in tokens.items()}
        before = memory.clone()
        output, after = selective_step(**one, rate=rate, memory=memory)
        assert torch.equal(memory, before)
        same = selective_step(**one, rate=rate, memory=memory, inplace=True)
        assert same.memory is memory and torch.equal(memory, after)
        torch.testing.assert_close(output, whole.output[:, t : t + 1], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(memory, whole.memory, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("kernels")
def test_bounds_that_lie_reach_no_memory_but_the_row_s():
    """On a device they are trusted; `in_bounds` (there compute-sanitizer) sees what is touched."""
    low, _ = low_precision(make_inputs(1, 20, 3, 2, 3), torch.float32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = [low[name].to(device) for name in INPUTS]
    bounds = torch.tensor([-4, 30, 2, 90], device=device)
    output, memory = scan_forward(*tensors, bounds, True)
    assert output.shape == tensors[0].shape and memory.shape == tensors[-1].shape
    assert len(scan_backward(*tensors, bounds, output, memory, True)) == 6


def test_its_operators_are_honest(request):
    if HAS_TRITON:
        request.getfixturevalue("kernels")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    low, _ = low_precision(make_inputs(1, 5, 2, 1, 2), torch.bfloat16)
    tensors = [low[name].to(device).requires_grad_() for name in INPUTS]
    bounds = torch.tensor([0, 2, 5], device=device)
    torch.library.opcheck(torch.ops.gsa.selective_scan.default, (*tensors, bounds, HAS_TRITON))
    plain = [x.detach() for x in tensors]
    torch.library.opcheck(
        torch.ops.gsa.selective_scan_backward.default,
        (*plain, bounds, plain[0], plain[-1], HAS_TRITON),
        test_utils=("test_schema", "test_faketensor"),  # it has no gradient itself
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 3)}, r"x: expected 3 dimensions \[B, T, E\]"),
        ({"delta": torch.ones(2, 7, 5)}, r"delta: expected shape \[B, T, E\]"),
        ({"rate": torch.ones(4, 3)}, r"rate: expected dtype torch.float64"),
        ({"read": torch.ones(2, 7, 2).double()}, r"read: expected shape \[B, T, K\]"),
        ({"initial_memory": torch.ones(1, 4, 3).double()}, r"initial_memory: expected shape"),
        ({"cu_seqlens": torch.tensor([0, 7])}, "x: expected batch size B = 1 with cu_seqlens"),
        ({"impl": "fast"}, "impl: expected one of auto"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**(make_inputs(2, 7, 4, 3) | change))


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_kernels_at_a_model_s_size(packed, dtype):
    """Within rounding of the definition in fp64; the same bits again; a row's own beside others."""
    low, exact = low_precision(make_inputs(1 if packed else 3, 300, 72, 16), dtype)
    low = {name: x.cuda() for name, x in low.items()}
    bounds = torch.tensor([0, 1, 1, 170, 300], dtype=torch.int32, device="cuda") if packed else None
    got = evaluate(selective_scan, low, cu_seqlens=bounds, impl="triton")
    again = evaluate(selective_scan, low, cu_seqlens=bounds, impl="triton")
    assert all(torch.equal(x, again[name]) for name, x in got.items())
    expected = evaluate(as_linear_attention, exact, cu_seqlens=None if not packed else bounds.cpu())
    assert_near({name: x.cpu() for name, x in got.items()}, expected, dtype)
    if not packed:
        alone = {name: x if name == "rate" else x[1:2] for name, x in low.items()}
        output, memory = selective_scan(**alone, impl="triton")
        assert torch.equal(output, got["output"][1:2]) and torch.equal(memory, got["memory"][1:2])
