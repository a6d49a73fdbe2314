"""Runs in processes of their own, to be killed for real; what equal runs share bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from gsa.training.objective import next_token

ROOT = Path(__file__).parent.parent

DRIVER = """
import json, sys
from gsa.training import TrainConfig, train
train(TrainConfig(**json.loads(sys.argv[1])))
"""


def start(config, program=DRIVER):
    """A process that trains; same threads as here, so that its numbers are the same."""
    return start_command([sys.executable, "-c", program, json.dumps(config.to_dict())])


def start_command(command):
    threads = str(torch.get_num_threads())
    environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_step(process, folder, step):
    """Returns when the run has done that step; fails if it ends before."""
    path = Path(folder) / "metrics.jsonl"
    while process.poll() is None:
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.002)
    raise AssertionError(f"ended early: {process.communicate()}")


def stopped_at(call):
    """An objective that asks its own process to stop during its `call`-th call."""
    calls = []

    def objective(model, batch):
        calls.append(batch)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGUSR1)
        return next_token(model, batch)

    return objective


def losses(folder):
    """(kind, step, loss) of every line of metrics.jsonl."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()]
    return [
        ("val_loss", row["step"], row["val_loss"])
        if "val_loss" in row
        else ("loss", row["step"], row["loss"], row["grad_norm"], row["lr"], row["tokens"])
        for row in rows
    ]


def assert_same_run(folder, other):
    """Every loss of every step, and the final weights, bit for bit."""
    assert losses(folder) == losses(other)
    a, b = (load_file(Path(f) / "model.safetensors") for f in (folder, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
