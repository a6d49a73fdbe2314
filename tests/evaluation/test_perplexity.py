"""Perplexity against a plain loop: tokens one by one, every context read anew."""

import json
import math

import numpy as np
import pytest
import torch
from teachers import build_tokenizer
from tiny_models import VARIANTS, build_tiny
from transformers import LlamaConfig, LlamaForCausalLM

from gsa.cli import main
from gsa.data import PrepareConfig, prepare
from gsa.evaluation import perplexity as module
from gsa.evaluation.perplexity import measure, token_losses, windows

TEXT = "The slot forgets what the gate lets go, and remembers the rest. " * 3


@torch.no_grad()
def by_loop(model, documents, length, stride):
    """{position: (nats, tokens)}, by one forward pass per token."""
    found = {}
    for ids in documents:
        scored, start = 1, 0
        while True:
            end = min(start + length, len(ids))
            for t in range(max(scored, start + 1), end):
                logits = model(input_ids=torch.tensor([ids[start:t].tolist()])).logits[0, -1]
                nats, tokens = found.get(t - start, (0.0, 0))
                loss = -float(logits.double().log_softmax(0)[ids[t]])
                found[t - start] = (nats + loss, tokens + 1)
            scored, start = end, start + stride
            if end == len(ids):
                break
    return found


def documents(*lengths, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 40, n).astype(np.uint16) for n in lengths]


@pytest.mark.parametrize("variant", ["paper", "abc", "hybrid", "gla", "retnet", "supra"])
@pytest.mark.parametrize(("length", "stride"), [(8, 8), (8, 3), (8, 1), (64, 64)])
def test_as_a_loop_over_tokens(variant, length, stride, monkeypatch):
    monkeypatch.setattr(module, "LOGITS", 40 * 3 * 5)  # pieces of five tokens
    model, texts = build_tiny(**VARIANTS[variant]), documents(21, 1, 8, 9, 2)
    expected = by_loop(model, texts, length, stride)
    tally, count = measure(model, iter(texts), length=length, stride=stride, rows=3)
    assert count == 5
    for row in tally.rows():
        here = [x for at, x in expected.items() if row["from"] <= at <= row["to"]]
        nats, tokens = (sum(part) for part in zip(*here, strict=True))
        assert row["tokens"] == tokens
        assert math.isclose(row["perplexity"], math.exp(nats / tokens), rel_tol=1e-9)
    nats, tokens = (sum(part) for part in zip(*expected.values(), strict=True))
    assert tally.total()["tokens"] == tokens == sum(row["tokens"] for row in tally.rows())
    assert math.isclose(tally.total()["nats_per_token"], nats / tokens, rel_tol=1e-9)


def test_every_token_is_scored_once():
    for tokens in (0, 1, 2, 17):
        for length, stride in ((5, 1), (5, 4), (20, 7)):
            found = [t for w in windows(tokens, length, stride) for t in range(w.first, w.end)]
            assert found == list(range(1, tokens))
    rows = [t for w in windows(17, 5, 5) for t in range(w.first, w.end)]
    assert rows == [t for t in range(1, 17) if t % 5]


def test_a_whole_document_is_one_pass():
    model, texts = build_tiny(), documents(50, 30)
    whole, _ = measure(model, iter(texts), length=None, stride=None, rows=1)
    long, _ = measure(model, iter(texts), length=64, stride=64, rows=2)
    assert whole.total()["tokens"] == 78
    assert math.isclose(whole.total()["perplexity"], long.total()["perplexity"], rel_tol=1e-12)
    assert whole.rows()[-1]["to"] == 63


def test_a_transformers_model_is_read_as_it_is():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_attention_heads=2, **sizes)).eval()
    texts = documents(13, 7)
    tally, _ = measure(model, iter(texts), length=6, stride=2, rows=2)
    expected = by_loop(model, texts, 6, 2)
    nats = sum(nats for nats, _ in expected.values())
    assert math.isclose(float(tally.nats.sum()), nats, rel_tol=1e-5)


