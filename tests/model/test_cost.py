"""The cost model against what it counts: built models, products seen by torch, real caches."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gsa.benchmark.model_cost import CostConfig, bench_cost, read_config
from gsa.model import GSAConfig, GSAForCausalLM
from gsa.model.cost import (
    count_parameters,
    device_hours,
    flops_per_token,
    kv_cache_bytes,
    mean_visible,
    memory_flops,
    mfu,
    peak_flops,
    state_bytes,
    training_bytes,
)
from gsa.recipes import RECIPES

PAPER = {"1.3b": 1.377e9, "2.7b": 2.728e9, "340m": 380.2e6, "125m": 125.8e6, "34m": 34.4e6}
MORE = {
    "tied": {"tie_word_embeddings": True},
    "t2r": {"feature_map": "t2r"},
    "bare_norm": {"elementwise_affine": False},
    "wide_values": {"expand_v": 2},
    "bounds in some layers": {"mixer": "hgrn2", "attn": {"layers": [1], "num_heads": 2}},
}


def parameters_of(config):
    with torch.device("meta"):
        return sum(p.numel() for p in GSAForCausalLM(config).parameters())


def test_parameters_are_those_of_the_model(variant, tiny):
    model = tiny(**variant)
    assert count_parameters(model.config).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("options", MORE.values(), ids=MORE.keys())
def test_parameters_of_further_options(tiny, options):
    config = tiny(**options).config
    found = count_parameters(config)
    assert found.total == parameters_of(config)
    assert found.total - found.non_embedding == found.embeddings + found.head


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_have_the_size_that_they_say(name):
    config = GSAConfig(**{"vocab_size": 32000, **RECIPES[name]().model})
    found = count_parameters(config).total
    assert found == parameters_of(config)
    if name in PAPER:
        assert found == pytest.approx(PAPER[name], rel=1e-3)


def test_flops_of_linear_layers_are_those_that_torch_sees(variant, tiny, token_ids):
    """What it cannot see, the operator, is left: the rest agrees to the last product."""
    if "attn" in variant or "window_branch" in variant:
        pytest.skip("softmax layers have products beside those of linear layers")
    model, ids = tiny(**variant).float(), token_ids(1, 12)
    with FlopCounterMode(display=False) as seen:
        model(ids, use_cache=False)
    found = flops_per_token(model.config, 12)
    assert seen.get_total_flops() == 12 * (found.projections + found.mlp + found.head)


def test_the_memory_counts_as_two_reads_and_a_write(tiny):
    options = tiny(num_kv_heads=2).config.mixer_options(0)
    per_slot = 2 * options.slots * (options.key_width + options.value_width)
    assert memory_flops(options) == options.num_heads * per_slot + options.kv_heads * per_slot
    found = flops_per_token(tiny().config, 5)
    assert found.forward_backward == 3 * found.forward and found.attention == 0


def test_softmax_layers_cost_by_what_they_see():
    assert mean_visible(4, None) == (1 + 2 + 3 + 4) / 4
    assert mean_visible(4, 2) == (1 + 2 + 2 + 2) / 4
    assert mean_visible(4, 9) == mean_visible(4, None)


@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_a_state_has_the_bytes_of_a_real_cache(variant, tiny, token_ids, tokens):
    model = tiny(**variant).float()
    with torch.no_grad():
        cache = model(token_ids(1, tokens), use_cache=True).past_key_values
    real = sum(
        x.numel() * x.element_size()
        for layer in cache.layers
        for x in layer.state.values()
        if torch.is_tensor(x)
    )
    assert state_bytes(model.config, tokens, torch.float32) == real


def test_utilisation_is_only_said_of_known_devices():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None and peak_flops("cpu") is None
    assert mfu(1e4, 8e9, None) is None
    assert mfu(1e4, 8e9, 1e14, devices=2) == pytest.approx(0.4)
    assert device_hours(1e9, 3.6e9, 1e15, 0.5) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="mfu: expected"):
        device_hours(1.0, 1.0, 1.0, math.inf)
    assert training_bytes(10).total == 160
    assert training_bytes(10, weights=torch.bfloat16, gradients=torch.bfloat16).total == 120


def test_the_command_says_and_writes_the_same(tmp_path, capsys, tiny):
    tiny().config.save_pretrained(tmp_path)
    out = tmp_path / "cost.json"
    recipes = {"1.3b": RECIPES["1.3b"]().model}
    config = CostConfig(models=("1.3b", str(tmp_path)), tokens=100e9, out=str(out))
    document = bench_cost(config, recipes, {"gsa": dict})
    printed = capsys.readouterr().out
    assert "1,376.9M" in printed and "GPU-hours" in printed and out.is_file()
    large, small = document["models"]
    assert large["lengths"][0]["state_bytes"] == 24 * 4 * 64 * 1024 * 4
    assert large["lengths"][0]["kv_cache_bytes"] == kv_cache_bytes(
        GSAConfig(**{"vocab_size": 32000, **recipes["1.3b"]}), 2048
    )
    assert small["parameters"]["total"] == count_parameters(tiny().config).total
    with pytest.raises(ValueError, match="models: expected a recipe"):
        read_config("nothing")
    with pytest.raises(ValueError, match="device: expected one of"):
        CostConfig(tokens=1.0, device="GPU")
