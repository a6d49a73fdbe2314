"""Suites and tasks as a user types them, on local files."""

import json

import pytest
from teachers import build_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from gsa.cli import main
from gsa.evaluation.own_tasks import OWN_TASKS
from gsa.evaluation.suites import suites
from gsa.evaluation.tasks import Catalogue, Plan, _result


def run(*arguments):
    return main(["eval", "tasks", *map(str, arguments)])


@pytest.fixture(scope="module")
def catalogue():
    return Catalogue()


def test_a_suite_beside_the_paper(save_model, data_dir, tmp_path, capsys):
    folder, out = save_model(), tmp_path / "found.json"
    assert run(folder, "--suite", "commonsense", "--data-dir", data_dir, "--out", out) == 0
    printed = capsys.readouterr().out
    assert out.with_suffix(".md").read_text() == printed
    found = json.loads(out.read_text())
    tasks = {task["task"]: task for task in found["tasks"]}
    assert list(tasks) == [*dict.fromkeys(c.task for c in suites()["commonsense"].columns)]
    assert tasks["arc_easy"]["examples"] == 2 and tasks["arc_easy"]["metrics"]["acc"] == 0.5
    assert tasks["arc_easy"]["versions"] == ["1.0"] and found["environment"]["lm_eval"]
    assert found["paper"]["model"][2] == 50 and found["scored_by"] == "forked states"
    assert "| 1.3B GSA" in printed and "55.3 |" in printed and "LAMBADA ppl *" in printed
    assert "Not comparable with published figures" in printed
    assert [task for task, found in tasks.items() if found["note"]] == ["lambada_openai"]


def test_some_tasks_of_a_suite(save_model, data_dir, tmp_path, capsys):
    folder, out = save_model(), tmp_path / "found.json"
    options = ("--suite", "t2r", "--tasks", "arc_easy", "piqa", "--data-dir", data_dir)
    assert run(folder, *options, "--out", out) == 0
    values = json.loads(out.read_text())["paper"]["model"]
    assert values[0] == 50 and [value is None for value in values] == [
        column.task not in ("arc_easy", "piqa") for column in suites()["t2r"].columns
    ]
    assert " 50.0 |" in capsys.readouterr().out


