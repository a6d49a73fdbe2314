"""Norm, MLP, rotary embedding, short convolution, feature maps, layouts, softmax attention."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from gsa.layers import RMSNorm, SoftmaxAttention, SwiGLU, TokenLayout
from gsa.layers.feature_map import FeatureMap
from gsa.layers.in_sight import attend
from gsa.layers.options import SoftmaxAttentionOptions
from gsa.layers.projections import is_plain, project_normed_together, project_together
from gsa.layers.rope import rope_frequencies, rotate
from gsa.layers.short_convolution import ShortConvolution
from gsa.layers.softmax_attention import replay_window
from gsa.ops.triton import swish

ROW_DOCUMENTS = torch.tensor([0, 2, 2, 7, 9])


def test_rms_norm_computes_in_fp32_and_keeps_the_dtype():
    x = (1e-3 * torch.randn(3, 64)).bfloat16()
    norm = RMSNorm(64, 1e-6).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x), exact.bfloat16())
    assert RMSNorm(64, 1e-6, affine=False).weight is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_compiled_is_rms_norm(dtype):
    """It is written otherwise for the compiler; both round an fp64 result, its gradients too."""
    norm, exact = RMSNorm(64, 1e-6).to(dtype), RMSNorm(64, 1e-6).double()
    with torch.no_grad():
        norm.weight += torch.randn(64) / 4
        exact.weight.copy_(norm.weight)
    x, d = torch.randn(2, 5, 64).to(dtype).unbind(0)

    def results(function, x, d, weight):
        y = function(x := x.requires_grad_())
        return y, *torch.autograd.grad(y, (x, weight), d)

    torch._dynamo.reset()
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    found = results(compiled, x, d, norm.weight)
    expected = results(exact, x.detach().double(), d.double(), exact.weight)
    eps = torch.finfo(dtype).eps
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=2 * eps, atol=2 * eps * b.abs().max().item())


PROJECTED = {"f": 3, "q": 5, "k": 2, "v": 300}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_layers_projected_together_are_the_layers(dtype, compiled):
    """As compiled for training on a GPU; the kernel runs in Triton's interpreter elsewhere."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers = torch.nn.ModuleDict(
        {name: torch.nn.Linear(8, n, bias=False) for name, n in PROJECTED.items()}
    ).to(device, dtype)
    x = torch.randn(2, 7, 8, dtype=dtype, device=device, requires_grad=True)
    torch.compiler.reset()

    def call(x):
        return project_together(x, layers, "qkv")

    found = torch.compile(call, backend="aot_eager", fullgraph=True)(x) if compiled else call(x)
    assert sorted(found) == sorted(PROJECTED)
    exact = {name: layer.weight.detach().double() for name, layer in layers.items()}
    x64 = x.detach().double()
    eps = torch.finfo(dtype).eps
    d_x = torch.zeros_like(x64)
    d, d_weights = {}, {}
    for name, y in found.items():
        z = x64 @ exact[name].T
        gate = torch.sigmoid(z)
        torch.testing.assert_close(
            y.double(), z if name == "f" else z * gate, rtol=4 * eps, atol=8 * eps
        )
        d[name] = torch.randn(7, 2, y.shape[-1], dtype=dtype, device=device).transpose(0, 1)
        slope = d[name].double() * (1 if name == "f" else gate * (1 + z * (1 - gate)))
        d_x += slope @ exact[name]
        d_weights[name] = slope.flatten(0, 1).T @ x64.flatten(0, 1)
    total = sum((y * d[name]).sum() for name, y in found.items())
    got = torch.autograd.grad(total, (x, *(layers[n].weight for n in PROJECTED)))
    expected = (d_x, *(d_weights[name] for name in PROJECTED))
    for a, b in zip(got, expected, strict=True):
        size = b.abs().max().item()
        torch.testing.assert_close(a.double(), b, rtol=8 * eps, atol=8 * eps * size)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("width", [48, 300])
def test_the_output_projected_together_is_the_layers(dtype, affine, width, monkeypatch):
    """Also where programs have several rows each, and rows lie apart."""
    monkeypatch.setattr(swish, "PROGRAMS", 4)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    norm = RMSNorm(width, 1e-5, affine=affine).to(device, dtype)
    layer = torch.nn.Linear(width, 6, bias=False).to(device, dtype)
    if affine:
        torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 7, width + 8, dtype=dtype, device=device)[..., :width].requires_grad_()
    torch.compiler.reset()
    call = torch.compile(project_normed_together, backend="aot_eager", fullgraph=True)
    y, d = call(x, norm, layer), torch.randn(2, 7, 6, dtype=dtype, device=device)
    exact_norm, exact_layer = copy.deepcopy(norm).double(), copy.deepcopy(layer).double()
    x64 = x.detach().double().requires_grad_()
    y64 = exact_layer(exact_norm(F.silu(x64)))
    got = torch.autograd.grad(y, (x, *norm.parameters(), layer.weight), d)
    expected = torch.autograd.grad(
        y64, (x64, *exact_norm.parameters(), exact_layer.weight), d.double()
    )
    eps = torch.finfo(dtype).eps
    for a, b in zip((y, *got), (y64, *expected), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=8 * eps, atol=8 * eps * b.abs().max().item())


