"""gsa distill: small teachers, converted, taught in seconds; killed and gone on with."""

import itertools
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import teachers
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from gsa.conversion import ConvertConfig, DistillConfig, convert, distill
from gsa.conversion.objectives import Align, FrozenTeacher, Kl
from gsa.conversion.stages import parse_stage, planned
from gsa.data import PackedRows, PrepareConfig, TokenShards, prepare
from gsa.model import GSAForCausalLM
from gsa.training import RunError
from gsa.training.metrics import read_metrics

WORDS = ["the", "slot", "forgets", "what", "gate", "lets", "go", "and", "remembers", "was", "read"]
T = 32
SIZES = teachers.SIZES | dict(initializer_range=0.15)


@pytest.fixture
def lesson(save, tmp_path):
    """(teacher's folder, its model, student's folder, training shards, held-out shards)"""
    teacher, model = save(LlamaConfig(**SIZES))
    student = tmp_path / "student"
    convert(ConvertConfig(teacher=str(teacher), out=str(student), slots=8, keep_layers=(1,)))
    rng = torch.Generator().manual_seed(0)
    shards = []
    for name, documents in (("train", 300), ("held-out", 20)):
        text = tmp_path / f"{name}.jsonl"
        with text.open("w") as file:
            for _ in range(documents):
                words = torch.randint(len(WORDS), (int(torch.randint(3, 40, (1,), generator=rng)),),
                                      generator=rng)  # fmt: skip
                file.write(json.dumps({"text": " ".join(WORDS[i] for i in words)}) + "\n")
        out = str(tmp_path / name)
        prepare(PrepareConfig(inputs=(str(text),), out=out, tokenizer=str(teacher), quiet=True))
        shards.append(out)
    return teacher, model, student, *shards


@pytest.fixture
def make_config(lesson, tmp_path):
    def make(**options):
        base = DistillConfig(
            student=str(lesson[2]), data=lesson[3], validation=lesson[4],
            out=str(tmp_path / "run"), preset="smoke", tokens=40 * 4 * T, seq_len=T, rows=4,
            checkpoint_interval=10,
        )  # fmt: skip
        return replace(base, **options)

    return make


def a_batch(shards, rows=3):
    return PackedRows(TokenShards(shards), seq_len=T, seed=0).batch(0, rows)


def alone(model, batch):
    """Logits [N, W] of each document and row read by itself."""
    bounds = batch.cu_seqlens.tolist()
    parts = itertools.pairwise(bounds)
    return torch.cat([model(batch.input_ids[:, a:b]).logits[0] for a, b in parts])


@torch.no_grad()
def test_the_teacher_reads_each_document_by_itself(lesson):
    folder, model, _, shards, held_out = lesson
    teacher = FrozenTeacher(folder, T, "cpu", torch.float32)
    whole, ragged = a_batch(shards), a_batch(shards)
    cut = ragged.cu_seqlens[ragged.cu_seqlens < 2 * T + 7]
    ragged = ragged._replace(
        input_ids=ragged.input_ids[:, : 2 * T + 7],
        labels=ragged.labels[:, : 2 * T + 7],
        cu_seqlens=torch.cat([cut, torch.tensor([2 * T + 7], dtype=torch.int32)]),
    )
    for batch in (whole, ragged):
        assert len(batch.cu_seqlens) > 5, "several documents"
        found = teacher.hidden(batch) @ teacher.head_WD.T
        torch.testing.assert_close(found, alone(model, batch), rtol=1e-4, atol=1e-5)


