"""Weights named and stored as in September 2024 load to the same model as today's.

`september_2024` rewrites a folder saved by flash-linear-attention 0.6.0 into that layout; the
rules for the output norm's eps, which differed, are tested on both.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gsa.model import GSAConfig, GSAForCausalLM

FIXTURES = Path(__file__).parents[1] / "fixtures" / "fla"
NAMES = ["gsa-2.7b-shrunk", "gsa-7b-mistral-shrunk"]
FP64_BOUND = 64 * torch.finfo(torch.float64).eps
# Keys that fla 0.6.0 writes and 2024 did not have.
LATER_KEYS = {"attn", "attnres_block_size", "fuse_linear_cross_entropy", "fuse_swiglu", "dtype"}
LATER_KEYS |= {"use_l2warp", "output_norm_eps"}


def september_2024(weights, config):
    """The same model as the folders of 2024 hold it: (weights, config), nothing modified in place.

    The pre-norms move inside, `attn_norm` → `attn.norm` and `mlp_norm` → `mlp.norm`; gate and up
    are stacked, in this order, as the 2F rows of `mlp.gate_proj`; the config says `norm_first`.
    """
    old = {}
    for key, value in weights.items():
        if key.endswith(".mlp.gate_proj.weight"):
            value = torch.cat([value, weights[key.replace("gate_proj", "up_proj")]])
        if not key.endswith(".mlp.up_proj.weight"):
            old[re.sub(r"\.(attn|mlp)_norm\.", r".\1.norm.", key)] = value
    kept = {key: value for key, value in config.items() if key not in LATER_KEYS}
    stamp = {"norm_first": True, "torch_dtype": "bfloat16", "transformers_version": "4.44.2"}
    return old, kept | stamp


def published(name):
    config = json.loads((FIXTURES / name / "config.json").read_text())
    return load_file(FIXTURES / name / "model.safetensors"), config


def write(folder, weights, config):
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def evaluation_of(name):
    return load_file(FIXTURES / f"{name}.evaluation.safetensors")


@torch.no_grad()
def logits_of(folder, input_ids, **overrides):
    model = GSAForCausalLM.from_pretrained(folder, dtype=torch.float64, **overrides)
    return model.eval()(input_ids).logits


def relative_error(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_both_layouts_give_the_same_logits_at_norm_eps_1e_5(tmp_path, name):
    weights, config = published(name)
    config |= {"norm_eps": 1e-5}
    new = write(tmp_path / "new", weights, config)
    old_weights, old_config = september_2024(weights, config)
    assert any(key.endswith("attn.norm.weight") for key in old_weights)
    assert len(old_weights) == len(weights) - config["num_hidden_layers"]
    old = write(tmp_path / "old", old_weights, old_config)
    ids = evaluation_of(name)["long.input_ids"]
    assert torch.equal(logits_of(old, ids), logits_of(new, ids))


def test_the_old_layout_of_the_7b_model_gives_what_fla_computes(tmp_path):
    name = "gsa-7b-mistral-shrunk"
    old = write(tmp_path / "old", *september_2024(*published(name)))
    recorded = evaluation_of(name)
    for inputs in ("short", "long"):
        logits = logits_of(old, recorded[f"{inputs}.input_ids"])
        assert relative_error(logits, recorded[f"{inputs}.fp64.logits"]) < FP64_BOUND


@pytest.mark.parametrize("name", NAMES)
def test_old_weights_land_renamed_and_split_with_nothing_left_over(tmp_path, name):
    weights, config = published(name)
    old = write(tmp_path / "old", *september_2024(weights, config))
    model, info = GSAForCausalLM.from_pretrained(old, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    loaded = model.state_dict()
    assert set(loaded) == set(weights)
    for key, value in weights.items():
        assert torch.equal(loaded[key], value), key


def test_the_auto_class_reads_the_old_layout_too(tmp_path):
    name = NAMES[0]
    old = write(tmp_path / "old", *september_2024(*published(name)))
    ids = evaluation_of(name)["short.input_ids"]
    auto = AutoModelForCausalLM.from_pretrained(old, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(auto(ids).logits, logits_of(old, ids))


def test_the_two_rules_for_the_eps_of_the_output_norm():
    """2024 ran the output norm at the config's eps; since then fla runs it at 1e-5, always."""
    assert GSAConfig(norm_eps=1e-6, norm_first=True).output_norm_eps == 1e-6
    assert GSAConfig(norm_eps=3e-6, norm_first=True).output_norm_eps == 3e-6
    assert GSAConfig(norm_eps=1e-6).output_norm_eps == 1e-5
    assert GSAConfig(norm_eps=1e-6, norm_first=True, output_norm_eps=2e-5).output_norm_eps == 2e-5


