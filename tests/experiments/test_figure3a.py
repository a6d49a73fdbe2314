"""Figure 3a: models of the author's sizes, the sweep, its report and plot."""

import json

import pytest
from PIL import Image
from training_runs import one_thread

from gsa.experiments import figure3a
from gsa.experiments.figure3a import SIZES, Figure3aConfig, best_points, model_keys, report_text
from gsa.experiments.mqar import Task
from gsa.experiments.recall_run import Examples
from gsa.model import GSAConfig
from gsa.model.cost import count_parameters


@pytest.mark.parametrize("arch", SIZES["paper"].arms)
@pytest.mark.parametrize("width", SIZES["paper"].widths)
def test_every_model_of_the_sweep_exists(arch, width):
    config = GSAConfig(**model_keys(arch, width, SIZES["paper"]))
    assert config.num_hidden_layers == 4 and config.mlp_width == 0
    if arch == "gsa":
        options = config.mixer_options(0)
        assert (options.slots, options.num_heads, options.scale) == (width // 4, 4, "rsqrt_key")
        per_layer = 4 * width * width + 4 * width * width // 4 + width + width
        assert count_parameters(config).total == 8192 * width + 4 * per_layer + width


def test_a_sweep_and_its_report(tmp_path, monkeypatch):
    """Two rates for two architectures of one width, on a task that takes a moment."""
    small = {**vars(SIZES["tiny"]), "task": Task(seq_len=8, pairs=2, vocab_size=16),
             "examples": Examples(train=32, held_out=8, epochs=2), "rows": 8}  # fmt: skip
    monkeypatch.setitem(SIZES, "tiny", figure3a.Protocol(**small))
    out = tmp_path / "out"
    config = Figure3aConfig(size="tiny", out=str(out), widths=(16,), rates=(1e-2, 1e-3),
                            device="cpu", dtype="fp32")  # fmt: skip
    said = []
    with one_thread():
        assert figure3a.reproduce_figure3a(config, command="gsa …", say=said.append) == 0
        found = json.loads((out / "results.json").read_text())["arms"]
        keys = ["gsa-16-0.01", "abc-16-0.01", "gsa-16-0.001", "abc-16-0.001"]
        assert sorted(found) == sorted(keys) and found[keys[0]]["steps"] == 8
        best = max(found[key]["accuracy"] for key in keys if key.startswith("gsa"))
        report = (out / "report.md").read_text()
        assert f"| gsa | {100 * best:.1f} (" in report and "paper |" not in report
        with Image.open(out / "figure3a.png") as picture:
            assert picture.size[0] > 400
        said.clear()
        other = Figure3aConfig(**vars(config) | {"arms": ("gsa",), "rates": (5e-3,)})
        assert figure3a.reproduce_figure3a(other, command="gsa …", say=said.append) == 0
    assert [line for line in said if " of 1: " in line] == ["1 of 1: gsa, d = 16, rate 0.005"]
    assert len(json.loads((out / "results.json").read_text())["arms"]) == 5


def test_the_best_rate_counts_and_the_paper_stands_beside():
    facts = ("device", "torch", "triton", "gsa", "commit")

    def result(arch, width, rate, accuracy):
        return {"arm": f"{arch} {width} {rate}", "arch": arch, "width": width, "rate": rate,
                "accuracy": accuracy, "steps": 1, "seconds": 1.0, "diverged": False, "command": "",
                "environment": dict.fromkeys(facts)}  # fmt: skip

    results = {str(i): result(*one) for i, one in enumerate((
        ("gla", 64, 1e-3, 0.5), ("gsa", 128, 1e-3, 0.2), ("gsa", 64, 1e-3, 0.3),
        ("gsa", 64, 2e-3, 0.4),
    ))}  # fmt: skip
    best = best_points(results)
    assert {arch: list(row) for arch, row in best.items()} == {"gsa": [64, 128], "gla": [64]}
    lines = report_text(Figure3aConfig(plan=True), results, best, ["abc, d = 64"]).splitlines()
    assert "Not there yet: abc, d = 64." in lines
    assert "| gsa | 40.0 (0.002) | 20.0 (0.001) |" in lines
    assert "| gsa, paper | 27.8 | 98.0 |" in lines and "| gla | 50.0 (0.001) | – |" in lines


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arms": ("mamba2",)}, "arms: expected some of gsa, abc, gla"),
        ({"widths": (20,)}, "widths: expected multiples of 16, got 20"),
        ({"rates": (2.0,)}, "rates: expected numbers between 0 and 1"),
        ({"epochs": -1}, "epochs: expected a number ≥ 0"),
        ({"mfu": 0.0}, "mfu: expected a number above 0"),
    ],
)
def test_mistakes_are_said(changes, words):
    with pytest.raises(ValueError, match=words):
        Figure3aConfig(**changes)
