"""Experiments one after another, as typed, at toy size: what one trains the next evaluates."""

import json

import huggingface_hub
import pytest
from local_tasks import write_tasks
from teachers import LESSON, build_model, build_tokenizer
from training_runs import one_thread
from transformers import LlamaConfig

from gsa.cli import main
from gsa.data import PrepareConfig, prepare
from gsa.experiments import figure4
from gsa.experiments.evaluation import find_models
from gsa.training.lock import RunLock

WORDS = "the slot remembers what the gate lets in, and forgets what it lets go; "


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder with local tasks, a teacher, and shards of bytes and in the teacher's tokens."""
    folder = tmp_path_factory.mktemp("reproduce")
    write_tasks(folder / "local")
    build_model(LlamaConfig(**LESSON)).save_pretrained(folder / "teacher")
    build_tokenizer().save_pretrained(folder / "teacher")
    for name, times in (("train", 80), ("valid", 4)):
        (folder / f"{name}.txt").write_text(WORDS * times)
        for kind, more in (("bytes", {}), ("tokens", {"tokenizer": str(folder / "teacher")})):
            out = str(folder / kind / name)
            inputs = (str(folder / f"{name}.txt"),)
            prepare(PrepareConfig(inputs=inputs, out=out, quiet=True, **more))
    return folder


