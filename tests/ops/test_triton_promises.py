"""What the operator by Triton kernels promises beside its numbers, at sizes for the interpreter."""

from functools import partial

import pytest
import torch
from numerics import (
    HOME,
    assert_bit_equal,
    assert_same,
    assert_within_budget,
    cotangents,
    evaluate,
    leaves,
    make_inputs,
    oracle,
    yardstick,
)

pytest.importorskip("triton", reason="the kernels need triton: Linux, and the dev extra")

from gsa.ops import gated_slot_attention

# numpy, in the interpreter, remarks on the NaN that some of these tests hand out
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("kernels"),
]
attention = partial(gated_slot_attention, impl="triton")
HOT, COLD = {"K": 8, "V": 16, "M": 8}, {"K": 5, "V": 3, "M": 3}
PATHS = pytest.mark.parametrize("path", [HOT, COLD], ids=["hot", "cold"])
TOKENWISE = ("q", "k", "v", "log_forget", "write")


def packing(*bounds, dtype=torch.int32):
    return torch.tensor(bounds, device=HOME.device, dtype=dtype)


def with_future(inputs, cut, name, value):
    """The inputs with one of them replaced from token `cut` on."""
    changed = {**inputs, name: inputs[name].clone()}
    changed[name][:, cut:] = value
    return changed


def past(inputs, cut):
    return {name: x[:, :cut] if name in TOKENWISE else x for name, x in inputs.items()}


@PATHS
@pytest.mark.parametrize(
    "name, value",
    [("q", torch.nan), ("k", torch.inf), ("v", torch.nan), ("v", torch.inf), ("write", torch.inf)],
)
def test_nan_in_the_future_stays_there(path, name, value):
    """0 x NaN is NaN: masking a product is not enough."""
    inputs = make_inputs(T=70, H=1, **path, write=True, memory=1)
    before = attention(**inputs).output
    for cut in (40, 64):
        after = attention(**with_future(inputs, cut, name, value)).output
        assert torch.isfinite(after[:, :cut]).all()
        if name in ("v", "write"):  # its chunk is computed another way
            results = ({"output": x[:, :cut]} for x in (after, before))
            assert_same(*results, past(inputs, cut))
        else:
            assert torch.equal(after[:, :cut], before[:, :cut])
        assert after[:, cut:].isnan().any()


@PATHS
def test_packed_nan_in_the_future_stays_there_too(path):
    """In the last, ragged chunk of a sequence."""
    inputs = make_inputs(T=110, H=1, **path)
    options = {"cu_seqlens": packing(0, 70, 110)}
    before = attention(**inputs, **options).output
    after = attention(**with_future(inputs, 67, "v", torch.nan), **options).output
    assert after[:, 67:].isnan().all()
    assert_same({"output": after[:, :67]}, {"output": before[:, :67]}, past(inputs, 67))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("cut", [1, 40, 100])
def test_the_future_changes_no_bit(dtype, cut):
    """Nor do future decays that ask for a shift."""
    inputs = make_inputs(T=128, H=2, G=1, **COLD, dtype=dtype, write=True, memory=1)
    before = attention(**inputs).output
    for name, x in make_inputs(T=128, H=2, G=1, **COLD, dtype=dtype, write=True, seed=1).items():
        inputs[name][:, cut:] = x[:, cut:] * (2 if name == "log_forget" else 1)
    after = attention(**inputs).output
    assert torch.equal(after[:, :cut], before[:, :cut])
    assert not torch.equal(after[:, cut:], before[:, cut:])


@pytest.mark.parametrize("cut", [1, 40])
def test_an_extreme_future_stays_within_rounding(cut):
    inputs = make_inputs(T=64, H=2, G=1, **HOT, write=True, memory=1)
    before = attention(**inputs).output
    after = attention(**with_future(inputs, cut, "log_forget", -1e4)).output
    assert_same({"output": after[:, :cut]}, {"output": before[:, :cut]}, past(inputs, cut))


