"""gsa distill: small teachers, converted, taught in seconds; killed and gone on with."""

import itertools
import json
import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forks import Forked, gsa
from safetensors.torch import load_file
from teachers import LESSON, ROW
from torch.nn import functional as F
from training_runs import succeeded
from transformers import AutoModelForCausalLM, LlamaConfig

from gsa.cli import main
from gsa.conversion import ConvertConfig, convert, distill
from gsa.conversion.distillation import _questions
from gsa.conversion.objectives import Align, FrozenTeacher, Kl
from gsa.conversion.recall import recall
from gsa.conversion.recovery import recovery
from gsa.conversion.stages import parse_stage, planned
from gsa.data import PackedRows, PrepareConfig, TokenShards, prepare
from gsa.model import GSAForCausalLM
from gsa.training import RunError
from gsa.training.adapters import PROJECTIONS
from gsa.training.distributed import Team
from gsa.training.export_run import ExportConfig, export_run
from gsa.training.metrics import read_metrics

T = ROW


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
    assert "| student |" in report and "recall at 48" in report
    assert said["recall"].keys() == {"texts", "shares", "chance"} == said["teacher_recall"].keys()
    assert distill(config).comparison == result.comparison, "a second call has nothing to do"


def test_each_branch_is_switched_off(make_config, lesson, tmp_path):
    """Its numbers are those of the saved student with the share set by hand."""
    hybrid = tmp_path / "hybrid"
    convert(ConvertConfig(teacher=str(lesson[0]), out=str(hybrid), slots=8, window=6))
    config = make_config(student=str(hybrid), tokens=20 * 4 * T)
    result = distill(config)
    said = json.loads((tmp_path / "run" / "recovery.json").read_text())
    teacher = FrozenTeacher(lesson[0], T, "cpu", torch.float32)
    student = GSAForCausalLM.from_pretrained(result.model)
    questions = _questions(config)
    for name, share in (("slots alone", 0.0), ("window alone", 1.0)):
        for block in student.model.layers:
            block.attn.window_share = share
        held_out = TokenShards(lesson[4])
        found = recovery(student, teacher, held_out, most_tokens=10**6, team=Team())
        assert found == result.comparison.branches[name].recovery
        assert said["branches"][name]["student"] == found.student != said["student"]
        shares = recall(student, questions, Team()).shares
        assert said["branches"][name]["recall"]["shares"] == {"48": shares[48]}
    assert "| window alone |" in (tmp_path / "run" / "report.md").read_text()


def test_without_held_out_text_there_is_recall_alone(make_config, tmp_path):
    result = distill(make_config(validation="", tokens=4 * 4 * T, prompt="the slot"))
    said = json.loads((tmp_path / "run" / "recovery.json").read_text())
    assert result.recovery is None and "student" not in said and "48" in said["recall"]["shares"]
    report = (tmp_path / "run" / "report.md").read_text()
    assert "perplexity" not in report
    for name in ("teacher", "student"):
        assert f"The {name} continues 'the slot':\n\n    the slot" in report


def test_the_teacher_finetuned_on_the_same_tokens_is_the_yardstick(make_config, lesson, tmp_path):
    """Both as typed: the teacher kept whole and taught the text, then a student held against it."""
    whole = str(tmp_path / "whole")
    assert main(["convert", str(lesson[0]), "--keep-all", "--out", whole]) == 0
    tokens = 40 * 4 * T
    tuned = make_config(student=whole, out=str(tmp_path / "tuned"), stages=(f"ce:{tokens}:3e-3:1",))
    before = distill(tuned).recovery
    assert before.student < before.teacher - 0.1, "it learned the text"
    config = make_config(tokens=tokens, yardstick=str(tmp_path / "tuned"))
    result = distill(config)
    ratio = math.exp(result.recovery.student - before.student)
    assert result.ratio == pytest.approx(ratio)
    said = json.loads((tmp_path / "run" / "recovery.json").read_text())["yardstick"]
    assert said["ratio"] == result.ratio and said["loss"] == before.student
    assert f"{ratio:.3f} × that" in (tmp_path / "run" / "report.md").read_text()
    for changes, words in (
        ({"yardstick": str(tmp_path)}, "without recovery.json"),
        ({"yardstick": str(tmp_path / "run")}, "expected the teacher itself, finetuned"),
        ({"held_out_tokens": 5}, "held_out_tokens: 1000000 there, 5 here"),
        ({"out": str(tmp_path / "new"), "tokens": 99 * T}, f"tokens: {tokens} there"),
        ({"out": str(tmp_path / "new"), "data": lesson[4]}, "data: "),
    ):
        with pytest.raises(ValueError, match=words):
            distill(replace(config, **changes))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("preset", ["smoke", "lora"])