@pytest.fixture(autouse=True)
def no_list_of_packages(monkeypatch):
    """lm-eval asks pip for all that is installed after every task, which takes longer than ours."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def reproduce(*arguments):
    with one_thread():
        return main(["reproduce", *map(str, arguments)])


def on_text(room, kind):
    return ["--data", room / kind / "train", "--validation", room / kind / "valid"]


TOY = ("--size", "tiny", "--device", "cpu")


def test_table_1_and_recall_on_its_models(room, capsys, monkeypatch):
    out, local = room / "table1", ["--data-dir", room / "local"]
    command = ["table1", *TOY, *on_text(room, "bytes"), "--tokens", "2560", "--out", out]
    command += ["--arms", "gsa"]
    assert reproduce(*command, *local) == 0
    results = json.loads((out / "commonsense" / "results.json").read_text())
    assert results["missing"] == [] and len(results["arms"]) == 8
    one = results["arms"]["gsa/arc_easy"]
    assert one["metrics"]["acc"] == 0.5 and one["examples"] == 2 and "torch" in one["environment"]
    report = (out / "report.md").read_text()
    ppl = results["arms"]["gsa/perplexity"]["metrics"]["perplexity"]
    row = next(line for line in report.splitlines() if line.startswith("| **gsa**"))
    assert f" {ppl:.1f} |" in row and " 50.0 |" in row
    assert "| 1.3B GSA " in report and "curves.png" in report and "- seed 0" in report
    times = {at: at.stat().st_mtime_ns for at in out.rglob("result.json")}
    assert reproduce(*command, *local) == 0
    task = out / "commonsense" / "gsa" / "piqa"
    kept = (task / "result.json").rename(task / "kept.json")
    with RunLock(task):  # as another command's
        assert reproduce(*command, *local) == 2
    assert "piqa on gsa failed: " in (said := capsys.readouterr().out) and "in use by" in said
    kept.rename(task / "result.json")
    assert times == {at: at.stat().st_mtime_ns for at in out.rglob("result.json")}
    capsys.readouterr()
    assert reproduce(*command, *local, "--arms", "gla", "--limit", "1") == 2
    assert "limit: 0 there, 1 asked" in capsys.readouterr().err and not (out / "gla").exists()

    recall = ["recall", "--device", "cpu", "--models", out, "--out", room / "recall"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert reproduce(*recall) == 0
    report = (room / "recall" / "report.md").read_text()
    assert "recall_fda: no data from the Hugging Face hub" in report
    assert "| **gsa** " not in report
    capsys.readouterr()
    assert reproduce(*recall, *local) == 0
    assert "recall_swde on gsa not run: data_dir: " in capsys.readouterr().out
    found = json.loads((room / "recall" / "results.json").read_text())["arms"]
    assert list(found) == ["gsa/recall_fda"]
    assert found["gsa/recall_fda"]["length"] == 2048
    report = (room / "recall" / "report.md").read_text()
    assert "- recall_swde: data_dir: " in report and "recall_fda: " not in report

    weights = out / "gsa" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    assert reproduce(*recall, *local) == 2
    assert "is of other weights than" in capsys.readouterr().err


def test_table_3_and_table_4_on_its_models(room, capsys):
    out, local = room / "table3", ["--data-dir", room / "local"]
    command = ["table3", *TOY, "--teacher", room / "teacher", "--out", out]
    command += ["--arms", "gsa-ours", "supra-paper", "teacher"]
    assert reproduce(*command, *on_text(room, "bytes")) == 2 and not out.exists()
    assert "made with another tokenizer than that in" in capsys.readouterr().err
    command += on_text(room, "tokens")
    assert reproduce(*command, *local, "--tokens", "640") == 0
    results = json.loads((out / "results.json").read_text())
    assert len(results["missing"]) == 7 and next(iter(results["arms"])) == "teacher"
    paper, ours = results["arms"]["supra-paper"], results["arms"]["gsa-ours"]
    assert (paper["model"], ours["model"]) == ("taught/1-ce", "taught/3-ce")
    assert paper["trained_tokens"] == ours["trained_tokens"] == 640
    assert paper["teacher_perplexity"] == ours["teacher_perplexity"]
    report = (out / "report.md").read_text()
    assert f"| gsa-ours | 640 | {ours['student_perplexity']:.3f} |" in report
    assert "| **teacher** " in report and "| GSA, +20B tokens " in report
    assert "- nq_open: data_dir: " in report
    capsys.readouterr()
    assert reproduce("table4", "--device", "cpu", "--models", out, "--out", room / "table4", *local,
                     "--limit", "1", "--dtype", "fp32") == 0  # fmt: skip
    found = json.loads((room / "table4" / "results.json").read_text())
    assert sorted(found["arms"]) == [
        f"{name}/long_quality" for name in ("gsa-ours", "supra-paper", "teacher")
    ]
    assert "Only the first 1 examples" in (room / "table4" / "report.md").read_text()


def test_figures_4(room, capsys, monkeypatch):
    arms = ["--arms", "gsa", "transformer++"]
    for figure, out in (("figure4a", "ab"), ("figure4b", "ab"), ("figure4c", "c")):
        assert reproduce(figure, *TOY, "--out", room / out, *arms) == 0
        said = capsys.readouterr().out
        assert ("1 of 2: gsa" in said) == (figure != "figure4b")
        report = (room / out / "report.md").read_text()
        assert (room / out / f"figure4{out}.png").read_bytes().startswith(b"\x89PNG")
        assert "| transformer++ " in report and "transformers' Llama" in report
        found = json.loads((room / out / "results.json").read_text())
        assert set(found["arms"]) == {"gsa", "transformer++"} and "rwkv6" in found["missing"]
    assert reproduce("figure4c", "--size", "small", "--device", "cpu", "--out", room / "c") == 2
    assert "size: 'tiny' there, 'small' asked" in capsys.readouterr().err
    asked = figure4.Figure4cConfig(arms=("gsa", "fla"), out=str(room / "c"))
    report = figure4.decode_report(asked, {"gsa": found["arms"]["gsa"]})
    assert "Not there yet: fla." in report


def test_the_paper_stands_beside_its_own_size_alone():
    facts = {"environment": {}, "rows": [{"tokens": 2048, "contenders": {"gsa": {"peak_gib": 30}},
                                          "missing": {"gla": "out of memory"}}]}  # fmt: skip
    results = {name: {"document": facts} for name in ("gsa", "gla")}

    def lines(size):
        cell = figure4.table(results, lambda x: str(x["peak_gib"]), "figure4b", "tokens", size)
        return [" ".join(line.split()) for line in cell.splitlines()]

    assert "| gsa | 30 |" in lines("small") and "| gsa, paper | 38.0 |" not in lines("small")
    assert lines("paper")[3] == "| gsa, paper | 38.0 |"
    assert "| gla | out of memory |" in lines("paper")


def test_models_are_found_or_missed_by_name(room, tmp_path):
    (tmp_path / "empty").mkdir()
    for sources, error, words in (
        ((tmp_path / "none",), FileNotFoundError, "no such folder"),
        ((tmp_path / "empty",), ValueError, "has no model that is done, and is none"),
        ((room / "teacher", room / "teacher"), ValueError, "different names, got teacher twice"),
    ):
        with pytest.raises(error, match=words):
            find_models([str(at) for at in sources])
    assert find_models([str(room / "teacher")]) == {"teacher": room / "teacher"}
