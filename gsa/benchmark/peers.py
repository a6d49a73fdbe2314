"""The peer library flash-linear-attention ("fla"), called as its own layer calls it.

Its gates are bf16, its writes a separate input (their gradient is left as it is: the caller would
still have to combine it with the gate's), its final state is not asked for. Heads of keys, values
and gates are repeated to the query heads beforehand, outside of what is timed.
"""

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from gsa.benchmark.cases import Case
from gsa.benchmark.contenders import Contender, InputSet, leaf

NOTES = (
    "fla: chunk_gsa(q, k, v, s, g, scale=1) in bf16, s = 1 - exp(g), default checkpoint level, no "
    "final state; gradients to q, k, v, s, g.",
    "fla: k, v, s, g repeated to the query heads beforehand (GQA); the copies are not timed.",
    "sdpa: torch's scaled_dot_product_attention, causal, its default choice of backend, on as many "
    "numbers per token as q, k, v have, in heads of 128; it has no gates.",
)


@dataclass(frozen=True, kw_only=True)
class Fla:
    """The imported library."""

    version: str
    import_seconds: float
    chunk: Callable[..., tuple[Tensor, object]]
    step: Callable[..., tuple[Tensor, object]]


def load_fla() -> Fla | str:
    """The library, or why its import fails.

    Raises:
        ValueError: it is not installed.
    """
    if importlib.util.find_spec("fla") is None:
        raise ValueError(
            "peers: expected flash-linear-attention, which is not installed; "
            "pip install 'gated-slots[peers]', or measure without --peers"
        )
    begin = time.perf_counter()
    try:
        from fla.ops.gsa import chunk_gsa, fused_recurrent_gsa  # type: ignore
    except Exception as error:  # whatever goes wrong inside is its story, and is reported
        return f"import fails: {type(error).__name__}: {error}"
    return Fla(
        version=fla_version() or "unknown",
        import_seconds=round(time.perf_counter() - begin, 2),
        chunk=chunk_gsa,
        step=fused_recurrent_gsa,
    )


def fla_version() -> str | None:
    for package in ("flash-linear-attention", "fla-core"):
        try:
            return version(package)
        except PackageNotFoundError:
            pass
    return None


def triton_cache_entries() -> int | None:
    """Kernels that Triton has kept from earlier runs: 0 makes a first call a cold start."""
    try:
        from triton import knobs

        folder = Path(knobs.cache.dir)
        return sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0
    except (ImportError, AttributeError, OSError):
        return None


def gates_of_fla(log_forget: Tensor) -> tuple[Tensor, Tensor]:
    """(s, g): what is written and the log-decay, in bf16."""
    return -torch.expm1(log_forget).bfloat16(), log_forget.bfloat16()


def _call_chunk(chunk: Callable[..., tuple[Tensor, object]], *inputs: Tensor) -> Tensor:
    q, k, v, s, g = inputs
    return chunk(q=q, k=k, v=v, s=s, g=g, scale=1.0)[0]


def fla_contender(case: Case, sets: Sequence[InputSet], library: Fla) -> Contender:
    repeats = case.H // case.G

    def for_all_heads(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(repeats, dim=2) if repeats > 1 else tensor

    inputs = []
    for one in sets:
        s, g = gates_of_fla(one.log_forget)
        tensors = (one.q, *(for_all_heads(x) for x in (one.k, one.v, s, g)))
        inputs.append(tuple(leaf(x) for x in tensors))
    return Contender(
        inputs=inputs,
        d_outputs=[one.d_output for one in sets],
        call=partial(_call_chunk, library.chunk),
    )
