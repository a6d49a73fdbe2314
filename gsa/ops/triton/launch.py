"""From tensors to kernels: the order of the launches."""

# Triton's types do not describe what may stand in a kernel or be passed to one.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportReturnType=false

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gsa.ops.triton import activation, gates, read, write
from gsa.ops.triton.plan import Plan, all_or_none, token_rows
from gsa.ops.triton.sizes import CHUNK, SNAPSHOT
from gsa.ops.types import SlotActivation


class Gates(NamedTuple):
    """What `prepare_kernel` makes of log f and w."""

    lifted: Tensor
    fades: Tensor
    steep: Tensor


def prepare(plan: Plan) -> Gates:
    """Decays of all chunks."""
    G, M = plan.G, plan.M
    lifted = plan.q.new_empty((plan.tokens, G, M), dtype=plan.operand_dtype)
    fades = plan.q.new_empty((plan.chunks, G, 2, M), dtype=torch.float32)
    steep = plan.q.new_empty((plan.chunks, G), dtype=torch.int32)
    gates.prepare_kernel[(plan.chunks * G,)](
        plan.log_forget, plan.write, lifted, fades, steep, plan.chunk_owners, plan.bounds, plan.T,
        M_PAD=plan.slots, **plan.gate, num_warps=4,
    )  # fmt: skip
    return Gates(lifted, fades, steep)


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
                outer: Tensor | None, backward: bool) -> Tensor | None:  # fmt: skip
    """Memories before (backward: their gradients after) every segment, [units, G, M, X].

    writes: what is written with keys and with values, [tokens, heads, M]. read: keys and values,
    or queries and d output. None where no sequence can have two segments.
    """
    if not plan.sizes.segmented:
        return None
    local = plan.q.new_empty((plan.units, plan.G, plan.M, plan.X), dtype=torch.float32)
    decays = plan.q.new_empty((plan.units, plan.G, plan.M), dtype=torch.float32)
    for u, y, column in zip(writes, read, (0, plan.K), strict=True):
        heads, width = y.shape[2:]
        y, stride = token_rows(y)
        options = plan.walk("scan", width, column)
        tiles = all_or_none(
            plan.tiles(u, heads, plan.M, heads * plan.M, options["M_PAD"]),
            plan.tiles(y, heads, width, stride, options["BLOCK"]),
        )
        grid = (plan.units * plan.G * triton.cdiv(width, options["BLOCK"]),)
        write.scan_kernel[grid](
            u, y, plan.log_forget, gate.fades, gate.steep, local, decays, *tiles, plan.unit_owners,
            plan.bounds, plan.T, stride, R=heads // plan.G, BACKWARD=backward, **options,
        )  # fmt: skip
    block = 256
    grid = (plan.sequences * plan.G * triton.cdiv(plan.M * plan.X, block),)
    write.combine_kernel[grid](
        outer, local, decays, plan.bounds, plan.T, G=plan.G, M=plan.M, X=plan.X, UNIT=plan.unit,
        BLOCK=block, BACKWARD=backward, PACKED=plan.packed,
    )  # fmt: skip
    return local


def contract(plan: Plan, gate: Gates, side: Side) -> tuple[Tensor, Tensor]:
    """(raw, own) of `contract_kernel`, in slices."""
    H, G, M, width = plan.H, plan.G, plan.M, side.y.shape[3]
    (x, x_stride), (y, y_stride) = token_rows(side.x), token_rows(side.y)
    options = plan.walk("contract", width, side.column)
    slices = triton.cdiv(width, options["BLOCK"])
    raw = plan.q.new_empty((slices, plan.tokens, H, M), dtype=torch.float32)
    own = plan.q.new_empty((slices, plan.tokens, H), dtype=torch.float32)
    tiles = all_or_none(
        plan.tiles(x, H, width, x_stride, options["BLOCK"]),
        plan.tiles(y, G, width, y_stride, options["BLOCK"]),
        plan.tiles(gate.lifted, G, M, G * M, options["M_PAD"]),
        plan.tiles(raw, H, M, H * M, options["M_PAD"], slices),
    )
    shot = plan.snapshot_tiles(side.snapshots, options)
    read.contract_kernel[(plan.units * H * slices,)](
        x, y, gate.lifted, plan.log_forget, gate.fades, gate.steep, side.initial, side.starts,
        side.final, side.snapshots, raw, own, *tiles, shot, plan.unit_owners, plan.bounds, plan.T,
        plan.B, x_stride, y_stride, H=H, SNAPSHOT=SNAPSHOT, FACTOR=plan.factor, **options,
    )  # fmt: skip
    return raw, own


