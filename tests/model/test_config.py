"""GSAConfig: what it accepts, what it refuses, and that every field does something."""

import json
from dataclasses import fields

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from gsa.model import GSAConfig, GSAForCausalLM
from gsa.model.config import DEAD_KEYS

BASE = dict(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_heads=4,
    num_slots=5,
    intermediate_size=24,
)
HYBRID = {"attn": {"layers": [1], "num_heads": 4}}
GLA = {"mixer": "gla", "num_slots": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# For each field: another value, and the other fields that must be set for it to matter.
CHANGES_THE_WEIGHTS = {
    "vocab_size": (50, {}),
    "hidden_size": (24, {}),
    "num_hidden_layers": (3, {}),
    "num_heads": (2, {}),
    "num_kv_heads": (2, {}),
    "num_slots": (6, {}),
    "mixer": ("gla", {"num_slots": 64}),
    "gate_low_rank": (3, GLA),
    "shift_low_rank": (3, GLA | {"mixer": "rwkv6"}),
    "head_dim": (6, {}),
    "expand_k": (2, {}),
    "expand_v": (2, {}),
    "gate": ("data_independent", {}),
    "feature_map": ("t2r", {}),
    "qkv_bias": (True, {}),
    "qk_norm": (True, {}),
    "use_short_conv": (True, {}),
    "conv_size": (3, {"use_short_conv": True}),
    "output_norm": (False, {}),
    "output_gate": (True, {}),
    "gate_bias": (True, {}),
    "window_branch": (3, {}),
    "elementwise_affine": (False, {}),
    "hidden_ratio": (60, {"intermediate_size": None}),
    "intermediate_size": (32, {}),
    "attn": ({"layers": [0], "num_heads": 2, "num_kv_heads": 1}, {}),
}
CHANGES_THE_OUTPUT = {
    "gate": [("abc", {}), ("abc_printed", {})],
    "gate_logit_normalizer": [(2, {}), (2, GLA)],
    "feature_map": [("relu", {}), ("identity", {}), ("identity", GLA)],
    "value_activation": [("identity", {}), ("identity", GLA)],
    "output_activation": [("identity", {}), ("identity", {"output_norm": False})],
    "slot_activation": [("identity", {}), ("swish", {}), ("relu", {}), ("relu2", {})],
    "scale": [(0.5, {}), ("rsqrt_key", {})],
    "rope_theta": [(100.0, {})],
    "rope_scaling": [
        ({"rope_type": "linear", "factor": 4.0}, {"rope_theta": 100.0}),
        (LLAMA3, {"rope_theta": 100.0}),
    ],
    "window_branch": [(3, {"window_branch": 5})],
    "window_rope_theta": [(100.0, {"window_branch": 5})],
    "window_rope_scaling": [
        (
            {"rope_type": "linear", "factor": 4.0},
            {"window_branch": 5, "window_rope_theta": 100.0},
        ),
    ],
    "output_norm_eps": [(0.1, {}), (0.1, GLA)],
    "norm_eps": [(0.1, {"output_norm_eps": 1e-5})],
    "sliding_window": [(3, HYBRID)],
}
TESTED_BELOW_OR_ELSEWHERE = {
    "max_position_embeddings",
    "initializer_range",
    "tie_word_embeddings",
    "hidden_act",
    "use_cache",  # test_forward.py
    "pad_token_id",  # with the other two in test_generation.py
    "bos_token_id",
    "eos_token_id",
}


def build(**options):
    torch.manual_seed(0)
    return (
        GSAForCausalLM(GSAConfig(**(BASE | {"initializer_range": 0.3} | options))).double().eval()
    )


def own_fields():
    return {f.name for f in fields(GSAConfig)} - {f.name for f in fields(PreTrainedConfig)}


def test_every_field_is_covered_here():
    covered = set(CHANGES_THE_WEIGHTS) | set(CHANGES_THE_OUTPUT) | TESTED_BELOW_OR_ELSEWHERE
    assert own_fields() == covered


@pytest.mark.parametrize("name", CHANGES_THE_WEIGHTS)
def test_field_changes_the_weights(name):
    value, others = CHANGES_THE_WEIGHTS[name]
    shapes = [
        {key: tuple(weight.shape) for key, weight in build(**options).state_dict().items()}
        for options in (others, others | {name: value})
    ]
    assert shapes[0] != shapes[1]


@pytest.mark.parametrize(
    ("name", "value", "others"),
    [(name, *change) for name, changes in CHANGES_THE_OUTPUT.items() for change in changes],
)
def test_field_changes_the_output_with_the_same_weights(name, value, others):
    before, after = build(**others), build(**(others | {name: value}))
    after.load_state_dict(before.state_dict())
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert (before(ids).logits - after(ids).logits).abs().max() > 1e-4


def test_initializer_range_is_the_spread_of_the_weights():
    wide = dict(hidden_size=128, num_heads=4, intermediate_size=256)
    model = GSAForCausalLM(GSAConfig(**(BASE | wide), initializer_range=0.07))
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert (weight == 1).all()
        else:
            assert abs(weight.std().item() / 0.07 - 1) < 0.1, name


def test_tied_weights_are_one_parameter():
    tied, untied = build(tie_word_embeddings=True), build()
    assert tied.lm_head.weight is tied.model.embeddings.weight
    assert untied.lm_head.weight is not untied.model.embeddings.weight


def test_max_position_embeddings_bounds_generation_that_names_no_length():
    """transformers reads it where a prompt of embeddings comes with its default length."""
    model = build(max_position_embeddings=9, eos_token_id=None, pad_token_id=0).float()
    prompt = model.get_input_embeddings()(torch.arange(3, 8)[None]).detach()
    lengths = []
    for limit in (9, 14):
        model.config.max_position_embeddings = limit
        lengths.append(model.generate(inputs_embeds=prompt, do_sample=False).shape[1])
    assert lengths[0] < lengths[1] <= 14


def test_mlp_width_follows_the_published_rule():
    assert GSAConfig(hidden_size=2048).mlp_width == 5632
    assert GSAConfig(hidden_size=2560, num_heads=5).mlp_width == 6912
    assert GSAConfig(hidden_size=4096, intermediate_size=14336).mlp_width == 14336


@pytest.mark.parametrize("mixer", ["gsa", "gla", "retnet", "hgrn2", "rwkv6"])
def test_a_saved_config_has_the_fields_of_its_mixer_alone(mixer, tmp_path):
    config = GSAConfig(**(BASE | {"mixer": mixer, "num_slots": 64}))
    config.save_pretrained(tmp_path)
    saved = set(json.loads((tmp_path / "config.json").read_text()))
    assert ("num_slots" in saved) == (mixer == "gsa")
    assert ("gate_low_rank" in saved) == (mixer in ("gla", "rwkv6"))
    assert ("shift_low_rank" in saved) == (mixer == "rwkv6")
    assert GSAConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads: expected a divisor of hidden_size = 16"),
        ({"num_kv_heads": 3}, "num_kv_heads: expected a divisor of num_heads = 4"),
        ({"mixer": "mamba2"}, "mixer: expected one of gsa, gla, retnet, hgrn2, rwkv6, mamba"),
        (GLA | {"mixer": "mamba"}, "head_dim: expected 1 with expand_v 1"),
        ({"mixer": "gla"}, "num_slots: expected 64 with mixer 'gla', which has no use for it"),
        (GLA | {"use_short_conv": True}, "use_short_conv: expected False with mixer 'gla'"),
        (GLA | {"gate_low_rank": 0}, "gate_low_rank: expected a whole number >= 1"),
        (GLA | {"mixer": "retnet", "gate_low_rank": 8}, "gate_low_rank: expected 16 with mixer"),
        (GLA | {"mixer": "hgrn2", "qk_norm": True}, "qk_norm: expected False with mixer 'hgrn2'"),
        (GLA | {"mixer": "rwkv6", "num_kv_heads": 2}, "num_kv_heads: expected None with mixer"),
        ({"gate_low_rank": 8}, "gate_low_rank: expected 16 with mixer 'gsa'"),
        ({"num_slots": 0}, "num_slots: expected a whole number >= 1, got 0"),
        ({"hidden_size": 16.0}, "hidden_size: expected a whole number"),
        ({"num_heads": True}, "num_heads: expected a whole number"),
        ({"expand_k": 0.3}, "expand_k: expected a factor"),
        ({"gate": "sometimes"}, "gate: expected one of data_dependent, data_independent, abc"),
        ({"gate_logit_normalizer": 0}, "gate_logit_normalizer: expected a number > 0"),
        ({"feature_map": "elu"}, "feature_map: expected one of swish, relu, identity, t2r"),
        ({"value_activation": "relu"}, "value_activation: expected one of swish, identity"),
        ({"slot_activation": "gelu"}, "slot_activation: expected one of softmax"),
        ({"scale": "sqrt"}, 'scale: expected a number or "rsqrt_key"'),
        ({"qkv_bias": 1}, "qkv_bias: expected True or False"),
        ({"use_short_conv": True, "conv_size": 1}, "conv_size: expected a whole number >= 2"),
        ({"norm_eps": -1e-5}, "norm_eps: expected a number > 0"),
        ({"hidden_act": "gelu"}, "hidden_act: expected one of swish, silu"),
        (
            {"rope_scaling": {"rope_type": "linear"}},
            "rope_scaling: expected None without rope_theta",
        ),
        ({"rope_theta": 1e4, "head_dim": 5}, "rope_theta: expected an even head width"),
        ({"rope_theta": 1e4, "rope_scaling": {"rope_type": "longrope"}}, "linear, llama3, yarn"),
        ({"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear"}}, r"keys \['factor'"),
        ({"window_branch": 0}, "window_branch: expected a whole number >= 1"),
        ({"window_branch": 4, "use_short_conv": True}, "window_branch: expected None with use_sho"),
        ({"window_rope_theta": 10.0}, "window_rope_theta: expected None without window_branch"),
        (
            {"window_branch": 4, "window_rope_scaling": {"rope_type": "default"}},
            "window_rope_scaling: expected None without window_rope_theta",
        ),
        ({"gate_bias": True, "gate": "data_independent"}, "gate_bias: expected False with gate"),
        ({"sliding_window": 4}, "sliding_window: expected None without softmax layers"),
        ({"attn": {"layers": [2], "num_heads": 4}}, r"attn\['layers'\]: expected numbers below 2"),
        ({"attn": {"num_heads": 4}}, "attn: expected None, a dict with at least 'layers'"),
        ({"attn": {"layers": [1], "num_heads": 4, "window": 3}}, r"attn: unknown key \['window'\]"),
        ({"attn": [HYBRID["attn"], HYBRID["attn"]]}, "expected each layer once, got 1 twice"),
        ({"attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 3}}, "num_kv_heads"),
        ({"pad_token_id": 40}, "pad_token_id: expected a token below vocab_size = 40"),
        ({"attnres_block_size": 4}, "attnres_block_size"),
        ({"use_rope": True}, "use_rope"),
        ({"num_slotz": 8}, "GSAConfig: unknown key 'num_slotz'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected True or False"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"initializer_range": 0}, "initializer_range"),
    ],
)
def test_contradictions_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        GSAConfig(**(BASE | options))


