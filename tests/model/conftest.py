"""Tiny models, one per way of remembering, in fp64 so that equal means equal."""

import pytest
import torch

from gsa.model import GSAConfig, GSAForCausalLM

VARIANTS = {
    "paper": {},
    "converted": {
        "num_kv_heads": 2,
        "rope_theta": 100.0,
        "qk_norm": True,
        "qkv_bias": True,
        "output_gate": True,
        "head_dim": 6,
    },
    "convolution": {"use_short_conv": True, "num_kv_heads": 1},
    "abc": {"gate": "abc"},
    "abc_printed": {"gate": "abc_printed"},
    "static_gate": {"gate": "data_independent"},
    "hybrid": {"attn": {"layers": [1], "num_heads": 2, "num_kv_heads": 1}},
    "window_branch": {
        "window_branch": 4,
        "window_rope_theta": 50.0,
        "num_kv_heads": 2,
        "gate_bias": True,
    },
    "window": {
        "attn": [{"layers": [0], "num_heads": 2, "window_size": 4, "rope_theta": 50.0}],
        "gate": "abc",
        "use_short_conv": True,
        "conv_size": 3,
    },
}


def build_tiny(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_heads=4, num_slots=5)
    rest = dict(intermediate_size=24, initializer_range=0.4, eos_token_id=None, pad_token_id=0)
    config = GSAConfig(**(sizes | rest | changes))
    return GSAForCausalLM(config).double().eval()


@pytest.fixture(params=VARIANTS)
def variant(request):
    """The options of each variant in turn."""
    return VARIANTS[request.param]


@pytest.fixture
def tiny():
    """Builds a tiny fp64 language model: tiny(seed=0, **config)."""
    return build_tiny


@pytest.fixture
def model(variant):
    """A tiny fp64 language model of each variant in turn."""
    return build_tiny(**variant)


@pytest.fixture
def token_ids():
    """Random token ids: token_ids(rows, tokens, seed=0), never the padding token."""

    def draw(rows, tokens, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, 40, (rows, tokens), generator=generator)

    return draw
