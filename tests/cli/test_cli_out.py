"""What --out may replace: results of the same command, and nothing else. Told before the work."""

import json
from pathlib import Path

import pytest

from gsa.cli import main

DRAWN = Path(__file__).parent.parent.parent / "results" / "2026-11-25-decode-h100.json"
COMMANDS = [
    ["bench", "cost", "tiny"],
    ["bench", "distill", "nowhere"],
    ["bench", "ops", "--device", "cpu"],
    ["bench", "training", "--device", "cpu", "--size", "tiny", "--arch", "gsa"],
    ["bench", "decode", "--device", "cpu", "--size", "tiny", "--arch", "gsa"],
    ["bench", "plot", str(DRAWN)],
    ["eval", "perplexity", "nowhere", "--data", "nowhere"],
    ["eval", "tasks", "nowhere", "--suite", "recall"],
    ["eval", "retrieval", "nowhere", "--data", "nowhere"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[:2]))
def test_no_other_file_is_replaced(command, tmp_path, capsys):
    for name, text in (("config.json", '{"model_type": "gsa"}'), ("notes.txt", "mine")):
        out = tmp_path / name
        out.write_text(text)
        assert main([*command, "--out", str(out)]) == 2
        assert capsys.readouterr().err.startswith("error: out: ")
        assert out.read_text() == text


def test_a_result_is_replaced_and_an_impossible_place_is_told_first(tmp_path, capsys):
    out = tmp_path / "deep" / "cost.json"
    for vocabulary in ("100", "200"):
        command = ["bench", "cost", "tiny", "--vocab-size", vocabulary, "--out", str(out)]
        assert main(command) == 0
        assert json.loads(out.read_text())["asked"]["vocab_size"] == int(vocabulary)
    capsys.readouterr()
    for command in COMMANDS:
        if command[1] != "plot":
            assert main([*command, "--out", str(out / "below-a-file.json")]) == 2
            assert f"out: expected a file that can be made, but in {out}" in capsys.readouterr().err


def test_the_table_of_an_evaluation_replaces_no_notes(tmp_path, capsys):
    (tmp_path / "x.md").write_text("mine")
    command = ["eval", "perplexity", "nowhere", "--data", "nowhere"]
    assert main([*command, "--out", str(tmp_path / "x.json")]) == 2
    assert "x.md exists, where the table would go" in capsys.readouterr().err
