import ast
from dataclasses import fields, replace
from pathlib import Path

import pytest

import gsa.training
from gsa.recipes import RECIPES
from gsa.training.config import FREE_TO_CHANGE, TrainConfig
from gsa.training.optimizer import rate_of
from gsa.training.schedule import learning_rate

BASE = TrainConfig(name="x", data="d", out="o", validation="v")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("name", " ", "non-empty"),
        ("data", "", "non-empty"),
        ("model", [("hidden_size", 3)], "dict of GSAConfig keys"),
        ("seq_len", 1, "at least 2"),
        ("rows", 0, "at least 1"),
        ("rows", 2.0, "integer"),
        ("rows", True, "integer"),
        ("accumulation", -1, "at least 1"),
        ("steps", 0, "at least 1"),
        ("lr", 0.0, "above 0"),
        ("lr", float("nan"), "finite"),
        ("lr", float("inf"), "finite"),
        ("min_lr", 1.0, "at most lr"),
        ("warmup", 1000, "fewer than steps"),
        ("weight_decay", -0.1, "≥ 0"),
        ("beta1", 1.0, "[0, 1)"),
        ("beta2", -0.5, "[0, 1)"),
        ("clip", 0, "above 0"),
        ("spike", 1.0, "above 1"),
        ("decay", 0.0, "(0, 1]"),
        ("decay", 1.5, "(0, 1]"),
        ("schedule", "linear", "cosine"),
        ("optimizer", "sgd", "adamw"),
        ("recompute", -1, "at least 0"),
        ("compile", 1, "true or false"),
        ("master_weights", 0, "true or false"),
        ("master_weights", False, "true with dtype fp32"),
        ("lean", 1, "true or false"),
        ("lean", True, "false without compile"),
        ("clip", float("nan"), "above 0"),
        ("dtype", "fp16", "fp32"),
        ("seed", -1, "at least 0"),
        ("keep_checkpoints", 0, "at least 1"),
        ("nan_limit", -1, "at least 0"),
        ("prompt", None, "a string"),
        ("device", "", "non-empty"),
        ("init", None, "a string"),
        ("rates", {"attn.": -1.0}, "≥ 0"),
    ],
)
def test_a_bad_value_is_refused_by_name(field, value, words):
    with pytest.raises(ValueError) as caught:
        replace(BASE, **{field: value})
    assert str(caught.value).startswith((f"{field}:", f"{field}[")) and words in str(caught.value)


def test_init_brings_its_own_config():
    with pytest.raises(ValueError, match="model: expected no keys with init"):
        replace(BASE, init="runs/first", model={"num_heads": 2})


def test_the_longest_part_of_a_name_decides_its_rate():
    rates = {"": 0.5, "attn.": 1.0, "attn.f_proj": 2.0}
    names = ("lm_head.weight", "model.layers.0.attn.q_proj.weight", "model.layers.0.attn.f_proj.w")
    assert [rate_of(name, rates) for name in names] == [0.5, 1.0, 2.0]
    assert rate_of("anything", BASE.rates) == 1.0


def test_validating_needs_a_validation_folder():
    with pytest.raises(ValueError, match="validation_interval: expected 0 without"):
        replace(BASE, validation="", validation_interval=5)


def test_no_clipping_is_infinity():
    assert replace(BASE, clip=float("inf")).clip == float("inf")


def test_every_field_is_read_outside_the_config():
    folder = Path(gsa.training.__file__).parent
    read = set()
    for path in folder.glob("*.py"):
        if path.name != "config.py":
            tree = ast.parse(path.read_text())
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute) and "config" in ast.unparse(node.value):
                    read.add(node.attr)
    names = {field.name for field in fields(TrainConfig)}
    assert names - read == set()
    assert names >= FREE_TO_CHANGE


def test_recipes_are_valid_and_have_their_own_name():
    for name, recipe in RECIPES.items():
        assert recipe().name == name
        assert recipe().out == f"runs/{name}"


def test_learning_rate_rises_and_falls():
    config = replace(BASE, steps=110, warmup=10, lr=2.0, min_lr=0.5)
    assert learning_rate(config, 1) == pytest.approx(0.2)
    assert learning_rate(config, 10) == 2.0
    assert learning_rate(config, 60) == pytest.approx(1.25)  # half-way down the cosine
    assert learning_rate(config, 110) == 0.5
    rates = [learning_rate(config, step) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_learning_rate_without_warmup_and_of_one_step():
    config = replace(BASE, steps=3, warmup=0, lr=2.0, min_lr=1.0)
    assert [learning_rate(config, step) for step in (1, 2, 3)] == pytest.approx([2.0, 1.5, 1.0])
    assert learning_rate(replace(config, steps=1), 1) == 2.0


def test_wsd_stays_at_the_top_until_the_last_steps():
    config = replace(BASE, steps=100, warmup=10, lr=2.0, min_lr=0.5, schedule="wsd", decay=0.4)
    assert learning_rate(config, 5) == pytest.approx(1.0)
    assert {learning_rate(config, step) for step in range(10, 61)} == {2.0}
    assert learning_rate(config, 70) == pytest.approx(0.5 + 1.5 * 0.5)  # a quarter: 1 - sqrt(1/4)
    assert learning_rate(config, 100) == 0.5
    longer = replace(config, steps=1000)
    assert learning_rate(longer, 60) == learning_rate(config, 60), "may be prolonged from here"
    assert learning_rate(replace(config, decay=1.0), 10) == 2.0