def test_layers_are_projected_together_only_where_they_are_plain():
    class Adapted(torch.nn.Linear):
        pass

    watched = torch.nn.Linear(4, 3, bias=False)
    watched.register_forward_hook(lambda module, args, output: output + 1)
    assert is_plain(torch.nn.Linear(4, 3, bias=False))
    assert not any(map(is_plain, (Adapted(4, 3, bias=False), torch.nn.Linear(4, 3), watched)))


def test_swiglu_is_its_formula():
    mlp, x = SwiGLU(6, 10), torch.randn(4, 6)
    gate, up = mlp.gate_proj.weight, mlp.up_proj.weight
    expected = ((x @ gate.T) * torch.sigmoid(x @ gate.T) * (x @ up.T)) @ mlp.down_proj.weight.T
    torch.testing.assert_close(mlp(x), expected)


def test_feature_maps_are_their_formulas():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(FeatureMap("identity", 5)(x), x)
    assert torch.equal(FeatureMap("relu", 5)(x), x.clamp(min=0))
    torch.testing.assert_close(FeatureMap("swish", 5)(x), x * torch.sigmoid(x))
    learned = FeatureMap("t2r", 5)
    torch.testing.assert_close(learned(x), (x @ learned.layer.weight.T).clamp(min=0))


def test_rope_is_a_rotation_by_position():
    x = torch.randn(1, 6, 2, 8, dtype=torch.float64)
    turned = rotate(x, torch.arange(6)[None], 100.0, None)
    torch.testing.assert_close(turned[:, 0], x[:, 0])
    pair = torch.complex(x[..., :4], x[..., 4:])
    angle = torch.arange(6)[:, None, None] * 100.0 ** (-torch.arange(4) / 4)
    expected = pair * torch.polar(torch.ones_like(angle), angle).to(pair.dtype)
    torch.testing.assert_close(
        turned, torch.cat([expected.real, expected.imag], -1), rtol=1e-6, atol=1e-6
    )


def test_rope_scalings_are_those_of_transformers():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    llama3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    llama3["original_max_position_embeddings"] = 8192
    for scaling in ({"rope_type": "linear", "factor": 4.0}, llama3):
        config = LlamaConfig(
            hidden_size=128,
            num_attention_heads=1,
            max_position_embeddings=8192,
            rope_parameters=scaling | {"rope_theta": 500000.0},
        )
        theirs, _ = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")
        ours = rope_frequencies(128, 500000.0, scaling, "cpu")
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)


def test_layout_of_rows_counts_real_tokens():
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 0]])
    layout = TokenLayout.of_rows(3, mask.device, past=2, attention_mask=mask)
    assert layout.positions.tolist() == [[1, -1, 2], [2, 3, -1]]
    assert layout.pads.tolist() == [[False, True, False], [False, False, True]]
    assert TokenLayout.of_rows(3, mask.device, past=4).positions.tolist() == [[4, 5, 6]]


def test_layout_of_packed_starts_anew_at_each_document():
    layout = TokenLayout.of_packed(9, torch.device("cpu"), ROW_DOCUMENTS.int())
    assert layout.positions.tolist() == [[0, 1, 0, 1, 2, 3, 4, 0, 1]]
    assert layout.documents.tolist() == [0, 0, 2, 2, 2, 2, 2, 3, 3]


def test_boundaries_are_checked_and_moved_to_the_tokens_once():
    """ "meta" stands for any device that is not the boundaries' own."""
    device = torch.device("meta")
    layout = TokenLayout.of_packed(9, device, ROW_DOCUMENTS)
    assert layout.cu_seqlens is not None and layout.cu_seqlens.device == device
    for wrong, words in (([0, 5, 3, 9], "never decrease"), ([0, 4, 8], "a last value of T = 9")):
        with pytest.raises(ValueError, match=words):
            TokenLayout.of_packed(9, device, torch.tensor(wrong))


def test_short_convolution_is_torchs_depthwise_convolution():
    conv, x = ShortConvolution(6, 4).double(), torch.randn(2, 9, 6, dtype=torch.float64)
    expected = F.silu(F.conv1d(F.pad(x.mT, (3, 0)), conv.weight, groups=6)).mT
    y, tail = conv(x, TokenLayout.of_rows(9, x.device))
    torch.testing.assert_close(y, expected)
    assert torch.equal(tail, x[:, -3:])
    for cut in (1, 2, 5):
        first, carried = conv(x[:, :cut], TokenLayout.of_rows(cut, x.device))
        second, last = conv(x[:, cut:], TokenLayout.of_rows(9 - cut, x.device, past=cut), carried)
        torch.testing.assert_close(torch.cat([first, second], 1), expected)
        assert torch.equal(last, tail)