def test_objectives_are_their_formulas(lesson):
    folder, model, student_folder, shards, _ = lesson
    teacher = FrozenTeacher(folder, T, "cpu", torch.float32)
    student, batch = GSAForCausalLM.from_pretrained(student_folder), a_batch(shards)
    counts = torch.zeros(3 * T, dtype=torch.bool)
    counts[:-1] = batch.labels[0, 1:] != -100
    log_q = student(batch.input_ids, cu_seqlens=batch.cu_seqlens).logits[0].log_softmax(1)
    log_p = alone(model, batch).log_softmax(1)
    expected = F.kl_div(log_q[counts], log_p[counts], reduction="sum", log_target=True)
    found = Kl(teacher)(student, batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    found.backward()
    assert all(p.grad is not None for p in student.parameters())

    student.zero_grad()
    total = 0.0
    inputs = {}
    for i in (0, 2):  # layer 1 is kept
        model.model.layers[i].self_attn.register_forward_hook(
            lambda _, a, given, out, i=i: inputs.setdefault(i, []).append(
                (given["hidden_states"], out[0])
            ),
            with_kwargs=True,
        )
    alone(model, batch)
    for i, parts in inputs.items():
        for x, y in parts:
            gap = student.model.layers[i].attn(x).output - y
            total += gap.norm(dim=-1)[0, :-1].sum() / 24**0.5 / 2
    found = Align(teacher)(student, batch)
    torch.testing.assert_close(found, total, rtol=1e-4, atol=1e-4)
    found.backward()
    moved = {
        name.split(".attn.")[0] for name, p in student.named_parameters() if p.grad is not None
    }
    assert moved == {"model.layers.0", "model.layers.2"}


def test_every_stage_learns_and_the_student_comes_nearer(make_config, lesson):
    config = make_config(tokens=60 * 4 * T)
    result = distill(config)
    assert result.status == "finished" and result.recovery is not None
    for number, name in enumerate(("align", "kl", "ce"), 1):
        rows, _ = read_metrics(result.model.parent / f"{number}-{name}")
        first, last = (sum(r["loss"] for r in part) / 4 for part in (rows[:4], rows[-4:]))
        assert last < first - 0.01 * first, name
    folders = [lesson[2], *(result.model.parent / f"{i}" for i in ("1-align", "2-kl"))]
    before, aligned, taught = (
        {k: v for f in sorted(folder.glob("model*.safetensors")) for k, v in load_file(f).items()}
        for folder in folders
    )
    moved = {name for name, t in before.items() if not torch.equal(t, aligned[name])}
    assert moved and all(".attn." in n and ".layers.1." not in n for n in moved), "mixers only"
    assert all(not torch.equal(t, taught[name]) for name, t in aligned.items()), "then all"
    said = json.loads((result.model.parent / "recovery.json").read_text())
    student = AutoModelForCausalLM.from_pretrained(result.model)
    teacher, held_out = lesson[1], TokenShards(lesson[4])
    sums = dict(student=0.0, teacher=0.0, same=0, tokens=0)
    ids = torch.tensor(held_out.tokens[:].astype("int64"))
    edges = sorted({0, len(ids), *range(0, len(ids), T), *map(int, held_out.document_starts)})
    with torch.no_grad():
        for a, b in itertools.pairwise(edges):
            part = ids[None, a:b]
            own, theirs = student(part).logits[0, :-1], teacher(part).logits[0, :-1]
            sums["student"] += F.cross_entropy(own, part[0, 1:], reduction="sum").item()
            sums["teacher"] += F.cross_entropy(theirs, part[0, 1:], reduction="sum").item()
            sums["same"] += (own.argmax(1) == theirs.argmax(1)).sum().item()
            sums["tokens"] += b - a - 1
    assert said["tokens"] == sums["tokens"]
    for key in ("student", "teacher"):
        assert said[key] == pytest.approx(sums[key] / sums["tokens"], rel=1e-4)
    assert said["agreement"] == pytest.approx(sums["same"] / sums["tokens"], abs=0.01)
    report = (result.model.parent / "report.md").read_text()
    assert "| 2 | kl |" in report and "perplexity" in report
    assert distill(config).recovery == result.recovery, "a second call has nothing to do"


@pytest.mark.parametrize("target", ["gla", "retnet", "supra"])
def test_every_target_learns_in_every_stage(make_config, lesson, tmp_path, target):
    student = tmp_path / target
    convert(ConvertConfig(teacher=str(lesson[0]), out=str(student), target=target))
    steps = 25 * 4 * T
    stages = (f"align:{steps}:3e-3:0", f"kl:{steps}:1e-3:0.1", f"ce:{steps}:1e-3:1")
    result = distill(make_config(student=str(student), stages=stages))
    assert result.status == "finished" and result.recovery is not None
    for number, name in enumerate(("align", "kl", "ce"), 1):
        rows, _ = read_metrics(result.model.parent / f"{number}-{name}")
        first, last = (sum(r["loss"] for r in part) / 4 for part in (rows[:4], rows[-4:]))
        assert last < first - 0.01 * first, name
    assert GSAForCausalLM.from_pretrained(result.model).config.mixer in ("gla", "retnet")


def command_of(config):
    options = ["--data", config.data, "--validation", config.validation, "--out", config.out]
    options += ["--preset", "smoke", "--tokens", str(config.tokens), "--seq-len", str(T)]
    options += ["--rows", "4", "--checkpoint-interval", "10"]
    return [sys.executable, "-m", "gsa", "distill", config.student, *options]


def test_killed_in_the_second_stage_it_goes_on_bit_for_bit(make_config, tmp_path):
    whole = distill(make_config(out=str(tmp_path / "whole"), tokens=75 * 4 * T))
    config = make_config(tokens=75 * 4 * T)
    running = subprocess.Popen(command_of(config), stdout=subprocess.DEVNULL)
    place = tmp_path / "run" / "2-kl" / "checkpoints" / "step-00000010"
    while not place.is_dir():
        assert running.poll() is None, "it ended before it was stopped"
        time.sleep(0.02)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    assert not (tmp_path / "run" / "3-ce").exists()
    done = subprocess.run(command_of(config), check=True, capture_output=True, text=True)
    assert "finished" in done.stdout and "perplexity" in done.stdout
    a, b = (load_file(f / "model.safetensors") for f in (whole.model, tmp_path / "run" / "3-ce"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_does_not_fit_is_named_before_anything_is_written(make_config, lesson, tmp_path):
    config = make_config()
    kept, other = tmp_path / "kept", tmp_path / "other"
    convert(ConvertConfig(teacher=str(lesson[0]), out=str(kept), keep_layers=(0, 1, 2)))
    LlamaConfig(**SIZES | dict(num_hidden_layers=2)).save_pretrained(other)
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"text": "a"}\n')
    for changes, error, words in (
        (
            {"student": str(tmp_path)},
            ValueError,
            "student: expected a folder that gsa convert made",
        ),
        ({"teacher": str(tmp_path)}, FileNotFoundError, "teacher: expected a model folder"),
        ({"teacher": str(other)}, ValueError, "teacher: expected num_hidden_layers = 3"),
        ({"student": str(kept)}, ValueError, "stages: expected no align"),
        ({"data": str(tmp_path / "none")}, (ValueError, OSError), "none"),
        ({"checkpoint_interval": -1}, ValueError, "checkpoint_interval: expected"),
    ):
        with pytest.raises(error, match=words):
            distill(replace(config, **changes))
        assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letter").touch()
    with pytest.raises(RunError, match="no distillation"):
        distill(config)


def test_numbers_that_make_no_sense(make_config):
    for name in ("rows", "seq_len", "accumulation", "tokens", "held_out_tokens"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            make_config(**{name: 0})


def test_other_settings_in_the_same_folder_are_refused(make_config):
    config = make_config(tokens=6 * 4 * T)
    distill(config)
    with pytest.raises(RunError, match="seed: 0 there, 1 asked"):
        distill(replace(config, seed=1))


@pytest.mark.parametrize(
    "text", ["kl", "kd:1M:1e-3:0", "kl:much:1e-3:0", "kl:0:1e-3:0", "kl:1M:0:0", "kl:1M:1e-3:-1"]
)
def test_stages_that_make_no_sense(text):
    with pytest.raises(ValueError, match="stages: expected objective:tokens:lr:rest"):
        parse_stage(text)


def test_stages():
    stage = parse_stage("kl:2.5M:3e-4:0.1")
    assert (stage.tokens, stage.lr, stage.rates) == (2_500_000, 3e-4, {"": 0.1, ".attn.": 1.0})
    assert parse_stage("ce:500:1e-5:1").rates == {}
    assert [s.tokens for s in planned("default", 50_000_000)] == [10_000_000, 35_000_000, 5_000_000]
    assert [s.objective for s in planned("paper", 10)] == ["ce"]
