"""With every layer kept a student says what its teacher says, as exactly as the teacher itself."""

import copy
import json

import pytest
import torch
from teachers import LINEAR, LLAMA3, SIZES, TEACHERS, YARN
from transformers import AutoModelForCausalLM, LlamaConfig

from gsa.conversion import ConvertConfig, check, convert
from gsa.conversion.check import compare_kept
from gsa.conversion.student import rope_keys, student_config
from gsa.conversion.teacher import open_teacher
from gsa.layers.rope import rope_frequencies
from gsa.model import GSAForCausalLM

EPS = torch.finfo(torch.float32).eps


@torch.no_grad()
def logits(model, ids, **more):
    return model.eval()(ids, **more).logits


def off(found, exact):
    """Errors by norm and by largest number."""
    wrong = found.double() - exact
    return wrong.norm() / exact.norm(), wrong.abs().max() / exact.abs().max()


def assert_as_exact(found, theirs, exact):
    for ours, its_own in zip(off(found, exact), off(theirs, exact), strict=True):
        assert ours <= 2 * its_own + EPS


@pytest.mark.parametrize("kind", TEACHERS)
def test_logits_are_the_teachers(kind, save, tmp_path):
    folder, model = save(kind)
    made = convert(
        ConvertConfig(
            teacher=str(folder), out=str(tmp_path / "out"), keep_layers=(0, 1, 2), check_tokens=40
        )
    )
    student = GSAForCausalLM.from_pretrained(tmp_path / "out")
    assert student.dtype == torch.float32
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, model.config.vocab_size, (2, 40), generator=generator)
    exact = logits(copy.deepcopy(model).double(), ids)
    assert_as_exact(logits(student, ids), logits(model, ids), exact)

    # Padding on the left, where positions are those of transformers' generate.
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = dict(attention_mask=mask, position_ids=positions)
    exact = logits(copy.deepcopy(model).double(), ids, **padded)[1, 9:]
    theirs = logits(model, ids, **padded)[1, 9:]
    assert_as_exact(logits(student, ids, attention_mask=mask)[1, 9:], theirs, exact)

    # What the command itself saw, layer by layer.
    check = made.report["check"]
    assert check["tokens"] == 40 and check["student"][0] <= 2 * check["teacher"][0] + EPS

    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=1)
    theirs = model.generate(ids[:, :10], **options)
    assert torch.equal(student.generate(ids[:, :10], **options), theirs)


MISREAD = {
    "a rotation": ("llama", lambda attn: attn.update(rope_theta=attn["rope_theta"] * 1.01)),
    "its scaling": ("llama 3", lambda attn: attn["rope_scaling"].update(factor=7.0)),
    "a window": ("mistral", lambda attn: attn.update(window_size=attn["window_size"] + 1)),
}
LOST = {"a bias": ("qwen2", "k_proj.bias", 0.0), "a norm": ("qwen3", "k_norm.weight", 1.0)}


OLD_ROTATIONS = {
    "theta alone": dict(rope_theta=5e3),
    "linear": dict(rope_theta=1e4, rope_scaling={"type": "linear", "factor": 2.0}),
    "llama3": dict(
        rope_theta=5e3, rope_scaling={k: v for k, v in LLAMA3.items() if "theta" not in k}
    ),
}


@pytest.mark.parametrize("kind", OLD_ROTATIONS)
def test_configs_as_they_were_before_transformers_5(kind, save, tmp_path):
    """rope_theta and rope_scaling beside each other, as in most folders of the hub."""
    folder, _ = save("llama", shard="1GB")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    path.write_text(json.dumps(config | OLD_ROTATIONS[kind] | {"torch_dtype": "float32"}))
    model = AutoModelForCausalLM.from_pretrained(folder)
    convert(ConvertConfig(teacher=str(folder), out=str(tmp_path / "out"), keep_layers=(0, 1, 2)))
    student = GSAForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(2, 42)[None]
    exact = logits(copy.deepcopy(model).double(), ids)
    assert_as_exact(logits(student, ids), logits(model, ids), exact)
    assert student.config.attn[0]["rope_theta"] == OLD_ROTATIONS[kind]["rope_theta"]


@pytest.mark.parametrize("part", [*MISREAD, *LOST, "eps", "the order of layers"])
def test_the_check_sees_what_was_misread(part, save, monkeypatch):
    kind = (MISREAD | LOST).get(part, ("llama",))[0]
    folder, _ = save(kind)
    teacher = open_teacher(folder)
    options = ConvertConfig(teacher=str(folder), out="unused", keep_layers=(0, 1, 2))
    config = student_config(teacher, options)
    assert compare_kept(teacher, config, 40, 0).holds
    right = check.run_student

    def run(teacher, config, layer, weights, x, layout):
        if part == "the order of layers":
            weights = check.block_weights(teacher, {0: 1, 1: 0}.get(layer, layer))
        if part in LOST:
            _, name, value = LOST[part]
            lost = torch.full_like(weights[f"self_attn.{name}"], value)
            weights = weights | {f"self_attn.{name}": lost}
        return right(teacher, config, layer, weights, x, layout)

    monkeypatch.setattr(check, "run_student", run)
    if part in MISREAD:
        MISREAD[part][1](config.attn[0])
    elif part == "eps":
        config.norm_eps = 1e-5
    assert not compare_kept(teacher, config, 40, 0).holds


MSCALE = dict(mscale=0.7, mscale_all_dim=1.2, beta_fast=20, beta_slow=2)


@pytest.mark.parametrize("scaling", [None, LLAMA3, LINEAR, YARN, YARN | MSCALE])
def test_rotations_are_transformers_bit_for_bit(scaling):
    theta = 5e5
    given = (scaling or {"rope_type": "default"}) | {"rope_theta": theta}
    config = LlamaConfig(**SIZES | dict(hidden_size=256), rope_parameters=given)
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = LlamaRotaryEmbedding(config)
    ours = rope_keys(config)
    assert ours["rope_theta"] == theta
    frequencies = rope_frequencies(64, theta, ours["rope_scaling"], "cpu")
    assert torch.equal(frequencies, theirs.inv_freq)
    factor = (ours["rope_scaling"] or {}).get("attention_factor", 1.0)
    assert factor == theirs.attention_scaling