def test_losses_of_uniform_logits():
    model = build_tiny()
    torch.nn.init.zeros_(model.lm_head.weight)
    losses = token_losses(model, torch.zeros(2, 5, dtype=torch.int64))
    assert losses.shape == (2, 4) and torch.allclose(losses, torch.tensor(40.0).double().log())


def test_stops_after_enough():
    tally, count = measure(
        build_tiny(), iter(documents(9, 9, 9)), length=4, stride=4, rows=2, max_tokens=7
    )
    assert (tally.total()["tokens"], count) == (9, 2)


def test_the_command(save_model, tmp_path, capsys):
    folder, text, out = save_model(), tmp_path / "held-out.txt", tmp_path / "out/ppl.json"
    text.write_text(TEXT)
    shards = tmp_path / "shards"
    prepare(PrepareConfig(inputs=(str(text),), out=str(shards), quiet=True))
    command = ["eval", "perplexity", str(folder), "--out", str(out), "--data"]
    assert main([*command, str(text)]) == 0
    printed = capsys.readouterr().out
    first = json.loads(out.read_text())
    assert out.with_suffix(".md").read_text() == printed
    assert f"{first['overall']['perplexity']:.3f}" in printed and "| 32 – 63" in printed
    assert first["overall"]["tokens"] == sum(row["tokens"] for row in first["by_position"])
    assert (first["length"], first["stride"], first["documents"]) == (64, 64, 1)
    assert main([*command, str(shards), "--rows", "3"]) == 0
    again = json.loads(out.read_text())
    assert again["overall"]["tokens"] == first["overall"]["tokens"] == len(TEXT) - 3
    assert again["overall"]["perplexity"] == pytest.approx(first["overall"]["perplexity"], 1e-6)
    assert main([*command, str(text), "--whole"]) == 0
    assert json.loads(out.read_text())["by_position"][-1]["to"] == 255
    assert main([*command, str(text), "--length", "16", "--stride", "4"]) == 0
    assert "windows of 16 tokens, one every 4" in capsys.readouterr().out


def test_refusals(save_model, tmp_path, capsys):
    folder, text = save_model(), tmp_path / "a.txt"
    text.write_text(TEXT)

    def says(*arguments):
        assert main(["eval", "perplexity", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "no such folder" in says(tmp_path / "none", "--data", text)
    assert "config.json is missing" in says(tmp_path, "--data", text)
    assert "data: " in says(folder, "--data", tmp_path / "none")
    assert "at most length = 16" in says(folder, "--data", text, "--length", 16, "--stride", 17)
    assert "at most length = 64" in says(folder, "--data", text, "--stride", 65)
    assert "expected neither length" in says(folder, "--data", text, "--whole", "--length", 16)
    assert "name of a .json file" in says(folder, "--data", text, "--out", tmp_path / "a.md")
    (tmp_path / "mine.json").write_text("{}")
    out = tmp_path / "mine.json"
    assert "is no result of gsa eval" in says(folder, "--data", text, "--out", out)
    assert out.read_text() == "{}"
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n')
    assert "at least two tokens" in says(folder, "--data", empty)
    other, shards = tmp_path / "tokenizer", tmp_path / "shards"
    build_tokenizer().save_pretrained(other)
    prepare(PrepareConfig(inputs=(str(text),), out=str(shards), tokenizer=str(other), quiet=True))
    assert "made with another tokenizer" in says(folder, "--data", shards)
    llama = tmp_path / "llama"
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1)
    config = LlamaConfig(vocab_size=320, num_attention_heads=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(llama)
    build_tokenizer().save_pretrained(llama)
    assert "expected a GSAConfig model" in says(llama, "--data", text, "--whole")
    assert main(["eval", "perplexity", str(llama), "--data", str(shards), "--length", "32"]) == 0