def test_a_signal_in_any_stage_and_on_bit_for_bit(preset, make_config, tmp_path, monkeypatch):
    """Layer 1 is kept, so that aligning leaves some of what it could train without a gradient."""
    whole = distill(make_config(preset=preset, out=str(tmp_path / "whole")))
    config = make_config(preset=preset, checkpoint_interval=1000)
    for number, objective in enumerate((Align, Kl), 1):
        calls, right = [], objective.__call__

        def stopping(self, model, batch, calls=calls, right=right):
            calls.append(batch)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGUSR1)
            return right(self, model, batch)

        with monkeypatch.context() as patch:
            patch.setattr(objective, "__call__", stopping)
            stopped = distill(config)
        assert (stopped.status, stopped.signal) == ("stopped", signal.SIGUSR1)
        assert stopped.model.name.startswith(str(number)) and stopped.comparison is None
    found = distill(config)
    a, b = (load_file(one.model / "model.safetensors") for one in (whole, found))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_adapters_are_merged_and_all_but_gates_stays(make_config, lesson, tmp_path):
    result = distill(make_config(preset="lora", tokens=100 * 4 * T))
    assert result.recovery.student < result.recovery.teacher + 3
    before = {k: v for f in lesson[2].glob("model*.safetensors") for k, v in load_file(f).items()}
    after = load_file(result.model / "model.safetensors")
    assert after.keys() == before.keys(), "a plain folder"
    ends = tuple(f".{name}.weight" for name in PROJECTIONS)
    projections = {name for name in before if name.endswith(ends)}
    new = {name for name in before if ".f_proj." in name or ".g_norm." in name}
    assert len(projections) == 12 and len(new) == 4
    moved = {name for name, weight in before.items() if not torch.equal(after[name], weight)}
    assert moved == projections | new
    for name in projections:  # three stages of rank 8 in a matrix of rank 12 and more
        assert torch.linalg.matrix_rank(after[name] - before[name]) <= 24
    first = load_file(result.model.parent / "1-align" / "model.safetensors")
    name = "model.layers.0.mlp_norm.weight"
    assert torch.equal(first[name], before[name])
    name = "model.layers.0.attn.q_proj.weight"
    singular = torch.linalg.svdvals(first[name] - before[name])
    assert singular[7] > 1e-4 and singular[8] < 1e-5, "one stage, one rank"


def test_a_checkpoint_with_adapters_is_exported_plain(make_config, tmp_path):
    result = distill(make_config(preset="lora", tokens=30 * 4 * T))
    final = load_file(result.model / "model.safetensors")
    stored = load_file(max((result.model / "checkpoints").iterdir()) / "model.safetensors")
    assert "model.layers.0.attn.q_proj.lora_up" in stored.keys() - final.keys()
    made = export_run(ExportConfig(source=str(result.model), out=str(tmp_path / "exported")))
    found = load_file(made / "model.safetensors")
    assert found.keys() == final.keys() and all(torch.equal(found[n], final[n]) for n in final)
    assert AutoModelForCausalLM.from_pretrained(made) is not None


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
    options += ["--rows", "4", "--checkpoint-interval", "10", "--recall-texts", "0"]
    return ["distill", config.student, *options]


