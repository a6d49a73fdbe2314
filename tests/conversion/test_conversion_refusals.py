"""What cannot be converted is named before anything is written; a failure leaves nothing behind."""

import json
import subprocess
import sys

import pytest
import torch
from forks import Forked, gsa
from safetensors.torch import load_file, save_file
from teachers import SIZES, build_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from gsa.cli import main
from gsa.conversion import ConvertConfig, convert
from gsa.model import GSAForCausalLM
from gsa.training.errors import RunError


def refused(tmp_path, error, *parts, teacher="teacher", **options):
    """Asserts that a conversion fails with all parts in its message, and writes nothing."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error) as caught:
        config = ConvertConfig(
            teacher=str(tmp_path / teacher), out=str(tmp_path / "new/out"), **options
        )
        convert(config)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert sorted(tmp_path.rglob("*")) == before


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder, change):
    """Rewrites the one file of weights after `change` has worked on them."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_no_folder_no_config_no_json(save, tmp_path):
    refused(tmp_path, FileNotFoundError, "teacher: expected a local Hugging Face folder, got ")
    folder, _ = save()
    (folder / "config.json").write_text("{")
    refused(tmp_path, ValueError, "config.json to be a JSON object (Expecting", "download it again")
    (folder / "config.json").write_text("[]")
    refused(tmp_path, ValueError, "config.json to be a JSON object (it holds a list)")
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    refused(tmp_path, ValueError, "expected a config.json that transformers can read", "hidden_siz")
    (folder / "config.json").unlink()
    refused(tmp_path, FileNotFoundError, "expected a config.json in ")


@pytest.mark.parametrize("model_type", ["gpt_neox", "mixtral", None])
def test_another_family(save, tmp_path, model_type):
    folder, _ = save()
    change_config(folder, model_type=model_type)
    known = "expected a model_type of llama, mistral, qwen2, qwen3, got "
    refused(tmp_path, ValueError, known + repr(model_type))


def test_quantised_weights(save, tmp_path):
    folder, _ = save(shard="1GB")
    change_config(folder, quantization_config={"quant_method": "awq", "bits": 4})
    refused(tmp_path, ValueError, "got quantised ones (awq", "dequantise it first")
    change_config(folder, quantization_config=None)
    name = "model.layers.0.self_attn.q_proj.weight"
    change_weights(folder, lambda w: w.update({name: w[name].to(torch.int8)}))
    refused(tmp_path, ValueError, f"got I8 for {name}", "expected weights in F64, F32, BF16, F16")


def test_files_that_are_missing_or_damaged(save, tmp_path):
    folder, _ = save(shard="8KB")
    files = sorted(folder.glob("model-*"))
    kept = files[1].read_bytes()
    files[1].unlink()
    expected = f"expected {len(files)} files of weights in {folder}, missing {files[1].name}"
    refused(tmp_path, FileNotFoundError, expected, "download")
    files[1].write_bytes(kept[:-100])
    refused(tmp_path, ValueError, f"expected {files[1]} to be a whole safetensors file", "again")
    files[1].write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(tmp_path, ValueError, f"expected {files[1]} to be a whole safetensors file, got 43 b")
    save_file({"x": torch.ones(2)}, files[1])
    refused(tmp_path, ValueError, "index.json promises", "that are not where it says")
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')
    refused(tmp_path, ValueError, "expected a weight_map in ")


def test_weights_in_a_format_that_is_not_read(save, tmp_path):
    folder, _ = save(shard="1GB")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(
        tmp_path,
        FileNotFoundError,
        "missing model.safetensors (it holds pytorch_model.bin, which cannot be read)",
        "save the model as safetensors first",
    )


def test_weights_that_do_not_fit_the_config(save, tmp_path):
    folder, _ = save(shard="1GB")
    name, norm = "model.layers.1.self_attn.k_proj.weight", "model.norm.weight"

    def change(weights):
        weights["score.weight"] = weights.pop(norm)
        weights[name] = weights[name][:6].clone()

    change_weights(folder, change)
    refused(
        tmp_path,
        ValueError,
        f"no weight in the files for {norm}",
        "no place for score.weight",
        f"{name} has shape [6, 24] where the config says [12, 24]",
    )
    change_config(folder, num_hidden_layers=2)
    refused(tmp_path, ValueError, "no place for model.layers.2.")


def test_a_tied_head_that_is_another(save, tmp_path):
    folder, _ = save("smollm2", shard="1GB")
    change_weights(folder, lambda w: w.update({"lm_head.weight": torch.ones(320, 24)}))
    refused(tmp_path, ValueError, "tie_word_embeddings: expected lm_head.weight to equal", "false")


@pytest.mark.parametrize(
    "change, parts",
    [
        ({"attention_bias": True}, ("attention_bias: expected False, got True", "o_proj")),
        ({"mlp_bias": True}, ("mlp_bias: expected False, got True",)),
        ({"hidden_act": "gelu"}, ("hidden_act: expected silu, got 'gelu'",)),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            (
                "rope_parameters['rope_type']: expected one of default, linear, llama3, yarn",
                "dynamic",
            ),
        ),
    ],
)
def test_what_a_gsa_model_has_no_place_for(save, tmp_path, change, parts):
    save(LlamaConfig(**SIZES | change), shard="1GB")
    refused(tmp_path, ValueError, "teacher: ", *parts)


def test_a_yarn_that_is_not_understood(save, tmp_path):
    yarn = dict(rope_type="yarn", rope_theta=1e4, factor=2.0, truncate=False)
    save(LlamaConfig(**SIZES, rope_parameters=yarn))
    refused(tmp_path, ValueError, "expected a factor, and truncate true, with rope_type yarn, got")


