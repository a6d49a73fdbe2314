"""Each kernel against its twin in `chunked.py`, in fp32: on the GPU if there is one, or else
interpreted.

The twin in fp64 is exact, the twin in fp32 the yardstick: a kernel errs at most twice as much. A
kernel is given what the exact twin makes, so that its errors are its own.
"""

from itertools import pairwise

import pytest
import torch
from numerics import cotangents, make_inputs

pytest.importorskip("triton", reason="the kernels need triton: Linux, and the dev extra")

import triton
import triton.language as tl
from kernel_twin import DEVICE, Case, check

from gsa.ops.triton import launch, sizes
from gsa.ops.triton.common import find_span
from gsa.ops.triton.plan import Plan

# numpy, in the interpreter, remarks on what overflows on its way to being left out
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
STEEP = 2 * 480 / 1.4426950408889634
"""A slot that decays more within a chunk, in log f, is beyond factorising."""

CASES = {
    "hot": {"B": 2, "T": 130, "H": 2, "G": 1, "K": 40, "V": 8, "M": 8, "write": True},
    "cold": {
        **{"T": 130, "H": 3, "K": 5, "V": 3, "M": 40, "memory": False},
        **{"slot_activation": "swish", "gate": "near_one"},
    },
    "steep": {
        **{"T": 150, "H": 2, "K": 8, "V": 8, "M": 8, "steep": True},
        "slot_activation": "relu",
    },
    "packed": {
        **{"T": 350, "H": 2, "G": 1, "K": 8, "V": 8, "M": 8, "steep": True, "write": True},
        **{"cu_seqlens": [0, 0, 70, 70, 71, 350], "unit": 256, "slot_activation": "relu2"},
    },
    "segments": {
        **{"B": 2, "T": 330, "H": 1, "K": 8, "V": 8, "M": 8, "unit": 256},
        "slot_activation": "identity",
    },
}


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request):
    return Case(**CASES[request.param])


@pytest.fixture(autouse=True)
def _segments(request, monkeypatch, in_bounds):
    """As long as the case says, whatever T; and no kernel touches what is not its own."""
    monkeypatch.setattr(sizes, "span_tokens", lambda: 256)
    monkeypatch.setattr(sizes, "chunk_tokens", lambda dtype, M: 64)  # as the twin has it
    if "case" in request.fixturenames:
        unit = request.getfixturevalue("case").unit
        monkeypatch.setattr(sizes, "segment_tokens", lambda packed: unit)


def sides(case):
    """Keys and values with room for what is found on the way, and the memory before segments."""
    plan = case.plan
    starts = case.starts() if plan.sizes.segmented else None
    final = torch.full((plan.sequences, plan.G, plan.M, plan.X), torch.nan, device=DEVICE)
    common = (case.on_device("initial_memory"), starts, final)
    shots = launch.new_snapshots(plan)
    q, k, v = (case.on_device(name) for name in "qkv")
    keys = launch.Side(q, k, 0, *common, shots[0])
    return keys, launch.Side(case.d_output.to(DEVICE), v, plan.K, *common, shots[1])


def read_back(case):
    """(d scores, read weights), times `grow`, as kernels take them."""
    return tuple(case.tokens(x * case.grow) for x in (case.exact.d_score, case.exact.weight))


def check_memories(case, side, columns):
    """What a walk left at the ends of sequences and of snapshots within them."""
    check(
        {"final": side.final[..., columns]},
        {"final": case.exact.final[..., columns]},
        {"final": case.ruler.final[..., columns]},
    )
    for span in case.spans(sizes.span_tokens()):
        if not span.ends:
            exact, ruler = (
                {"snapshot": case.after(twin, span)[..., columns]}
                for twin in (case.exact, case.ruler)
            )
            check({"snapshot": side.snapshots[span.border]}, exact, ruler)


