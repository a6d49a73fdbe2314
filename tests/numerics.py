"""What "correct" means in the operator's tests: an oracle, a yardstick and an error budget.

The oracle never keeps a memory: for each query it sums over all past tokens, each weighted by its
write and by the product of the gates since, in fp64. The yardstick is the chunked form with matmul
operands rounded to the input dtype: what an honest implementation in that dtype can reach.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gsa.ops import gated_slot_attention

ACTIVATIONS = {
    "softmax": lambda s: (
        (s - s.amax(-1, keepdim=True)).exp()
        / (s - s.amax(-1, keepdim=True)).exp().sum(-1, keepdim=True)
    ),
    "identity": lambda s: s,
    "swish": lambda s: s * torch.sigmoid(s),
    "relu": lambda s: s.clamp(min=0),
    "relu2": lambda s: s.clamp(min=0) ** 2,
}
CHUNK = 64
Tensors = dict[str, Tensor]


@dataclass
class Home:
    """Where `make_inputs` puts tensors, and their dtype where a test names none: see `impl`."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float64


HOME = Home()


def gates(kind: str, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Log-decays [..., M] in fp64: usual, near_one (1 - f far below bf16's step), mixed, steep."""
    if kind == "usual":
        return F.logsigmoid(torch.randn(shape, generator=rng, dtype=torch.float64) + 1) / 2
    if kind == "near_one":
        return F.logsigmoid(torch.randn(shape, generator=rng, dtype=torch.float64) / 4 + 5) / 8
    uniform = torch.rand(shape, generator=rng, dtype=torch.float64)
    log_decay = -(10 ** (uniform * 7.778 - 6))  # 1e-6 ... 60
    if kind == "mixed":
        return log_decay
    dice = torch.rand(shape, generator=rng, dtype=torch.float64)
    assert kind == "steep", kind
    return log_decay.masked_fill(dice < 0.1, 0.0).masked_fill(dice > 0.9, -1e4)


def make_inputs(
    *,
    B: int = 1,
    T: int = 16,
    H: int = 2,
    G: int | None = None,
    K: int = 5,
    V: int = 6,
    M: int = 4,
    dtype: torch.dtype | None = None,
    gate_dtype: torch.dtype | None = None,
    gate: str = "usual",
    write: bool = False,
    memory: int | None = None,
    seed: int = 0,
) -> Tensors:
    """Arguments of the operator by name; `memory` is the number of initial memories, if any."""
    G, dtype = H if G is None else G, dtype or HOME.dtype
    if dtype == torch.float64 and dtype != HOME.dtype:
        pytest.skip("the kernels take no fp64")
    rng = torch.Generator().manual_seed(seed)
    internal = torch.float64 if dtype == torch.float64 else torch.float32
    gate_dtype = gate_dtype or internal

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    inputs = {
        "q": normal(B, T, H, K).to(dtype),
        "k": normal(B, T, G, K).to(dtype),
        "v": normal(B, T, G, V).to(dtype),
        "log_forget": gates(gate, (B, T, G, M), rng).to(gate_dtype),
    }
    if write:
        inputs["write"] = (torch.rand((B, T, G, M), generator=rng, dtype=torch.float64) * 1.5).to(
            gate_dtype
        )
    if memory is not None:
        inputs["initial_memory"] = normal(memory, G, M, K + V).to(internal)
    return {name: x.to(HOME.device) for name, x in inputs.items()}


def leaves(inputs: Tensors) -> Tensors:
    return {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}


def cotangents(
    inputs: Tensors, memories: int | None = None, seed: int = 1
) -> tuple[Tensor, Tensor]:
    """Random gradients for (output, memory), in their dtypes, where q is."""
    q, v, f = inputs["q"], inputs["v"], inputs["log_forget"]
    rng = torch.Generator().manual_seed(seed)
    B, T, H, K = q.shape
    internal = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = B if memories is None else memories
    d_output = torch.randn((B, T, H, v.shape[3]), generator=rng, dtype=torch.float64)
    d_memory = torch.randn(
        (rows, v.shape[2], f.shape[3], K + v.shape[3]), generator=rng, dtype=torch.float64
    )
    return d_output.to(q), d_memory.to(q.device, internal)


def evaluate(
    function: Callable[..., tuple[Tensor, Tensor]],
    inputs: Tensors,
    d: tuple[Tensor, Tensor] | None = None,
    **options: object,
) -> Tensors:
    """Output, memory and, given cotangents, the gradient of every input (as d_name)."""
    arguments = leaves(inputs) if d is not None else inputs
    output, memory = function(**arguments, **options)
    results = {"output": output.detach(), "memory": memory.detach()}
    if d is None:
        return results
    pairs = [(x, g.to(x.dtype)) for x, g in zip((output, memory), d, strict=True)]
    pairs = [(x, g) for x, g in pairs if x.requires_grad]
    targets = list(arguments.values())
    grads = [None] * len(targets)
    if pairs:
        grads = torch.autograd.grad(
            [x for x, _ in pairs], targets, [g for _, g in pairs], allow_unused=True
        )
    for (name, argument), gradient in zip(arguments.items(), grads, strict=True):
        results[f"d_{name}"] = torch.zeros_like(argument) if gradient is None else gradient
    return results


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_forget: Tensor,
    *,
    write: Tensor | None = None,
    scale: float = 1.0,
    slot_activation: str = "softmax",
    initial_memory: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator as attention over all past tokens, in fp64."""
    q, k, v, log_forget = (x.double() for x in (q, k, v, log_forget))
    write = -torch.expm1(log_forget) if write is None else write.double()
    (B, T, _, K), G, V, M = q.shape, k.shape[2], v.shape[3], log_forget.shape[3]
    if cu_seqlens is None:
        pieces = [(b, 0, T) for b in range(B)]
    else:
        bounds = cu_seqlens.tolist()
        pieces = [(0, a, b) for a, b in pairwise(bounds)]
    outputs, memories = [], []
    for index, (row, start, stop) in enumerate(pieces):
        first = (
            q.new_zeros(G, M, K + V) if initial_memory is None else initial_memory[index].double()
        )
        part = (x[row, start:stop] for x in (q, k, v, log_forget, write))
        output, memory = _oracle_sequence(*part, scale, slot_activation, first)
        outputs.append(output)
        memories.append(memory)
    output = torch.stack(outputs) if cu_seqlens is None else torch.cat(outputs)[None]
    return output, torch.stack(memories)


def _oracle_sequence(q, k, v, log_forget, write, scale, slot_activation, first):
    T, H, K = q.shape
    group = torch.arange(H, device=q.device) // (H // log_forget.shape[1])
    alive, faded = left_of_writes(log_forget)
    alive = alive * write
    likeness = torch.einsum("jhk,thk->tjh", k[:, group], q)
    score = torch.einsum("tjh,tjhm->thm", likeness, alive[:, :, group])
    score = score + faded[:, group] * torch.einsum("hmk,thk->thm", first[group, :, :K], q)
    p = ACTIVATIONS[slot_activation](scale * score)
    attention = torch.einsum("thm,tjhm->tjh", p, alive[:, :, group])
    recalled = torch.einsum("thm,hmv->thv", p * faded[:, group], first[group, :, K:])
    output = torch.einsum("tjh,jhv->thv", attention, v[:, group]) + recalled
    if not T:
        return output, first
    kept = torch.cat([torch.einsum("jgm,jgx->gmx", alive[-1], x) for x in (k, v)], -1)
    return output, faded[-1, ..., None] * first + kept


def left_of_writes(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """What is left after token t of token j's write, [t, j, ...], 0 if j > t, and of what was
    before. Each is a sum of its own, not a difference of two long ones, which would cancel.
    """
    T = len(log_decay)
    rows = torch.arange(T, device=log_decay.device)
    rows = rows.view(T, 1, *[1] * (log_decay.dim() - 1))
    since = torch.where(rows > rows.transpose(0, 1), log_decay[:, None], 0.0).cumsum(0)
    alive = since.masked_fill(rows < rows.transpose(0, 1), -torch.inf).exp()
    return alive, log_decay.cumsum(0).exp()


def yardstick(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_forget: Tensor,
    *,
    write: Tensor | None = None,
    scale: float = 1.0,
    slot_activation: str = "softmax",
    initial_memory: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Chunked torch, matmul operands rounded to q's dtype (gradients too), fp32 accumulation.

    Keys of width 0: the scores are q, which makes it gated linear attention.
    """
    (B, T, H, _), (G, K), V, M = q.shape, k.shape[2:], v.shape[3], log_forget.shape[3]
    dtype, internal = q.dtype, torch.float64 if q.dtype == torch.float64 else torch.float32
    log_forget = log_forget.to(internal)
    write = -torch.expm1(log_forget) if write is None else write.to(internal)
    bounds = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    count = B if cu_seqlens is None else len(bounds) - 1
    first = q.new_zeros(count, G, M, K + V, dtype=internal)
    first = first if initial_memory is None else initial_memory
    outputs, memories = [], []
    for s, (start, stop) in enumerate(pairwise(bounds)):
        memory = first if cu_seqlens is None else first[s : s + 1]
        for a in range(start, stop, CHUNK):
            part = slice(a, min(a + CHUNK, stop))
            inputs = (x[:, part] for x in (q, k, v, log_forget, write))
            output, memory = _yardstick_chunk(*inputs, memory, scale, slot_activation, dtype)
            outputs.append(output)
        memories.append(memory)
    output = torch.cat(outputs, 1) if outputs else q.new_zeros(B, 0, H, V)
    return output.to(dtype), torch.cat(memories)


def _yardstick_chunk(q, k, v, log_forget, write, memory, scale, slot_activation, dtype):
    def r(x: Tensor) -> Tensor:
        return x.to(dtype).to(memory.dtype)

    C, H, G, K = q.shape[1], q.shape[2], k.shape[2], k.shape[3]
    q = q.unflatten(2, (G, H // G))
    total, exact = log_forget.cumsum(1), log_forget.detach().double().cumsum(1)

    def exactly(x: Tensor, value: Tensor) -> Tensor:
        """fp64's value, x's gradient: no decay is rounded before its exponential."""
        return x + (value - x.detach()).to(x.dtype)

    gap = exactly(total[:, :, None] - total[:, None], exact[:, :, None] - exact[:, None])
    rest = exactly(total[:, -1:] - total, exact[:, -1:] - exact)
    past = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()[None, :, :, None, None]
    decay = gap.masked_fill(~past, -torch.inf).exp()  # [B, i, j, G, M]
    grow = exactly(total, exact).exp()[:, :, :, None]
    weight = r(decay * write[:, None])
    score = q.to(memory.dtype)
    if K:
        likeness = torch.einsum("bigrk,bjgk->bijgr", r(q), r(k))
        inside = torch.einsum("bijgr,bijgm->bigrm", r(likeness), weight)
        before = torch.einsum("bigrk,bgmk->bigrm", r(q), r(memory[..., :K]))
        score = inside + grow * before
    p = ACTIVATIONS[slot_activation](scale * score)
    mix = torch.einsum("bigrm,bijgm->bijgr", r(p), weight)
    output = torch.einsum("bijgr,bjgv->bigrv", r(mix), r(v))
    output = output + torch.einsum("bigrm,bgmv->bigrv", r(p * grow), r(memory[..., K:]))
    kept = r(rest.exp() * write)
    update = [torch.einsum("bjgm,bjgx->bgmx", kept, r(x)) for x in (k, v)]
    memory = grow[:, -1, :, 0, :, None] * memory + torch.cat(update, -1)
    return output.flatten(2, 3), memory


def errors(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """(‖a - ref‖ / ‖ref‖, max|a - ref| / max|ref|), 0/0 being 0."""
    if exact.numel() == 0:
        return 0.0, 0.0
    gap, exact = actual.double() - exact.double(), exact.double()
    pairs = ((gap.norm(), exact.norm()), (gap.abs().max(), exact.abs().max()))
    return tuple(0.0 if a == 0 else float(a / b) for a, b in pairs)  # type: ignore[return-value]


def vanishes(actual: Tensor, exact: Tensors, name: str, eps: float) -> bool:
    """Whether the exact value is zero (a first gate without a memory), so that only noise may come:
    relative errors do not exist there, and eps times the largest gradient is the bound."""
    if exact[name].numel() == 0 or exact[name].any():
        return False
    largest = max(float(x.abs().max()) for x in exact.values() if x.numel())
    noise = float(actual.abs().max())
    assert noise <= 4 * eps * largest, f"{name}: {noise} where the exact value is zero"
    return True


def assert_close(actual: Tensors, exact: Tensors, tolerance: float) -> None:
    """Every tensor finite, of the same shape, and within a relative tolerance by both measures."""
    assert actual.keys() == exact.keys()
    for name, a in actual.items():
        assert a.shape == exact[name].shape, name
        assert torch.isfinite(a).all(), f"{name} is not finite"
        if vanishes(a, exact, name, tolerance):
            continue
        got = errors(a, exact[name])
        assert max(got) <= tolerance, f"{name}: errors {got} above {tolerance}"


def assert_within_budget(
    actual: Tensors, exact: Tensors, ruler: Tensors, dtype: torch.dtype, impl: str = "chunked"
) -> None:
    """Each error at most twice the yardstick's plus eps(dtype).

    The reference rounds the memory once a token, not once a chunk: in fp32 that random walk,
    sqrt(T) steps of eps, is allowed to it and to nothing else.
    """
    assert actual.keys() == exact.keys() == ruler.keys()
    eps = torch.finfo(dtype).eps
    if impl == "reference" and dtype == torch.float32:
        eps *= actual["output"].shape[1] ** 0.5
    for name, a in actual.items():
        assert a.shape == exact[name].shape, name
        assert torch.isfinite(a).all(), f"{name} is not finite"
        assert torch.isfinite(ruler[name]).all(), f"the yardstick's {name} is not finite"
        if vanishes(a, exact, name, eps):
            continue
        got, allowed = errors(a, exact[name]), errors(ruler[name], exact[name])
        for measure, g, y in zip(("norm", "max"), got, allowed, strict=True):
            assert g <= 2 * y + eps, (
                f"{name}: {measure} error {g:.3g} above 2 x {y:.3g} + {eps:.3g}"
            )


def assert_same(
    actual: Tensors,
    expected: Tensors,
    inputs: Tensors,
    d: tuple[Tensor, Tensor] | None = None,
    *,
    tolerance: float = 1e-12,
    around: Callable[..., Callable] = lambda function: function,
    impl: str = "chunked",
    **options: object,
) -> None:
    """Results for `inputs` that are mathematically the same: in fp64 to `tolerance`, else within
    the budget. There `expected` must be exact, or else only says what the oracle says better.

    around: what a test wraps the operator in, if it does.
    """
    if inputs["q"].dtype == torch.float64:
        assert_close(actual, expected, tolerance)
        return
    exact, ruler = (evaluate(around(f), inputs, d, **options) for f in (oracle, yardstick))
    if all(x.dtype == torch.float64 for x in expected.values()):
        exact = expected
    exact, ruler = ({name: x[name] for name in actual} for x in (exact, ruler))
    assert_within_budget(actual, exact, ruler, inputs["q"].dtype, impl)


def check(
    impl: str,
    inputs: Tensors,
    d: tuple[Tensor, Tensor],
    *,
    recompute: bool = True,
    **options: object,
) -> Tensors:
    """The operator's results, which have their dtypes and are within the budget."""
    exact, ruler = (evaluate(f, inputs, d, **options) for f in (oracle, yardstick))
    actual = evaluate(gated_slot_attention, inputs, d, recompute=recompute, impl=impl, **options)
    for name, x in inputs.items():
        assert actual[f"d_{name}"].dtype == x.dtype, name
    assert actual["output"].dtype == inputs["q"].dtype
    assert actual["memory"].dtype == torch.float32
    assert_within_budget(actual, exact, ruler, inputs["q"].dtype, impl)
    return actual


def assert_bit_equal(actual: Tensors, expected: Tensors) -> None:
    assert actual.keys() == expected.keys()
    for name, a in actual.items():
        assert torch.equal(a, expected[name]), f"{name} differs"