@PATHS
def test_gradients_never_flow_back_from_the_past(path):
    """Tokens after the last output that is used get exactly zero gradient."""
    inputs = make_inputs(T=130, H=2, G=1, **path, write=True, memory=1)
    d_output, d_memory = cotangents(inputs)
    d_output[:, 90:] = 0
    got = evaluate(attention, inputs, (d_output, d_memory * 0))
    for name in TOKENWISE:
        assert not got[f"d_{name}"][:, 90:].any(), name
        assert got[f"d_{name}"][:, :90].any(), name


@PATHS
@pytest.mark.parametrize("packed", [False, True])
def test_nan_in_one_row_or_sequence_stays_there(path, packed):
    inputs = make_inputs(B=1 if packed else 3, T=20, H=1, **path, memory=3)
    d = cotangents(inputs, memories=3)
    options = {"cu_seqlens": packing(0, 5, 12, 20)} if packed else {}
    clean = evaluate(attention, inputs, d, **options)
    mine = (0, slice(5, 12)) if packed else (1,)
    for name in ("q", "k", "v"):
        inputs[name][mine] = torch.nan
    inputs["initial_memory"][1] = torch.inf
    got = evaluate(attention, inputs, d, **options)
    for name, x in got.items():
        others = torch.ones(x.shape[:2], dtype=torch.bool)
        others[1 if "memory" in name else mine] = False
        assert torch.equal(x[others], clean[name][others]), name
        assert x[~others].isnan().any() or name in ("d_memory", "d_initial_memory"), name


CALLS = {
    "hot": {"B": 2, "T": 70, "H": 2, "G": 1, **HOT, "write": True, "memory": 2},
    "cold": {"T": 66, "H": 1, **COLD, "gate": "steep"},
    "snapshots": {"T": 270, "H": 1, **COLD, "memory": 1},
    "packed": {"T": 135, "H": 2, "G": 1, **HOT, "memory": 4},
}
BOUNDS = (0, 0, 64, 65, 135)


def call(name, **options):
    inputs = make_inputs(**CALLS[name])
    if name == "packed":
        options["cu_seqlens"] = packing(*BOUNDS)
    return inputs, cotangents(inputs, memories=CALLS[name].get("memory")), options


@pytest.mark.parametrize("name", CALLS)
def test_every_number_of_a_result_is_written_and_none_other_is_read(monkeypatch, name):
    """Run twice, the second time in memory full of NaN: bit-equal, so also run to run."""
    inputs, d, options = call(name, recompute=name != "packed")
    expected = evaluate(attention, inputs, d, **options)

    def poisoned(allocate):
        def allocated(*arguments, **given):
            x = allocate(*arguments, **given)
            return x.fill_(torch.nan if x.is_floating_point() else -1)  # bytes of NaN, too

        return allocated

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    for function in ("empty", "empty_like"):
        monkeypatch.setattr(torch, function, poisoned(getattr(torch, function)))
    assert_bit_equal(evaluate(attention, inputs, d, **options), expected)


@PATHS
def test_a_row_in_a_batch_is_the_row_alone_bit_for_bit(path):
    inputs = make_inputs(B=3, T=67, H=1, **path, write=True, memory=3)
    if path is COLD:
        inputs["log_forget"][0] -= 1.9  # too steep to factorise, beside rows that are not
    d = cotangents(inputs)
    together = evaluate(attention, inputs, d)
    for b in (0, 2):
        row = {name: x[b : b + 1] for name, x in inputs.items()}
        alone = evaluate(attention, row, tuple(x[b : b + 1] for x in d))
        assert_bit_equal(alone, {name: x[b : b + 1] for name, x in together.items()})


def test_inputs_and_cotangents_are_never_modified():
    inputs, d, _ = call("hot")
    inputs = leaves(inputs)
    before = {name: x.detach().clone() for name, x in inputs.items()}
    d_before = [x.clone() for x in d]
    got = attention(**inputs)
    torch.autograd.backward(list(got), list(d))
    for name, x in inputs.items():
        assert torch.equal(x, before[name]), name
    assert all(torch.equal(a, b) for a, b in zip(d, d_before, strict=True))


