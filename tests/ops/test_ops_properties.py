"""What must hold whatever the numbers: symmetry, bounds, causality, independence."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_bit_equal, assert_same, cotangents, evaluate, make_inputs

from gsa.ops import SLOT_ACTIVATIONS, gated_slot_attention


@pytest.mark.parametrize("slot_activation", SLOT_ACTIVATIONS)
def test_slots_have_no_order(impl, slot_activation):
    inputs = make_inputs(T=100, H=4, G=2, M=6, gate="mixed", write=True, memory=1)
    d = cotangents(inputs)
    plain = evaluate(gated_slot_attention, inputs, d, slot_activation=slot_activation, impl=impl)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    mixed = dict(inputs)
    for name in ("log_forget", "write"):
        mixed[name] = inputs[name][..., order]
    mixed["initial_memory"] = inputs["initial_memory"][:, :, order]
    d = (d[0], d[1][:, :, order])
    moved = evaluate(gated_slot_attention, mixed, d, slot_activation=slot_activation, impl=impl)
    for name in ("log_forget", "write"):
        plain[f"d_{name}"] = plain[f"d_{name}"][..., order]
    for name in ("memory", "d_initial_memory"):
        plain[name] = plain[name][:, :, order]
    assert_same(moved, plain, mixed, d, slot_activation=slot_activation)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", ["usual", "near_one", "mixed", "steep"])
def test_outputs_are_bounded_by_the_values(impl, dtype, gate):
    """Each slot is a convex mixture of past values (and zero), softmax one of slots."""
    inputs = make_inputs(B=2, T=200, H=4, G=2, dtype=dtype, gate=gate)
    inputs["v"][..., 0] = 1.0  # the tightest case: a coordinate that never changes
    output = gated_slot_attention(**inputs, scale=3.0, impl=impl).output
    so_far = inputs["v"].abs().double().cummax(1).values.repeat_interleave(2, 2)
    bound = so_far * (1 + 8 * torch.finfo(dtype).eps)
    assert (output.double().abs() <= bound).all()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), T=st.integers(1, 140), M=st.integers(1, 9))
def test_bound_for_any_size(seed, T, M):
    inputs = make_inputs(T=T, M=M, dtype=torch.float32, gate="mixed", seed=seed)
    output = gated_slot_attention(**inputs, impl="chunked").output
    bound = inputs["v"].abs().amax(1, keepdim=True) * (1 + 8 * torch.finfo(torch.float32).eps)
    assert (output.abs() <= bound).all()


CUTS = [1, 40, 64, 65, 100, 149]


def poisoned(inputs, cut, names, value=None):
    """The inputs with everything from token `cut` on replaced."""
    rng = torch.Generator().manual_seed(9)
    changed = {name: x.clone() for name, x in inputs.items()}
    for name in names:
        future = changed[name][:, cut:]
        noise = torch.rand(future.shape, generator=rng, dtype=torch.float64) * 2
        noise = -noise if name == "log_forget" else noise
        future.copy_(noise if value is None else torch.full_like(noise, value))
    return changed


def assert_same_past(after, before, inputs, cut):
    """The outputs before a cut, which a sequence that ends there has too."""
    past = {n: x if n == "initial_memory" else x[:, :cut] for n, x in inputs.items()}
    assert_same({"output": after[:, :cut]}, {"output": before[:, :cut]}, past)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("cut", CUTS)
def test_the_future_changes_nothing(impl, cut, dtype):
    inputs = make_inputs(T=150, H=4, G=2, dtype=dtype, write=True, memory=1)
    before = gated_slot_attention(**inputs, impl=impl).output
    changed = poisoned(inputs, cut, ("q", "k", "v", "log_forget", "write"))
    after = gated_slot_attention(**changed, impl=impl).output
    assert torch.equal(after[:, :cut], before[:, :cut])
    assert not torch.equal(after[:, cut:], before[:, cut:])


@pytest.mark.parametrize("cut", CUTS)
def test_an_extreme_future_stays_within_rounding(impl, cut):
    """A future that decays so fast that its chunk is computed another way: the past may be rounded
    differently, no more."""
    inputs = make_inputs(T=150, H=4, G=2, write=True, memory=1)
    before = gated_slot_attention(**inputs, impl=impl).output
    changed = poisoned(inputs, cut, ("log_forget",), -1e4)
    after = gated_slot_attention(**changed, impl=impl).output
    assert_same_past(after, before, inputs, cut)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "write"])
@pytest.mark.parametrize("cut", CUTS)
def test_nan_in_the_future_stays_there(impl, cut, name, value):
    """0 x NaN is NaN: masking a product is not enough."""
    inputs = make_inputs(T=150, H=4, G=2, write=True, memory=1)
    before = gated_slot_attention(**inputs, impl=impl).output
    after = gated_slot_attention(**poisoned(inputs, cut, (name,), value), impl=impl).output
    leaked = (~torch.isfinite(after[0, :cut])).any(-1).any(-1).nonzero().flatten().tolist()
    assert not leaked, f"tokens {leaked} before {cut}"
    assert_same_past(after, before, inputs, cut)


def test_gradients_never_flow_back_from_the_past(impl):
    """Tokens after the last output that is used get exactly zero gradient."""
    inputs = make_inputs(T=150, H=4, G=2, write=True, memory=1)
    d_output, d_memory = cotangents(inputs)
    d_output[:, 90:] = 0
    got = evaluate(gated_slot_attention, inputs, (d_output, d_memory * 0), impl=impl)
    for name in ("q", "k", "v", "log_forget", "write"):
        assert not got[f"d_{name}"][:, 90:].any(), name
        assert got[f"d_{name}"][:, :90].any(), name


@pytest.mark.parametrize("gate", ["usual", "mixed"])
def test_rows_of_a_batch_are_independent(impl, gate):
    inputs = make_inputs(B=3, T=130, H=4, G=2, gate=gate, write=True, memory=3)
    d = cotangents(inputs)
    together = evaluate(gated_slot_attention, inputs, d, impl=impl)
    for b in range(3):
        row, mine = ({n: x[b : b + 1] for n, x in many.items()} for many in (inputs, together))
        row_d = (d[0][b : b + 1], d[1][b : b + 1])
        alone = evaluate(gated_slot_attention, row, row_d, impl=impl)
        assert_same(alone, mine, row, row_d)


def test_nan_in_one_row_stays_there(impl):
    inputs = make_inputs(B=3, T=130, H=4, G=2, memory=3)
    clean = evaluate(gated_slot_attention, inputs, cotangents(inputs), impl=impl)
    for name in ("q", "k", "v"):
        inputs[name][1] = torch.nan
    got = evaluate(gated_slot_attention, inputs, cotangents(inputs), impl=impl)
    for name, x in got.items():
        assert torch.equal(x[[0, 2]], clean[name][[0, 2]]), name


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_heads_equal_repeated_ones(impl, groups):
    """H query heads on G memories give what H separate memories would; memory gradients add up."""
    inputs = make_inputs(T=70, H=12, G=groups, write=True, memory=1)
    d_output, d_memory = cotangents(inputs)
    share = 12 // groups
    grouped = evaluate(gated_slot_attention, inputs, (d_output, d_memory * 0), impl=impl)
    wide = {
        name: x if name == "q" else x.repeat_interleave(share, 1 if name == "initial_memory" else 2)
        for name, x in inputs.items()
    }
    zero = d_memory.new_zeros(1, 12, *d_memory.shape[2:])
    repeated = evaluate(gated_slot_attention, wide, (d_output, zero), impl=impl)
    repeated["memory"] = repeated["memory"][:, ::share]
    for name in ("k", "v", "log_forget", "write"):
        repeated[f"d_{name}"] = repeated[f"d_{name}"].unflatten(2, (groups, share)).sum(3)
    d_start = repeated["d_initial_memory"].unflatten(1, (groups, share))
    repeated["d_initial_memory"] = d_start.sum(2)
    assert_same(grouped, repeated, inputs, (d_output, d_memory * 0))


def test_padding_that_keeps_and_writes_nothing_is_invisible(impl):
    """log_forget = 0 and write = 0 at a token: the memory passes through, whatever k, v hold."""
    inputs = make_inputs(T=100, H=4, G=2, write=True, memory=1)
    real = torch.ones(130, dtype=torch.bool)
    real[:10] = real[50:65] = real[125:] = False
    padded = {"initial_memory": inputs["initial_memory"]}
    for name in ("q", "k", "v", "log_forget", "write"):
        x = inputs[name]
        fill = 0.0 if name in ("log_forget", "write") else 1e3
        padded[name] = x.new_full((1, 130, *x.shape[2:]), fill)
        padded[name][:, real] = x
    expected = gated_slot_attention(**inputs, impl=impl)
    got = gated_slot_attention(**padded, impl=impl)
    actual = {"output": got.output[:, real], "memory": got.memory}
    assert_same(actual, expected._asdict(), inputs)


def test_auto_is_one_of_the_named_ones():
    inputs = make_inputs(T=130, memory=1)
    d = cotangents(inputs)
    auto = evaluate(gated_slot_attention, inputs, d)
    named = [evaluate(gated_slot_attention, inputs, d, impl=i) for i in ("reference", "chunked")]
    assert any(all(torch.equal(auto[n], run[n]) for n in auto) for run in named)
    assert_bit_equal(auto, named[1])
