"""What the kernels of the operator compute, as their twin in `gsa/ops/chunked.py` has it.

Needs triton: import it after `pytest.importorskip("triton")`.
"""

from functools import cached_property
from itertools import pairwise
from types import SimpleNamespace
from typing import NamedTuple

import torch
from numerics import CHUNK, Tensors, assert_within_budget, cotangents, make_inputs
from torch import Tensor

from gsa.ops import chunked_op
from gsa.ops.activation import activate, activation_backward
from gsa.ops.chunked import (
    Read,
    beyond_fast,
    readout_backward,
    readout_forward,
    write_backward,
    write_factors,
)
from gsa.ops.triton import launch
from gsa.ops.triton.plan import Plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUERIES = ("score", "weight", "output", "d_q", "d_weight", "d_score")


class Span(NamedTuple):
    """A stretch of tokens, its number in the kernels, and the twin's chunks that it covers."""

    number: int
    row: int  # of the batch; 0 if packed
    sequence: int
    border: int  # which of the borders between spans of one sequence ends it
    first: int
    last: int
    begins: bool  # its sequence
    ends: bool


class Case:
    """Inputs on the CPU, and results: [chunks, rows, heads, C, width] if they are token-wise.

    unit: tokens per segment; whoever asks for kernels has patched `segment_tokens` accordingly.
    steep: makes one chunk too steep to factorise, and a slot of another steep enough for a shift.
    """

    def __init__(
        self,
        *,
        unit: int = 2048,
        scale: float = 0.7,
        slot_activation: str = "softmax",
        cu_seqlens: list[int] | None = None,
        memory: bool = True,
        steep: bool = False,
        **sizes: int | bool,
    ) -> None:
        self.unit, self.scale, self.slot_activation = unit, scale, slot_activation
        self.steep = steep
        self.cu = None if cu_seqlens is None else torch.tensor(cu_seqlens)
        rows = sizes.get("B", 1) if cu_seqlens is None else len(cu_seqlens) - 1
        x = make_inputs(dtype=torch.float32, memory=rows if memory else None, **sizes)
        if steep:
            x["log_forget"][:, 70:134, 0, 1] = -12.0
            x["log_forget"][:, :64, -1, 0] = -6.0
        self.inputs = x
        self.d_output, self.d_final = cotangents(x, memories=rows)
        self.B, self.T, self.H, self.K = x["q"].shape
        self.G, self.M = x["log_forget"].shape[2:]
        self.bounds = cu_seqlens
        self.tiling = chunked_op.plan(x["q"], x["k"], self.cu)
        self.chunks = range(self.tiling.chunks)

    def results(self, *names: str) -> tuple[Tensors, Tensors]:
        """Those of the exact twin, and those of the yardstick."""
        exact, ruler = vars(self.exact), vars(self.ruler)
        return {name: exact[name] for name in names}, {name: ruler[name] for name in names}

    def new_plan(self) -> Plan:
        tokens = (self.on_device(name) for name in ("q", "k", "v", "log_forget", "write"))
        return Plan(*tokens, None if self.cu is None else self.cu.to(DEVICE))

    @cached_property
    def plan(self) -> Plan:
        return self.new_plan()

    @cached_property
    def gate(self) -> launch.Gates:
        return launch.prepare(self.plan)

    def on_device(self, name: str) -> Tensor | None:
        x = self.inputs.get(name)
        return None if x is None else x.to(DEVICE)

    def tiles(self, tokens: Tensor, heads: int) -> Tensor:
        """[tokens, heads, width] of a kernel as the twin has it."""
        x = tokens.cpu().reshape(self.B, self.T, heads, -1)
        return self.tiling.gather(x, self.chunks, x.dtype)

    def tokens(self, tiles: Tensor) -> Tensor:
        """The reverse: [tokens, heads, width] in fp64 on the device."""
        x = tiles.new_empty(self.B, self.T, tiles.shape[2], tiles.shape[4])
        self.tiling.scatter(tiles, self.chunks, x)
        return x.flatten(0, 1).double().to(DEVICE)

    def spans(self, length: int) -> list[Span]:
        """All spans of so many tokens that are not empty."""
        found, before, T = [], 0, self.T
        sequences = pairwise(self.bounds) if self.bounds else [(0, T)] * self.B
        for s, (a, b) in enumerate(sequences):
            number = a // length + s if self.bounds else s * -(-T // length)
            border = a // length if self.bounds else s * (T // length)
            for i, start in enumerate(range(0, b - a, length)):
                stop = min(start + length, b - a)
                span = Span(
                    number=number + i,
                    row=0 if self.bounds else s,
                    sequence=s,
                    border=border + i,
                    first=before + start // CHUNK,
                    last=before + (stop - 1) // CHUNK,
                    begins=start == 0,
                    ends=stop == b - a,
                )
                found.append(span)
            before += -(-(b - a) // CHUNK) if self.bounds else 0
        return found

    def by_chunk(self, x: Tensor) -> Tensor:
        """[chunks, ...] of a kernel as the twin has it: [chunks, rows, ...]."""
        number = torch.zeros(len(self.chunks), self.B, dtype=torch.int64)
        for span in self.spans(CHUNK):
            number[span.first, span.row] = span.number
        return x.cpu()[number]

    @cached_property
    def exact(self) -> SimpleNamespace:
        return self.twin(torch.float64)

    @cached_property
    def ruler(self) -> SimpleNamespace:
        return self.twin(torch.float32)

    def twin(self, dtype: torch.dtype) -> SimpleNamespace:
        """Everything from inputs to gradients, computed in a dtype."""
        x = {name: tensor.to(dtype) for name, tensor in self.inputs.items()}
        tiling, chunks, initial = self.tiling, self.chunks, x.get("initial_memory")
        tokens = (x["q"], x["k"], x["v"], x["log_forget"], x.get("write"))
        tiles = chunked_op.load(tiling, chunks, tokens)
        beyond, d_final = beyond_fast(tiles), self.d_final.to(dtype)
        written = write_factors(tiles, beyond)
        final = torch.zeros_like(d_final) if initial is None else initial.clone()
        carry = torch.zeros_like(final[:1]) if self.bounds else final
        starts = chunked_op.memory_forward(tiling, chunks, tiles, written, carry, initial, final)
        start, read = starts.flatten(0, 2), Read(self.scale, self.slot_activation)
        output, score = readout_forward(tiles, beyond, start, read)
        d_out = tiling.gather(self.d_output.to(dtype), chunks, dtype).view(output.shape)
        gradients, d_start = readout_backward(tiles, beyond, start, score, d_out, read)
        d_initial = d_final.clone()
        carry = torch.zeros_like(final[:1]) if self.bounds else d_initial
        d_ends = chunked_op.memory_backward(
            tiling, chunks, written, d_start.view(starts.shape), carry, d_initial
        )
        d_log_forget = write_backward(tiles, written, start, d_ends.flatten(0, 2), gradients)
        if "write" not in x:
            d_log_forget.addcmul_(1 - tiles.write, gradients.write, value=-1)
        found = {
            **{"score": score, "output": output, "w": tiles.write, "decay": tiles.decay_sum},
            **{"faded": written.faded_write, "fade": written.fade, "d_q": gradients.q},
            **{"d_k": gradients.k, "d_v": gradients.v, "d_write": gradients.write},
            "d_log_forget": d_log_forget,
        }
        swapped = tiles._replace(q=d_out, k=tiles.v, v=tiles.k)
        swapped_start = torch.cat([start[..., self.K :], start[..., : self.K]], -1)
        d_weight = readout_forward(swapped, beyond, swapped_start, Read(1.0, "identity"))[1]
        weight = activate(score, self.slot_activation)
        d_score = activation_backward(score, weight, d_weight, self.slot_activation)
        found |= {"d_weight": d_weight, "weight": weight, "d_score": self.scale * d_score}
        is_token = tiling.gather(x["q"][:, :, :1, :1] * 0 + 1, chunks, dtype)
        for name, tensor in found.items():
            tensor = tensor.unflatten(0, (len(chunks), self.B, self.G))
            tensor = tensor.flatten(2, 3) if name in QUERIES else tensor
            found[name] = tensor if name in ("decay", "fade") else tensor * is_token
        memories = {"starts": starts, "final": final, "d_ends": d_ends, "d_initial": d_initial}
        return SimpleNamespace(**found, **memories)

    def of_own_token(self) -> Tensor:
        """The part of d write that a token has from reading what it writes: [.., G, C, M]."""
        names = ("q", "k", "v")
        q, k, v = (x.double() for x in (self.inputs[name] for name in names))
        share = self.H // self.G
        k, v = (x.repeat_interleave(share, 2) for x in (k, v))
        pairs = ((q, k), (self.d_output.double(), v))
        own, d_own = (
            self.tiling.gather((x * y).sum(-1, keepdim=True), self.chunks, torch.float64)
            for x, y in pairs
        )
        terms = self.exact.d_score * own + self.exact.weight * d_own
        return terms.unflatten(2, (self.G, share)).sum(3)

    def after(self, twin: SimpleNamespace, span: Span) -> Tensor:
        """The memory after a span, [G, M, X]."""
        if span.ends:
            return twin.final[span.sequence]
        return twin.starts[span.last + 1, span.row]

    def crossing(self, twin: SimpleNamespace, span: Span) -> Tensor:
        """Rows of the memory before and after a span ⊙ their gradients, [2, G, M]."""
        ends, initial = twin.d_ends, twin.d_initial
        d_before = initial[span.sequence] if span.begins else ends[span.first - 1, span.row]
        before = twin.starts[span.first, span.row] * d_before
        after = self.after(twin, span) * ends[span.last, span.row]
        return torch.stack([before.sum(-1), after.sum(-1)])

    @cached_property
    def grow(self) -> Tensor:
        """exp(G - S), for the kernels' S; 1 in chunks not factorised: [chunks, rows, H, C, M]."""
        fade_in = self.by_chunk(self.gate.fades)[..., 0, :].double()
        grow = (self.exact.decay - fade_in.log()[..., None, :]).exp()
        grow[self.by_chunk(self.gate.steep) != 0] = 1.0
        return grow.repeat_interleave(self.H // self.G, 2)

    def starts(self) -> Tensor:
        """The exact memory before every segment that does not begin a sequence, else NaN."""
        spans = [(span, span.first) for span in self.spans(self.unit) if not span.begins]
        return self.at_borders(self.exact.starts, spans)

    def ends(self) -> Tensor:
        """The exact gradient of the memory after every segment that does not end one."""
        spans = [(span, span.last) for span in self.spans(self.unit) if not span.ends]
        return self.at_borders(self.exact.d_ends, spans)

    def at_borders(self, memories: Tensor, spans: list[tuple[Span, int]]) -> Tensor:
        """[units, G, M, X]"""
        found = memories.new_full((self.plan.units, *memories.shape[2:]), torch.nan)
        for span, chunk in spans:
            found[span.number] = memories[chunk, span.row]
        return found.double().to(DEVICE)


def check(actual: Tensors, exact: Tensors, ruler: Tensors) -> None:
    """Each within twice the error of the twin in fp32, plus eps."""
    actual = {name: x.cpu() for name, x in actual.items()}
    assert_within_budget(actual, exact, ruler, torch.float32)
