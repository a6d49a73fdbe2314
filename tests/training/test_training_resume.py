import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from forks import Forked, gsa
from training_runs import (
    assert_same_run,
    command_of,
    losses,
    start,
    start_command,
    stopped_at,
    wait_for_step,
)

from gsa.data import PrepareConfig, prepare
from gsa.training import RunError, train
from gsa.training.lock import RunLock
from gsa.training.objective import next_token

LONG = 100
"""Steps enough that a run is still going when it is killed."""


@pytest.fixture(scope="module")
def uninterrupted(shard_folders, tmp_path_factory):
    """A long run that nothing disturbed, and its config."""
    from gsa.recipes import tiny

    config = replace(
        tiny(),
        data=str(shard_folders[0]),
        validation=str(shard_folders[1]),
        out=str(tmp_path_factory.mktemp("runs") / "whole"),
        steps=LONG,
        checkpoint_interval=9,
        validation_interval=20,
        validation_rows=4,
        accumulation=2,
    )
    train(config)
    return config


def test_killed_and_resumed_is_the_same_run(uninterrupted, tmp_path):
    config = replace(uninterrupted, out=str(tmp_path / "killed"))
    for step in (20, 45):
        process = start(config)
        wait_for_step(process, config.out, step)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (tmp_path / "killed" / "report.md").exists()
    result = train(config)
    assert result.status == "finished"
    assert_same_run(config.out, uninterrupted.out)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGINT, 130)]
)
def test_a_signal_saves_and_exits(uninterrupted, tmp_path, number, code):
    config = replace(uninterrupted, out=str(tmp_path / "stopped"))
    if number == signal.SIGINT:
        process = start_command([sys.executable, "-m", "gsa", *command_of(config)])
    else:
        process = Forked(gsa, command_of(config))
    wait_for_step(process, config.out, 20)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == code, errors
    assert f"{number.name}: saved step" in errors and "Traceback" not in errors
    last = losses(config.out)[-1][1]
    assert 20 <= last < LONG
    assert (tmp_path / "stopped" / "checkpoints" / f"step-{last:08d}" / "manifest.json").exists()
    if number == signal.SIGTERM:  # what is saved does not depend on who asked
        train(config)
        assert_same_run(config.out, uninterrupted.out)


def test_a_signal_during_validation_repeats_no_line(make_config, tmp_path):
    config = make_config(validation_rows=12)

    def terminated_while_validating(model, batch):
        if not model.training and not terminated_while_validating.sent:
            terminated_while_validating.sent = True
            os.kill(os.getpid(), signal.SIGTERM)
        return next_token(model, batch)

    terminated_while_validating.sent = False
    result = train(config, objective=terminated_while_validating)
    assert (result.status, result.step, result.signal) == ("stopped", 5, signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "handlers are put back"
    assert "val_loss" not in [row[0] for row in losses(config.out)], "cut off half-way"
    train(config)
    whole = replace(config, out=str(tmp_path / "whole"))
    train(whole)
    assert_same_run(config.out, whole.out)


def test_a_run_folder_serves_one_run_at_a_time(make_config):
    config = make_config()
    Path(config.out).mkdir()
    with (
        RunLock(Path(config.out)),
        pytest.raises(RunError, match=r"in use by another run \(pid \d"),
    ):
        train(config)
    assert train(config).status == "finished"


def test_a_folder_that_is_no_run_is_not_touched(make_config, tmp_path):
    config = make_config(out=str(tmp_path))
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match=r"not a run folder .* holds thesis\.txt"):
        train(config)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(RunError, match="expected a folder, got the file"):
        train(replace(config, out=str(tmp_path / "thesis.txt")))
    for left in (".lock", ".train.json.incomplete"):  # by a run that was killed as it began
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / left).touch()
    assert train(replace(config, out=str(tmp_path / "run"))).status == "finished"


def stopped_at_5(config):
    """A run of which only checkpoint 5 is left, as if it had been killed soon after."""

    class Killed(Exception):
        pass

    def killed_at_step_8(model, batch):
        if model.training:
            killed_at_step_8.calls += 1
        if killed_at_step_8.calls == 8:
            raise Killed
        return next_token(model, batch)

    killed_at_step_8.calls = 0
    with pytest.raises(Killed):
        train(config, objective=killed_at_step_8)
    return Path(config.out) / "checkpoints" / "step-00000005"


def test_other_settings_do_not_resume(make_config):
    config = make_config()
    stopped_at_5(config)
    before = losses(config.out)
    with pytest.raises(RunError, match=r"lr: 0\.01 there, 0\.02 asked.*choose another out"):
        train(replace(config, lr=0.02))
    with pytest.raises(RunError, match=r"model: .*'num_slots': 8.* there"):
        train(replace(config, model=config.model | {"num_slots": 4}))
    assert losses(config.out) == before, "nothing lost"


def test_settings_that_change_no_weight_may_change(make_config, tmp_path):
    config = make_config()
    stopped_at_5(config)
    train(replace(config, checkpoint_interval=4, keep_checkpoints=9, prompt="x"))
    whole = make_config(out=str(tmp_path / "whole"))
    train(whole)
    assert_same_run(config.out, whole.out)


def test_damaged_settings_are_written_anew_from_what_is_asked(make_config, capsys):
    config = make_config()
    stopped_at_5(config)
    path = Path(config.out) / "train.json"
    whole = json.loads(path.read_text())
    for damaged in ('{"config": ', "[]", json.dumps(whole).replace('"config"', '"gonfig"')):
        path.write_text(damaged)
        train(config, objective=stopped_at(1))
        assert f"ignoring {path}: damaged" in capsys.readouterr().err
        assert json.loads(path.read_text())["config"] == whole["config"]
    train(config)
    path.write_text(damaged)
    with pytest.raises(RunError, match=r"train\.json: damaged .config: expected object"):
        train(config)


def test_other_shards_do_not_resume(make_config, shard_folders, tmp_path):
    config = make_config()
    stopped_at_5(config)
    (tmp_path / "other.txt").write_text("other text " * 200)
    prepare(PrepareConfig(inputs=(str(tmp_path / "other.txt"),), out=str(tmp_path / "other")))
    with pytest.raises(RunError, match=r"data: .* was made with other shards"):
        train(replace(config, data=str(tmp_path / "other")))
    with pytest.raises(RunError, match=r"validation: .* was made with other shards"):
        train(replace(config, validation=str(tmp_path / "other")))


def test_a_named_checkpoint_starts_another_folder(make_config, tmp_path):
    config = make_config(keep_checkpoints=3)
    checkpoint = stopped_at_5(config)
    branch = replace(config, out=str(tmp_path / "branch"))
    train(branch, resume=str(checkpoint))
    train(config)
    assert losses(branch.out) == [row for row in losses(config.out) if row[1] > 5]
    with pytest.raises(RunError, match="newer checkpoints than step 5"):
        train(config, resume=str(checkpoint))
