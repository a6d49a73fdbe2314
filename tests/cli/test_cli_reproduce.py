"""gsa reproduce as a user types it."""

import pytest

from gsa.cli import main
from gsa.experiments.commands import EXPERIMENTS


def test_a_plan_needs_neither_text_nor_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for experiment, words in (
        ("table2", "no gate of its own (ABC)"),
        ("table1", "suite commonsense, forward alone"),
        ("figure3a", "retnet, d = 512"),
        ("figure4a", "own-transformer++"),
        ("figure4b", "rwkv6"),
        ("figure4c", "a floor"),
    ):
        assert main(["reproduce", experiment, "--size", "paper", "--plan"]) == 0
        output = capsys.readouterr().out
        assert words in output and "GPU-hours" in output
    assert not list(tmp_path.iterdir())


def test_help_names_every_experiment(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["reproduce", "--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in EXPERIMENTS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "expected 'table1' or 'table2' or 'table3' or 'recall' or"),
        (["table9"], "got 'table9'"),
        (["table2"], "data: expected a shard folder"),
        (["table1", "--data", "/no", "--validation", "/no", "--device", "cpu"], "no such folder"),
        (["figure3a", "--arms", "mamba2"], "arms: expected some of gsa"),
        (["table3"], "teacher: expected a folder"),
        (["table3", "--plan", "--teacher", "/no"], "teacher: expected a local"),
        (["recall", "--models", "/no"], "models: /no: no such folder"),
        (["figure4a", "--arms", "gpt"], "arms: expected gsa, abc"),
    ],
)
def test_a_mistake_is_one_line(arguments, words, capsys):
    assert main(["reproduce", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said and said.startswith("error: ") and said.count("\n") == 1