def test_short_convolution_respects_documents_and_padding():
    conv, x = ShortConvolution(6, 3).double(), torch.randn(1, 9, 6, dtype=torch.float64)
    packed, _ = conv(x, TokenLayout.of_packed(9, x.device, ROW_DOCUMENTS))
    apart = [conv(x[:, a:b], TokenLayout.of_rows(b - a, x.device))[0] for a, b in [(0, 2), (2, 7)]]
    torch.testing.assert_close(packed[:, :7], torch.cat(apart, 1))
    mask = torch.tensor([[0, 1, 0, 0, 1, 1, 1, 0, 1]])
    y, tail = conv(x, TokenLayout.of_rows(9, x.device, attention_mask=mask))
    alone, tail_alone = conv(x[:, mask[0].bool()], TokenLayout.of_rows(5, x.device))
    torch.testing.assert_close(y[:, mask[0].bool()], alone)
    assert torch.equal(tail, tail_alone)


def attention(seed=0, **options):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=12, num_heads=4, num_kv_heads=2, head_dim=4, rope_theta=None)
    return SoftmaxAttention(SoftmaxAttentionOptions(**(sizes | options))).double()


@pytest.mark.parametrize("window", [None, 1, 3, 20])
def test_softmax_attention_is_its_formula(window):
    layer, x = attention(window_size=window), torch.randn(1, 7, 12, dtype=torch.float64)
    q = layer.q_proj(x)[0].unflatten(-1, (4, 4))
    k, v = (p(x)[0].unflatten(-1, (2, 4)) for p in (layer.k_proj, layer.v_proj))
    rows = []
    for t in range(7):
        start = 0 if window is None else max(0, t - window + 1)
        seen = slice(start, t + 1)
        heads = [
            (k[seen, h // 2] @ q[t, h] / math.sqrt(4)).softmax(0) @ v[seen, h // 2]
            for h in range(4)
        ]
        rows.append(torch.cat(heads))
    torch.testing.assert_close(layer(x).output[0], layer.o_proj(torch.stack(rows)))


def test_a_window_keeps_a_bounded_number_of_keys_and_can_be_replayed():
    layer = attention(window_size=4, rope_theta=10.0, qk_norm=True, qkv_bias=True)
    x, state = torch.randn(2, 15, 12, dtype=torch.float64), None
    whole = layer(x)
    outputs = []
    for start, end in [(0, 2), (2, 9), (9, 10), (10, 15)]:
        layout = TokenLayout.of_rows(end - start, x.device, past=start)
        mixed = layer(x[:, start:end], layout, state)
        again = replay_window(layer.options, state, mixed.step)
        state = mixed.state
        assert state["keys"].shape[1] <= 3
        assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
        outputs.append(mixed.output)
    torch.testing.assert_close(torch.cat(outputs, 1), whole.output)
    assert state["positions"].tolist() == [[12, 13, 14]] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads: expected a divisor of num_heads = 4"),
        ({"window_size": 0}, "window_size: expected a whole number >= 1"),
        ({"head_dim": None, "num_heads": 5, "num_kv_heads": 5}, "num_heads: expected a divisor"),
        ({"qk_norm": None}, "qk_norm: expected True or False"),
    ],
)
def test_softmax_options_refuse_contradictions(options, message):
    with pytest.raises(ValueError, match=message):
        attention(**options)


@pytest.mark.parametrize("tokens", [7, 9, 12, 13])
@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_in_blocks_is_attention_under_a_mask(tokens, window, packed):
    """Long rows go by blocks, with the same outputs, gradients and state."""
    rows = 1 if packed else 2
    torch.manual_seed(0)
    shapes = ((rows, tokens, 4, 6), (rows, tokens, 2, 6), (rows, tokens, 2, 5))
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    layout = TokenLayout.of_rows(tokens, torch.device("cpu"))
    if packed:
        bounds = torch.tensor([0, 2, 2, 6, tokens])
        layout = TokenLayout.of_packed(tokens, torch.device("cpu"), bounds)
    assert layout.consecutive
    found = attend(*given, layout, None, window)
    masked = attend(*given, replace(layout, consecutive=False), None, window)
    torch.testing.assert_close(found[0], masked[0], rtol=1e-12, atol=1e-12)
    assert all(torch.equal(found[1][name], masked[1][name]) for name in masked[1])
    d = torch.randn_like(found[0])
    for a, b in zip(*(torch.autograd.grad(x[0], given, d) for x in (found, masked)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_positions_given_by_hand_are_not_taken_for_columns():
    """A window is one of positions: where they repeat, more tokens than columns are in sight."""
    layout = TokenLayout(torch.zeros(1, 9, dtype=torch.int64))
    q, k, v = (torch.randn(1, 9, 1, 4) for _ in range(3))
    everything = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    output, _, _ = attend(q, k, v, layout, None, 2)
    torch.testing.assert_close(output, everything.transpose(1, 2))
