"""`gsa bench ops`: the operator on this machine's CPU, forward and backward.

Chunked against the loop over tokens and against causal softmax attention (torch SDPA) of equal
width. The table is for people; the last line printed is one JSON document, also written to
`out`. The loop is timed by itself: the memory it takes and frees would slow down the others.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch.nn import functional as F

from gsa.benchmark.results import check_out, write_result
from gsa.benchmark.timing import Timing, interleaved
from gsa.ops import Impl, gated_slot_attention
from gsa.training.environment import environment


@dataclass(frozen=True, kw_only=True)
class BenchOpsConfig:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to measure; auto takes a CUDA device if there is one. A GPU has other options."""
    tokens: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384, 65536)
    """Sequence lengths T, one row of the table each."""
    heads: int = 4
    """H = G, heads of queries, keys and values."""
    width: int = 64
    """K = V, numbers per head."""
    slots: int = 64
    """M, memory slots per head."""
    threads: int = 0
    """Threads of torch; 0 leaves its default."""
    seconds: float = 2.0
    """Time to spend on each cell of the table."""
    max_loop: int = 1024
    """Longest T for the loop over tokens, whose autograd keeps a memory per token."""
    max_attention: int = 16384
    """Longest T for softmax attention, whose time grows with T²."""
    out: str = ""
    """JSON file to write; none if empty."""

    def __post_init__(self) -> None:
        if not self.tokens or min(self.tokens) < 1:
            raise ValueError(f"tokens: expected lengths of at least 1, got {self.tokens}")
        for name in ("heads", "width", "slots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("threads", "seconds", "max_loop", "max_attention"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")


def train_step(
    function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], d_output: torch.Tensor
) -> None:
    """Forward and backward; gradients are dropped."""
    function(*inputs).backward(d_output)
    for tensor in inputs:
        tensor.grad = None


def slot_attention(impl: Impl, *inputs: torch.Tensor) -> torch.Tensor:
    return gated_slot_attention(*inputs, impl=impl).output


def contenders(config: BenchOpsConfig, tokens: int) -> dict[str, Callable[[], None]]:
    """What is timed at one length, on random inputs."""
    H, D, M = config.heads, config.width, config.slots

    def leaves(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
        return [torch.randn(shape).requires_grad_() for shape in shapes]

    qkv = leaves(*[(1, tokens, H, D)] * 3)
    gate = (F.logsigmoid(torch.randn(1, tokens, H, M)) / 8).requires_grad_()
    d_output = torch.randn(1, tokens, H, D)
    step = partial(train_step, inputs=[*qkv, gate], d_output=d_output)
    timed = {"chunked": partial(step, partial(slot_attention, "chunked"))}
    if tokens <= config.max_loop:
        timed["loop"] = partial(step, partial(slot_attention, "reference"))
    if tokens <= config.max_attention:
        attention = partial(F.scaled_dot_product_attention, is_causal=True)
        inputs = leaves(*[(1, H, tokens, D)] * 3)
        cotangent = torch.randn(1, H, tokens, D)
        timed["attention"] = partial(train_step, attention, inputs, cotangent)
    return timed


def describe(tokens: int, timings: dict[str, Timing]) -> dict[str, object]:
    """One row: microseconds per token, and how many times longer the rivals take."""
    row: dict[str, object] = {"tokens": tokens}
    for name, timing in timings.items():
        row[f"{name}_us_per_token"] = round(timing.median / tokens * 1e6, 2)
        row[f"{name}_seconds"] = asdict(timing)
    for rival in ("attention", "loop"):
        if rival in timings:
            row[f"{rival}_over_chunked"] = round(
                timings[rival].median / timings["chunked"].median, 2
            )
    return row


def print_row(row: dict[str, object]) -> None:
    cells = [f"{row['tokens']:>7}"]
    cells += [f"{row.get(f'{n}_us_per_token', '-'):>11}" for n in ("chunked", "attention", "loop")]
    cells += [f"{row.get(f'{n}_over_chunked', '-'):>15}" for n in ("attention", "loop")]
    print(" ".join(cells), flush=True)


def bench_ops(config: BenchOpsConfig) -> dict[str, object]:
    """Measures, prints the table and returns the result document.

    OSError if `out` is something else, or cannot be written.
    """
    check_out(config.out)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    H, D, M = config.heads, config.width, config.slots
    print(f"forward + backward, fp32, H=G={H}, K=V={D}, M={M}; microseconds per token")
    print(
        f"{'T':>7} {'chunked':>11} {'attention':>11} {'loop':>11} "
        f"{'attention/gsa':>15} {'loop/gsa':>15}"
    )
    rows = []
    for tokens in config.tokens:
        timed = contenders(config, tokens)
        alone = {"loop": timed.pop("loop")} if "loop" in timed else {}
        timings = interleaved(timed, seconds=config.seconds)
        timings |= interleaved(alone, seconds=config.seconds)
        rows.append(describe(tokens, timings))
        print_row(rows[-1])
    command = "gsa " + " ".join(sys.argv[1:])
    result = {
        "benchmark": "ops",
        "command": command,
        "environment": environment(torch.device("cpu")),
        "config": asdict(config),
        "rows": rows,
    }
    if config.out:
        write_result(Path(config.out), result)
    print(json.dumps(result))
    return result
