"""Every command as a user types it, on a tiny corpus."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gsa.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent.parent
TEXT = "The slot forgets, the gate remembers; ä word or two in UTF-8. " * 30


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text(TEXT)
    (tmp_path / "texts" / "two.txt").write_text(TEXT[::-1])
    return tmp_path / "texts"


@pytest.fixture
def shards(corpus, tmp_path, capsys):
    assert main(["data", "prepare", str(corpus), "--out", str(tmp_path / "shards")]) == 0
    capsys.readouterr()
    return tmp_path / "shards"


def train_command(shards, out, *more):
    return ["train", "tiny", "--data", str(shards), "--out", str(out), "--steps", "8", *more]


def fails(arguments, capsys):
    """The message of a command that fails with exit code 2, a single line on stderr."""
    assert main(arguments) == 2
    output = capsys.readouterr()
    last = output.err.strip().splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in output.err
    return last


def test_prepare_train_generate(shards, tmp_path, capsys):
    run = tmp_path / "run"
    command = train_command(shards, run, "--model.num_slots", "4", "--validation", str(shards))
    assert main(command) == 0
    assert json.loads((run / "config.json").read_text())["num_slots"] == 4
    weights = load_file(run / "model.safetensors")
    assert weights["model.layers.0.attn.f_proj.weight"].shape == (2 * 4, 32)
    report = (run / "report.md").read_text()
    assert "gsa train tiny --data" in report and "--model.num_slots 4" in report
    assert "one.txt" in report
    capsys.readouterr()

    generate = ["generate", str(run), "--prompt", "The slot", "--max-new-tokens", "40"]
    texts = []
    for more in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"], ["--greedy"]):
        assert main([*generate, *more]) == 0
        texts.append(capsys.readouterr().out)
    assert all(text.startswith("The slot") and len(text) > 20 for text in texts)
    assert texts[0] == texts[1] != texts[2]

    assert main(command) == 0
    assert "is complete: nothing to do" in capsys.readouterr().err

    exported = tmp_path / "exported"
    assert main(["export", str(run), "--out", str(exported)]) == 0
    assert capsys.readouterr().out == f"{exported}\n"
    found = load_file(exported / "model.safetensors")
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert f"out: {exported} exists" in fails(["export", str(run), "--out", str(exported)], capsys)


def test_a_dataset_and_a_mixture_as_typed(corpus, shards, tmp_path, capsys, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/a.jsonl").write_text(json.dumps({"body": TEXT}) + "\n")
    other = tmp_path / "other"
    source = [f"hf:{tmp_path / 'rows'}", "--text-key", "body", "--streaming"]
    assert main(["data", "prepare", *source, "--out", str(other)]) == 0
    run = tmp_path / "run"
    assert main(train_command(f"{shards}:0.75,{other}:0.25", run)) == 0
    report = (run / "report.md").read_text()
    assert f"{other}, weight 0.25:" in report and "- rows@train (" in report
    capsys.readouterr()
    message = fails(train_command(f"{shards}:0.5,{other}:0.5", run), capsys)
    assert "by other weights (3/4, 1/4 there, 1/2, 1/2 asked)" in message
    assert (
        main(["data", "prepare", str(corpus), "--tokenizer", "mistral", "--out", f"{run}-m"]) == 0
    )
    assert "vocabulary 32000" in capsys.readouterr().out
    message = fails(train_command(f"{shards}:1,{run}-m:1", tmp_path / "none"), capsys)
    assert "were made with different tokenizers" in message
    message = fails(train_command("hf:allenai/c4/en", tmp_path / "none"), capsys)
    assert "does not resume exactly" in message and "gsa data prepare hf:allenai/c4/en" in message


def test_options_override_the_recipe(shards, tmp_path):
    run = tmp_path / "run"
    options = ("--lr=0.005", "--dtype", "bf16", "--clip", "inf", "--no-master-weights")
    assert main(train_command(shards, run, *options)) == 0
    config = json.loads((run / "train.json").read_text())["config"]
    assert (config["lr"], config["dtype"], config["steps"]) == (0.005, "bf16", 8)
    assert config["clip"] == float("inf") and config["master_weights"] is False


def test_info_says_what_runs_here(capsys):
    import torch

    assert main(["info"]) == 0
    output = capsys.readouterr().out
    assert torch.__version__ in output
    assert f"threads       {torch.get_num_threads()}\n" in output
    assert "impl on cpu   chunked: " in output


def test_bench_ops_ends_in_json(capsys):
    command = "bench ops --device cpu --tokens 32 64 --seconds 0.01 --heads 1 --width 8 --slots 8"
    assert main(command.split()) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["tokens"] for row in result["rows"]] == [32, 64]


def test_bench_ops_has_the_options_of_its_device(capsys, monkeypatch):
    import torch

    def helps(*more):
        with pytest.raises(SystemExit) as caught:
            main(["bench", "ops", *more, "--help"])
        assert caught.value.code == 0
        return capsys.readouterr().out

    assert "--max-loop" in helps("--device", "cpu") and "--peers" not in helps("--device=cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "--peers" in helps() and "--max-loop" not in helps("--device", "cuda")
    assert "--max-loop" in helps("--device", "cpu")
    with pytest.raises(SystemExit) as caught:
        main(["bench", "ops", "--tokens", "32"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --tokens 32" in capsys.readouterr().err


def test_bench_ops_without_the_device_or_the_peer_it_was_asked_for(capsys, monkeypatch, tmp_path):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = fails(["bench", "ops", "--device", "cuda"], capsys)
    assert "device: expected a CUDA device, but torch sees none" in message
    assert "device: expected auto, cpu or cuda" in fails(["bench", "ops", "--device=x"], capsys)
    if importlib.util.find_spec("fla"):
        pytest.skip("flash-linear-attention is installed here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    out = tmp_path / "gpu.json"
    message = fails(["bench", "ops", "--peers", "--out", str(out)], capsys)
    assert "pip install 'gated-slots[peers]'" in message and not out.exists()
    message = fails(["bench", "ops", "--cases", "2.7B"], capsys)
    assert message.startswith("error: cases: expected groups (cold-start, step, 1.3B")


def test_bench_tune_wants_a_cuda_device(capsys, monkeypatch, tmp_path):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "table.json"
    message = fails(
        ["bench", "tune", "--sizes", "4", "4", "64", "64", "64", "--out", str(out)], capsys
    )
    assert "gsa bench tune: expected a CUDA device" in message and not out.exists()
    message = fails(["bench", "tune", "--sizes", "4", "3", "64", "64", "64"], capsys)
    assert "sizes: expected H G K V M, above 0, H a multiple of G" in message
    with pytest.raises(SystemExit) as caught:
        main(["bench", "tune", "--help"])
    assert caught.value.code == 0
    assert "--budget-seconds" in capsys.readouterr().out


def test_shards_are_verified_as_typed(shards, capsys):
    assert main(["data", "verify", str(shards), str(shards)]) == 0
    assert capsys.readouterr().out.count("tokens as they were written") == 2
    data = bytearray((shards / "tokens.bin").read_bytes())
    data[-2] ^= 1
    (shards / "tokens.bin").write_bytes(data)
    words = "tokens.bin: contents differ from index.json; prepare again"
    assert words in fails(["data", "verify", str(shards)], capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "huge"], "unknown recipe 'huge'; known are demo, tiny"),
        (["train", "tiny", "--data", "/no/shards"], "/no/shards: no such folder"),
        (["train", "tiny", "--lr", "-1"], "lr: expected a finite number above 0, got -1.0"),
        (["train", "tiny", "--model.num_slots"], "--model.num_slots: expected a value"),
        (["generate", "/no/model", "--prompt", "x"], "/no/model: no such folder"),
        (["generate", ".", "--prompt", "x", "--temperature", "0"], "temperature: expected"),
        (["data", "prepare", "/no/text", "--out", "x"], "/no/text"),
        (["data", "cook"], "gsa data: expected 'prepare' or 'corpus' or 'verify', got 'cook'"),
        (
            ["bench"],
            "'tune' or 'cost' or 'training' or 'decode' or 'distill', got nothing",
        ),
        (["bench", "plot", "/no/result.json"], "/no/result.json"),
        (["bench", "plot", "pyproject.toml"], "pyproject.toml: expected JSON"),
    ],
)
def test_a_mistake_is_one_line(arguments, words, capsys):
    assert words in fails(arguments, capsys)


def test_model_settings_are_checked_before_anything_is_written(shards, tmp_path, capsys):
    for option, words in (
        ("--model.num_slot=4", "unknown key 'num_slot'"),
        ("--model.feature_map=sinus", "feature_map: expected"),
        ("--model.vocab_size=100", "vocab_size"),
    ):
        assert words in fails(train_command(shards, tmp_path / "run", option), capsys)
        assert not (tmp_path / "run").exists()


def test_an_unfinished_run_names_its_checkpoint(shards, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(train_command(shards, run, "--checkpoint-interval", "4")) == 0
    (run / "model.safetensors").unlink()
    message = fails(["generate", str(run), "--prompt", "x"], capsys)
    assert "not finished" in message and "step-00000008" in message
    checkpoint = str(run / "checkpoints" / "step-00000008")
    assert main(["generate", checkpoint, "--prompt", "The", "--max-new-tokens", "3"]) == 0


def test_memory_that_ran_out_is_one_line_and_other_failures_are_none(capsys, monkeypatch):
    def fails(error, arguments):
        raise error

    full = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB. See documentation for"
    monkeypatch.setitem(COMMANDS, "info", lambda arguments: torch.empty(1 << 60))
    assert main(["info"]) == 2 and "can't allocate memory" in capsys.readouterr().err
    monkeypatch.setitem(COMMANDS, "info", partial(fails, torch.OutOfMemoryError(full)))
    assert main(["info"]) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith("error: CUDA out of memory. Tried to allocate 2.00 GiB") and "rows" in said
    )
    monkeypatch.setitem(COMMANDS, "info", partial(fails, RuntimeError("a defect of ours")))
    with pytest.raises(RuntimeError, match="a defect"):
        main(["info"])


def test_unknown_options_and_commands_are_refused(capsys):
    for arguments in (["cook"], ["train", "tiny", "--stepps", "3"], ["generate", ".", "--step"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2


def test_help_shows_each_field_with_the_recipe_s_value(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", "tiny", "--help"])
    assert caught.value.code == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "--seq-len N Tokens per row; the memory starts empty at each row" in output
    assert "Optimizer steps of the whole run. [60]" in output
    assert "--model.num_slots 8" in output


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["train", "tiny", "-h"], ["chat", "-h"]]
)
def test_help_loads_nothing_heavy(arguments):
    program = (
        "import sys\nfrom gsa.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "print('loaded:', *{'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "usage: gsa" in done.stdout
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_python_m_gsa_and_a_closed_pipe(shards, tmp_path):
    run = tmp_path / "run"
    assert main(train_command(shards, run)) == 0
    command = [sys.executable, "-m", "gsa", "generate", str(run), "--prompt", "The"]
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert "Traceback" not in process.stderr and "Exception" not in process.stderr
    assert process.returncode == 0
