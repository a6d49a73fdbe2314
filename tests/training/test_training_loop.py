import copy
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend
from training_runs import assert_same_run, losses, stopped_at
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import gsa.model  # noqa: F401  (registers the Auto classes)
from gsa.data import Batch, PackedRows, TokenShards
from gsa.model import GSAConfig, GSAForCausalLM
from gsa.training import RunError, train
from gsa.training.blocks import prepare_blocks
from gsa.training.objective import next_token, num_targets
from gsa.training.optimizer import build_optimizer, decay_groups
from gsa.training.state import NORMS, Progressed
from gsa.training.validation import HeldOut


def of_kind(config, kind):
    return [row for row in losses(config.out) if row[0] == kind]


def test_the_loss_falls_on_seen_and_unseen_text(make_config):
    config = make_config(steps=80, validation_interval=40, checkpoint_interval=0)
    result = train(config)
    steps = of_kind(config, "loss")
    assert [row[1] for row in steps] == list(range(1, 81))
    assert steps[0][2] == pytest.approx(math.log(258), rel=0.02)  # knows nothing yet
    assert steps[-1][2] < 2.6
    (first_step, first), (last_step, last) = [row[1:] for row in of_kind(config, "val_loss")]
    assert (first_step, last_step) == (40, 80)
    assert last < first < math.log(258)
    assert result.status == "finished" and result.val_loss == last


