"""Tiny models, one per way of remembering, in fp64 so that equal means equal."""

import json

import torch
from forks import limit_files

from gsa.generation import Decoder, ModelState
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
    "gla": {
        "mixer": "gla",
        "num_kv_heads": 2,
        "expand_k": 0.5,
        "gate_low_rank": 3,
        "output_gate": True,
        "feature_map": "identity",
        "value_activation": "identity",
        "scale": "rsqrt_key",
    },
    "retnet": {"mixer": "retnet", "expand_v": 2, "rope_theta": 100.0, "output_gate": True},
    "hgrn2": {
        "mixer": "hgrn2",
        "num_kv_heads": 2,
        "expand_v": 2,
        "value_activation": "identity",
    },
    "rwkv6": {"mixer": "rwkv6", "expand_v": 2, "gate_low_rank": 3, "shift_low_rank": 2},
    "mamba": {
        "mixer": "mamba",
        "num_heads": 20,
        "head_dim": 1,
        "expand_k": 3,
        "gate_low_rank": 2,
        "conv_size": 3,
        "intermediate_size": 0,
    },
    "supra": {
        "mixer": "retnet",
        "num_kv_heads": 2,
        "feature_map": "t2r",
        "rope_theta": 100.0,
        "qk_norm": True,
        "qkv_bias": True,
        "attn": {"layers": [1], "num_heads": 2, "num_kv_heads": 1, "window_size": 4},
    },
    "window": {
        "attn": [{"layers": [0], "num_heads": 2, "window_size": 4, "rope_theta": 50.0}],
        "gate": "abc",
        "use_short_conv": True,
        "conv_size": 3,
    },
}

SLOTS = {
    **{"num_heads": 9, "num_kv_heads": 3, "head_dim": 6, "gate_bias": True, "rope_theta": 100.0},
    **{"feature_map": "identity", "value_activation": "identity", "scale": "rsqrt_key"},
    **{"output_activation": "identity", "output_norm": False, "tie_word_embeddings": True},
}
"""The form that `gsa convert` makes unless told otherwise."""


def build_tiny(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_heads=4)
    if changes.get("mixer", "gsa") == "gsa":
        sizes |= dict(num_slots=5)
    rest = dict(intermediate_size=24, initializer_range=0.4, eos_token_id=None, pad_token_id=0)
    config = GSAConfig(**(sizes | rest | changes))
    return GSAForCausalLM(config).double().eval()


def write_on(folder, sampling):
    """Prints what each variant writes after the state that a folder holds, as JSON."""
    texts = {}
    for name, variant in VARIANTS.items():
        state = ModelState.load(folder / f"{name}.safetensors")
        texts[name] = list(Decoder(build_tiny(**variant)).write(state, sampling))
    print(json.dumps(texts))


def save_without_room(state, path):
    """Prints what is said when a state finds no room."""
    limit_files(1000)
    try:
        state.save(path)
    except OSError as error:
        print(error)
