"""Experiments of several arms: what is skipped, refused, told of failures and written."""

import json
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from gsa.experiments.arms import Arm, StoppedError, begin, collect, read_result, run_arms
from gsa.training import RunError
from gsa.training.distributed import Team
from gsa.training.lock import turn


class Bench:
    """Arms that note how often they ran; what they do is set by name."""

    def __init__(self, out):
        self.out, self.ran, self.reports, self.said, self.errors = out, [], 0, [], {}
        begin(out, {"seed": 0})

    def run(self, *names):
        def work(name):
            self.ran.append(name)
            (self.out / name).mkdir(exist_ok=True)
            if name in self.errors:
                raise self.errors[name]
            return {"accuracy": len(name)}

        arms = [Arm(name=n, folder=self.out / n, run=lambda n=n: work(n)) for n in names]
        return run_arms(arms, report=self.report, command="gsa reproduce it", team=Team(),
                        say=self.said.append)  # fmt: skip

    def report(self):
        self.reports += 1
        collect(self.out, {name: self.out / name for name in ("a", "bb", "ccc")})


def test_arms_that_are_done_are_skipped(tmp_path):
    bench = Bench(tmp_path / "out")
    assert bench.run("a", "bb") == 0 and bench.run("a", "bb", "ccc") == 0
    assert bench.ran == ["a", "bb", "ccc"]
    found = json.loads((bench.out / "results.json").read_text())
    assert {key: one["accuracy"] for key, one in found["arms"].items()} == {
        "a": 1,
        "bb": 2,
        "ccc": 3,
    }
    assert found["missing"] == [] and found["asked"] == {"seed": 0}
    assert found["arms"]["a"]["command"] == "gsa reproduce it"
    assert "torch" in found["arms"]["a"]["environment"]


def test_more_arms_than_versions_of_a_block_are_compiled(tmp_path):
    """Dynamo refuses to compile a function anew more than eight times."""
    compiled = torch.compile(lambda x: x + 1, fullgraph=True, dynamic=False, backend="eager")

    def arm(size):
        folder = tmp_path / str(size)
        folder.mkdir()
        return Arm(
            name="", folder=folder, run=lambda: {"sum": float(compiled(torch.ones(size)).sum())}
        )

    arms = [arm(size) for size in range(1, 13)]
    run_arms(arms, report=lambda: None, command="", team=Team(), say=lambda text: None)
    assert [read_result(one.folder)["sum"] for one in arms] == [2.0 * n for n in range(1, 13)]


def test_a_signal_ends_it_with_a_report(tmp_path):
    bench = Bench(tmp_path / "out")
    bench.errors["bb"] = StoppedError(15)
    assert bench.run("a", "bb", "ccc") == 15
    assert bench.ran == ["a", "bb"] and bench.reports == 2
    assert json.loads((bench.out / "results.json").read_text())["missing"] == ["bb", "ccc"]


def test_a_failure_does_not_keep_others_from_running(tmp_path):
    bench = Bench(tmp_path / "out")
    bench.errors["a"] = RunError("the loss was not finite")
    with pytest.raises(RunError, match="failed: a; why is said above"):
        bench.run("a", "bb")
    assert bench.ran == ["a", "bb"] and read_result(bench.out / "a") is None
    assert any("a failed: the loss was not finite" in line for line in bench.said)
    bench.errors.clear()
    assert bench.run("a", "bb") == 0 and bench.ran == ["a", "bb", "a"]


def test_a_folder_of_something_else_is_refused(tmp_path):
    begin(tmp_path / "out", {"seed": 0, "rates": (1, 2)})
    begin(tmp_path / "out", {"seed": 0, "rates": (1, 2)})
    with pytest.raises(RunError, match="other settings \\(seed: 0 there, 1 asked\\)"):
        begin(tmp_path / "out", {"seed": 1, "rates": (1, 2)})
    with pytest.raises(RunError, match="holds something that is no experiment"):
        begin(tmp_path, {"seed": 0})
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="holds something that is no experiment"):
        begin(tmp_path / "file", {"seed": 0})
    for damaged in ("{", "[]"):
        (tmp_path / "out" / "experiment.json").write_text(damaged)
        with pytest.raises(RunError, match="damaged"):
            begin(tmp_path / "out", {"seed": 0})


def test_a_result_that_is_damaged_or_of_another_experiment_is_named(tmp_path):
    bench = Bench(tmp_path / "out")
    bench.run("a")
    path = bench.out / "a" / "result.json"
    good = path.read_text()
    for text in ("", "{", "[]", "3", "{}", good.replace('"arm": "a"', '"arm": 3')):
        path.write_text(text)
        with pytest.raises(RunError, match=r"a/result\.json: damaged"):
            bench.run("a")
    path.write_text(good.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(RunError, match=r"of an experiment with other settings .*move it away"):
        bench.run("a")
    path.write_text(good)
    bench.run("a")
    assert bench.ran == ["a"]


def test_commands_share_a_folder_at_the_same_moment(tmp_path):
    out, together = tmp_path / "out", Barrier(4)

    def command(name):
        together.wait()
        bench = Bench(out)
        bench.report = turn(out)(lambda: collect(out, {n: out / n for n in "abcd"}))
        for _ in range(5):
            bench.report()
        return bench.run(name)

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(command, "abcd")) == [0] * 4
    assert json.loads((out / "results.json").read_text())["missing"] == []


@pytest.mark.parametrize("left", [".lock", ".experiment.json.incomplete"])
def test_what_a_killed_command_left_is_no_obstacle(tmp_path, left):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / left).touch()
    assert Bench(tmp_path / "out").run("a") == 0