def test_prepare_factorises_the_decays_of_a_chunk(case):
    flags = case.by_chunk(case.gate.steep) != 0
    total, plain = case.exact.decay[..., -1, :], ~flags
    assert torch.equal(flags, (total < -STEEP).any(-1))
    assert flags.any() == case.steep
    fade_in, fade_out = case.by_chunk(case.gate.fades).unbind(-2)
    assert torch.equal(fade_in[plain].log2(), fade_in[plain].log2().round()), "powers of two"
    assert torch.equal((fade_in == 1)[plain], (total >= -STEEP / 2)[plain]), "1 where that will do"
    lifted = case.tiles(case.gate.lifted, case.G)
    actual = {
        "faded": (lifted * fade_out[..., None, :])[plain],
        "fade": (fade_in * fade_out)[plain],
        "unlifted": lifted[flags],
    }
    exact, ruler = (
        {"faded": x.faded[plain], "fade": x.fade[plain][..., 0], "unlifted": x.w[flags]}
        for x in (case.exact, case.ruler)
    )
    check(actual, exact, ruler)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_prepare_flags_a_chunk_with_a_write_that_is_not_finite(value):
    case = Case(T=130, H=2, M=3, write=True)
    case.inputs["write"][0, 70, 1, 2] = value
    flags = case.by_chunk(case.gate.steep)
    assert flags[:, 0].tolist() == [[0, 0], [0, 1], [0, 0]]
    lifted = case.tiles(case.gate.lifted, 2)
    assert lifted.isfinite().sum() == lifted.numel() - 1
    given = case.inputs["write"][0, 70, 1]
    assert torch.equal(lifted[1, 0, 1, 6].float().nan_to_num(), given.nan_to_num()), "as it is"