def expand(plan: Plan, gate: Gates, z: Tensor, side: Side) -> Tensor:
    """The result of `expand_kernel`: [B, T, H, width] in q's dtype."""
    H, G, M, width = plan.H, plan.G, plan.M, side.y.shape[3]
    y, y_stride = token_rows(side.y)
    options = plan.walk("expand", width, side.column)
    out = plan.q.new_empty((plan.B, plan.T, H, width))
    tiles = all_or_none(
        plan.tiles(z, H, M, H * M, options["M_PAD"]),
        plan.tiles(y, G, width, y_stride, options["BLOCK"]),
        plan.tiles(gate.lifted, G, M, G * M, options["M_PAD"]),
        plan.tiles(out, H, width, H * width, options["BLOCK"]),
    )
    shot = plan.snapshot_tiles(side.snapshots, options)
    read.expand_kernel[(plan.units * H * triton.cdiv(width, options["BLOCK"]),)](
        z, y, gate.lifted, plan.log_forget, gate.fades, gate.steep, side.initial, side.starts,
        side.final, side.snapshots, out, *tiles, shot, plan.unit_owners, plan.bounds, plan.T,
        y_stride, H=H, SNAPSHOT=SNAPSHOT, **options,
    )  # fmt: skip
    return out


def write_back_side(plan: Plan, name: str, z: Tensor, side: Side, d_lifted: Tensor,
                    crossing: Tensor) -> tuple[dict[str, Any], Tensor]:  # fmt: skip
    """What `write_back_kernel` wants to know of its `name` side, and the gradient of side.y."""
    H, G, M, width = plan.H, plan.G, plan.M, side.y.shape[3]
    (x, x_stride), (y, y_stride) = token_rows(side.x), token_rows(side.y)
    block = plan.tile("write_back", width).block
    d_y = plan.q.new_empty((plan.B, plan.T, G, width))
    tiles = all_or_none(
        plan.tiles(z, H, M, H * M, plan.slots),
        plan.tiles(x, H, width, x_stride, block),
        plan.tiles(y, G, width, y_stride, block),
        plan.tiles(d_y, G, width, G * width, block),
        plan.tiles(d_lifted, G, M, G * M, plan.slots, d_lifted.shape[0]),
    )
    names = ("z_tiles", "x_tiles", "y_tiles", "d_y_tiles", "d_lifted_tiles")
    arguments = dict(
        z=z, x=x, y=y, d_y=d_y, snapshots=side.snapshots, d_lifted=d_lifted, crossing=crossing,
        x_stride=x_stride, y_stride=y_stride, **dict(zip(names, tiles, strict=True)),
    )  # fmt: skip
    return {f"{name}_{key}": value for key, value in arguments.items()}, d_y


