"""The peer library computes what we compute when it is called as we call it."""

from dataclasses import replace

import pytest
import torch

from gsa.benchmark.cases import Case
from gsa.benchmark.contenders import make_inputs, ours, sdpa
from gsa.benchmark.peers import Fla, fla_contender, load_fla, triton_cache_entries

CASE = Case(group="x", name="x", H=4, G=2, K=16, V=16, M=8, B=2, T=40)


@pytest.fixture
def sets():
    torch.manual_seed(0)
    return make_inputs(CASE, torch.device("cpu"), cache_bytes=0)


def compare(ours_, theirs):
    """Outputs, and the gradient of q, which both have, agree to bf16's precision."""
    for name, a, b in zip(("output", "d_q"), ours_.results(), theirs.results(), strict=False):
        error = (a.float() - b.float()).norm() / a.float().norm()
        assert float(error) < 0.02, name


def test_heads_are_repeated_beforehand_and_gates_agree(sets, fla):
    contender = fla_contender(CASE, sets, fla)
    shapes = [tuple(x.shape) for x in contender.inputs[0]]
    assert shapes == [(2, 40, 4, n) for n in (16, 16, 16, 8, 8)]
    assert {x.dtype for x in contender.inputs[0]} == {torch.bfloat16}
    compare(ours(sets, "reference", recompute=True), contender)


def test_every_input_gets_its_gradient(sets, fla):
    for contender in (
        ours(sets, "chunked", recompute=False),
        fla_contender(CASE, sets, fla),
        sdpa(CASE, sets),
    ):
        _, *gradients = contender.results()
        inputs = contender.inputs[0]
        assert [g.shape for g in gradients] == [x.shape for x in inputs]
        assert all(x.is_leaf and x.grad is None for x in inputs)


def test_attention_is_causal_over_the_same_numbers(sets):
    contender = sdpa(CASE, sets)
    q, k, v = contender.inputs[0]
    assert q.shape == (2, 4, 40, 16) and k.shape == v.shape == (2, 2, 40, 16)
    assert q.data_ptr() == sets[0].q.data_ptr() and v.data_ptr() == sets[0].v.data_ptr()
    with torch.no_grad():
        cut = contender.call(q[:, :, :7], k[:, :, :7], v[:, :, :7])
        assert torch.allclose(contender.call(q, k, v)[:, :, :7].float(), cut.float(), atol=0.02)
    assert contender.set_bytes() == 2 * 40 * 2 * (64 + 32 + 32 + 64)


def test_kernels_kept_by_triton_are_counted():
    entries = triton_cache_entries()
    assert entries is None or entries >= 0


@pytest.mark.fla
def test_the_library_s_own_definition_agrees(sets):
    library = load_fla()
    assert isinstance(library, Fla), library
    from fla.ops.gsa.naive import naive_recurrent_gsa

    contender = fla_contender(CASE, sets, replace(library, chunk=naive_recurrent_gsa))
    compare(ours(sets, "reference", recompute=True), contender)


@pytest.mark.gpu
@pytest.mark.fla
def test_the_library_s_kernels_agree():
    case = replace(CASE, K=64, V=64, M=32, T=200)
    on_gpu = make_inputs(case, torch.device("cuda"), cache_bytes=0)
    library = load_fla()
    assert isinstance(library, Fla), library
    compare(ours(on_gpu, "reference", recompute=True), fla_contender(case, on_gpu, library))
