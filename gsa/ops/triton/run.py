"""Calls of the kernels: every kind noted down once (`tape.py`), then played."""

# Triton's types do not describe what may stand in a kernel or be passed to one.
# pyright: reportArgumentType=false

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from gsa.ops.triton import launch, sizes, table
from gsa.ops.triton.launch import Kept, kept_rooms, new_kept
from gsa.ops.triton.plan import Plan, token_rows
from gsa.ops.triton.program import enter_context
from gsa.ops.triton.tape import Form, Recorder, Tape, form_of, make_ready
from gsa.ops.types import SlotActivation

Tokens = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
"""q, k, v, log_forget, write, cu_seqlens."""

TAPES = 256
"""Kinds of calls that are remembered, forward and backward each. Packed rows have one for every
number of sequences."""


class Call(NamedTuple):
    """All that a tape depends on."""

    device: torch.device
    tokens: tuple[Form | None, ...]
    initial: Form | None
    scale: float
    slot_activation: SlotActivation
    keep: bool
    keep_memories: bool
    edition: int  # of the launch table
    span: int
    segment: int


def call_of(tokens: Tokens, initial: Tensor | None, scale: float, slot_activation: SlotActivation,
            keep: bool, keep_memories: bool) -> Call:  # fmt: skip
    packed = tokens[5] is not None
    return Call(
        tokens[0].device, tuple(map(form_of, tokens)), form_of(initial), scale, slot_activation,
        keep, keep_memories, table.edition(), sizes.span_tokens(), sizes.segment_tokens(packed),
    )  # fmt: skip


def aligned(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format) if x.data_ptr() & 15 else x


def dense(x: Tensor) -> Tensor:
    return aligned(x if x.is_contiguous() else x.contiguous())


def rows(x: Tensor) -> Tensor:
    return aligned(x if x.is_contiguous() else token_rows(x)[0])


def fitting(q: Tensor, k: Tensor, v: Tensor, log_forget: Tensor, write: Tensor | None,
            cu_seqlens: Tensor | None) -> Tokens:  # fmt: skip
    """The same as kernels take them: themselves, where nothing is to be done."""
    q = rows(q) if k.shape[3] else dense(q)
    write = None if write is None else dense(write)
    if cu_seqlens is not None:
        cu_seqlens = dense(cu_seqlens.to(q.device, non_blocking=True))
    return q, rows(k), rows(v), dense(log_forget), write, cu_seqlens


def run_forward(tokens: Tokens, initial: Tensor | None, scale: float,
                slot_activation: SlotActivation, keep: bool, keep_memories: bool
                ) -> list[Tensor]:  # fmt: skip
    """[output, final memory], and with `keep` what the backward pass needs, in one piece."""
    tokens = fitting(*tokens)
    initial = None if initial is None else dense(initial)
    enter_context(tokens[0].device)
    call = call_of(tokens, initial, scale, slot_activation, keep, keep_memories)
    return forward_tape(call).play(*tokens, initial)


def run_backward(tokens: Tokens, initial: Tensor | None, final: Tensor, kept: Tensor,
                 d_output: Tensor, d_final: Tensor | None, scale: float,
                 slot_activation: SlotActivation, keep_memories: bool) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, log_forget, and of write and the initial memory if they are given."""
    tokens = fitting(*tokens)
    initial = None if initial is None else dense(initial)
    d_output, d_final = rows(d_output), None if d_final is None else dense(d_final)
    enter_context(d_output.device)
    call = call_of(tokens, initial, scale, slot_activation, True, keep_memories)
    tape = backward_tape(call, form_of(d_output), form_of(d_final))
    return tape.play(*tokens, initial, dense(final), dense(kept), d_output, d_final)


def begin(call: Call) -> tuple[Recorder, Plan, Tensor | None]:
    """(the machine, a plan on it, the initial memory)."""
    machine = Recorder(call.device)
    tokens = [machine.input(form) for form in call.tokens]
    initial = machine.input(call.initial)
    return machine, Plan(*tokens, machine=machine), initial


@lru_cache(TAPES)
def forward_tape(call: Call) -> Tape:
    """Compiles its kernels, and those of a backward pass if one is to follow, side by side."""
    machine, plan, initial = begin(call)
    memory, kept = new_kept(plan, call.keep_memories) if call.keep else (None, None)
    output, final = launch.forward(plan, initial, call.scale, call.slot_activation, kept)
    tapes = [machine.finish(output, final, *([] if memory is None else [memory]))]
    options = (call.initial is None, call.slot_activation, call.keep_memories)
    kind = (*options, plan.sizes.segmented)
    if call.keep and kind not in plan.recipe.compiled:
        plan.recipe.compiled.add(kind)
        tapes.append(sketch_backward(call, form_of(output), None))
    make_ready(tapes)
    return tapes[0]


@lru_cache(TAPES)
def backward_tape(call: Call, d_output: Form, d_final: Form | None) -> Tape:
    tape = sketch_backward(call, d_output, d_final)
    make_ready([tape])
    return tape


def sketch_backward(call: Call, d_output: Form, d_final: Form | None) -> Tape:
    machine, plan, initial = begin(call)
    rooms = kept_rooms(plan, call.keep_memories)
    shape = (plan.sequences, plan.G, plan.M, plan.X)
    final = machine.input(contiguous(shape, torch.float32))
    kept = Kept.within(machine.input(contiguous((rooms.bytes,), torch.uint8)), rooms)
    cotangents = machine.input(d_output), machine.input(d_final)
    gradients = launch.backward(
        plan, initial, final, kept, *cotangents, call.scale, call.slot_activation
    )
    return machine.finish(*(x for x in gradients if x is not None))


def contiguous(shape: tuple[int, ...], dtype: torch.dtype) -> Form:
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.shape, x.stride(), dtype
