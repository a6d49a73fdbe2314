"""gsa report as a user types it."""

import subprocess
import sys
from pathlib import Path

import pytest

from gsa.cli import main

ROOT = Path(__file__).parent.parent.parent
DEMO = str(ROOT / "results" / "2026-11-24-demo-cpu")


def test_report_of_a_finished_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", DEMO]) == 0
    assert capsys.readouterr().out == "report.html\n"
    text = (tmp_path / "report.html").read_text()
    assert "1.7649 (step 700)" in text and "1,433,600" in text and "2.13.0+cpu" in text
    assert "Settings that differ" not in text
    assert main(["report", DEMO, "--out", "pictures/curves.png"]) == 0
    assert (tmp_path / "pictures" / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/no/run"], "runs: /no/run: no such folder"),
        (["docs"], "runs: docs is no run folder (it has neither train.json nor metrics.jsonl)"),
        ([DEMO, "--out", "README.md"], "out: expected a name ending in .html or .png"),
        ([DEMO, "--out", "results/2026-11-25-ops-h100.png"], "was not made by gsa report"),
    ],
)
def test_a_mistake_is_one_line(arguments, words, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["report", *arguments]) == 2
    output = capsys.readouterr()
    assert words in output.err and output.err.startswith("error: ") and output.err.count("\n") == 1


def test_report_loads_no_torch(tmp_path):
    program = (
        "import sys\nfrom gsa.cli import main\n"
        f"main(['report', {DEMO!r}, '--out', {str(tmp_path / 'r.html')!r}])\n"
        "print('loaded:', *{'torch', 'transformers'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded:"
