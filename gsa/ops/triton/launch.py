"""From tensors to kernels: the order of the launches.

Large tensors are made by the plan (`Plan.new`), so that a call can be sketched without memory.
"""

# Triton's types do not describe what may stand in a kernel or be passed to one.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportReturnType=false

from typing import NamedTuple

import torch
from torch import Tensor

from gsa.ops.triton import activation, gates, read, write
from gsa.ops.triton.plan import Plan, all_or_none, token_rows
from gsa.ops.triton.sizes import KeptRooms
from gsa.ops.types import SlotActivation

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
"""Of q, k, v, log_forget, write, initial."""


class Gates(NamedTuple):
    """What `prepare_kernel` makes of log f and w."""

    lifted: Tensor
    fades: Tensor
    steep: Tensor


def prepare(plan: Plan, gate: Gates | None = None) -> Gates:
    """Decays of all chunks, in `gate` if it is given."""
    G, M, recipe = plan.G, plan.M, plan.recipe
    gate = gate or Gates(
        plan.new(plan.tokens, G, M, dtype=recipe.operand_dtype),
        plan.new(plan.chunks, G, 2, M),
        plan.new(plan.chunks, G, dtype=torch.int32),
    )
    plan.launch(
        gates.prepare_kernel, plan.chunks * G,
        (plan.log_forget, plan.write, *gate, plan.chunk_owners, plan.bounds, plan.T),
        recipe.common | dict(num_warps=recipe.prepare_warps),
    )  # fmt: skip
    return gate


class Side(NamedTuple):
    """Keys (column 0) or values (column K) of the memory, with what meets them."""

    x: Tensor  # [B, T, H, width] queries or d output
    y: Tensor  # [B, T, G, width] keys or values
    column: int
    initial: Tensor | None
    starts: Tensor | None
    final: Tensor | None
    snapshots: Tensor | None  # [borders, G, M, width]


