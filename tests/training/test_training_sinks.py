"""Trackers: what reaches them, each step once however often resumed. Real packages where installed.

wandb and trackio are tested where they are installed, tensorboard always.
"""

import importlib.util
import json
import math
import os
import re
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from training_runs import stopped_at

from gsa.training import train
from gsa.training.errors import RunError
from gsa.training.metrics import MetricsLog
from gsa.training.sinks import SINKS, TRACKERS, Sinks, check_sinks, open_sinks, scalars

CONFIG = {"name": "mine", "lr": 3e-4, "clip": math.inf, "model": {"num_slots": 4}}
ROOT = Path(__file__).parent.parent.parent


def line(step, loss=0.0):
    return {"step": step, "loss": loss or 10.0 / step, "ppl": math.inf, "tokens": 100 * step}


def validation(step):
    return {"step": step, "val_loss": 20.0 / step, "val_tokens": 5, "whole": False, "tokens": 1}


def begin(names, folder, *, resumed, upto, validate=(), loss=0.0):
    """What the loop does from one checkpoint on, up to a step, and its end."""
    sinks = open_sinks(names, folder, CONFIG, resumed)
    log = MetricsLog(folder, after_step=resumed, validated=resumed)
    for step in range(resumed + 1, upto + 1):
        for one in [line(step, loss), *([validation(step)] if step in validate else [])]:
            log.write(**one)
            sinks.write(one)
    sinks.sync()
    sinks.close()
    log.close()


def test_scalars_are_the_finite_numbers():
    assert scalars(line(2) | {"lr": None, "x": math.nan, "y": True}) == {
        "train/loss": 5.0,
        "train/tokens": 200,
    }
    assert scalars(validation(4)) == {"validation/loss": 5.0}
    assert scalars({"step": 4, "val_loss": None}) == {}


def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="expected some of tensorboard, wandb, trackio, got 'x'"):
        check_sinks(["x"])
    missing = [name for name in SINKS if importlib.util.find_spec(name) is None]
    for name in missing:
        with pytest.raises(ValueError, match=f"{name} is not installed.*pip install {name}"):
            check_sinks([name])
        with pytest.raises(ValueError, match=f"pip install {name}"):
            open_sinks([name], tmp_path, CONFIG, 0)
        (tmp_path / "here" / name).mkdir(parents=True)  # such as the folder that wandb itself makes
        monkeypatch.syspath_prepend(tmp_path / "here")
        with pytest.raises(ValueError, match=f"pip install {name}"):
            check_sinks([name])
        sys.modules.pop(name, None)
    assert [path.name for path in tmp_path.iterdir()] == (["here"] if missing else [])


def test_no_sinks_touch_nothing(tmp_path):
    sinks = open_sinks([], tmp_path, CONFIG, 5)
    sinks.write(line(6))
    sinks.sync()
    sinks.close()
    assert list(tmp_path.iterdir()) == []


class Recorder:
    """Takes what it is given until it has had enough."""

    def __init__(self, limit=math.inf):
        self.got, self.limit = [], limit

    def write(self, step, scalars, validation):
        if len(self.got) >= self.limit:
            raise OSError("no space left")
        self.got.append((step, scalars))

    def sync(self):
        pass

    def close(self):
        self.got.append("closed")


def test_a_tracker_that_fails_is_given_up_and_the_others_go_on():
    weak, strong = Recorder(limit=2), Recorder()
    sinks = Sinks({"weak": weak, "strong": strong})
    sinks.write(line(1))
    sinks.write(line(2))
    with pytest.warns(UserWarning, match=r"weak failed and gets no more \(no space left\)"):
        sinks.write(line(3))
    sinks.write(line(4))
    sinks.close()
    assert [one[0] for one in weak.got] == [1, 2]
    assert [one[0] for one in strong.got[:-1]] == [1, 2, 3, 4] and strong.got[-1] == "closed"


# --- tensorboard --------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from gsa.training.sinks import open_sinks
sinks = open_sinks(["tensorboard"], Path(sys.argv[1]), {"name": "mine"}, 0)
for step in range(1, 9):
    sinks.write({"step": step, "loss": 100.0 + step})
    if step == 5:
        sinks.write({"step": 5, "val_loss": 3.0})
        sinks.sync()
os.kill(os.getpid(), signal.SIGKILL)
"""


def read_events(folder):
    """{tag: [(step, value), ...]} as tensorboard itself shows them."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()
    found = {
        tag: [(one.step, pytest.approx(one.value)) for one in events.Scalars(tag)]
        for tag in tags["scalars"]
    }
    return found, {tag: events.Tensors(tag) for tag in tags["tensors"]}


def test_tensorboard_shows_each_step_once_after_a_kill(tmp_path):
    pytest.importorskip("tensorboard")
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    found, texts = read_events(tmp_path)
    assert [step for step, _ in found["train/loss"]][:5] == [1, 2, 3, 4, 5]  # what was synced
    assert "mine" in str(texts["settings/text_summary"][0].tensor_proto.string_val)
    second = int(time.time())
    while int(time.time()) == second:  # files are ordered by their names, which count in seconds
        time.sleep(0.02)
    begin(["tensorboard"], tmp_path, resumed=5, upto=10, validate=[10])
    found, texts = read_events(tmp_path)
    assert found["train/loss"] == [
        *((step, 100.0 + step) for step in range(1, 6)),
        *((step, 10.0 / step) for step in range(6, 11)),
    ]
    assert found["validation/loss"] == [(5, 3.0), (10, 2.0)]
    assert found["train/tokens"] == [(step, 100 * step) for step in range(6, 11)]
    assert "train/ppl" not in found and "train/step" not in found  # ppl was infinite
    assert len(texts["settings/text_summary"]) == 1
    assert not (tmp_path / TRACKERS).exists()


