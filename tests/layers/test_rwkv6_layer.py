"""RWKV6 against the paper's equations, token by token."""

import pytest
import torch
from torch.nn import functional as F

from gsa.layers import TokenLayout
from gsa.layers.options import RWKV6Options
from gsa.layers.rwkv6 import RWKV6, replay_rwkv6

D, H, K, V = 12, 2, 6, 12


@pytest.fixture
def layer():
    torch.manual_seed(0)
    sizes = dict(hidden_size=D, num_heads=H, expand_v=2.0, gate_low_rank=3, shift_low_rank=2)
    layer = RWKV6(RWKV6Options(**sizes, decay="data_dependent")).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def draw(rows=2, tokens=9, seed=1):
    return torch.randn(rows, tokens, D, generator=torch.Generator().manual_seed(seed)).double()


def by_hand(layer, x_TD):
    """One row, one token and head after the other, with a loop over the memory's life."""
    mu_x, mu = layer.mixtures[0], layer.mixtures[1:]
    A = layer.shift_in.weight.view(5, 2, D)
    before, S, rows = torch.zeros(D).double(), torch.zeros(H, K, V).double(), []
    for x in x_TD:
        base = x + (before - x) * mu_x
        shifted = []
        for n in range(5):
            share = mu[n] + torch.tanh(base @ A[n].T) @ layer.shift_out[n]
            shifted.append(x + (before - x) * share)
        x_r, x_k, x_v, x_g, x_d = shifted
        r, k = (x_r @ layer.receptance.weight.T).view(H, K), (x_k @ layer.key.weight.T).view(H, K)
        v = (x_v @ layer.value.weight.T).view(H, V)
        d = layer.decay_bias + torch.tanh(x_d @ layer.decay_in.weight.T) @ layer.decay_out.weight.T
        w, heads = torch.exp(-torch.exp(d)).view(H, K), []
        for h in range(H):
            now = S[h] + torch.outer(layer.bonus[h] * k[h], v[h])
            o = now.T @ r[h]
            o = (o - o.mean()) / (o.var(unbiased=False) + 1e-5).sqrt()
            heads.append(o * layer.g_norm.weight[h] + layer.g_norm.bias[h])
        S = w[..., None] * S + k[..., None] * v[:, None]
        y = torch.cat(heads) * F.silu(x_g @ layer.gate.weight.T)
        rows.append(y @ layer.o_proj.weight.T)
        before = x
    return torch.stack(rows), S


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_the_layer_is_the_paper_s_recurrence_written_out(layer):
    x = draw(rows=1, tokens=70)
    output, memory = by_hand(layer, x[0])
    got = layer(x)
    close(got.output[0], output)
    close(got.state["memory"][0], memory)


def test_padding_and_packing_change_nothing(layer):
    x = draw(rows=1, tokens=9)
    whole = layer(x)
    mask = torch.tensor([[0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 0]])
    padded = draw(rows=1, tokens=13, seed=5)
    padded[mask.bool()] = x[0]
    got = layer(padded, TokenLayout.of_rows(13, x.device, attention_mask=mask))
    close(got.output[mask.bool()], whole.output[0])
    close(got.state["memory"], whole.state["memory"])
    assert torch.equal(got.state["tail"], x[:, -1:])

    first = draw(rows=1, tokens=4, seed=6)
    bounds = torch.tensor([0, 4, 4, 13])
    got = layer(torch.cat([first, x], 1), TokenLayout.of_packed(13, x.device, bounds))
    close(got.output, torch.cat([layer(first).output, whole.output], 1))


@pytest.mark.parametrize("cut", [1, 4, 8])
@pytest.mark.parametrize("grad", [True, False])
def test_a_state_goes_on_and_can_be_made_again(layer, cut, grad):
    x = draw(tokens=9)
    whole = layer(x)
    with torch.set_grad_enabled(grad):
        first = layer(x[:, :cut])
        rest = layer(x[:, cut:], TokenLayout.of_rows(9 - cut, x.device, past=cut), first.state)
    close(rest.output, whole.output[:, cut:])
    again = replay_rwkv6(layer.options, first.state, rest.step)
    assert again.keys() == rest.state.keys() == layer.empty_state(1, 0).keys()
    for name in again:
        close(again[name], whole.state[name])


def test_every_weight_learns_also_through_a_state(layer):
    x = draw(tokens=6)
    state = layer(x[:, :3]).state
    layer(
        x[:, 3:], TokenLayout.of_rows(3, x.device, past=3), state
    ).output.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 1e-6 for p in layer.parameters())


def test_a_new_layer_has_decays_from_fast_to_slow(layer):
    start = layer.initial()
    decays = torch.exp(-torch.exp(start["decay_bias"]))
    assert decays[0] == pytest.approx(0.9975, abs=1e-4) and decays[-1] == pytest.approx(
        0.692, abs=1e-3
    )
    assert start["mixtures"].shape == (6, D) and start["mixtures"].min() > 0
    assert start["bonus"].shape == (H, K)
    with pytest.raises(ValueError, match="shift_low_rank: expected a whole number >= 1"):
        RWKV6Options(hidden_size=D, num_heads=H, decay="data_dependent", shift_low_rank=0)
