"""GatedSlotAttention against the paper's equations written out, and its options one by one."""

import pytest
import torch
from torch.nn import functional as F

from gsa.layers import GatedSlotAttention, SoftmaxAttention, TokenLayout
from gsa.layers.options import SlotAttentionOptions, SoftmaxAttentionOptions
from gsa.layers.slot_attention import replay_slots

SIZES = dict(hidden_size=12, num_heads=4, num_kv_heads=2, num_slots=5)


def build(seed=0, **options):
    torch.manual_seed(seed)
    layer = GatedSlotAttention(SlotAttentionOptions(**(SIZES | options))).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def draw(rows=2, tokens=9, seed=1):
    return torch.randn(rows, tokens, 12, generator=torch.Generator().manual_seed(seed)).double()


def two_linear_passes(q_TK, k_TK, v_TV, forget_TM, write_TM):
    """Eq. 7, one head: two gated linear attentions joined by a softmax, as sums over the past."""
    T = q_TK.shape[0]
    kept = torch.ones(T, T, forget_TM.shape[1], dtype=q_TK.dtype)
    for t in range(T):
        for i in range(t):
            kept[t, i] = forget_TM[i + 1 : t + 1].prod(0)
    weight = kept * write_TM * torch.ones(T, T).tril()[..., None]
    score = torch.einsum("tk,ik,tim->tm", q_TK, k_TK, weight)
    return torch.einsum("tm,tim,iv->tv", score.softmax(-1), weight, v_TV)


