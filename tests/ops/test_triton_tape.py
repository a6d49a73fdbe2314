"""Calls that are noted down once and played: memory, addresses, and who launches them."""

import threading
from functools import partial
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import HOME, assert_bit_equal, cotangents, evaluate, make_inputs

pytest.importorskip("triton", reason="the kernels need triton: Linux, and the dev extra")

from triton.runtime._async_compile import active_mode

from gsa.ops import gated_slot_attention
from gsa.ops.triton import cuda, launch, run
from gsa.ops.triton.plan import Plan
from gsa.ops.triton.program import compile_all
from gsa.ops.triton.tape import Recorder, arrange

pytestmark = pytest.mark.usefixtures("kernels")
attention = partial(gated_slot_attention, impl="triton")

blocks = st.dictionaries(st.integers(0, 9), st.integers(0, 3000))
launches = st.lists(st.sets(st.integers(0, 12)), max_size=8)


@given(blocks, launches)
@settings(max_examples=200, deadline=None)
def test_blocks_that_are_needed_together_do_not_overlap(sizes, uses):
    offsets, total = arrange(sizes, uses)
    assert offsets.keys() == sizes.keys() & set().union(*uses)
    times = {key: [i for i, keys in enumerate(uses) if key in keys] for key in offsets}
    for key, offset in offsets.items():
        assert offset % 256 == 0 and offset + sizes[key] <= total
    for a, b in combinations(offsets, 2):
        together = times[a][0] <= times[b][-1] and times[b][0] <= times[a][-1]
        apart = offsets[a] + sizes[a] <= offsets[b] or offsets[b] + sizes[b] <= offsets[a]
        assert apart or not together or 0 in (sizes[a], sizes[b])


def test_memory_is_used_again():
    """A block that is read no more makes room for those of later launches."""
    offsets, total = arrange({1: 512, 2: 512, 3: 1000}, [{1}, {1, 2}, {2, 3}, {3}])
    assert offsets[1] == offsets[3] == 0, "never needed at the same time"
    assert offsets[2] == 1024 and total == 1024 + 512


def test_a_copy_that_would_not_be_made_again_is_refused():
    """What is played is launches alone: a sketch that copies an input by torch is wrong."""
    machine = Recorder(torch.device(HOME.device))
    form = ((1, 4, 1, 8), (32, 1, 4, 4), torch.float32)
    q, k, v, log_forget = (machine.input(form) for _ in range(4))
    plan = Plan(q, k, v, log_forget.contiguous(), None, None, machine)
    with pytest.raises(AssertionError, match="a hidden copy"):
        launch.prepare(plan)


