"""gsa bench distill: its numbers are those of models that are really built."""

import json
from dataclasses import replace

import pytest
import torch
from teachers import LESSON, build_model
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from gsa.benchmark.distill_cost import (
    DistillCostConfig,
    bench_distill,
    block_activations,
    mixer_activations,
    stage_flops,
)
from gsa.cli import main
from gsa.conversion import ConvertConfig, DistillConfig, convert
from gsa.conversion.objectives import Align, FrozenTeacher, Kl
from gsa.data import Batch
from gsa.layers import TokenLayout
from gsa.model import GSAConfig, GSAForCausalLM
from gsa.model.cost import flops_per_token
from gsa.training.distributed import Team
from gsa.training.objective import next_token
from gsa.training.optimizer import build_optimizer, flat_state
from gsa.training.setup import build_model as build_student

T = 32
GLA = {"mixer": "gla", "gate_low_rank": 16, "output_gate": True}
RETNET = {"mixer": "retnet", "rope_theta": 1e4}


@pytest.fixture
def pair(tmp_path):
    """(teacher's folder, folder of its student, a hybrid)"""
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    build_model(LlamaConfig(**LESSON)).save_pretrained(teacher)
    convert(ConvertConfig(teacher=str(teacher), out=str(student), slots=8, keep_layers=(1,)))
    return teacher, student


def nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("preset", ["default", "lora", "paper"])
def test_bytes_that_stay_are_those_of_a_real_step(preset, pair):
    folder, student = pair
    asked = dict(student=str(student), preset=preset, tokens=10**6, seq_len=T, rows=2)
    said = bench_distill(DistillCostConfig(**asked, gpus=1))
    runs = DistillConfig(**asked, data="none", out="none").runs()
    teacher = FrozenTeacher(folder, T, "cpu", torch.float32)
    objectives = {"align": Align(teacher), "kl": Kl(teacher), "ce": next_token}
    ids = torch.randint(320, (1, 2 * T))
    batch = Batch(ids, ids, torch.tensor([0, T, 2 * T], dtype=torch.int32))
    own = GSAConfig.from_pretrained(student)
    for run, found in zip(runs, said["stages"], strict=True):
        run = replace(run, init=str(student))  # as each stage's model, but for what it learned
        model = build_student(run, own, torch.device("cpu"), Team())
        objectives[found["objective"]](model, batch).backward()
        optimizer = build_optimizer(model, run)
        optimizer.step(1e-3)
        moments = [t for name, t in flat_state(model, optimizer).items() if ".exp_avg" in name]
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert found["bytes"]["weights"] == nbytes(model.parameters())
        assert found["bytes"]["gradients"] == nbytes(gradients)
        assert found["bytes"]["optimizer"] == nbytes(moments)
        assert found["trained"] == sum(g.numel() for g in gradients)
        theirs = 0 if preset == "paper" else nbytes(teacher.model.parameters())
        assert found["bytes"]["teacher"] == theirs
    assert said["student"] == sum(p.numel() for p in GSAForCausalLM(own).parameters())
    assert said["teacher"] == sum(p.numel() for p in teacher.model.parameters())


@pytest.mark.parametrize(
    "options", [{}, {"attn": [{"layers": [0], "num_heads": 4, "num_kv_heads": 2}]},
                {"window_branch": 16, "window_rope_theta": 1e4}, GLA, RETNET],
)  # fmt: skip
def test_activations_are_about_what_autograd_keeps(options):
    """On a CPU in fp32; a tensor kept twice counts once, weights do not count."""
    slots = {} if "mixer" in options else {"num_slots": 16}
    config = GSAConfig(
        hidden_size=128, num_heads=4, num_kv_heads=2, intermediate_size=352, num_hidden_layers=1,
        vocab_size=64, **slots, **options,
    )  # fmt: skip
    model = GSAForCausalLM(config)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = model.model.embeddings(torch.randint(64, (1, 256)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.model.layers[0](x, TokenLayout.of_rows(256, x.device))
    assert output.requires_grad
    found = sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in weights) / 4 / 256
    said = mixer_activations(config.mixer_options(0)) + block_activations(config)
    assert said == pytest.approx(found, rel=0.2)


def test_flops_follow_from_what_is_trained(pair):
    _, student = pair
    own = GSAConfig.from_pretrained(student)
    config = DistillCostConfig(
        student="x", gpus=1, stages=("ce:1:1:1", "ce:1:1:0", "ce:1:1:lora", "kl:1:1:1")
    )
    whole, mixers, adapters, taught = (
        stage_flops(stage, own, own, seq_len=T) for stage in config.plan()
    )
    one = flops_per_token(own, T)
    assert whole == one.forward_backward and taught == whole + one.forward
    assert mixers == whole - one.mlp - one.head and adapters == mixers - one.projections


SIZES = {  # parameters of teacher and student
    "mistral": (7_241_732_096, 7_308_857_344),
    "llama": (8_030_261_248, 8_097_386_496),
}


@pytest.mark.parametrize("kind", SIZES)
def test_mistral_7b_and_llama_3_8b_from_their_config_alone(kind, tmp_path, capsys):
    rope = dict(rope_type="default", rope_theta=5e5)
    if kind == "mistral":
        config = MistralConfig(rms_norm_eps=1e-5, rope_parameters=rope)
    else:
        config = LlamaConfig(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8,
                             rope_parameters=rope)  # fmt: skip
    config.save_pretrained(tmp_path)
    out = tmp_path / "cost.json"
    command = ["bench", "distill", str(tmp_path), "--dtype", "bf16", "--recompute", "1"]
    assert main([*command, "--tokens", "500000000", "--out", str(out)]) == 0
    said = json.loads(out.read_text())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert (said["teacher"], said["student"]) == SIZES[kind]
    assert said["teacher"] == sum(p.numel() for p in model.parameters())
    kl = said["stages"][1]
    assert kl["trained"] == said["student"] and kl["bytes"]["weights"] == said["student"] * 4 / 8
    assert kl["bytes"]["teacher"] == said["teacher"] * 2
    # 6 FLOPs a weight and token for the student, 2 for the teacher, and the memory's besides.
    weights = 6 * said["student"] + 2 * said["teacher"]
    assert weights * 0.9 < kl["flops_per_token"] < weights * 1.1
    seconds = kl["flops_per_token"] * kl["tokens"] / (8 * 989e12 * 0.4)
    assert kl["hours"] == pytest.approx(seconds / 3600)
    printed = capsys.readouterr().out
    assert "GiB on each of 8 GPUs" in printed and "2 kl" in printed


def test_what_makes_no_sense_is_named(tmp_path):
    for changes, words in (
        ({"gpus": 3}, "gpus: expected at least 1, and rows = 16 a multiple of it"),
        ({"mfu": 0}, "mfu: expected"),
        ({"gpu": "abacus"}, "gpu: expected one of H100"),
        ({"recompute": -1}, "recompute: expected at least 0"),
        ({"student": ""}, "student: expected a non-empty"),
    ):
        with pytest.raises(ValueError, match=words):
            DistillCostConfig(**{"student": "x"} | changes)
    with pytest.raises(FileNotFoundError, match=r"expected a config\.json"):
        bench_distill(DistillCostConfig(student=str(tmp_path)))
