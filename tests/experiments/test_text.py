"""Table 2 and the rivals at a toy size: arms, runs, resuming, report."""

import json
import math

import pytest
from training_runs import one_thread

from gsa.architectures import ARCHITECTURES
from gsa.data import PrepareConfig, prepare
from gsa.experiments import table1, table2
from gsa.experiments.arms import paper_rows
from gsa.experiments.table2 import TABLE2, Table2Config, reproduce_table2
from gsa.experiments.text import base_run, orderings
from gsa.model import GSAConfig
from gsa.recipes import RECIPES
from gsa.training import RunError
from gsa.training.metrics import read_metrics
from gsa.training.run_folder import read_settings


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for name, words in (
        ("train", "the slot remembers what the gate lets in; "),
        ("valid", "the gate "),
    ):
        (folder / f"{name}.txt").write_text(words * 60)
        prepare(
            PrepareConfig(inputs=(str(folder / f"{name}.txt"),), out=str(folder / name), quiet=True)
        )
    return folder


def asked(kind, shards, out, **changes):
    return kind(data=str(shards / "train"), validation=str(shards / "valid"), out=str(out),
                size="tiny", device="cpu", tokens=2560, **changes)  # fmt: skip


def test_the_arms_of_table_2_are_those_of_the_paper():
    keys = RECIPES["340m"]().model
    arms = table2.arms(keys)
    assert list(arms) == list(paper_rows("table2")[1]) == list(table2.NAMES)
    models = {key: GSAConfig(**own) for key, own in arms.items()}
    assert models["gsa"].to_dict() == GSAConfig(**keys).to_dict()
    changed = {key: {k: v for k, v in own.items() if keys.get(k) != v} for key, own in arms.items()}
    assert changed.pop("gsa") == {}
    assert changed["half-slots"] == {"num_slots": 32} and changed["double-slots"] == {
        "num_slots": 128
    }
    assert changed["no-gate"] == {"gate": "abc"}
    assert all(len(own) == 1 for own in changed.values())
    assert TABLE2.label("half-slots", arms["half-slots"]) == "32 slots"


def test_the_arms_of_table_1_are_all_architectures():
    assert list(table1.arms(RECIPES["34m"]().model)) == list(ARCHITECTURES)
    for recipe, size, perplexity in (("1.3b", "1.3B", 16.7), ("2.7b", "2.7B", 14.8)):
        source, rows = table1.paper(recipe)
        assert rows["gsa"] == perplexity and f"of {size} models" in source and len(rows) == 6


def test_two_arms_of_table_2(shards, tmp_path):
    said = []
    out = tmp_path / "out"
    config = asked(Table2Config, shards, out, arms=("relu", "gsa"))
    with one_thread():
        assert reproduce_table2(config, command="gsa reproduce table2 …", say=said.append) == 0
        assert said[0].startswith("2,560 tokens for each, in rows of 64")
        assert [line for line in said if " of 2: " in line] == [
            "1 of 2: GSA",
            "2 of 2: ReLU for softmax",
        ]
        results = json.loads((out / "results.json").read_text())
        settings = [read_settings(out / key)["config"] for key in ("gsa", "relu")]
        different = {key for key in settings[0] if settings[0][key] != settings[1][key]}
        assert different == {"name", "out", "model"}
        assert settings[1]["model"] == settings[0]["model"] | {"slot_activation": "relu"}
        for key in ("gsa", "relu"):
            found, (steps, validations) = results["arms"][key], read_metrics(out / key)
            assert found["perplexity"] == math.exp(validations[-1]["val_loss"])
            assert validations[-1]["whole"] and found["tokens"] == steps[-1]["tokens"] == 2560
        assert results["missing"] == [key for key in table2.NAMES if key not in ("gsa", "relu")]
        report = (out / "report.md").read_text()
        row = next(line for line in report.splitlines() if line.startswith("| ReLU for"))
        assert f"{results['arms']['relu']['perplexity']:.3f}" in row and "13.69" in row
        assert "of 1 pairs are in the paper's order" in report and "Not there yet: " in report
        assert (out / "curves.png").is_file()

        before = (out / "gsa" / "metrics.jsonl").stat().st_mtime_ns
        config = asked(Table2Config, shards, out, arms=("gsa", "half-slots"))
        said.clear()
        assert reproduce_table2(config, command="", say=said.append) == 0
    assert [line for line in said if " of 2: " in line] == ["2 of 2: 4 slots"]
    assert (out / "gsa" / "metrics.jsonl").stat().st_mtime_ns == before
    assert "of 3 pairs" in (out / "report.md").read_text()


