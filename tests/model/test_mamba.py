"""Mamba against transformers' own, and the first values that its paper gives it."""

import pytest
import torch
from tiny_models import VARIANTS
from torch import nn
from torch.nn import functional as F
from transformers import MambaConfig, MambaForCausalLM

from gsa.model import GSAConfig, GSAForCausalLM
from gsa.training.optimizer import decay_groups

D, E, K, R, TAPS = 12, 24, 5, 3, 4
NAMES = {
    "v_conv.weight": "conv1d.weight",
    "v_conv.bias": "conv1d.bias",
    "select_proj.weight": "x_proj.weight",
    "step_proj.weight": "dt_proj.weight",
    "step_proj.bias": "dt_proj.bias",
    "o_proj.weight": "out_proj.weight",
    "log_rate": "A_log",
    "skip": "D",
}


def build(**changes):
    sizes = dict(vocab_size=40, hidden_size=D, num_hidden_layers=2, intermediate_size=0)
    sizes |= dict(num_heads=E, head_dim=1, expand_k=K, gate_low_rank=R, conv_size=TAPS)
    ends = dict(tie_word_embeddings=True, initializer_range=0.3)
    return GSAForCausalLM(GSAConfig(mixer="mamba", **(sizes | ends | changes)))


def theirs_with_weights_of(model):
    """Their model, computing in fp64; its norms, which are fp32 whatever the dtype, are torch's."""
    config = MambaConfig(
        vocab_size=40, hidden_size=D, num_hidden_layers=2, state_size=K, conv_kernel=TAPS,
        expand=2, time_step_rank=R, residual_in_fp32=False,
    )  # fmt: skip
    theirs = MambaForCausalLM(config).double()
    blocks = [(theirs.backbone, "norm_f", model.model.norm)]
    for own, block in zip(model.model.layers, theirs.backbone.layers, strict=True):
        blocks.append((block, "norm", own.attn_norm))
        weights = {there: own.attn.get_parameter(name) for name, there in NAMES.items()}
        weights["in_proj.weight"] = torch.cat([own.attn.v_proj.weight, own.attn.g_proj.weight])
        block.mixer.load_state_dict(weights)
    for owner, name, norm in blocks:
        setattr(owner, name, nn.RMSNorm(D, norm.eps, dtype=torch.float64))
    theirs.backbone.embeddings.weight.data.copy_(model.model.embeddings.weight)
    theirs.tie_weights()
    return theirs


def test_logits_and_gradients_are_those_of_transformers(monkeypatch):
    """The tolerance is fp64's rounding in sums of at most a hundred numbers, some layers deep."""
    torch.manual_seed(0)
    model = build().double()
    for parameter in model.parameters():  # first values would make steps of all channels small
        nn.init.normal_(parameter, std=0.5) if parameter.dim() > 1 else nn.init.ones_(parameter)
    theirs = theirs_with_weights_of(model)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # so that theirs is in fp64
    ids = torch.randint(3, 40, (2, 70))
    d = torch.randn(2, 70, 40, dtype=torch.float64)
    logits = [one(ids, use_cache=False).logits for one in (model, theirs)]
    assert logits[0].dtype == torch.float64 and logits[0].std() > 0.1
    torch.testing.assert_close(*logits, rtol=1e-11, atol=1e-11)
    for one in logits:
        (one * d).sum().backward()
    for own, block in zip(model.model.layers, theirs.backbone.layers, strict=True):
        pairs = [
            (own.attn.get_parameter(n), block.mixer.get_parameter(m)) for n, m in NAMES.items()
        ]
        pairs.append((own.attn_norm.weight, block.norm.weight))
        for ours, other in pairs:
            torch.testing.assert_close(ours.grad, other.grad, rtol=1e-10, atol=1e-9)
        joined = torch.cat([own.attn.v_proj.weight.grad, own.attn.g_proj.weight.grad])
        torch.testing.assert_close(joined, block.mixer.in_proj.weight.grad, rtol=1e-10, atol=1e-9)


def test_first_values_are_the_paper_s_and_are_not_decayed():
    torch.manual_seed(0)
    model = build(num_heads=400, expand_k=16, hidden_size=D)
    mixer = model.model.layers[1].attn
    assert torch.allclose(mixer.log_rate.exp(), torch.arange(1.0, 17).expand(400, 16))
    assert (mixer.skip == 1).all() and (mixer.v_conv.bias == 0).all()
    steps = F.softplus(mixer.step_proj.bias).log10()
    assert steps.min() > -3.01 and steps.max() < -0.99
    assert abs(steps.mean() + 2) < 0.1 and abs(steps.std() - 2 / 12**0.5) < 0.1
    assert mixer.step_proj.weight.abs().max() <= R**-0.5
    _, kept = decay_groups(model)
    own = {name.split("attn.")[1] for name in kept if ".1.attn." in name}
    assert own == {"log_rate", "skip", "step_proj.bias", "v_conv.weight", "v_conv.bias"}


@pytest.mark.parametrize("field", ["head_dim", "expand_v"])
def test_channels_are_heads_of_width_one(field):
    with pytest.raises(ValueError, match=f"{field}: expected 1"):
        GSAConfig(**(VARIANTS["mamba"] | {"hidden_size": 16, field: 2}))
