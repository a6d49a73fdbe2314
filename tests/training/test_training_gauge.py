"""Speed, share of the peak, time to the end: the readings in a step's line."""

import json

import pytest
import torch

from gsa.model import GSAConfig
from gsa.model.cost import flops_per_token
from gsa.training import gauge, train
from gsa.training.config import TrainConfig
from gsa.training.gauge import Gauge

CONFIG = TrainConfig(name="x", data="-", out="-", steps=50, warmup=0, seq_len=64)
MODEL = GSAConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_heads=2)


def test_readings_are_their_formulas(monkeypatch):
    monkeypatch.setattr(gauge, "peak_of", lambda device: 1e12)
    found = Gauge(CONFIG, MODEL, torch.device("cpu"), 4).readings(
        step=10, tokens=4096, seconds=0.5, total=6.0
    )
    assert found["tokens_per_s"] == 8192 and found["tokens_per_s_per_device"] == 2048
    assert found["eta"] == pytest.approx(40 * 6.0 / 10) and found["seconds"] == 6.0
    flops = flops_per_token(MODEL, 64).forward_backward
    assert found["mfu"] == pytest.approx(8192 * flops / 4e12)
    assert "memory_gib" not in found, "a CPU's is not measured"


def test_an_unknown_peak_gives_no_share():
    found = Gauge(CONFIG, MODEL, torch.device("cpu"), 1).readings(
        step=1, tokens=10, seconds=1.0, total=1.0
    )
    assert "mfu" not in found


def test_every_line_of_a_run_has_them(make_config):
    config = make_config(steps=3, warmup=0)
    result = train(config)
    lines = [json.loads(x) for x in (result.folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["tokens_per_s"] == line["tokens_per_s_per_device"] > 0
        assert line["seconds"] > 0 and line["eta"] >= 0
    assert lines[-1]["eta"] == 0