def test_other_text_is_refused_in_the_same_folder(shards, tmp_path):
    with one_thread():
        config = asked(Table2Config, shards, tmp_path / "out", arms=("relu",))
        assert reproduce_table2(config, command="", say=lambda text: None) == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| ReLU for softmax |" in report and "Fewer than two arms" in report
    for changes in ({"data": str(shards / "valid")}, {"tokens": 5120.0}, {"seed": 1}):
        other = Table2Config(**vars(config) | changes)
        with pytest.raises(
            RunError, match=f"{'fingerprints' if 'data' in changes else min(changes)}: "
        ):
            reproduce_table2(other, command="", say=lambda text: None)


def test_nothing_is_written_for_a_plan_or_a_mistake(shards, tmp_path):
    out = tmp_path / "out"
    said = []
    plan = Table2Config(plan=True, size="paper", out=str(out))
    assert reproduce_table2(plan, command="", say=said.append) == 0
    assert said[0].startswith("9,999,745,024 tokens for each") and "all 9" in said[0]
    for changes, words in (
        ({"arms": ("gla",)}, "arms: expected some of gsa, no-gate, .*, got gla"),
        ({"device": "abacus"}, "device: expected cpu, cuda or cuda:N"),
        ({"validation": str(tmp_path)}, "not a shard folder"),
    ):
        config = asked(Table2Config, shards, out)
        with pytest.raises((ValueError, OSError), match=words):
            reproduce_table2(Table2Config(**vars(config) | changes), command="", say=said.append)
    with pytest.raises(ValueError, match="validation: expected a shard folder"):
        Table2Config(data="somewhere")
    with pytest.raises(ValueError, match=r"recipe: expected demo, tiny, .* got '9b'"):
        Table2Config(plan=True, recipe="9b")
    with pytest.raises(ValueError, match="gpu: expected one of"):
        Table2Config(plan=True, gpu="abacus")
    assert not out.exists()


def test_sizes_follow_recipes():
    small, paper = (base_run(Table2Config(plan=True, size=size)) for size in ("small", "paper"))
    assert (small.seq_len, small.steps, small.warmup) == (2048, 763, 76)
    assert (paper.steps, paper.warmup, paper.lr) == (19073, 190, 3e-4)
    half = base_run(table1.Table1Config(plan=True, size="paper", recipe="2.7b"))
    assert half.model == RECIPES["2.7b"]().model and half.steps * 2**21 == pytest.approx(1e11, 1e-4)
    eager = base_run(Table2Config(plan=True, eager=True))
    assert small.compile and not eager.compile and not eager.lean


def test_orderings_are_those_of_the_paper_or_not():
    labels = {"gsa": "GSA", "relu": "ReLU", "swish": "Swish", "extra": "extra"}
    paper = {"gsa": 13.5, "relu": 13.7, "swish": 13.7}
    ours = {"gsa": 20.0, "relu": 19.0, "swish": 21.0, "extra": 1.0}
    said = orderings(labels, ours, paper)
    assert said.startswith("1 of 2 pairs are in the paper's order. Not reproduced:")
    assert "- GSA (20.000) is not better than ReLU (19.000); paper: 13.5 and 13.7" in said
    assert (
        orderings(labels, ours | {"relu": 20.5}, paper) == "2 of 2 pairs are in the paper's order."
    )
    assert "Fewer than two" in orderings(labels, {"gsa": 20.0}, paper)