def test_the_same_numbers_as_through_hflm(save_model, data_dir, tmp_path, monkeypatch):
    folder, numbers = save_model("hybrid"), []
    names = ("arc_easy", "hellaswag", "lambada_openai", "wikitext", "recall_fda", "long_quality")
    for ours in (True, False):
        out = tmp_path / f"{ours}.json"
        monkeypatch.setattr("gsa.evaluation.tasks.is_ours", lambda model, ours=ours: ours)
        options = ("--length", "200", "--data-dir", data_dir, "--out", out)
        assert run(folder, "--tasks", *names, *options) == 0
        found = json.loads(out.read_text())
        assert found["scored_by"] == ("forked states" if ours else "lm-eval's HFLM")
        numbers.append([task["metrics"] for task in found["tasks"]])
    for mine, theirs in zip(*numbers, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_a_transformers_model(data_dir, tmp_path, capsys):
    folder = tmp_path / "llama"
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1)
    config = LlamaConfig(vocab_size=320, num_attention_heads=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    assert run(folder, "--tasks", "recall_fda", "arc_easy", "--data-dir", data_dir) == 0
    printed = capsys.readouterr().out
    assert "| arc_easy  " in printed and "| recall_fda *" in printed and "never compared" in printed
    assert main(["eval", "speed", str(folder), "--context", "20"]) == 2
    assert "expected a GSAConfig model" in capsys.readouterr().err


def test_shots_and_groups(catalogue, data_dir):
    assert len(catalogue.leaves("mmlu")) == 57 and len(catalogue.leaves("bbh")) == 27
    files = catalogue.files("mmlu_anatomy", 5, data_dir)
    assert sorted(files) == ["dev", "test"]
    task = catalogue.build("mmlu_anatomy", 5, files, build_tokenizer(), 100)
    assert task.config.num_fewshot == 5
    assert task.fewshot_context(task.task_docs[0], 5).count("Answer:") == 6
    assert sorted(catalogue.files("mmlu_anatomy", 0, data_dir)) == ["test"]
    bbh = "bbh_cot_fewshot_navigate"
    with pytest.raises(FileNotFoundError, match=rf"{bbh}/test\.jsonl is missing"):
        catalogue.files(bbh, 3, data_dir)
    with pytest.raises(FileNotFoundError, match=r"nq_open/train\.jsonl is missing"):
        catalogue.files("nq_open", 5, data_dir)


def test_every_suite_names_tasks_that_exist(catalogue):
    for suite in suites().values():
        for column in suite.columns:
            for leaf in catalogue.leaves(column.task):
                if leaf in OWN_TASKS:
                    assert OWN_TASKS[leaf].metric == column.metric and column.note
                else:
                    metrics = catalogue._config(leaf)["metric_list"]
                    assert column.metric in [metric["metric"] for metric in metrics]
        assert all(len(row.values) == len(suite.columns) for row in suite.rows)
    shots = [column.shots for column in suites()["t2r"].columns]
    assert shots == [0, 0, 0, 0, 0, 5, 5, 3, 5]


def test_refusals(save_model, data_dir, tmp_path, capsys):
    folder = save_model()

    def says(*arguments):
        assert run(*arguments) == 2
        return capsys.readouterr().err

    assert "suite: expected one of commonsense" in says(folder, "--suite", "common")
    assert "expected a suite, or tasks, got neither" in says(folder)
    assert "expected some of mmlu in suite mmlu, got bbh" in says(
        folder, "--suite", "mmlu", "--tasks", "bbh"
    )
    assert "did you mean" in says(folder, "--tasks", "arc_eazy")
    missing = says(folder, "--suite", "recall", "--data-dir", data_dir)
    assert "recall_swde/validation.jsonl is missing" in missing
    assert "reads its data itself" in says(folder, "--tasks", "fda", "--data-dir", data_dir)
    assert "no such folder" in says(tmp_path / "none", "--suite", "mmlu")
    broken = data_dir / "recall_fda" / "validation.jsonl"
    broken.write_text('{"text": "a"}\n')
    options = ("--tasks", "recall_fda", "--data-dir", data_dir)
    assert "recall_fda, row 1: expected rows as for FDA and SWDE" in says(folder, *options)
    broken.write_text("[1]\n")
    assert "line 1: not a JSON object" in says(folder, *options)


def test_speed_compares_the_numbers(save_model, tmp_path, capsys):
    out = tmp_path / "speed.json"
    sizes = {"questions": 3, "choices": 2, "context": 60, "shots": 40, "answer": 3, "turns": 1}
    options = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    assert main(["eval", "speed", str(save_model()), *options, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["requests"] == 6 and found["same_greedy"] is True
    assert 0 < found["largest_relative_difference"] < 1e-5
    assert "times as fast" in capsys.readouterr().out


def test_a_group_weighs_every_example_the_same():
    found = {
        "results": {
            "a": {"alias": "a", "acc,none": 1.0, "acc_stderr,none": "N/A", "only,none": 3.0},
            "b": {"alias": "b", "acc,get": 0.5, "acc,other": 0.9},
        },
        "n-samples": {"a": {"effective": 1}, "b": {"effective": 3}},
        "versions": {"a": 1.0, "b": 2.0},
        "n-shot": {"a": 5, "b": 5},
    }
    result = _result(Plan("both", ("a", "b"), 5), found)
    assert result["metrics"] == {"acc": (1 + 3 * 0.5) / 4} and result["examples"] == 4
    assert (result["versions"], result["shots"]) == (["1.0", "2.0"], [5])
    assert result["members"]["a"] == {"examples": 1, "metrics": {"acc": 1.0, "only": 3.0}}