@pytest.mark.parametrize("packed", [False, True])
def test_where_inputs_lie_changes_nothing(packed):
    """Off every boundary, transposed, or the same tensor twice: in turns, by the same tapes."""
    inputs = make_inputs(T=70, H=2, G=1, K=8, V=8, M=8, write=True, memory=2 if packed else 1)
    options = {"cu_seqlens": torch.tensor([0, 5, 70], device=HOME.device)} if packed else {}
    d = cotangents(inputs, memories=2 if packed else None)
    expected = evaluate(attention, inputs, d, **options)

    def elsewhere(x):
        room = torch.full((x.numel() + 1,), 7.0, dtype=x.dtype, device=x.device)
        return room[1:].view(x.shape).copy_(x)

    def across(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    for move in (elsewhere, across):
        moved = {name: move(x) for name, x in inputs.items()}
        assert_bit_equal(evaluate(attention, moved, tuple(map(move, d)), **options), expected)
        assert_bit_equal(evaluate(attention, inputs, d, **options), expected)
    one = inputs | {"v": inputs["k"]}
    two = inputs | {"v": inputs["k"].clone()}
    assert_bit_equal(evaluate(attention, one, d, **options), evaluate(attention, two, d, **options))


def test_another_scale_is_another_call():
    inputs = make_inputs(T=5, H=1, K=8, V=8, M=8)
    first, second = (attention(**inputs, scale=scale).output for scale in (1.0, 0.5))
    assert not torch.equal(first, second)
    assert torch.equal(attention(**inputs, scale=1.0).output, first)


BIG = {"B": 2, "T": 300, "H": 8, "G": 2, "K": 128, "V": 128, "M": 64}
SMALL = {"B": 2, "T": 300, "H": 2, "G": 1, "K": 16, "V": 16, "M": 16}  # compiled in seconds


def forget_tapes():
    run.forward_tape.cache_clear()
    run.backward_tape.cache_clear()


class Broken:
    """A kernel that does not compile: hands Triton's mode a job, as a kernel does."""

    def warmup(self, grid):
        def fail():
            raise ValueError("no such instruction")

        return active_mode.get().submit("broken", fail, lambda kernel: None)


def test_what_does_not_compile_does_no_harm_to_what_does():
    """The error is told every time, and no mode of Triton's is left on."""
    for _ in range(2):
        with pytest.raises(ValueError, match="no such instruction"):
            compile_all([(Broken(), (), {})], torch.device("cpu"))
    assert active_mode.get() is None


@pytest.mark.gpu
def test_a_call_that_was_interrupted_leaves_no_address_behind(monkeypatch):
    inputs, other = (make_inputs(**BIG, dtype=torch.bfloat16, seed=i) for i in range(2))
    forget_tapes()
    expected = [attention(**x).output for x in (inputs, other)]
    replace, times = cuda.replace_address, []

    def interrupted(*x):
        times.append(x)
        if len(times) == 3:
            raise KeyboardInterrupt
        replace(*x)

    with monkeypatch.context() as patch:
        patch.setattr(cuda, "replace_address", interrupted)
        with pytest.raises(KeyboardInterrupt):
            attention(**inputs)
    for x, wanted in zip((other, inputs), (expected[1], expected[0]), strict=True):
        assert torch.equal(attention(**x).output, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_driver_launches_what_triton_would(dtype, monkeypatch):
    """Bit for bit, with addresses that change from call to call; and the driver it is."""
    made, by_triton = [], cuda.ByTriton
    monkeypatch.setattr(cuda, "ByTriton", lambda *x: made.append(x) or by_triton(*x))
    forget_tapes()
    sizes = BIG if dtype == torch.bfloat16 else SMALL
    inputs = make_inputs(**sizes, dtype=dtype, memory=2)
    d = cotangents(inputs)
    first = evaluate(attention, inputs, d)
    for _ in range(3):
        again = {name: x.clone() for name, x in inputs.items()}
        held = torch.empty(1 << 20, device="cuda")  # so that later results lie elsewhere
        assert_bit_equal(evaluate(attention, again, d), first)
        del held
    assert not made, "parameters are not where they are thought to be"


@pytest.mark.gpu
def test_tritons_launcher_does_the_same(monkeypatch):
    inputs = make_inputs(**BIG, dtype=torch.bfloat16, memory=2)
    d = cotangents(inputs)
    forget_tapes()
    expected = evaluate(attention, inputs, d)

    def unknown(*_):
        raise cuda.Unknown

    monkeypatch.setattr(cuda, "Launches", unknown)
    forget_tapes()
    assert_bit_equal(evaluate(attention, inputs, d), expected)
    forget_tapes()


@pytest.mark.gpu
def test_threads_share_a_tape():
    """Each on a stream of its own, with its own numbers."""
    inputs = [make_inputs(**BIG, dtype=torch.bfloat16, seed=i) for i in range(4)]
    expected = [attention(**x).output for x in inputs]
    torch.cuda.synchronize()
    wrong = []

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [attention(**inputs[i]).output for _ in range(50)]
            torch.cuda.current_stream().synchronize()
        wrong.extend(i for x in found if not torch.equal(x, expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.gpu
def test_a_captured_call_is_replayed_with_what_its_inputs_hold_then():
    inputs, other = (make_inputs(**BIG, dtype=torch.bfloat16, seed=i) for i in range(2))
    expected = attention(**other).output
    attention(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention(**inputs).output
    attention(**other)  # the tape's parameters are others by now
    for name, x in inputs.items():
        x.copy_(other[name])
    graph.replay()
    assert torch.equal(captured, expected)