def test_results_share_no_storage_with_inputs():
    inputs, _, _ = call("hot")
    before = {name: x.clone() for name, x in inputs.items()}
    for x in attention(**inputs):
        x.fill_(7)
    assert_bit_equal(inputs, before)


def test_a_memory_that_is_changed_before_the_backward_pass_is_noticed():
    """It is kept for it: an error, not a wrong gradient."""
    inputs = leaves(make_inputs(T=5, H=1, **COLD))
    got = attention(**inputs)
    got.memory.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        got.output.sum().backward()


def test_a_gradient_of_a_gradient_is_refused():
    """An error, not a part left out."""
    inputs = leaves(make_inputs(T=5, H=1, **COLD))
    output = attention(**inputs).output
    (d_q,) = torch.autograd.grad(output.square().sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (d_q.square().sum() + inputs["k"].sum()).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_autocast_changes_nothing(dtype):
    inputs = make_inputs(T=70, H=2, G=1, **HOT, dtype=dtype, memory=1)
    d = cotangents(inputs)
    plain = evaluate(attention, inputs, d)

    def under_autocast(**arguments):
        with torch.autocast(HOME.device, dtype=torch.bfloat16):
            return attention(**arguments)

    assert_bit_equal(evaluate(under_autocast, inputs, d), plain)
    with torch.autocast(HOME.device, dtype=torch.bfloat16):
        assert_bit_equal(evaluate(attention, inputs, d), plain)


def test_gradients_are_tracked_only_where_asked_for():
    inputs = make_inputs(T=5, H=1, **COLD)
    assert not any(x.requires_grad for x in attention(**inputs))
    with torch.no_grad():
        assert not any(x.requires_grad for x in attention(**leaves(inputs)))


def test_two_graphs_whose_backward_passes_cross():
    first, second = (make_inputs(T=T, H=1, **COLD, seed=T) for T in (5, 70))
    expected = [evaluate(attention, x, cotangents(x)) for x in (first, second)]
    graphs = [(a := leaves(x), attention(**a), cotangents(x)) for x in (first, second)]
    for (arguments, got, d), wanted in reversed(list(zip(graphs, expected, strict=True))):
        grads = torch.autograd.grad(list(got), list(arguments.values()), list(d))
        for name, gradient in zip(arguments, grads, strict=True):
            assert torch.equal(gradient, wanted[f"d_{name}"]), name


@pytest.mark.parametrize("gate", ["usual", "near_one", "steep"])
def test_outputs_are_bounded_by_the_values(gate):
    inputs = make_inputs(T=70, H=2, G=1, **COLD, gate=gate)
    inputs["v"][..., 0] = 1.0  # the tightest case: a coordinate that never changes
    output = attention(**inputs, scale=3.0).output
    bound = inputs["v"].abs().cummax(1).values * (1 + 8 * torch.finfo(torch.float32).eps)
    assert (output.abs() <= bound).all()


def test_slots_have_no_order():
    inputs = make_inputs(T=70, H=2, G=1, K=8, V=8, M=6, write=True, memory=1)
    d = cotangents(inputs)
    order = torch.tensor([3, 0, 5, 1, 2, 4], device=HOME.device)
    mixed = {name: x[..., order] if x.shape[3] == 6 else x for name, x in inputs.items()}
    mixed["initial_memory"] = inputs["initial_memory"][:, :, order]
    mixed_d = (d[0], d[1][:, :, order])
    exact, ruler = (evaluate(f, mixed, mixed_d) for f in (oracle, yardstick))
    plain = evaluate(attention, inputs, d)
    for name, x in plain.items():
        if "memory" in name:
            plain[name] = x[:, :, order]
        elif name in ("d_log_forget", "d_write"):
            plain[name] = x[..., order]
    for results in (plain, evaluate(attention, mixed, mixed_d)):
        assert_within_budget(results, exact, ruler, torch.float32)


def test_no_decay_and_no_write_leave_a_memory_as_it_is():
    inputs = make_inputs(T=70, H=1, **HOT, memory=1)
    inputs["log_forget"] = torch.zeros_like(inputs["log_forget"])
    inputs["k"] *= 1e3
    assert torch.equal(attention(**inputs).memory, inputs["initial_memory"])