def write_back(plan: Plan, gate: Gates, d_score: Tensor, weights: Tensor, keys: Side, values: Side,
               d_final: Tensor | None, ends: Tensor | None, d_initial: Tensor | None
               ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(d_k, d_v, d_lifted [slices, tokens, G, M], crossing [slices, spans, G, M])."""
    tiles = [plan.tile("write_back", width) for width in (plan.K, plan.V)]
    parts = [triton.cdiv(w, tile.block) for w, tile in zip((plan.K, plan.V), tiles, strict=True)]
    shape = (sum(parts), plan.tokens, plan.G, plan.M)
    d_lifted = plan.q.new_empty(shape, dtype=torch.float32)
    crossing = plan.q.new_empty((shape[0], plan.spans, *shape[2:]), dtype=torch.float32)
    rooms = (d_lifted.split(parts), crossing.split(parts))
    key_arguments, d_k = write_back_side(plan, "key", d_score, keys, rooms[0][0], rooms[1][0])
    value_arguments, d_v = write_back_side(plan, "value", weights, values, rooms[0][1], rooms[1][1])
    programs = [plan.units * plan.G * part for part in parts]
    # None exactly where z, of the same width, has no descriptor either.
    lifted_tiles = plan.tiles(gate.lifted, plan.G, plan.M, plan.G * plan.M, plan.slots)
    write.write_back_kernel[(sum(programs),)](
        **key_arguments, **value_arguments, lifted=gate.lifted, log_forget=plan.log_forget,
        fades=gate.fades, steep_flags=gate.steep, d_final=d_final, ends=ends, d_initial=d_initial,
        final=keys.final, lifted_tiles=lifted_tiles, owners=plan.unit_owners, bounds=plan.bounds,
        tokens=plan.T, batch=plan.B, spans=plan.spans, value_programs=programs[1], H=plan.H,
        G=plan.G, M=plan.M, K=plan.K, V=plan.V, C=CHUNK, UNIT=plan.unit, SNAPSHOT=SNAPSHOT,
        M_PAD=plan.slots, KEY_BLOCK=tiles[0].block, VALUE_BLOCK=tiles[1].block,
        FACTOR=plan.factor, OPERAND=plan.operand, PRECISION=plan.precision, PACKED=plan.packed,
        WIDE=plan.wide, num_warps=tiles[0].warps, num_stages=min(tile.stages for tile in tiles),
    )  # fmt: skip
    return d_k, d_v, d_lifted, crossing


def new_snapshots(plan: Plan) -> tuple[Tensor | None, Tensor | None]:
    """Room for the keys and the values of the memory at every SNAPSHOT tokens within a sequence."""
    if plan.sizes.borders == 0:
        return None, None
    keys, values = (
        plan.q.new_empty((plan.sizes.borders, plan.G, plan.M, width), dtype=plan.operand_dtype)
        for width in (plan.K, plan.V)
    )
    return keys, values


class Kept(NamedTuple):
    """What the backward pass needs beside inputs and results."""

    raw: Tensor  # [tokens, H, M] fp32: scores against other tokens, without `grow`
    own: Tensor  # [tokens, H] fp32: q · k of each token
    gates: Gates
    starts: Tensor | None  # [units, G, M, X] fp32; None if every sequence is one segment
    keys: Tensor | None  # [borders, G, M, K], snapshots; None if they are to be made again
    values: Tensor | None  # [borders, G, M, V]


def forward(plan: Plan, initial: Tensor | None, scale: float, slot_activation: SlotActivation,
            keep: bool, keep_memories: bool) -> tuple[Tensor, Tensor, Kept | None]:  # fmt: skip
    """(output, final memory, what to keep)."""
    gate = prepare(plan)
    starts = find_starts(plan, gate, (gate.lifted, gate.lifted), (plan.k, plan.v), initial, False)
    final = plan.q.new_empty((plan.sequences, plan.G, plan.M, plan.X), dtype=torch.float32)
    shots = new_snapshots(plan) if keep and keep_memories else (None, None)
    keys = Side(plan.q, plan.k, 0, initial, starts, final, shots[0])
    values = Side(plan.q, plan.v, plan.K, initial, starts, final, shots[1])
    raw, own = contract(plan, gate, keys)
    weights = plan.q.new_empty((plan.tokens, plan.H, plan.M), dtype=plan.operand_dtype)
    kept_raw = torch.empty_like(raw[0]) if keep else None
    kept_own = torch.empty_like(own[0]) if keep else None
    activation.activate_kernel[(plan.chunks * plan.G,)](
        raw, own, plan.log_forget, plan.write, gate.steep, weights, kept_raw, kept_own,
        plan.chunk_owners, plan.bounds, plan.T, plan.tokens, scale, H=plan.H, SLICES=raw.shape[0],
        ACTIVATION=slot_activation, M_PAD=plan.slots, **plan.gate, num_warps=8,
    )  # fmt: skip
    del raw, own
    output = expand(plan, gate, weights, values)
    if kept_raw is None or kept_own is None:
        return output, final, None
    return output, final, Kept(kept_raw, kept_own, gate, starts, *shots)


def backward(plan: Plan, initial: Tensor | None, final: Tensor, kept: Kept, d_output: Tensor,
             d_final: Tensor | None, scale: float, slot_activation: SlotActivation
             ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v, log_forget, write, initial."""
    gate = kept.gates
    again = kept.keys is None
    shots = new_snapshots(plan) if again else (kept.keys, kept.values)
    keys = Side(plan.q, plan.k, 0, initial, kept.starts, None, shots[0] if again else None)
    values = Side(d_output, plan.v, plan.K, initial, kept.starts, None, shots[1] if again else None)
    raw, own = contract(plan, gate, values)
    weights = plan.q.new_empty((plan.tokens, plan.H, plan.M), dtype=plan.operand_dtype)
    d_score = torch.empty_like(weights)
    read_terms = plan.q.new_empty((plan.tokens, plan.G, plan.M), dtype=torch.float32)
    own_terms = torch.empty_like(read_terms)
    activation.activate_backward_kernel[(plan.chunks * plan.G,)](
        raw, own, kept.raw, kept.own, plan.log_forget, plan.write, gate.steep, weights, d_score,
        read_terms, own_terms, plan.chunk_owners, plan.bounds, plan.T, plan.tokens, scale,
        H=plan.H, SLICES=raw.shape[0], ACTIVATION=slot_activation, M_PAD=plan.slots, **plan.gate,
        num_warps=8,
    )  # fmt: skip
    del raw, own
    d_q = expand(plan, gate, d_score, keys)
    ends = find_starts(plan, gate, (d_score, weights), (plan.q, d_output), d_final, True)
    d_initial = None if initial is None else torch.empty_like(final)
    d_k, d_v, d_lifted, crossing = write_back(
        plan, gate, d_score, weights, keys._replace(snapshots=shots[0], final=final),
        values._replace(snapshots=shots[1], final=final), d_final, ends, d_initial,
    )  # fmt: skip
    d_log_forget = torch.empty_like(plan.log_forget)
    d_write = None if plan.write is None else torch.empty_like(plan.write)
    block = min(plan.slots, 32)
    gates.gate_gradient_kernel[(plan.spans * plan.G * triton.cdiv(plan.M, block),)](
        plan.log_forget, plan.write, gate.lifted, gate.steep, d_lifted, read_terms, own_terms,
        crossing, d_log_forget, d_write, plan.span_owners, plan.bounds, plan.T, plan.tokens,
        plan.spans, SPAN=SNAPSHOT, SLICES=d_lifted.shape[0], M_BLOCK=block, **plan.gate,
        num_warps=4,
    )  # fmt: skip
    return d_q, d_k, d_v, d_log_forget, d_write, d_initial
