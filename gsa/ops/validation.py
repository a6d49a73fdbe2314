"""Every error the operator can raise about its arguments, in one place.

Each message names the argument, what was expected and what came. Shapes are written with the
package's alphabet (`gsa/ops/types.py`).
"""

import math
from typing import NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gsa.ops.types import IMPLS, SLOT_ACTIVATIONS, compute_dtype

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _fail(name: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{name}: expected {expected}, got {got}")


def _check_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        _fail(name, "a torch.Tensor", type(value).__name__)
    return value


def _check_shape(name: str, tensor: Tensor, letters: str, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        _fail(name, f"shape [{letters}] = {list(shape)}", list(tensor.shape))


def _check_like_q(
    name: str, tensor: Tensor, q: Tensor, dtypes: tuple[torch.dtype, ...], letter: str = "q"
) -> None:
    if tensor.dtype not in dtypes:
        _fail(name, f"dtype {' or '.join(str(dtype) for dtype in dtypes)}", tensor.dtype)
    if tensor.device != q.device:
        _fail(name, f"device {q.device} (that of {letter})", tensor.device)


def check_options(scale: object, slot_activation: object, impl: object) -> None:
    check_scale(scale)
    if slot_activation not in SLOT_ACTIVATIONS:
        _fail("slot_activation", f"one of {', '.join(SLOT_ACTIVATIONS)}", repr(slot_activation))
    check_impl(impl)


def check_scale(scale: object) -> None:
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat, torch.SymInt)):
        _fail("scale", "a number", repr(scale))
    if isinstance(scale, float) and math.isnan(scale):
        _fail("scale", "a number", scale)


def refuse_tangents(impl: str, *tensors: Tensor | None) -> None:
    """NotImplementedError under forward-mode differentiation, unless impl is the reference: the
    others know gradients only, and a tangent would come out as zeros."""
    if impl == "reference" or torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    given = [x for x in tensors if x is not None]
    if any(forward_ad.unpack_dual(x).tangent is not None for x in given):
        raise NotImplementedError(
            f"forward-mode differentiation (jvp): only impl='reference' has it, got {impl!r}"
        )


def check_impl(impl: object) -> None:
    if impl not in IMPLS:
        _fail("impl", f"one of {', '.join(IMPLS)}", repr(impl))


def check_inputs(
    q: Tensor, k: Tensor, v: Tensor, log_forget: Tensor, write: Tensor | None
) -> tuple[int, int, int]:
    """Checks the token-wise arguments; returns (G, M, K+V)."""
    _check_tokens(q, k, v, "log_forget", log_forget)
    B, T, H, K = q.shape
    G, V, M = k.shape[2], v.shape[3], log_forget.shape[3]
    _check_shape("log_forget", log_forget, "B, T, G, M", (B, T, G, M))
    _check_sizes("q, k, v, log_forget", {"H": H, "G": G, "K": K, "V": V, "M": M})
    _check_gate("log_forget", log_forget, q, k, v)
    if write is not None:
        _check_tensor("write", write)
        _check_shape("write", write, "B, T, G, M", (B, T, G, M))
        _check_like_q("write", write, q, gate_dtypes(q))
    return G, M, K + V