def test_killed_in_the_second_stage_it_goes_on_bit_for_bit(make_config, tmp_path):
    whole = distill(make_config(out=str(tmp_path / "whole"), tokens=75 * 4 * T))
    config = make_config(tokens=75 * 4 * T)
    running = Forked(gsa, command_of(config))
    place = tmp_path / "run" / "2-kl" / "checkpoints" / "step-00000010"
    try:
        while not place.is_dir():
            assert running.poll() is None, "it ended before it was stopped"
            time.sleep(0.02)
    finally:
        running.kill()
    running.communicate()
    assert running.returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "3-ce").exists()
    said = succeeded(Forked(gsa, command_of(config)))
    assert "finished" in said and "perplexity" in said
    a, b = (load_file(f / "model.safetensors") for f in (whole.model, tmp_path / "run" / "3-ce"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_command_ends_with_the_signal_that_stopped_it(make_config, tmp_path, monkeypatch):
    """What a script does next, with a model that is not there yet, is not to begin."""
    command, right = command_of(make_config(tokens=6 * 4 * T)), Align.__call__

    def stopping(self, model, batch):
        os.kill(os.getpid(), signal.SIGTERM)
        return right(self, model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Align, "__call__", stopping)
        assert main(command) == 128 + signal.SIGTERM
    assert not (tmp_path / "run" / "2-kl").exists()
    assert main(command) == 0


@pytest.mark.gpu
def test_passes_of_both_can_be_recorded(make_config, tmp_path):
    config = make_config(device="cuda")
    plain, recorded = (
        distill(replace(config, out=str(tmp_path / str(way)), cuda_graph=way)).model
        for way in (False, True)
    )
    a, b = (load_file(folder / "model.safetensors") for folder in (plain, recorded))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_does_not_fit_is_named_before_anything_is_written(make_config, lesson, tmp_path):
    config = make_config()
    kept, other = tmp_path / "kept", tmp_path / "other"
    convert(ConvertConfig(teacher=str(lesson[0]), out=str(kept), keep_layers=(0, 1, 2)))
    LlamaConfig(**LESSON | dict(num_hidden_layers=2)).save_pretrained(other)
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"text": "a"}\n')
    prepare(PrepareConfig(inputs=(str(plain),), out=str(tmp_path / "bytes"), quiet=True))
    for changes, error, words in (
        (
            {"student": str(tmp_path)},
            ValueError,
            "student: expected a folder that gsa convert made",
        ),
        ({"teacher": str(tmp_path)}, FileNotFoundError, "teacher: expected a model folder"),
        ({"teacher": str(other)}, ValueError, "teacher: expected num_hidden_layers = 3"),
        ({"teacher": str(lesson[2])}, ValueError, "teacher: expected a model_type of llama"),
        ({"student": str(kept)}, ValueError, "stages: expected no align"),
        ({"data": str(tmp_path / "none")}, (ValueError, OSError), "none"),
        ({"validation": str(tmp_path / "bytes")}, ValueError, "made with another tokenizer than"),
        ({"checkpoint_interval": -1}, ValueError, "checkpoint_interval: expected"),
        ({"recall_distances": (3,)}, ValueError, "recall_distances: expected at least"),
        ({"cuda_graph": True}, ValueError, "cuda_graph: expected false on device cpu"),
    ):
        with pytest.raises(error, match=words):
            distill(replace(config, **changes))
        assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letter").touch()
    for taken in (tmp_path / "run", tmp_path / "run" / "letter"):
        with pytest.raises(RunError, match="no distillation"):
            distill(replace(config, out=str(taken)))
    conversion = lesson[2] / "conversion.json"
    for damaged in ("{", "[]", '{"teacher": {"folder": 3}}'):
        conversion.write_text(damaged)
        with pytest.raises(RunError, match=r"conversion\.json: damaged"):
            distill(config)


def test_numbers_that_make_no_sense(make_config):
    for name in ("rows", "seq_len", "accumulation", "tokens", "held_out_tokens"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            make_config(**{name: 0})
    with pytest.raises(ValueError, match="recall_texts: expected at least 0, got -1"):
        make_config(recall_texts=-1)
    with pytest.raises(ValueError, match="yardstick: expected none without held-out text"):
        make_config(yardstick="there", validation="")


def test_other_settings_in_the_same_folder_are_refused(make_config):
    config = make_config(tokens=6 * 4 * T)
    folder = Path(config.out)
    folder.mkdir()
    (folder / ".distill.json.incomplete").touch()  # a killed command's, and no obstacle
    distill(config)
    with pytest.raises(RunError, match="seed: 0 there, 1 asked"):
        distill(replace(config, seed=1))
    (folder / "distill.json").write_text('{"config": []}')
    with pytest.raises(RunError, match=r"distill\.json: damaged .config: expected object"):
        distill(config)


@pytest.mark.parametrize(
    "text",
    [
        *("kl", "kd:1M:1e-3:0", "kl:much:1e-3:0", "kl:0:1e-3:0", "kl:1M:0:0", "kl:1M:1e-3:-1"),
        *("kl:inf:1e-3:0", "kl:1e99:1e-3:0", "kl:1KM:1e-3:0", "kl:1M:2:0", "kl:1M:nan:0"),
        *("kl:1M:1e-3:inf", "kl::1e-3:0", "kl:M:1e-3:0"),
    ],
)
def test_stages_that_make_no_sense(text):
    with pytest.raises(ValueError, match="stages: expected objective:tokens:lr:rest"):
        parse_stage(text)


def test_stages():
    stage = parse_stage("kl:2.5M:3e-4:0.1")
    assert (stage.tokens, stage.lr, stage.rates) == (2_500_000, 3e-4, {"": 0.1, ".attn.": 1.0})
    assert parse_stage("ce:500:1e-5:1").rates == {}
    adapted = parse_stage("ce:500:1e-4:lora")
    assert (adapted.lora, adapted.rates[""], adapted.rates[".f_proj."]) == (8, 0.0, 1.0)
    assert [s.tokens for s in planned("default", 5000)] == [1500, 2000, 1500]
    assert [s.objective for s in planned("paper", 10)] == ["ce"]