# --- wandb and trackio --------------------------------------------------------------------------


def wandb_history(folder):
    """[(step, {key: value})] of the offline runs under a run folder, in order, and their ids."""
    from wandb.proto import wandb_internal_pb2

    rows, ids = [], set()
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for data in wandb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            elif record.WhichOneof("record_type") == "history":
                items = record.history.item
                row = {one.key or one.nested_key[0]: json.loads(one.value_json) for one in items}
                row = {key: value for key, value in row.items() if "/" in key}
                rows.append((record.history.step.num, row))
    return rows, ids


def wandb_records(data):
    """The records of a LevelDB log: blocks of 32 KiB, each piece with checksum, length, kind."""
    at, whole = 7, b""  # behind the file's header
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield whole
            whole = b""


def test_wandb_offline_gets_each_step_once(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    begin(["wandb"], tmp_path, resumed=0, upto=8, validate=[5])
    begin(["wandb"], tmp_path, resumed=5, upto=7)  # stopped before it was past where it had been
    time.sleep(1.1)  # its folders are named by the second
    begin(["wandb"], tmp_path, resumed=5, upto=10, validate=[10])
    rows, ids = wandb_history(tmp_path)
    assert [step for step, row in rows if "train/loss" in row] == list(range(1, 11))
    assert all(row.get("train/loss", 10 / step) == 10 / step for step, row in rows)
    held_out = {step: row["validation/loss"] for step, row in rows if "validation/loss" in row}
    assert held_out == {5: 4.0, 10: 2.0}
    known = json.loads((tmp_path / TRACKERS).read_text())["wandb"]
    assert ids == {known["id"]}


def test_wandb_without_a_login_is_an_error(tmp_path):
    pytest.importorskip("wandb")
    program = (
        "import pathlib, sys\nfrom gsa.training.sinks import open_sinks\n"
        "open_sinks(['wandb'], pathlib.Path(sys.argv[1]), {'name': 'mine'}, 0)"
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=ROOT,
        env=kept | {"HOME": str(tmp_path), "WANDB_MODE": "online"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert re.match(r".*RunError: sinks: wandb does not start \(.*login", last)


def test_trackio_gets_each_step_once(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    for module in (m for name, m in sys.modules.items() if name.startswith("trackio")):
        if hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "db")
    assert trackio
    begin(["trackio"], tmp_path, resumed=0, upto=8, validate=[5])
    begin(["trackio"], tmp_path, resumed=5, upto=7)
    begin(["trackio"], tmp_path, resumed=5, upto=10, validate=[10])
    database = sqlite3.connect(tmp_path / "db" / "gated-slots.db")
    rows = list(database.execute("select run_name, step, metrics from metrics order by id"))
    known = json.loads((tmp_path / TRACKERS).read_text())["trackio"]
    assert {row[0] for row in rows} == {f"mine-{known['id']}"}
    rows = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert [step for step, row in rows if "train/loss" in row] == list(range(1, 11))
    held_out = {step: row["validation/loss"] for step, row in rows if "validation/loss" in row}
    assert held_out == {5: 4.0, 10: 2.0}


class Run(Recorder):
    """The two methods of a run that wandb and trackio share."""

    def log(self, values, step):
        self.got.append((step, values))

    def finish(self):
        self.got.append("finished")


def test_steps_handed_over_are_not_handed_over_again(tmp_path, monkeypatch):
    """The same without either package: their part is played by a list."""
    from gsa.training import sinks

    runs = []

    def start(**settings):
        runs.append((settings["name"], Run()))
        return runs[-1][1]

    monkeypatch.setitem(sinks._LOADERS, "trackio", lambda: start)
    monkeypatch.setattr(sinks, "_trackio", lambda: start)
    begin(["trackio"], tmp_path, resumed=0, upto=8, validate=[5, 8])
    begin(["trackio"], tmp_path, resumed=5, upto=7)
    begin(["trackio"], tmp_path, resumed=5, upto=10, validate=[8, 10])
    assert len({name for name, _ in runs}) == 1
    given = [[one[0] for one in run.got[:-1]] for _, run in runs]
    assert given == [[1, 2, 3, 4, 5, 5, 6, 7, 8, 8], [], [9, 10, 10]]
    assert all(run.got[-1] == "finished" for _, run in runs)

    begin(["trackio"], tmp_path, resumed=0, upto=2)  # from the start: another run
    assert runs[-1][0] != runs[0][0] and [one[0] for one in runs[-1][1].got[:-1]] == [1, 2]

    (tmp_path / TRACKERS).write_text('{"trackio": {}}')
    with pytest.raises(RunError, match=r"trackers\.json: damaged .*move it away"):
        open_sinks(["trackio"], tmp_path, CONFIG, 2)


def test_a_run_sends_every_step_once_however_often_resumed(make_config):
    pytest.importorskip("tensorboard")
    config = make_config(sinks=("tensorboard",), validation="", validation_interval=0)
    assert train(config, objective=stopped_at(8)).status == "stopped"
    assert train(config).status == "finished"
    found, _ = read_events(Path(config.out))
    assert [step for step, _ in found["train/loss"]] == list(range(1, config.steps + 1))
    with pytest.raises(ValueError, match="sinks: expected some of"):
        train(replace(config, sinks=("paper",)))