@pytest.mark.parametrize("key", sorted(DEAD_KEYS))
def test_dead_keys_are_dropped(key):
    config = GSAConfig(**BASE, **{key: 1})
    assert not hasattr(config, key) or hasattr(PreTrainedConfig(), key)
    assert key not in json.loads(config.to_json_string())


def test_silu_is_another_name_of_swish():
    assert GSAConfig(**BASE, hidden_act="silu").hidden_act == "silu"


def test_the_misspelt_expansions_are_understood():
    config = GSAConfig(**BASE, exapnd_k=2, exapnd_v=0.5)
    assert (config.expand_k, config.expand_v) == (2, 0.5)


def test_round_trips(tmp_path):
    config = GSAConfig(
        **BASE,
        gate="abc",
        scale="rsqrt_key",
        attn=[{"layers": [1], "num_heads": 2, "window_size": 3}],
        num_kv_heads=2,
        norm_eps=1e-4,
        pad_token_id=3,
        dtype="bfloat16",
    )
    again = GSAConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    for loader in (GSAConfig, AutoConfig):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is GSAConfig
        for name in own_fields():
            assert getattr(loaded, name) == getattr(config, name), name
    assert json.loads((tmp_path / "config.json").read_text())["output_norm_eps"] == 1e-5


def test_overrides_on_loading_are_checked_with_the_rest(tmp_path):
    GSAConfig(**BASE).save_pretrained(tmp_path)
    assert GSAConfig.from_pretrained(tmp_path, num_slots=7).num_slots == 7
    with pytest.raises(ValueError, match="num_kv_heads"):
        GSAConfig.from_pretrained(tmp_path, num_kv_heads=3)
