"""Rivals sized alike, as recipes and as commands."""

import json

import pytest

from gsa.architectures import ARCHITECTURES, sized_alike
from gsa.cli import main
from gsa.data import PrepareConfig, prepare
from gsa.layers.options import LinearAttentionOptions, SoftmaxAttentionOptions
from gsa.model import GSAConfig, GSAForCausalLM
from gsa.model.cost import count_parameters, kv_cache_bytes, state_bytes
from gsa.recipes import RECIPES
from gsa.training.metrics import read_metrics

SIZES = ("34m", "125m", "340m", "1.3b", "2.7b")


def config_of(arch, size):
    return GSAConfig(**{"vocab_size": 32000, **sized_alike(arch, RECIPES[size]().model)})


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_parameters_are_as_many_within_two_percent(arch, size):
    own, rival = count_parameters(config_of("gsa", size)), count_parameters(config_of(arch, size))
    assert rival.total == pytest.approx(own.total, rel=0.02)
    assert rival.embeddings == own.embeddings and rival.head == own.head


def test_states_at_1_3b_are_those_of_the_paper():
    """Appendix C, in numbers per layer: GSA and HGRN2 128 d, GLA 256 d, RetNet 512 d. RWKV6, whose
    heads are of 64, keeps its last input (in bf16) too; Mamba, twice as deep, 64 d in two layers
    and three tokens of its convolution."""
    for arch, per_width in (("gsa", 128), ("hgrn2", 128), ("gla", 256), ("retnet", 512)):
        config = config_of(arch, "1.3b")
        assert state_bytes(config, 2048) == 24 * per_width * 2048 * 4, arch
    assert state_bytes(config_of("rwkv6", "1.3b"), 2048) == 24 * 2048 * (64 * 4 + 2)
    mamba = config_of("mamba", "1.3b")
    assert state_bytes(mamba, 2048) == mamba.num_hidden_layers * 2 * 2048 * (16 * 4 + 3 * 2)
    assert kv_cache_bytes(mamba, 9) == mamba.num_hidden_layers / 2 * 2 * 2048 * 9 * 2
    heads = {arch: config_of(arch, "1.3b").mixer_options(0) for arch in ARCHITECTURES}
    assert isinstance(heads["gla"], LinearAttentionOptions)
    assert (heads["gla"].key_width, heads["gla"].value_width) == (256, 512)
    assert isinstance(heads["transformer++"], SoftmaxAttentionOptions)
    assert heads["transformer++"].width == 128


def test_mistral_groups_heads_and_keeps_what_its_window_sees():
    config = config_of("mistral", "1.3b")
    options = config.mixer_options(0)
    assert isinstance(options, SoftmaxAttentionOptions)
    assert (options.num_heads, options.kv_heads, options.width) == (16, 4, 128)
    whole = state_bytes(config_of("transformer++", "1.3b"), 2048) - 24 * 2048 * 8  # positions
    assert state_bytes(config, 2048) - 24 * 2048 * 8 == whole / 4
    assert state_bytes(config, 4095) == state_bytes(config, 1 << 17)
    assert {type(config_of("mistral", size).mixer_options(0)) for size in SIZES} == {type(options)}


def test_what_cannot_be_is_refused():
    keys = RECIPES["34m"]().model
    with pytest.raises(ValueError, match="arch: expected one of gsa, abc, gla"):
        sized_alike("mamba2", keys)
    with pytest.raises(ValueError, match="arch: expected mixers smaller than the whole model"):
        sized_alike("retnet", keys | {"intermediate_size": 64})


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rivals")
    (folder / "text.txt").write_text("the gate lets go of what the slot has read before. " * 60)
    prepare(PrepareConfig(inputs=(str(folder / "text.txt"),), out=str(folder / "data"), quiet=True))
    return folder / "data"


@pytest.mark.parametrize("arch", [name for name in ARCHITECTURES if name != "gsa"])
def test_each_can_be_trained_and_used_by_the_same_commands(arch, shards, tmp_path, capsys):
    run = tmp_path / "run"
    command = ["train", "tiny", "--arch", arch, "--data", str(shards), "--out", str(run)]
    command += ["--steps", "30", "--warmup", "3"]
    assert main(command) == 0
    rows, _ = read_metrics(run)
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    config = GSAForCausalLM.from_pretrained(run).config
    assert (
        config.intermediate_size == sized_alike(arch, RECIPES["tiny"]().model)["intermediate_size"]
    )
    assert f"--arch {arch}" in (run / "report.md").read_text()
    assert main(command) == 0
    assert "is complete: nothing to do" in capsys.readouterr().err
    assert main(["generate", str(run), "--prompt", "the", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out.startswith("the")


def test_a_rival_s_run_is_not_gone_on_with_as_another(shards, tmp_path, capsys):
    run = tmp_path / "run"
    command = ["train", "tiny", "--data", str(shards), "--out", str(run), "--steps", "6"]
    assert main([*command, "--arch", "gla"]) == 0
    assert main([*command, "--arch", "retnet"]) == 2
    assert "model" in capsys.readouterr().err
    assert main([*command, "--arch", "mamba2"]) == 2
    assert "error: arch: expected one of gsa, abc, gla" in capsys.readouterr().err
    assert main([*command, "--arch", "gla", "--init", str(run)]) == 2
    assert "error: arch: expected none with init" in capsys.readouterr().err


def test_cost_of_every_architecture(tmp_path, capsys):
    out = tmp_path / "cost.json"
    command = ["bench", "cost", "34m", "1.3b", "--arch", "all", "--out", str(out)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "1.3b retnet" in printed and "KiB of state per layer" in printed
    found = {row["model"]: row for row in json.loads(out.read_text())["models"]}
    assert len(found) == 2 * len(ARCHITECTURES)
    assert found["1.3b gla"]["lengths"][0]["state_bytes_per_layer"] == 256 * 2048 * 4
    assert main(["bench", "cost", "34m", "--arch", "gla", "rwkv5"]) == 2
    assert "arch: expected all, or some of gsa, abc, gla" in capsys.readouterr().err
