"""Processes killed with -9 at any moment, torn shards, a full disk: nothing is lost but time."""

import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from forks import Forked, gsa
from training_runs import (
    assert_same_run,
    children,
    command_of,
    damage,
    kill_all,
    launched,
    losses,
    one_thread,
    succeeded,
    tensors_of,
    torchrun,
    wait_for_save,
    wait_for_step,
)

from gsa.training import RunError, train
from gsa.training.checkpoint import find_checkpoint, open_checkpoint


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


def unfinished_copy(runs, name, folder):
    """A run as if it had been killed before it made the model, and its config."""
    shutil.copytree(runs.at(name), folder)
    for made in ("report.md", "model.safetensors"):
        (folder / made).unlink()
    return replace(runs(name), out=str(folder))


@pytest.mark.parametrize("how", ["truncated", "changed", "missing"])
@pytest.mark.parametrize(
    "name",
    [f"shards/shard-0000{i}-model-00001-of-00001.safetensors" for i in (1, 2)]
    + ["rng-00001.safetensors"],
)
def test_a_torn_shard_is_found(runs, pair, tmp_path, name, how):
    config = unfinished_copy(runs, "2-whole", tmp_path / "run")
    checkpoints = Path(config.out) / "checkpoints"
    damage(checkpoints / "step-00000012" / name, how)
    words = {"truncated": "truncated: ", "changed": "its SHA-256", "missing": "missing"}[how]
    with pytest.raises(RunError, match=f"step-00000012/{name}: .*{words}"):
        open_checkpoint(checkpoints / "step-00000012")
    said = []
    assert find_checkpoint(checkpoints, said.append).step == 10
    assert len(said) == 1 and "ignoring" in said[0] and name in said[0]


def test_one_process_goes_back_behind_a_torn_shard(runs, pair, tmp_path, capsys):
    config = unfinished_copy(runs, "2-whole", tmp_path / "run")
    shards = Path(config.out) / "checkpoints" / "step-00000012" / "shards"
    damage(next(shards.iterdir()), "changed")
    assert train(config).status == "finished"
    said = capsys.readouterr().err
    assert "ignoring" in said and "step-00000010" in said
    assert open_checkpoint(shards.parent).state["world"] == 1


def test_a_full_disk_in_one_process_ends_all(runs, pair):
    """The second process had no room from step 7 on, so checkpoint 10 failed in the background."""
    for rank in (0, 1):
        assert f"process {rank} ends: " in pair
    assert "step-00000010: the checkpoint could not be saved (process 1: " in pair
    assert f"the last good one is {runs.at('2-full', 'checkpoints/step-00000005')}" in pair
    left = [path.name for path in runs.at("2-full", "checkpoints").iterdir()]
    assert left == ["step-00000005"], "and nothing half-written takes up room"
    open_checkpoint(runs.at("2-full", "checkpoints/step-00000005"))


def test_two_killed_in_a_save_one_killed_alone_then_a_torn_shard(runs, pair, tmp_path):
    """And the run is that which nothing disturbed, bit for bit."""
    config = replace(runs("x"), out=str(tmp_path / "killed"), checkpoint_interval=1)
    command = command_of(config)
    process = launched(2, command)
    wait_for_step(process, config.out, 2)
    wait_for_save(process, config.out)
    kill_all(process)
    assert not (Path(config.out) / "report.md").exists()

    process = launched(2, command)
    wait_for_step(process, config.out, 7)
    os.kill(children(process)[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    # which of the two is reported depends on which the launcher looks at first
    assert process.returncode != 0 and ("Signal 9" in errors or "remote worker" in errors)
    assert not (Path(config.out) / "report.md").exists()

    checkpoints = Path(config.out) / "checkpoints"
    newest = max(path for path in checkpoints.iterdir() if path.suffix != ".incomplete")
    damage(newest / "shards" / "shard-00002-model-00001-of-00001.safetensors", "truncated")
    said = succeeded(torchrun(2, ["-m", "gsa", *command]))
    assert f"ignoring {newest}/shards" in said and "going on from" in said
    assert_same_run(config.out, runs.at("2-whole"))
    ours, theirs = tensors_of(checkpoints / "step-00000012"), tensors_of(runs.at("2-whole", END))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


END = "checkpoints/step-00000012"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_ten_times_at_random(runs, tmp_path, processes, capsys):
    """Half of the kills after a random delay from the start of the steps, half within a save."""
    long = replace(runs("x"), steps=240, checkpoint_interval=2, validation_interval=40)
    whole, killed = (replace(long, out=str(tmp_path / name)) for name in ("whole", "killed"))

    def launch(config):
        if processes == 1:
            return Forked(gsa, command_of(config))
        return launched(processes, command_of(config))

    succeeded(launch(whole))
    rng = random.Random(processes)
    moments = []
    for i in range(10):
        process = launch(killed)
        before = losses(killed.out)[-1][1] if i else 0
        wait_for_step(process, killed.out, before + 1)
        if i % 2:
            wait_for_save(process, killed.out)
        else:
            time.sleep(rng.uniform(0, 1.5))
        kill_all(process)
        assert not (Path(killed.out) / "report.md").exists(), "the run was over too soon"
        moments.append(losses(killed.out)[-1][1])
    succeeded(launch(killed))
    assert_same_run(killed.out, whole.out)
    with capsys.disabled():
        print(f"\n{processes} processes: {len(moments)} kills -9, in steps {moments}; bit for bit")