def test_contract_reads_a_number_per_slot(case):
    keys, values = sides(case)
    w = case.exact.w.repeat_interleave(case.H // case.G, 2)
    actual = {}
    for name, side, factor in (("score", keys, case.scale), ("d_weight", values, 1.0)):
        raw, own = (x.sum(0) for x in launch.contract(case.plan, case.gate, side))
        raw, own = (case.tiles(x, case.H).double() for x in (raw, own))
        actual[name] = factor * (case.grow * raw + w * own)
    check(actual, *case.results(*actual))
    check_memories(case, keys, slice(0, case.K))
    check_memories(case, values, slice(case.K, None))


def test_expand_reads_a_number_per_column(case):
    actual = {}
    for name, side, z in zip(("d_q", "output"), sides(case), read_back(case), strict=True):
        out = launch.expand(case.plan, case.gate, z, side)
        actual[name] = case.tiles(out, case.H)
        columns = slice(0, case.K) if name == "d_q" else slice(case.K, None)
        check_memories(case, side, columns)
    check(actual, *case.results(*actual))


def spy(monkeypatch, name):
    """The arguments and the result of every call of a function of `launch`."""
    calls, function = [], getattr(launch, name)

    def spied(*arguments):
        calls.append((arguments, function(*arguments)))
        return calls[-1][1]

    monkeypatch.setattr(launch, name, spied)
    return calls


def test_scores_become_weights_and_what_kernels_leave_becomes_gradients(case, monkeypatch):
    """`activate`, `activate_backward` and `gate_gradient`, as they are launched."""
    expanded, written = spy(monkeypatch, "expand"), spy(monkeypatch, "write_back")
    initial, options = case.on_device("initial_memory"), (case.scale, case.slot_activation)
    _, kept = launch.new_kept(case.plan, memories=False)
    _, final = launch.forward(case.plan, initial, *options, kept)
    d = (case.d_output.to(DEVICE), case.d_final.to(DEVICE))
    gradients = launch.backward(case.plan, initial, final, kept, *d, *options)
    (_, _, weight, _), (_, _, d_score, weight_again, *_) = expanded[0][0], written[0][0]
    assert torch.equal(weight, weight_again)
    actual = {
        "weight": case.tiles(weight, case.H) / case.grow,
        "d_score": case.tiles(d_score, case.H) / case.grow,
    }
    names = ("d_q", "d_k", "d_v", "d_log_forget", "d_write")
    for name, gradient in zip(names, gradients, strict=False):
        if gradient is not None:
            actual[name] = case.tiles(gradient, case.H if name == "d_q" else case.G)
    check(actual, *case.results(*actual))


def test_segments_begin_and_end_with_what_is_carried_to_them(case, monkeypatch):
    """`scan` and `combine`, forward with the memory and backward with its gradient."""
    monkeypatch.setattr(sizes, "segment_tokens", lambda packed: 128)
    monkeypatch.setattr(sizes, "span_tokens", lambda: 128)
    plan, gate, spans = case.new_plan(), case.gate, case.spans(128)
    q, k, v, initial = (case.on_device(name) for name in ("q", "k", "v", "initial_memory"))
    d_output, d_final = case.d_output.to(DEVICE), case.d_final.to(DEVICE)
    starts = launch.find_starts(plan, gate, (gate.lifted,) * 2, (k, v), initial, False)
    ends = launch.find_starts(plan, gate, read_back(case), (q, d_output), d_final, True)
    inner = [span for span in spans if not span.begins]
    outer = [span for span in spans if not span.ends]
    assert len(inner) == len(outer) >= case.B
    actual = {
        "starts": torch.stack([starts[span.number] for span in inner]),
        "ends": torch.stack([ends[span.number] for span in outer]),
    }
    exact, ruler = (
        {
            "starts": torch.stack([twin.starts[span.first, span.row] for span in inner]),
            "ends": torch.stack([twin.d_ends[span.last, span.row] for span in outer]),
        }
        for twin in (case.exact, case.ruler)
    )
    check(actual, exact, ruler)


def test_write_back_finds_the_gradients_of_what_was_written(case):
    """Those of writes and, from what crosses the borders of spans, of gates are half done."""
    plan, gate, (keys, values) = case.plan, case.gate, sides(case)
    spans = case.spans(sizes.span_tokens())
    keys.final.copy_(case.exact.final)
    for span in spans:
        if not span.ends:
            after = case.after(case.exact, span)
            keys.snapshots[span.border] = after[..., : case.K].to(keys.snapshots)
            values.snapshots[span.border] = after[..., case.K :].to(values.snapshots)
    initial = case.on_device("initial_memory")
    d_initial = None if initial is None else torch.full_like(initial, torch.nan)
    ends = case.ends() if plan.sizes.segmented else None
    d_k, d_v, d_lifted, crossing = launch.write_back(
        plan, gate, *read_back(case), keys, values, case.d_final.to(DEVICE), ends, d_initial
    )
    d_lifted = case.tiles(d_lifted.sum(0), case.G) / case.grow[:, :, :: case.H // case.G]
    crossing = crossing.sum(0).cpu()
    actual = {
        "d_k": case.tiles(d_k, case.G),
        "d_v": case.tiles(d_v, case.G),
        "d_write": d_lifted + case.of_own_token(),
        "crossing": torch.stack([crossing[span.number] for span in spans]),
    }
    exact, ruler = case.results("d_k", "d_v", "d_write")
    for found, twin in ((exact, case.exact), (ruler, case.ruler)):
        found["crossing"] = torch.stack([case.crossing(twin, span) for span in spans])
        if d_initial is not None:
            found["d_initial"] = twin.d_initial
    if d_initial is not None:
        actual["d_initial"] = d_initial
    check(actual, exact, ruler)


@triton.jit
def spans_kernel(out, owners, bounds, tokens, LENGTH: tl.constexpr, PACKED: tl.constexpr):
    """out [spans, 5] int64: what `find_span` says of each span."""
    index = tl.program_id(0)
    owner, begin, end, start, stop = find_span(index, owners, bounds, tokens, LENGTH, PACKED)
    tl.store(out + index * 5, owner)
    tl.store(out + index * 5 + 1, begin)
    tl.store(out + index * 5 + 2, end)
    tl.store(out + index * 5 + 3, start)
    tl.store(out + index * 5 + 4, stop)


def spans(length, *, cu_seqlens=None, dtype=torch.int32, **options):
    """Rows (sequence, its first token, its end, first token, end) of all spans of a call."""
    inputs = make_inputs(K=1, V=1, M=1, H=1, dtype=torch.float32, **options)
    cu = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=dtype, device=DEVICE)
    tokens = (inputs[name].to(DEVICE) for name in ("q", "k", "v", "log_forget"))
    plan = Plan(*tokens, None, cu)
    out = torch.full((plan.sizes.spans(length), 5), -1, dtype=torch.int64, device=DEVICE)
    owners = plan.owners(length) if plan.packed else plan.bounds
    spans_kernel[(len(out),)](out, owners, plan.bounds, plan.T, length, plan.packed)
    return out.tolist()


PACKINGS = [
    *([0, 70], [0, 0, 0, 64, 64], [0, 1, 2, 3, 67, 131, 131, 195], [0, 0], [0, 63, 127, 192]),
    [0, *torch.randint(0, 90, (9,), generator=torch.Generator().manual_seed(0)).cumsum(0).tolist()],
]


@pytest.mark.parametrize("length", [64, 128])
@pytest.mark.parametrize("bounds", PACKINGS, ids=str)
def test_every_packed_token_is_in_one_span_of_its_sequence(bounds, length):
    for dtype in (torch.int32, torch.int64):
        rows = spans(length, cu_seqlens=bounds, dtype=dtype, T=bounds[-1])
        owned = []
        for sequence, begin, end, start, stop in rows:
            if start < stop:
                assert [begin, end] == bounds[sequence : sequence + 2]
                assert (start - begin) % length == 0 and stop == min(start + length, end)
                owned += range(start, stop)
        assert owned == list(range(bounds[-1])), "each once, and in order"
        empty = [s for s, (a, b) in enumerate(pairwise(bounds)) if a == b]
        first = {sequence for sequence, begin, _, start, _ in rows if begin == start}
        assert first >= set(empty), "an empty sequence has a span, which leaves its memory"


@pytest.mark.parametrize("T", [0, 1, 64, 65, 130])
def test_every_token_of_a_batch_is_in_one_span_of_its_row(T):
    rows = spans(64, B=3, T=T)
    assert {row[0] for row in rows} == {0, 1, 2}
    owned = [t for *_, start, stop in rows for t in range(start, stop)]
    assert owned == list(range(3 * T))
    assert all(row[1:3] == [row[0] * T, (row[0] + 1) * T] for row in rows)


LIES = {
    "beyond the end": [0, 70, 1000, 300],
    "before the start": [-100, 20, 300],
    "backwards": [0, 200, 100, 300],
    "starts late": [299, 300],
    "ends early": [0, 0, 10],
    "enormous": [0, 2**40, -(2**40), 300],
    "all at the end": [300, 300, 300],
}


@pytest.mark.parametrize("bounds", LIES.values(), ids=LIES.keys())
def test_bounds_that_lie_lead_to_no_access_out_of_bounds(bounds, monkeypatch):
    """On a device they are trusted: results may be anything, the rest of memory is left alone."""
    monkeypatch.setattr(sizes, "segment_tokens", lambda packed: 256)
    for length in (64, 256):
        for _, begin, end, start, stop in spans(
            length, cu_seqlens=bounds, dtype=torch.int64, T=300
        ):
            assert 0 <= begin <= end <= 300 and (start >= stop or begin <= start < stop <= end)
    inputs = make_inputs(T=300, H=1, K=8, V=8, M=8, dtype=torch.float32, memory=len(bounds) - 1)
    d_output, d_final = cotangents(inputs, memories=len(bounds) - 1)
    inputs = {name: x.to(DEVICE) for name, x in inputs.items()}
    initial = inputs.pop("initial_memory")
    plan = Plan(*inputs.values(), None, torch.tensor(bounds, device=DEVICE))
    _, kept = launch.new_kept(plan, memories=True)
    output, final = launch.forward(plan, initial, 1.0, "softmax", kept)
    d = (d_output.to(DEVICE), d_final.to(DEVICE))
    launch.backward(plan, initial, final, kept, *d, 1.0, "softmax")
    assert output.shape == d_output.shape


@triton.jit
def reach_kernel(x, OFFSET: tl.constexpr):
    tl.store(x + OFFSET, tl.load(x))


@pytest.mark.skipif(DEVICE == "cuda", reason="on a device, compute-sanitizer is the guard")
def test_the_guard_sees_an_access_out_of_bounds():
    x = torch.zeros(4)[:2]
    reach_kernel[(1,)](x, OFFSET=1)
    for offset in (2, -1):
        with pytest.raises(triton.runtime.errors.InterpreterError, match="outside of every tensor"):
            reach_kernel[(1,)](x, OFFSET=offset)


def test_a_segment_holds_whole_snapshots_and_a_power_of_two_of_chunks(monkeypatch):
    monkeypatch.undo()
    for dtype, M in ((torch.bfloat16, 256), (torch.float32, 64), (torch.float32, 65)):
        chunk = sizes.chunk_tokens(dtype, M)
        assert sizes.span_tokens() % chunk == 0
        for packed in (False, True):
            unit = sizes.segment_tokens(packed)
            assert unit % sizes.span_tokens() == 0
            chunks = unit // chunk
            assert chunks & (chunks - 1) == 0