def test_the_final_validation_is_over_all_the_text(make_config, shard_folders):
    config = make_config()
    result = train(config)
    model = AutoModelForCausalLM.from_pretrained(config.out).eval()
    shards, T = TokenShards(shard_folders[1]), config.seq_len
    total, tokens = 0.0, 0
    for i in range(shards.num_documents):
        starts = [int(shards.document_starts[i])]
        end = starts[0] + len(shards.document(i))
        starts += range((starts[0] // T + 1) * T, end, T)
        for a, b in zip(starts, [*starts[1:], end], strict=True):
            ids = torch.from_numpy(shards.tokens[a:b].astype("int64"))[None]
            if b - a > 1:
                total += model(ids, labels=ids).loss.item() * (b - a - 1)
                tokens += b - a - 1
    assert result.val_loss == pytest.approx(total / tokens, rel=1e-5)


def test_accumulation_equals_the_big_batch(make_config, tmp_path):
    at_once = make_config(rows=8, steps=5, out=str(tmp_path / "a"))
    in_parts = make_config(rows=2, accumulation=4, steps=5, out=str(tmp_path / "b"))
    rows = PackedRows(TokenShards(at_once.data), seq_len=at_once.seq_len, seed=0)
    counts = {num_targets(rows.batch(i, 2)) for i in range(0, 8, 2)}
    assert len(counts) > 1, "a mean of means would not show"
    train(at_once)
    train(in_parts)
    for a, b in zip(of_kind(at_once, "loss"), of_kind(in_parts, "loss"), strict=True):
        assert a[1] == b[1] and a[5] == b[5]
        assert a[2:4] == pytest.approx(b[2:4], rel=1e-4)
    a, b = of_kind(at_once, "loss")[0], of_kind(in_parts, "loss")[0]
    assert a[2:4] == pytest.approx(b[2:4], rel=2e-6)


def test_packed_documents_do_not_see_each_other(make_config):
    config = make_config()
    torch.manual_seed(0)
    options = {**config.model, "use_short_conv": True, "vocab_size": 258}
    model = GSAForCausalLM(GSAConfig(**options)).double()
    batch = PackedRows(TokenShards(config.data), seq_len=64, seed=0).batch(0, 8)
    bounds = batch.cu_seqlens.tolist()
    assert len(bounds) > 9, "documents end within rows"
    alone, gradients = 0.0, {}
    for start, end in pairwise(bounds):
        ids = batch.input_ids[:, start:end]
        part = Batch(ids, batch.labels[:, start:end], torch.tensor([0, end - start]).int())
        loss = next_token(model, part)
        loss.backward()
        alone += loss.item()
    for name, parameter in model.named_parameters():
        gradients[name], parameter.grad = parameter.grad, None
    packed = next_token(model, batch)
    packed.backward()
    assert packed.item() == pytest.approx(alone, rel=1e-6)
    for name, parameter in model.named_parameters():
        expected = gradients[name]
        assert (parameter.grad - expected).abs().max() < 2e-6 * expected.abs().max(), name


def test_bf16_trains_close_to_fp32_and_keeps_fp32_weights(make_config, tmp_path):
    full = make_config(steps=30, out=str(tmp_path / "fp32"), checkpoint_interval=0)
    half = replace(full, dtype="bf16", out=str(tmp_path / "bf16"), prompt="the slot")
    train(full)
    train(half)
    a, b = of_kind(full, "loss"), of_kind(half, "loss")
    assert a[0][2] != b[0][2], "bf16 changes the rounding"
    assert [row[2] for row in b] == pytest.approx([row[2] for row in a], abs=0.05)
    weights = load_file(Path(half.out) / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert "    the slot" in (Path(half.out) / "report.md").read_text()


def test_the_run_folder_is_a_model_folder(make_config):
    config = make_config(prompt="the slot")
    train(config)
    folder = Path(config.out)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(model, GSAForCausalLM)
    assert model.config.vocab_size == 258
    assert model.config.eos_token_id == tokenizer.eos_token_id == 256
    assert tokenizer("ä").input_ids == [0xC3, 0xA4]
    checkpoint = AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / "step-00000012")
    ids = tokenizer("the slot gate", return_tensors="pt").input_ids
    assert torch.equal(model(ids).logits, checkpoint(ids).logits)
    report = (folder / "report.md").read_text()
    assert "unseen.jsonl" in report and "seen.jsonl" in report
    assert f"{sum(p.numel() for p in model.parameters()):,}" in report
    assert "    the slot" in report
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob("**/*.incomplete"))


def test_a_finished_run_is_left_alone(make_config):
    config = make_config()
    train(config)
    before = {p: p.stat().st_mtime_ns for p in Path(config.out).rglob("*") if p.name != ".lock"}
    result = train(config)
    assert result.status == "already finished"
    after = {p: p.stat().st_mtime_ns for p in Path(config.out).rglob("*") if p.name != ".lock"}
    assert after == before
    with pytest.raises(RunError, match="steps: 12 there, 13 asked"):
        train(replace(config, steps=13))
    with pytest.raises(RunError, match="already holds a run"):
        train(config, resume="never")


def test_a_step_that_is_not_finite_is_skipped_and_counted(make_config):
    config = make_config(steps=6, validation_interval=0, checkpoint_interval=0)
    calls = []

    def infinite_at_step_3(model, batch):
        calls.append(batch)
        loss = next_token(model, batch)
        return loss * float("inf") if model.training and len(calls) == 3 else loss

    train(config, objective=infinite_at_step_3)
    rows = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").open()][:6]
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert rows[2]["loss"] is None
    assert all(math.isfinite(row["loss"]) for row in rows if row["step"] != 3)
    weights = load_file(Path(config.out) / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_the_best_validation_is_a_number_once_there_is_one():
    at = Progressed()
    for loss in (math.nan, 3.0, math.nan, 2.0, 2.5):
        at.step += 1
        at.note_validation(HeldOut(loss, 1, 0.0))
    assert (at.best_val_loss, at.best_val_step) == (2.0, 4)


def test_a_run_that_diverges_stops_after_the_limit(make_config):
    config = make_config(
        steps=40, lr=1e30, min_lr=1e30, warmup=0, nan_limit=3, validation_interval=0
    )
    with pytest.raises(RunError, match="4 steps in a row were skipped"):
        train(config)
    rows = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").open()]
    assert [row["skipped"] for row in rows[-4:]] == [1, 2, 3, 4]
    assert not (Path(config.out) / "report.md").exists()


def test_only_matrices_of_linear_layers_decay(make_config):
    options = {**make_config().model, "vocab_size": 258, "use_short_conv": True, "qkv_bias": True}
    for tied in (True, False):
        model = GSAForCausalLM(GSAConfig(**{**options, "tie_word_embeddings": tied}))
        decayed, others = decay_groups(model)
        assert {name.rsplit(".", 1)[1] for name in decayed} == {"weight"}
        assert all("norm" not in name and "conv" not in name for name in decayed)
        assert any("attn.q_proj" in name for name in decayed)
        assert "model.embeddings.weight" in others
        assert ("lm_head.weight" in decayed) is (not tied)
        total = sum(p.numel() for p in [*decayed.values(), *others.values()])
        assert total == sum(p.numel() for p in model.parameters())


def test_weight_decay_shrinks_what_gets_no_gradient(make_config):
    config = make_config(steps=1, warmup=0, lr=0.1, min_lr=0.1, weight_decay=0.5)

    def no_gradient(model, batch):
        return next_token(model, batch) * 0

    train(config, objective=no_gradient)
    torch.manual_seed(config.seed)
    start = GSAForCausalLM(GSAConfig(**config.model, vocab_size=258)).state_dict()
    end = load_file(Path(config.out) / "model.safetensors")
    name = "model.layers.0.attn.q_proj.weight"
    torch.testing.assert_close(end[name], start[name] * (1 - 0.1 * 0.5))
    assert torch.equal(end["model.embeddings.weight"], start["model.embeddings.weight"])


def test_muon_moves_hidden_matrices_and_adamw_the_rest(make_config):
    config = make_config(optimizer="muon")
    model = GSAForCausalLM(GSAConfig(**{**config.model, "vocab_size": 258}))
    optimizer = build_optimizer(model, config)
    muon, adamw = optimizer.members
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    names = {id(p): name for name, p in model.named_parameters()}
    moved = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    rest = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert moved.isdisjoint(rest) and moved | rest == set(names.values())
    assert all(".attn." in name or ".mlp." in name for name in moved)
    assert not any("embeddings" in name or "lm_head" in name or "norm" in name for name in moved)


def test_muon_learns_and_resumes_bit_for_bit(make_config, tmp_path):
    whole = make_config(optimizer="muon", out=str(tmp_path / "whole"), steps=30)
    train(whole)
    rows = of_kind(whole, "loss")
    assert rows[-1][2] < rows[0][2] - 1
    parts = replace(whole, out=str(tmp_path / "parts"))
    assert train(parts, objective=stopped_at(17)).status == "stopped"
    assert train(parts).status == "finished"
    assert_same_run(parts.out, whole.out)


def test_a_spike_is_skipped_once_there_is_something_to_compare_with(make_config):
    config = make_config(
        steps=NORMS + 8, spike=50.0, clip=math.inf, validation_interval=0, checkpoint_interval=0
    )
    calls = []

    def spikes(model, batch):
        calls.append(batch)
        loud = len(calls) in (10, NORMS + 3)
        return next_token(model, batch) * (1e4 if loud and model.training else 1)

    train(config, objective=spikes)
    rows = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").open()][: NORMS + 8]
    skipped = [row["step"] for row, old in zip(rows[1:], rows, strict=False)
               if row["skipped"] > old["skipped"]]  # fmt: skip
    assert skipped == [NORMS + 3], "not the first, with nothing to compare it with"


@pytest.mark.parametrize("recompute", [1, 2])
def test_recomputed_blocks_train_the_same(make_config, tmp_path, recompute):
    plain = make_config(out=str(tmp_path / "plain"), steps=4, warmup=1)
    train(plain)
    less = replace(plain, out=str(tmp_path / "less"), recompute=recompute)
    train(less)
    assert_same_run(less.out, plain.out)


def test_every_recomputed_block_keeps_its_input_only(make_config):
    def kept(recompute):
        config = make_config(recompute=recompute)
        options = {**config.model, "vocab_size": 258, "num_hidden_layers": 4}
        model = GSAForCausalLM(GSAConfig(**options)).train()
        prepare_blocks(model, config)
        sizes = {}

        def pack(x):
            sizes[x.untyped_storage().data_ptr()] = x.numel()
            return x

        ids = torch.randint(258, (1, 64))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(ids, labels=ids)
        return sum(sizes.values())

    none, half, all_of_them = kept(0), kept(2), kept(1)
    assert all_of_them < half < none
    assert none - half == pytest.approx(half - all_of_them, rel=0.05)


def test_lean_blocks_keep_less_and_compute_the_same(make_config, monkeypatch):
    compile_block = torch.nn.Module.compile
    backend = "aot_eager_decomp_partition"  # splits a graph as inductor does
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **o: compile_block(self, backend=backend, **o)
    )
    ids = torch.randint(258, (2, 64))

    def run(lean):
        torch.compiler.reset()
        torch.manual_seed(0)
        config = make_config(compile=True, lean=lean)
        options = {**config.model, "vocab_size": 258, "num_hidden_layers": 2}
        model = GSAForCausalLM(GSAConfig(**options)).train()
        prepare_blocks(model, config)
        sizes = {}

        def pack(x):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(ids, labels=ids).loss
        loss.backward()
        return sum(sizes.values()), loss, [p.grad for p in model.parameters()]

    (lean, *found), (plain, *expected) = run(True), run(False)
    assert lean < 0.8 * plain
    torch.testing.assert_close(found, expected)


def test_one_graph_serves_all_compiled_blocks(make_config, monkeypatch):
    """No graph breaks, and blocks that are alike share a graph."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compile_block = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **o: compile_block(self, backend=counter, **o)
    )
    config = make_config(compile=True)
    options = {**config.model, "vocab_size": 258, "num_hidden_layers": 4}
    model = GSAForCausalLM(GSAConfig(**options)).train()
    eager = copy.deepcopy(model)
    prepare_blocks(model, config)
    ids = torch.randint(258, (1, 64))
    bounds = torch.tensor([0, 10, 64], dtype=torch.int32)
    for one in (model, eager):
        one(ids, labels=ids, cu_seqlens=bounds).loss.backward()
    assert counter.frame_count == 1
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_from_a_models_weights_at_rates_of_their_own(make_config, tmp_path, optimizer):
    """Frozen parameters stay what they are, others move by their share of the rate."""
    first = make_config(steps=4, out=str(tmp_path / "first"))
    train(first)
    asked = {"init": first.out, "rates": {"": 0.0, "attn.": 1.0, "mlp.up_proj": 0.1}}
    on = replace(first, **asked, model={}, out=str(tmp_path / "on"), optimizer=optimizer, steps=6)
    result = train(replace(on, lr=1e-5, min_lr=1e-6, weight_decay=0.0, warmup=0))
    before, after = (load_file(Path(o) / "model.safetensors") for o in (first.out, on.out))
    moved = {name: (after[name] - t).abs().max().item() for name, t in before.items()}
    assert all((gap > 0) == (".attn." in name or "up_proj" in name) for name, gap in moved.items())
    if optimizer == "adamw":  # Adam's first steps are as long as its rate
        assert moved["model.layers.0.mlp.up_proj.weight"] < 0.2 * max(moved.values())
    assert result.val_loss is not None
    assert of_kind(on, "loss")[0][2] < of_kind(first, "loss")[0][2] - 0.1, "it goes on from there"
    assert "trained from the weights of" in (Path(on.out) / "report.md").read_text()


def test_a_start_that_is_no_model_is_named_before_anything_is_written(make_config, tmp_path):
    config = replace(make_config(), init=str(tmp_path / "none"), model={})
    with pytest.raises(ValueError, match=r"init: expected a model folder, got .*none"):
        train(config)
    LlamaConfig().save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match=r"init: expected a GSA model, got model_type 'llama'"):
        train(replace(config, init=str(tmp_path / "llama")))
    assert not Path(config.out).exists()