def test_the_layer_is_equations_7_to_9_written_out():
    layer, x = build(), draw(rows=1)
    q = F.silu(x @ layer.q_proj.weight.T)[0].unflatten(-1, (4, 3))
    k = F.silu(x @ layer.k_proj.weight.T)[0].unflatten(-1, (2, 3))
    v = F.silu(x @ layer.v_proj.weight.T)[0].unflatten(-1, (2, 3))
    forget = torch.sigmoid(x @ layer.f_proj.weight.T)[0].unflatten(-1, (2, 5)) ** (1 / 8)
    shared = [(k[:, g], v[:, g], forget[:, g], 1 - forget[:, g]) for g in range(2)]
    heads = [two_linear_passes(q[:, h], *shared[h // 2]) for h in range(4)]
    o = F.silu(torch.cat(heads, -1))
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.g_norm.weight
    expected = o @ layer.o_proj.weight.T
    torch.testing.assert_close(layer(x).output[0], expected, rtol=1e-10, atol=1e-12)


def softmax_over_time(a_TM):
    """Eq. 3: each token's share of everything written so far."""
    return a_TM.exp() / a_TM.exp().cumsum(0)


@pytest.mark.parametrize("gate", ["abc", "abc_printed"])
def test_abc_gates_are_their_definitions(gate):
    layer, x = build(gate=gate), draw(rows=1)
    step = layer(x).step
    a = (x @ layer.f_proj.weight.T)[0].unflatten(-1, (2, 5))
    torch.testing.assert_close(step["write"][0], softmax_over_time(a))
    z = a.logcumsumexp(0)
    torch.testing.assert_close(step["normalizer"][0], z)
    decay = torch.cat([torch.zeros_like(z[:1]), z[:-1] - z[1:]])
    expected = decay if gate == "abc" else torch.zeros_like(decay)
    torch.testing.assert_close(step["log_forget"][0], expected)


def test_abc_keeps_in_each_slot_the_softmax_weighted_mean_of_all_keys():
    """What makes ABC a bounded memory: slot m holds Σ_i softmax_i(a_im) [k_i; v_i]."""
    layer, x = build(gate="abc"), draw(rows=1)
    mixed = layer(x)
    a = (x @ layer.f_proj.weight.T)[0].unflatten(-1, (2, 5))
    share = a.softmax(0)
    rows = torch.cat([mixed.step["k"], mixed.step["v"]], -1)[0]
    expected = torch.einsum("tgm,tgx->gmx", share, rows)
    torch.testing.assert_close(mixed.state["memory"][0], expected)


def test_abc_and_its_printed_form_differ():
    outputs = [build(gate=gate)(draw()).output for gate in ("abc", "abc_printed")]
    assert (outputs[0][:, 0] - outputs[1][:, 0]).abs().max() < 1e-12
    assert (outputs[0][:, 1:] - outputs[1][:, 1:]).abs().max() > 1e-2


@pytest.mark.parametrize("offset", [-300.0, 0.0, 300.0])
def test_abc_does_not_depend_on_the_level_of_its_logits(offset):
    """A constant added to all logits cancels, however large: nothing overflows."""
    layer, x = build(gate="abc"), draw()
    plain = layer(x).output
    gate = layer._gate
    layer._gate = lambda logits, layout, normalizer: gate(logits + offset, layout, normalizer)
    torch.testing.assert_close(layer(x).output, plain, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("gate", ["data_dependent", "data_independent", "abc", "abc_printed"])
def test_gradients_reach_every_parameter_and_are_right(gate):
    layer = build(gate=gate, use_short_conv=True, qk_norm=True, output_gate=True, feature_map="t2r")
    x = draw(rows=1, tokens=4)
    inputs = (x.requires_grad_(), layer.f_proj.logits if gate == "data_independent" else None)
    assert torch.autograd.gradcheck(lambda x, _: layer(x).output, inputs, fast_mode=True)
    layer(x).output.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_a_gate_near_one_still_writes_in_bf16():
    """Logits of 5: 1 - f is about 8e-4, which bf16 would round to zero were it formed there."""
    layer = build().bfloat16()
    with torch.no_grad():
        layer.f_proj.weight.zero_()
    layer.f_proj.bias = torch.nn.Parameter(torch.full((10,), 5.0, dtype=torch.bfloat16))
    mixed = layer(draw(rows=1, tokens=1).bfloat16())
    log_forget = mixed.step["log_forget"]
    assert log_forget.dtype == torch.float32
    expected = 1 - torch.sigmoid(torch.tensor(5.0, dtype=torch.float64)) ** 0.125
    written = mixed.state["memory"][0, 0, 0] / mixed.step["k"].new_tensor(1.0).float()
    ratio = written[:3] / mixed.step["k"][0, 0, 0].float()
    torch.testing.assert_close(ratio, torch.full((3,), float(expected)), rtol=1e-5, atol=0)


def test_output_norm_and_gate_are_what_they_say():
    x = draw()
    bare = build(output_norm=False)
    assert not hasattr(bare, "g_norm")
    inner = torch.linalg.lstsq(bare.o_proj.weight, bare(x).output.flatten(0, 1).T).solution.T
    normed = build()
    normed.load_state_dict(bare.state_dict(), strict=False)
    weight = normed.g_norm.weight
    by_hand = inner / (inner.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    expected = by_hand @ bare.o_proj.weight.T
    torch.testing.assert_close(normed(x).output.flatten(0, 1), expected, rtol=1e-6, atol=1e-8)

    gated = build(output_gate=True)
    gated.load_state_dict(normed.state_dict(), strict=False)
    gate = F.silu(x.flatten(0, 1) @ gated.g_proj.weight.T)
    expected = (by_hand * gate) @ bare.o_proj.weight.T
    torch.testing.assert_close(gated(x).output.flatten(0, 1), expected, rtol=1e-6, atol=1e-8)


def test_rope_makes_scores_depend_on_distance_alone():
    """Shifting all positions changes nothing; stretching them does."""
    layer, x = build(rope_theta=10.0, head_dim=4), draw()
    positions = torch.arange(9)[None]
    near, far, stretched = (
        layer(x, TokenLayout(p)).output for p in (positions, positions + 50, positions * 2)
    )
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-5)
    assert (near - stretched).abs().max() > 1e-3


def test_the_layer_works_on_its_own_and_leaves_the_given_state_alone():
    layer, x = build(use_short_conv=True, gate="abc"), draw()
    whole = layer(x)
    first = layer(x[:, :4])
    before = {name: t.clone() for name, t in first.state.items()}
    with torch.no_grad():
        second = layer(x[:, 4:], TokenLayout.of_rows(5, x.device, past=4), first.state)
        one = layer(x[:, 4:5], TokenLayout.of_rows(1, x.device, past=4), first.state)
    torch.testing.assert_close(second.output, whole.output[:, 4:])
    torch.testing.assert_close(one.output, whole.output[:, 4:5])
    assert all(torch.equal(first.state[name], t) for name, t in before.items())
    assert set(whole.state) == {"memory", "normalizer", "q_tail", "k_tail", "v_tail"}
    again = replay_slots(layer.options, first.state, second.step)
    for name, tensor in whole.state.items():
        torch.testing.assert_close(again[name], tensor)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_impl_chooses_the_operator(impl):
    layer, x = build(), draw()
    expected = layer(x).output
    layer.impl = impl
    torch.testing.assert_close(layer(x).output, expected)
    layer.impl = "nonsense"
    with pytest.raises(ValueError, match="impl"):
        layer(x)


def test_the_window_branch_is_softmax_attention_in_a_learned_share():
    """Both branches on their own are layers that exist; between them each head has its share."""
    sizes = SIZES | dict(head_dim=4)
    layer, x = build(head_dim=4, window_branch=3, window_rope_theta=50.0), draw()
    softmax = SoftmaxAttention(
        SoftmaxAttentionOptions(
            hidden_size=12, num_heads=4, num_kv_heads=2, head_dim=4, window_size=3, rope_theta=50.0
        )
    ).double()
    slots = GatedSlotAttention(SlotAttentionOptions(**sizes)).double()
    softmax.load_state_dict(layer.state_dict(), strict=False)
    slots.load_state_dict(layer.state_dict(), strict=False)
    exact = dict(rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        layer.window_share = 1.0
        torch.testing.assert_close(layer(x).output, softmax(x).output, **exact)
        layer.window_share = 0.0
        torch.testing.assert_close(layer(x).output, slots(x).output, **exact)
        layer.window_share = None
        share = torch.sigmoid(layer.share_proj(x)).repeat_interleave(4, -1)
        for branch in (softmax, slots):
            branch.o_proj = torch.nn.Identity()
        mixed = share * softmax(x).output + (1 - share) * slots(x).output
        torch.testing.assert_close(layer(x).output, layer.o_proj(mixed), **exact)


def test_a_gate_with_a_bias_is_shifted_by_it():
    layer, x = build(gate_bias=True), draw()
    logits = (x @ layer.f_proj.weight.T + layer.f_proj.bias).unflatten(-1, (2, 5))
    torch.testing.assert_close(layer(x).step["log_forget"], F.logsigmoid(logits) / 8)