def check_linear_inputs(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> tuple[int, int, int]:
    """Checks the token-wise arguments of gated linear attention; returns (G, K, V)."""
    _check_tokens(q, k, v, "log_decay", log_decay)
    B, T, H, K = q.shape
    G, V = v.shape[2:]
    _check_shape("log_decay", log_decay, "B, T, G, K", (B, T, G, K))
    _check_sizes("q, k, v, log_decay", {"H": H, "G": G, "K": K, "V": V})
    _check_gate("log_decay", log_decay, q, k, v)
    return G, K, V


def check_scan_inputs(
    x: Tensor, delta: Tensor, rate: Tensor, write: Tensor, read: Tensor
) -> tuple[int, int]:
    """Checks the arguments of a selective scan; returns (E, K)."""
    if _check_tensor("x", x).dim() != 3:
        _fail("x", "3 dimensions [B, T, E]", list(x.shape))
    if x.dtype not in FLOAT_DTYPES:
        _fail("x", f"dtype {', '.join(str(dtype) for dtype in FLOAT_DTYPES)}", x.dtype)
    if _check_tensor("rate", rate).dim() != 2:
        _fail("rate", "2 dimensions [E, K]", list(rate.shape))
    (B, T, E), K = x.shape, rate.shape[1]
    own, wide = (x.dtype,), (compute_dtype(x.dtype),)
    for name, tensor, letters, shape, dtypes in (
        ("delta", delta, "B, T, E", (B, T, E), gate_dtypes(x)),
        ("rate", rate, "E, K", (E, K), wide),
        ("write", write, "B, T, K", (B, T, K), own),
        ("read", read, "B, T, K", (B, T, K), own),
    ):
        _check_shape(name, _check_tensor(name, tensor), letters, shape)
        _check_like_q(name, tensor, x, dtypes, "x")
    _check_sizes("x, rate", {"E": E, "K": K})
    return E, K


def _check_tokens(q: Tensor, k: Tensor, v: Tensor, gate_name: str, gate: Tensor) -> None:
    for name, value in (("q", q), ("k", k), ("v", v), (gate_name, gate)):
        if _check_tensor(name, value).dim() != 4:
            _fail(name, "4 dimensions [B, T, heads, width]", list(value.shape))
    if q.dtype not in FLOAT_DTYPES:
        _fail("q", f"dtype {', '.join(str(dtype) for dtype in FLOAT_DTYPES)}", q.dtype)
    B, T, _, K = q.shape
    G, V = k.shape[2], v.shape[3]
    _check_shape("k", k, "B, T, G, K", (B, T, G, K))
    _check_shape("v", v, "B, T, G, V", (B, T, G, V))


def _check_sizes(names: str, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        if size < 1:
            _fail(names, f"{name} >= 1", size)
    if "H" in sizes and sizes["H"] % sizes["G"]:
        G = sizes["G"]
        _fail("q", f"a number of heads H that is a multiple of k's G = {G}", sizes["H"])


def _check_gate(name: str, gate: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    for other, tensor in (("k", k), ("v", v)):
        _check_like_q(other, tensor, q, (q.dtype,))
    _check_like_q(name, gate, q, gate_dtypes(q))


def gate_dtypes(q: Tensor) -> tuple[torch.dtype, ...]:
    """What gates may have beside these queries: their dtype, or the compute dtype."""
    return tuple(dict.fromkeys((q.dtype, compute_dtype(q.dtype))))


def check_memory(
    name: str, memory: Tensor, q: Tensor, shape: tuple[int, ...], letters: str
) -> None:
    _check_tensor(name, memory)
    _check_shape(name, memory, letters, shape)
    _check_like_q(name, memory, q, (compute_dtype(q.dtype),))


def check_cu_seqlens(cu_seqlens: Tensor, tokens: int) -> None:
    """Raises ValueError unless `cu_seqlens` starts at 0, never decreases and ends at `tokens`.

    The operator itself reads the contents only of a CPU tensor. Call this for a device tensor whose
    origin is not trusted; it waits for the device.

    Args:
        cu_seqlens: [S+1], int32 or int64, the boundaries of S packed sequences; empty ones allowed.
        tokens: T, the length of the packed row.
    """
    check_cu_seqlens_form(cu_seqlens)
    bounds = cu_seqlens.detach().cpu()
    if bounds[0] != 0:
        _fail("cu_seqlens", "a first value of 0", int(bounds[0]))
    steps = bounds.diff()
    if (steps < 0).any():
        i = int((steps < 0).nonzero()[0])
        _fail(
            "cu_seqlens",
            "values that never decrease",
            f"{int(bounds[i])} followed by {int(bounds[i + 1])} at index {i + 1}",
        )
    if bounds[-1] != tokens:
        _fail("cu_seqlens", f"a last value of T = {tokens}", int(bounds[-1]))


def check_cu_seqlens_form(cu_seqlens: Tensor) -> None:
    _check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        _fail("cu_seqlens", "dtype torch.int32 or torch.int64", cu_seqlens.dtype)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        _fail("cu_seqlens", "shape [S+1] with S >= 1 sequences", list(cu_seqlens.shape))


def check_packing(q: Tensor, cu_seqlens: Tensor, letter: str = "q") -> None:
    """Form and placement always; contents when they can be read without waiting for a device."""
    check_cu_seqlens_form(cu_seqlens)
    if q.shape[0] != 1:
        _fail(letter, "batch size B = 1 with cu_seqlens (sequences packed in one row)", q.shape[0])
    if cu_seqlens.device != q.device and cu_seqlens.device.type != "cpu":
        _fail("cu_seqlens", f"device cpu or {q.device} (that of {letter})", cu_seqlens.device)
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        check_cu_seqlens(cu_seqlens, q.shape[1])


def check_step(
    q: Tensor,
    memory: Tensor,
    rows: Tensor | None,
    inplace: bool,
    sizes: tuple[int, int, int],
    letters: str = "B, G, M, K+V",
) -> None:
    """What a one-token step asks beyond its inputs. `sizes` is (G, M, K+V), or `letters` say so."""
    if q.shape[1] != 1:
        _fail("q", "T = 1 token (shape [B, 1, H, K])", list(q.shape))
    if not isinstance(inplace, bool):
        _fail("inplace", "True or False", repr(inplace))
    B = q.shape[0]
    if rows is None:
        check_memory("memory", memory, q, (B, *sizes), letters)
        return
    if not inplace:
        _fail("rows", "inplace=True (a pool is updated in place)", "inplace=False")
    _check_tensor("rows", rows)
    if rows.dtype != torch.int64 or tuple(rows.shape) != (B,):
        _fail("rows", f"int64 of shape [B] = [{B}]", f"{rows.dtype} {list(rows.shape)}")
    if rows.device != q.device:
        _fail("rows", f"device {q.device} (that of q)", rows.device)
    pool = _check_tensor("memory", memory).shape[0] if memory.dim() else 0
    check_memory("memory", memory, q, (pool, *sizes), "P, G, M, K+V")
    if rows.device.type == "cpu" and not torch.compiler.is_compiling():
        if ((rows < 0) | (rows >= pool)).any():
            _fail("rows", f"values in [0, P = {pool})", rows.tolist())
        if rows.unique().numel() != B:
            _fail("rows", "distinct values", rows.tolist())
