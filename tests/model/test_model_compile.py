"""torch.compile of the whole model: one graph, the same loss and gradients."""

import pytest
import torch

OPTIONS = {
    "paper": {},
    "abc and convolution": {
        "gate": "abc",
        "use_short_conv": True,
        "num_kv_heads": 2,
        "rope_theta": 10.0,
    },
    "hybrid": {
        "gate": "data_independent",
        "output_gate": True,
        "attn": {"layers": [0], "num_heads": 2},
    },
    "window branch": {
        "window_branch": 5,
        "window_rope_theta": 10.0,
        "gate_bias": True,
        "num_kv_heads": 2,
    },
    "gla": {"mixer": "gla", "output_gate": True, "num_kv_heads": 2},
    "retnet": {"mixer": "retnet", "feature_map": "t2r", "rope_theta": 10.0},
    "hgrn2": {
        "mixer": "hgrn2",
        "num_hidden_layers": 3,
        "attn": {"layers": [1], "num_heads": 2},
    },
    "rwkv6": {"mixer": "rwkv6", "gate_low_rank": 3, "shift_low_rank": 2},
    "mamba": {
        "mixer": "mamba",
        "num_heads": 20,
        "head_dim": 1,
        "expand_k": 3,
        "intermediate_size": 0,
    },
}
PLAIN = ("paper", "hybrid", "gla", "mamba")
"""One of each operator, and attention; the mixers are the same code around them."""


@pytest.mark.parametrize(
    ("options", "packed"),
    [
        *(pytest.param(OPTIONS[name], True, id=f"{name}, packed") for name in OPTIONS),
        *(pytest.param(OPTIONS[name], False, id=name) for name in PLAIN),
    ],
)
def test_training_is_one_graph_with_the_same_gradients(tiny, token_ids, options, packed):
    torch.compiler.reset()
    model, ids = tiny(**options).train(), token_ids(1, 20)
    bounds = torch.tensor([0, 8, 8, 20], dtype=torch.int32) if packed else None
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads, losses = [], []
    for call in (model, compiled):
        loss = call(ids, labels=ids, cu_seqlens=bounds).loss
        loss.backward()
        losses.append(loss.item())
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.zero_grad()
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-9, atol=1e-12)
