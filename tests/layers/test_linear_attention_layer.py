"""LinearAttention against the equations of GLA, RetNet, HGRN2 and SUPRA, token by token."""

import pytest
import torch
from torch.nn import functional as F

from gsa.layers import LinearAttention, TokenLayout
from gsa.layers.gate import LowerBounds, bounded_gate
from gsa.layers.linear_attention import replay_linear
from gsa.layers.options import LinearAttentionOptions
from gsa.layers.rope import rotate

SIZES = dict(hidden_size=12, num_heads=4, num_kv_heads=2, head_dim=4)
KINDS = {
    "gla": dict(
        decay="data_dependent",
        expand_k=0.5,
        feature_map="identity",
        value_activation="identity",
        scale="rsqrt_key",
        gate_logit_normalizer=16.0,
        gate_low_rank=3,
        output_gate=True,
    ),
    "retnet": dict(
        decay="fixed",
        expand_v=2.0,
        feature_map="identity",
        value_activation="identity",
        scale="rsqrt_key",
        rope_theta=10000.0,
        output_gate=True,
    ),
    "hgrn2": dict(decay="tied", expand_v=2.0, value_activation="identity"),
    "supra": dict(
        decay="fixed", feature_map="t2r", value_activation="identity", rope_theta=10000.0
    ),
}

BOUNDS = torch.linspace(0.1, 0.9, 8).double()
"""Of the forget gates of a tied decay."""


def build(kind):
    torch.manual_seed(0)
    layer = LinearAttention(LinearAttentionOptions(**SIZES, **KINDS[kind])).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def draw(rows=2, tokens=9, seed=1):
    return torch.randn(rows, tokens, 12, generator=torch.Generator().manual_seed(seed)).double()


def by_hand(kind, layer, x_TD):
    """The papers' recurrences for one row, heads one by one."""
    T, K, V = x_TD.shape[0], layer.options.key_width, layer.options.value_width
    names = "qfv" if kind == "hgrn2" else "qkv"
    q, k, v = (F.linear(x_TD, getattr(layer, f"{n}_proj").weight) for n in names)
    q, k, v = q.view(T, 4, K), k.view(T, 2, K), v.view(T, 2, V)
    if kind == "supra":
        W = layer.feature_map.layer.weight
        q, k = (q @ W.T).relu(), (k @ W.T).relu()
    if kind == "gla":
        low = x_TD @ layer.f_proj.weight.T
        alpha = torch.sigmoid(low @ layer.f_out.weight.T + layer.f_out.bias) ** (1 / 16)
        alpha = alpha.view(T, 2, K)
    elif kind == "hgrn2":
        alpha = BOUNDS.view(2, K) + (1 - BOUNDS.view(2, K)) * k.sigmoid()
        q, k = q * q.sigmoid(), 1 - alpha
    else:
        alpha = torch.tensor([1 - 2**-5, 1 - 2**-6]).double()[None, :, None].expand(T, 2, K)
        positions = torch.arange(T)[None]
        q, k = (rotate(y[None], positions, 10000.0, None)[0] for y in (q, k))
    heads = []
    for h in range(4):
        S, rows = torch.zeros(K, V).double(), []
        for t in range(T):
            S = alpha[t, h // 2][:, None] * S + torch.outer(k[t, h // 2], v[t, h // 2])
            rows.append(S.T @ q[t, h])
        heads.append(torch.stack(rows) * layer.options.score_scale)
    o = torch.cat(heads, -1) if kind == "hgrn2" else torch.stack(heads, 1)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.g_norm.weight
    o = o.reshape(T, 4 * V)
    if layer.options.output_gate:
        o = o * F.silu(x_TD @ layer.g_proj.weight.T)
    return o @ layer.o_proj.weight.T


@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_is_the_paper_s_recurrence_written_out(kind):
    layer, x = build(kind), draw(rows=1, tokens=70)
    expected = by_hand(kind, layer, x[0])
    bound = BOUNDS.log() if kind == "hgrn2" else None
    got = layer(x, log_bound=bound).output[0]
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_lower_bounds_grow_with_depth_and_learn():
    """HGRN2's: cumulative sums of a softmax over layers, without the first layer's share."""
    bounds = LowerBounds(4, 3).double()
    first, *rest = (bound if bound is None else bound.exp() for bound in bounds())
    torch.testing.assert_close(
        torch.stack(rest), torch.tensor([[0.25], [0.5], [0.75]]).double().expand(3, 3)
    )
    torch.nn.init.normal_(bounds.logits)
    share = bounds.logits.softmax(0)
    torch.testing.assert_close(torch.stack(bounds()[1:]).exp(), share.cumsum(0)[1:] - share[0])
    torch.stack(bounds()[1:]).sum().backward()
    assert first is None and bounds.logits.grad.abs().min() > 0


def test_a_gate_stays_above_its_bound_and_below_one():
    logits = torch.tensor([-1e4, -30.0, 0.0, 30.0, 1e4])[:, None, None]
    for bound in (1e-3, 0.5, 1 - 1e-8):
        log_f = bounded_gate(logits, torch.tensor([bound]).log(), None)
        assert log_f.max() <= 0 and log_f.exp().min() >= bound * (1 - 1e-6)
    assert bounded_gate(logits, None, None).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_packing_change_nothing(kind):
    layer, x = build(kind), draw(rows=1, tokens=9)
    whole = layer(x)
    mask = torch.tensor([[0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 0]])
    padded = draw(rows=1, tokens=13, seed=5)
    padded[mask.bool()] = x[0]
    got = layer(padded, TokenLayout.of_rows(13, x.device, attention_mask=mask))
    torch.testing.assert_close(got.output[mask.bool()], whole.output[0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(got.state["memory"], whole.state["memory"], rtol=1e-9, atol=1e-10)

    packed = torch.cat([draw(rows=1, tokens=4, seed=6), x], 1)
    layout = TokenLayout.of_packed(13, x.device, torch.tensor([0, 4, 13]))
    got = layer(packed, layout)
    torch.testing.assert_close(got.output[:, 4:], whole.output, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_goes_on_and_can_be_made_again(kind):
    layer, x = build(kind), draw(tokens=9)
    first = layer(x[:, :4])
    layout = TokenLayout.of_rows(5, x.device, past=4)
    rest = layer(x[:, 4:], layout, first.state)
    whole = layer(x)
    torch.testing.assert_close(rest.output, whole.output[:, 4:], rtol=1e-9, atol=1e-10)
    again = replay_linear(layer.options, first.state, rest.step)
    assert again.keys() == rest.state.keys() == layer.empty_state(1, 0).keys()
    torch.testing.assert_close(again["memory"], whole.state["memory"], rtol=1e-9, atol=1e-10)


def test_an_unknown_decay_is_refused():
    with pytest.raises(ValueError, match="decay: expected one of data_dependent, fixed, tied"):
        LinearAttentionOptions(**SIZES, decay="none")