def find_starts(plan: Plan, gate: Gates, writes: tuple[Tensor, Tensor], read: tuple[Tensor, Tensor],
                outer: Tensor | None, backward: bool, local: Tensor | None = None
                ) -> Tensor | None:  # fmt: skip
    """Memories before (backward: their gradients after) every segment, [units, G, M, X], in `local`
    if it is given.

    writes: what is written with keys and with values, [tokens, heads, M]. read: keys and values,
    or queries and d output. None where no sequence can have two segments.
    """
    if not plan.sizes.segmented:
        return None
    G, M, recipe = plan.G, plan.M, plan.recipe
    heads = read[0].shape[2]
    local = plan.new(plan.units, G, M, plan.X) if local is None else local
    decays = plan.new(plan.units, G, M)
    inputs, tiles, strides, programs = [], [], [], []
    for u, y in zip(writes, read, strict=True):
        width = y.shape[3]
        block = recipe.tile("scan", width).block
        y, stride = token_rows(y)
        tiles += all_or_none(
            plan.tiles(u, heads, M, heads * M, recipe.slots),
            plan.tiles(y, heads, width, stride, block),
        )
        inputs += [u, y]
        strides.append(stride)
        programs.append(plan.units * G * -(-width // block))
    plan.launch(
        write.scan_kernel, sum(programs),
        (*inputs, plan.log_forget, gate.fades, gate.steep, local, decays, *tiles, plan.unit_owners,
         plan.bounds, plan.T, programs[1], *strides),
        recipe.walk_both("scan") | dict(R=heads // G, BACKWARD=backward),
    )  # fmt: skip
    block = 256
    plan.launch(
        write.combine_kernel,
        plan.sequences * G * -(-M * plan.X // block),
        (outer, local, decays, plan.bounds, plan.T),
        dict(G=G, M=M, X=plan.X, UNIT=recipe.kind.unit, BLOCK=block, BACKWARD=backward,
                     PACKED=plan.packed, NUMBER=recipe.number),
    )  # fmt: skip
    return local


def contract(plan: Plan, gate: Gates, side: Side,
             whole: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(raw, own) of `contract_kernel`, in slices. whole: where to put them if there is only one."""
    H, G, M, recipe, width = plan.H, plan.G, plan.M, plan.recipe, side.y.shape[3]
    (x, x_stride), (y, y_stride) = token_rows(side.x), token_rows(side.y)
    block = recipe.tile("contract", width).block
    slices = -(-width // block)
    if whole is not None and slices == 1:
        raw, own = whole[0][None], whole[1][None]
    else:
        raw, own = plan.new(slices, plan.tokens, H, M), plan.new(slices, plan.tokens, H)
    tiles = all_or_none(
        plan.tiles(x, H, width, x_stride, block),
        plan.tiles(y, G, width, y_stride, block),
        plan.tiles(gate.lifted, G, M, G * M, recipe.slots),
        plan.tiles(raw, H, M, H * M, recipe.slots, slices),
    )
    plan.launch(
        read.contract_kernel, plan.units * H * slices,
        (x, y, gate.lifted, plan.log_forget, gate.fades, gate.steep, side.initial, side.starts,
         side.final, side.snapshots, raw, own, *tiles, plan.snapshot_tiles(side.snapshots, block),
         plan.unit_owners, plan.bounds, plan.T, plan.B, x_stride, y_stride),
        recipe.walk("contract", width, side.column) | dict(FACTOR=recipe.factor),
    )  # fmt: skip
    return raw, own


def expand(plan: Plan, gate: Gates, z: Tensor, side: Side) -> Tensor:
    """The result of `expand_kernel`: [B, T, H, width] in q's dtype."""
    H, G, M, recipe, width = plan.H, plan.G, plan.M, plan.recipe, side.y.shape[3]
    y, y_stride = token_rows(side.y)
    block = recipe.tile("expand", width).block
    out = plan.new(plan.B, plan.T, H, width, dtype=plan.q.dtype)
    tiles = all_or_none(
        plan.tiles(z, H, M, H * M, recipe.slots),
        plan.tiles(y, G, width, y_stride, block),
        plan.tiles(gate.lifted, G, M, G * M, recipe.slots),
        plan.tiles(out, H, width, H * width, block),
    )
    plan.launch(
        read.expand_kernel, plan.units * H * -(-width // block),
        (z, y, gate.lifted, plan.log_forget, gate.fades, gate.steep, side.initial, side.starts,
         side.final, side.snapshots, out, *tiles, plan.snapshot_tiles(side.snapshots, block),
         plan.unit_owners, plan.bounds, plan.T, y_stride),
        recipe.walk("expand", width, side.column),
    )  # fmt: skip
    return out


def write_back(plan: Plan, gate: Gates, d_score: Tensor, weights: Tensor, keys: Side, values: Side,
               d_final: Tensor | None, ends: Tensor | None, d_initial: Tensor | None
               ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(d_k, d_v, d_lifted [slices, tokens, G, M], crossing [slices, spans, 2, G, M])."""
    H, G, M, recipe = plan.H, plan.G, plan.M, plan.recipe
    inputs, tiles, results, strides, slices = [], [], [], [], []
    for z, side in ((d_score, keys), (weights, values)):
        width = side.y.shape[3]
        (x, x_stride), (y, y_stride) = token_rows(side.x), token_rows(side.y)
        block = recipe.tile("write_back", width).block
        d_y = plan.new(plan.B, plan.T, G, width, dtype=plan.q.dtype)
        inputs += [z, x, y, d_y, side.snapshots]
        tiles += all_or_none(
            plan.tiles(z, H, M, H * M, recipe.slots),
            plan.tiles(x, H, width, x_stride, block),
            plan.tiles(y, G, width, y_stride, block),
            plan.tiles(d_y, G, width, G * width, block),
        )
        results.append(d_y)
        strides += [x_stride, y_stride]
        slices.append(-(-width // block))
    d_lifted = plan.new(sum(slices), plan.tokens, G, M)
    crossing = plan.new(sum(slices), plan.spans, 2, G, M)
    # None exactly where z, of the same width, has no descriptor either.
    lifted_tiles = plan.tiles(gate.lifted, G, M, G * M, recipe.slots)
    d_lifted_tiles = plan.tiles(d_lifted, G, M, G * M, recipe.slots, sum(slices))
    plan.launch(
        write.write_back_kernel, plan.units * G * sum(slices),
        (*inputs, *tiles, gate.lifted, plan.log_forget, gate.fades, gate.steep, d_final, ends,
         d_initial, keys.initial, keys.final, d_lifted, crossing, lifted_tiles, d_lifted_tiles,
         plan.unit_owners, plan.bounds, plan.T, plan.B, plan.spans, plan.units * G * slices[1],
         *strides),
        recipe.walk_both("write_back") | dict(
            H=H, SNAPSHOT=plan.sizes.span, FACTOR=recipe.factor
        ),
    )  # fmt: skip
    return *results, d_lifted, crossing


def new_snapshots(plan: Plan) -> tuple[Tensor | None, Tensor | None]:
    """Room for the keys and the values of the memory at every `span` tokens within a sequence."""
    if plan.sizes.borders == 0:
        return None, None
    keys, values = (
        plan.new(plan.sizes.borders, plan.G, plan.M, width, dtype=plan.recipe.operand_dtype)
        for width in (plan.K, plan.V)
    )
    return keys, values


class Kept(NamedTuple):
    """What the backward pass needs beside inputs and results: see `KeptRooms`."""

    raw: Tensor | None
    own: Tensor | None
    gates: Gates | None
    starts: Tensor | None
    keys: Tensor | None
    values: Tensor | None

    @staticmethod
    def within(memory: Tensor, rooms: KeptRooms) -> "Kept":
        found = [None if room is None else room.of(memory) for room in rooms[:-1]]
        raw, own, *gate, starts, keys, values = found
        return Kept(raw, own, Gates(*gate), starts, keys, values)


def kept_rooms(plan: Plan, memories: bool) -> KeptRooms:
    recipe = plan.recipe
    return KeptRooms.of(plan.sizes, recipe.number_dtype, recipe.operand_dtype, memories)


def new_kept(plan: Plan, memories: bool) -> tuple[Tensor, Kept]:
    """(one piece of memory, what is kept, within it)."""
    rooms = kept_rooms(plan, memories)
    memory = plan.new(rooms.bytes, dtype=torch.uint8)
    return memory, Kept.within(memory, rooms)


def forward(plan: Plan, initial: Tensor | None, scale: float, slot_activation: SlotActivation,
            kept: Kept | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(output, final memory). kept: where to put what the backward pass needs, if it follows."""
    recipe = plan.recipe
    keep = kept or Kept(None, None, None, None, None, None)
    gate = prepare(plan, keep.gates)
    starts = find_starts(
        plan, gate, (gate.lifted, gate.lifted), (plan.k, plan.v), initial, False, keep.starts
    )
    final = plan.new(plan.sequences, plan.G, plan.M, plan.X, dtype=torch.float32)
    keys = Side(plan.q, plan.k, 0, initial, starts, final, keep.keys)
    values = Side(plan.q, plan.v, plan.K, initial, starts, final, keep.values)
    raw, own = plan.q.contiguous(), None  # without keys: the scores are the queries
    if plan.K:
        whole = None if kept is None else (kept.raw, kept.own)
        raw, own = contract(plan, gate, keys, whole)
    slices = raw.shape[0] if plan.K else 1
    weights = plan.new(plan.tokens, plan.H, plan.M, dtype=recipe.operand_dtype)
    sums = (keep.raw, keep.own) if slices > 1 else (None, None)  # one slice is its own sum
    plan.launch(
        activation.activate_kernel, plan.chunks * plan.G,
        (raw, own, plan.log_forget, plan.write, gate.steep, weights, *sums, plan.chunk_owners,
         plan.bounds, plan.T, plan.tokens, scale),
        activation_constants(plan, slices, slot_activation),
    )  # fmt: skip
    return expand(plan, gate, weights, values), final


def backward(plan: Plan, initial: Tensor | None, final: Tensor, kept: Kept, d_output: Tensor,
             d_final: Tensor | None, scale: float, slot_activation: SlotActivation
             ) -> Gradients:  # fmt: skip
    """Gradients by walks from the end, and what they need of the forward pass made again."""
    recipe = plan.recipe
    gate, again = kept.gates, kept.keys is None
    assert gate is not None
    shots = new_snapshots(plan) if again else (kept.keys, kept.values)
    keys = Side(plan.q, plan.k, 0, initial, kept.starts, None, shots[0] if again else None)
    values = Side(d_output, plan.v, plan.K, initial, kept.starts, None, shots[1] if again else None)
    raw, own = contract(plan, gate, values)
    slices = raw.shape[0]
    weights, own_terms = (
        plan.new(plan.tokens, heads, plan.M, dtype=recipe.operand_dtype)
        for heads in (plan.H, plan.G)
    )
    if plan.K:
        queries, kept_raw, kept_own, d_score = plan.q, kept.raw, kept.own, plan.new_like(weights)
    else:  # the scores are the queries
        queries, kept_raw, kept_own = plan.q[..., :0], plan.q.contiguous(), None
        d_score = plan.new_like(kept_raw)
    read_terms = plan.new(plan.tokens, plan.G, plan.M)
    plan.launch(
        activation.activate_backward_kernel,
        plan.chunks * plan.G,
        (raw, own, kept_raw, kept_own, plan.log_forget, plan.write, gate.steep, weights, d_score,
         read_terms, own_terms, plan.chunk_owners, plan.bounds, plan.T, plan.tokens, scale),
        activation_constants(plan, slices, slot_activation),
    )  # fmt: skip
    d_q = expand(plan, gate, d_score, keys) if plan.K else d_score
    ends = find_starts(plan, gate, (d_score, weights), (queries, d_output), d_final, True)
    d_initial = None if initial is None else plan.new_like(final)
    d_k, d_v, d_lifted, crossing = write_back(
        plan, gate, d_score, weights, keys._replace(snapshots=shots[0], final=final),
        values._replace(snapshots=shots[1]), d_final, ends, d_initial,
    )  # fmt: skip
    d_log_forget = plan.new_like(plan.log_forget)
    d_write = None if plan.write is None else plan.new_like(plan.write)
    block, slices = min(recipe.slots, 32), d_lifted.shape[0]
    plan.launch(
        gates.gate_gradient_kernel,
        plan.spans * plan.G * -(-plan.M // block),
        (plan.log_forget, plan.write, gate.lifted, gate.steep, d_lifted, read_terms, own_terms,
         crossing, d_log_forget, d_write, plan.span_owners, plan.bounds, plan.T, plan.tokens,
         plan.spans),
        gate_gradient_constants(plan, block, slices),
    )  # fmt: skip
    return d_q, d_k, d_v, d_log_forget, d_write, d_initial


def activation_constants(plan: Plan, slices: int, slot_activation: str) -> dict[str, object]:
    own = dict(H=plan.H, SLICES=slices, ACTIVATION=slot_activation, num_warps=8)
    return plan.recipe.common | own


def gate_gradient_constants(plan: Plan, block: int, slices: int) -> dict[str, object]:
    shared = {name: x for name, x in plan.recipe.common.items() if name != "M_PAD"}
    return shared | dict(SPAN=plan.sizes.span, M_BLOCK=block, SLICES=slices, num_warps=4)