def test_layers_of_another_kind(save, tmp_path):
    folder, _ = save("qwen3")
    change_config(folder, layer_types=["full_attention", "linear_attention", "full_attention"])
    refused(
        tmp_path,
        ValueError,
        "layer_types: expected full_attention or sliding_attention, got linear_attention",
        keep_layers=(0,),
    )


def test_a_tokenizer_that_does_not_fit(save, tmp_path):
    folder, _ = save()
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    while len(tokenizer) <= 320:
        tokenizer.add_tokens([f"<extra {len(tokenizer)}>"])
    tokenizer.save_pretrained(folder)
    refused(
        tmp_path, ValueError, "expected a tokenizer with tokens below vocab_size = 320", "token 320"
    )
    (folder / "tokenizer.json").write_text("{}")
    refused(tmp_path, ValueError, "tokenizer: no tokenizer could be loaded from ")


@pytest.mark.parametrize(
    "options, part",
    [
        ({"keep_layers": (1, 3)}, "expected numbers from 0 to 2 (the teacher has 3 layers), got 3"),
        ({"keep_layers": (-1,)}, "keep_layers: expected numbers from 0 to 2"),
        ({"keep_layers": (1, 1)}, "keep_layers: expected each layer once"),
        ({"slots": 0}, "slots: expected a whole number >= 1, got 0"),
        ({"tau": 0.0}, "tau: expected a number > 0"),
        ({"feature_map": "elu"}, "feature_map: expected one of auto, swish, relu"),
        ({"gate_init": "zero"}, "gate_init: expected one of auto, normal, spread, pooled_keys"),
        ({"window": -1}, "window: expected a whole number >= 0"),
        ({"window": 4, "keep_layers": (0, 1, 2)}, "window: expected 0 with every layer kept"),
        (
            {"window": 4, "model": {"use_short_conv": True}},
            "window_branch: expected None with use_short_conv",
        ),
        (
            {"gate_init": "spread", "model": {"gate": "data_independent"}},
            "gate_init: expected normal with gate data_independent, got spread",
        ),
        ({"rope": 1}, "rope: expected true or false"),
        ({"seed": -1}, "seed: expected a whole number >= 0"),
        ({"seed": 1 << 63}, "seed: expected a number below 2^63"),
        ({"check_tokens": True}, "check_tokens: expected a whole number >= 0"),
        ({"model": {"hidden_size": 8}}, "model: expected keys of GSAConfig among gate, "),
        ({"model": {"gate": "none"}}, "gate: expected one of data_dependent"),
        (
            {"gate_init": "pooled_keys", "model": {"gate": "data_independent"}},
            "gate_init: expected normal with gate data_independent",
        ),
        (
            {"gate_init": "pooled_keys", "slots": 7},
            "slots: expected at most 6, the width of a head, with gate_init pooled_keys",
        ),
    ],
)
def test_options_that_do_not_fit(save, tmp_path, options, part):
    save()
    refused(tmp_path, ValueError, part, **options)


def test_a_folder_in_use_is_left_alone_and_an_empty_one_is_taken(save, tmp_path, capsys):
    folder, _ = save()
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert main(["convert", str(folder), "--out", str(out)]) == 2
    assert f"error: out: expected a new or empty folder, got {out}" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    (out / "mine.txt").unlink()
    left = tmp_path / ".out.incomplete"
    left.mkdir()
    (left / "model.safetensors").write_text("what a killed conversion left")
    assert main(["convert", str(folder), "--out", str(out), "--slots", "3"]) == 0
    assert GSAForCausalLM.from_pretrained(out).config.num_slots == 3
    assert not left.exists()


def test_a_failure_while_writing_leaves_nothing(save, tmp_path):
    """A limit on file sizes stands in for a full disk: both fail in the middle of a file."""
    folder, _ = save(shard="1GB")
    converting = Forked(gsa, ["convert", str(folder), "--out", str(tmp_path / "out")], 30_000)
    _, errors = converting.communicate()
    assert converting.returncode == 2, errors
    assert "could not be written (" in errors and "it is as it was before" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["teacher"]


def test_a_disk_without_room_is_seen_at_once(save, tmp_path, monkeypatch):
    save()
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    refused(tmp_path, RunError, "out: expected 0.0 GB free under ")


@pytest.mark.slow
def test_no_more_than_about_a_file_is_in_memory(tmp_path):
    """A teacher of 280 MB in files of up to 34 MB, in a process of its own."""
    sizes = SIZES | dict(hidden_size=1024, intermediate_size=2048, num_attention_heads=8)
    config = LlamaConfig(**sizes | dict(num_hidden_layers=8))
    teacher = AutoModelForCausalLM.from_config(config)
    teacher.save_pretrained(tmp_path / "teacher", max_shard_size="34MB")
    files = [path.stat().st_size for path in (tmp_path / "teacher").glob("*.safetensors")]
    assert sum(files) > 250e6 and max(files) < 35e6
    program = (
        "from gsa.conversion import ConvertConfig, convert;"
        "from transformers import LlamaModel;"
        "status = lambda: dict(line.split(':') for line in open('/proc/self/status'));"
        "peak = lambda: int(status()['VmHWM'].split()[0]) * 1024;"
        "config = ConvertConfig(teacher='teacher', out='out', check_tokens=0);"
        "before = peak(); convert(config); print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    # A file and the new weights beside it; modules that are loaded meanwhile are counted too.
    assert max(files) / 2 < int(done.stdout) < sum(files) / 3
