"""gsa distill in several processes that torchrun starts: as in one, but for rounding."""

import json
import time

import pytest
import torch
from forks import ALONE, Forked, launch
from safetensors.torch import load_file
from teachers import ROW
from training_runs import distill_all, kill_all, launched, losses, one_thread, succeeded

from gsa.conversion import distill

STAGES = ("1-align", "2-kl", "3-ce")


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def in_two(*configs):
    return Forked(launch, 2, ALONE, distill_all, configs)


def command_of(config):
    options = ["--data", config.data, "--validation", config.validation, "--out", config.out]
    options += ["--preset", "smoke", "--tokens", str(config.tokens), "--seq-len", str(ROW)]
    options += ["--rows", "4", "--checkpoint-interval", "10", "--recall-texts", "4"]
    return ["distill", config.student, *options, "--recall-distances", "48"]


def assert_close(folder, other, numbers, rel):
    """The first so many numbers of each step: its loss, the norm of its gradient."""
    for stage in STAGES:
        ours, theirs = (losses(place / stage) for place in (folder, other))
        assert len(ours) == len(theirs) > 3
        for a, b in zip(ours, theirs, strict=True):
            assert a[:2] == b[:2] and a[2 : 2 + numbers] == pytest.approx(
                b[2 : 2 + numbers], rel=rel
            ), stage


def test_two_processes_distill_as_one(make_config, tmp_path):
    """Each stage's losses, adapters and bf16 included, and what is measured in the end.

    fp32 differs by the order of sums, which a few dozen steps do not carry far; bf16 rounds to 2^-8
    and a mean over hundreds of tokens to less. What does not fit is named, and nothing is written.
    """
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter").touch()
    refused = [make_config(rows=3), make_config(out=str(tmp_path / "taken"))]
    variants = {
        "smoke": {"validation_interval": 8},
        "lora": {"preset": "lora"},
        "bf16": {"dtype": "bf16"},
    }
    ones = {n: make_config(out=str(tmp_path / f"1-{n}"), **v) for n, v in variants.items()}
    twos = [make_config(out=str(tmp_path / f"2-{n}"), **v) for n, v in variants.items()]
    found = {name: distill(config) for name, config in ones.items()}
    said = succeeded(in_two(*twos, *refused))
    assert said.count("finished, ") == 3, "one of them says so"
    assert said.count("ends: rows: expected a multiple of 2") == 2
    assert said.count("holds something that is no distillation") == 2
    assert not (tmp_path / "run").exists()
    assert "FSDP2-wrapped module" not in said, "no output whose hooks may be lost"
    for name, one in found.items():
        folder = tmp_path / f"2-{name}"
        numbers, rel = (1, 2**-7) if name == "bf16" else (2, 2**-18)
        assert_close(folder, tmp_path / f"1-{name}", numbers, rel)
        theirs = json.loads((folder / "recovery.json").read_text())
        assert theirs["tokens"] == one.recovery.tokens
        assert theirs["student"] == pytest.approx(one.recovery.student, rel=rel)
        assert theirs["recall"]["shares"]["48"] == one.comparison.student.recall.shares[48]
        assert "| student |" in (folder / "report.md").read_text()
        a, b = (load_file(p / "3-ce/model.safetensors") for p in (folder, tmp_path / f"1-{name}"))
        assert {n: t.shape for n, t in a.items()} == {n: t.shape for n, t in b.items()}


@pytest.mark.slow
def test_two_killed_go_on_bit_for_bit(make_config, tmp_path):
    whole, config = (make_config(out=str(tmp_path / n)) for n in ("whole", "run"))
    running = launched(2, command_of(config))
    place = tmp_path / "run" / "2-kl" / "checkpoints" / "step-00000010"
    while not place.is_dir():
        assert running.poll() is None, running.communicate()
        time.sleep(0.005)
    kill_all(running)
    assert not (tmp_path / "run" / "3-ce").exists()
    succeeded(in_two(config, whole))
    for stage in STAGES:
        a, b = (load_file(tmp_path / n / stage / "model.safetensors") for n in ("whole", "run"))
        assert all(torch.equal(a[name], b[name]) for name in a)