@pytest.mark.parametrize("inputs", ["short", "long"])
def test_each_layout_computes_with_the_output_norm_of_its_time(tmp_path, inputs):
    """The 2.7B config says 1e-6: today's folder runs at 1e-5, the one of 2024 at 1e-6."""
    name = "gsa-2.7b-shrunk"
    recorded = evaluation_of(name)
    ids = recorded[f"{inputs}.input_ids"]
    since_2025 = recorded[f"{inputs}.fp64.logits"]
    at_config_eps = recorded[f"{inputs}.fp64_config_eps.logits"]
    assert relative_error(at_config_eps, since_2025) > 0.1

    weights, config = published(name)
    plain = {key: value for key, value in config.items() if key != "norm_first"}
    new = write(tmp_path / "new", weights, plain)
    old = write(tmp_path / "old", *september_2024(weights, config))
    assert relative_error(logits_of(new, ids), since_2025) < FP64_BOUND
    assert relative_error(logits_of(old, ids), at_config_eps) < FP64_BOUND
    assert relative_error(logits_of(old, ids, output_norm_eps=1e-5), since_2025) < FP64_BOUND


@pytest.mark.parametrize("layout", ["2024", "2025"])
def test_what_we_save_says_the_eps_and_loads_to_the_same_logits(tmp_path, layout):
    weights, config = published("gsa-2.7b-shrunk")
    ids = evaluation_of("gsa-2.7b-shrunk")["short.input_ids"]
    if layout == "2024":
        source = write(tmp_path / "source", *september_2024(weights, config))
    else:
        source = FIXTURES / "gsa-2.7b-shrunk"
    GSAForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert saved["output_norm_eps"] == {"2024": 1e-6, "2025": 1e-5}[layout]
    again = load_file(tmp_path / "ours" / "model.safetensors")
    assert set(again) == set(weights)
    assert all(torch.equal(again[key], weights[key]) for key in weights)
    assert torch.equal(logits_of(tmp_path / "ours", ids), logits_of(source, ids))


def both_spellings(weights):
    return weights | {"model.layers.0.attn_norm.weight": torch.ones(40)}


def odd_rows(weights):
    stacked = weights["model.layers.1.mlp.gate_proj.weight"]
    return weights | {"model.layers.1.mlp.gate_proj.weight": stacked[:-1].contiguous()}


def no_inner_norm(weights):
    return {key: value for key, value in weights.items() if "layers.0.mlp.norm" not in key}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (both_spellings, r"layers\.0\.attn(_|\.)norm"),
        (odd_rows, r"layers\.1\.mlp\.gate_proj"),
        (no_inner_norm, r"layers\.0\.mlp(_|\.)norm"),
    ],
)
def test_a_damaged_old_folder_is_refused_by_name(tmp_path, change, named):
    weights, config = september_2024(*published("gsa-2.7b-shrunk"))
    old = write(tmp_path / "old", change(weights), config)
    with pytest.raises((ValueError, RuntimeError), match=named):
        GSAForCausalLM.from_pretrained(old)
