"""Runs in processes of their own, to be killed for real; what equal runs share bit for bit."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from forks import ALONE, Forked, gsa, launch, limit_files
from safetensors.torch import load_file

from gsa.conversion import distill
from gsa.training import RunError, train
from gsa.training.checkpoint import read_tensors
from gsa.training.distributed import Team
from gsa.training.objective import next_token

ROOT = Path(__file__).parent.parent

STOP, END = "checkpoints/step-00000007", "checkpoints/step-00000012"
"""Where runs of 12 steps are stopped, and where they end."""


def start(config, objective="next token", room=resource.RLIM_INFINITY):
    """A process that trains; room: bytes that no file may outgrow.

    Same threads as here, so that its numbers are the same.
    """
    return Forked(train_alone, config, objective, room)


def train_alone(config, objective, room):
    limit_files(room)
    try:
        train(config, objective=OBJECTIVES[objective]())
    except RunError as error:
        sys.exit(str(error))


@contextlib.contextmanager
def one_thread():
    """Models as small as ours lose time by more threads, where other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def torchrun(processes, arguments):
    """A launch of several processes on this machine, at a port of its own.

    One thread each: more than there are cores wait for one another.
    """
    torch_run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return start_command([sys.executable, *torch_run, *arguments], threads=1)


def launched(processes, arguments):
    """A launch of gsa with those arguments; what `torchrun` does, but for the imports."""
    return Forked(launch, processes, ALONE, gsa, arguments)


def in_teams(processes, *runs, options=ALONE):
    """Trains several runs one after another in one launch: (config, resume, objective, more)."""
    return Forked(launch, processes, options, train_all, runs)


def train_all(runs):
    """In each process of a launch; objective: a name in `OBJECTIVES`, and more to make it from."""
    dist.init_process_group("gloo")
    for config, resume, objective, *more in runs:
        try:
            train(config, resume=resume, objective=OBJECTIVES[objective](*more))
        except RunError as error:
            print(f"process {dist.get_rank()} ends: {error}", flush=True)
        limit_files(resource.RLIM_INFINITY)
    dist.destroy_process_group()


def distill_all(configs):
    """In each process of a launch."""
    dist.init_process_group("gloo")
    for config in configs:
        try:
            distill(config, say=print)
        except (ValueError, RunError) as error:
            print("ends:", error)
    dist.destroy_process_group()


def succeeded(process):
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output + errors


def start_command(command, threads=None):
    """threads: of each process; as many as here, so that its numbers are the same."""
    threads = str(threads or torch.get_num_threads())
    paths = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": paths}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def command_of(config, recipe="tiny"):
    """The arguments of gsa that train that; the model is the recipe's."""
    options = []
    for name, value in config.to_dict().items():
        if isinstance(value, str | float | int) and not isinstance(value, bool):
            options += [f"--{name.replace('_', '-')}={value}"]
    return ["train", recipe, *options]


def children(process):
    """The process ids that a launch started."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in listed.split()]


def kill_all(process):
    """kill -9 for a process and those it started, as when the power fails."""
    for pid in [*children(process), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def wait_for_save(process, folder):
    """Returns when a checkpoint is being written; fails if the run ends before."""
    while process.poll() is None:
        if list((Path(folder) / "checkpoints").glob("*.incomplete")):
            return
        time.sleep(0.001)
    raise AssertionError(f"ended early: {process.communicate()}")


def wait_for_step(process, folder, step):
    """Returns when the run has done that step; fails if it ends before."""
    path = Path(folder) / "metrics.jsonl"
    while process.poll() is None:
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.002)
    raise AssertionError(f"ended early: {process.communicate()}")


def damage(path, how):
    """Leaves half of a file, a last byte that differs, or none of it."""
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "changed":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        path.unlink()


def stopped_at(call):
    """An objective that asks its own process to stop during its `call`-th call."""
    calls = []

    def objective(model, batch):
        calls.append(batch)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGUSR1)
        return next_token(model, batch)

    return objective


def is_second():
    return dist.get_rank() == 1


def never_finite():
    """An objective of which no step is taken."""
    return lambda model, batch: next_token(model, batch) * float("nan")


def infinite_at(step):
    """An objective that is not finite in that step, in the second process alone."""
    calls = []

    def objective(model, batch):
        calls.extend([batch] if model.training else [])
        here = model.training and len(calls) == step and is_second()
        return next_token(model, batch) * (float("inf") if here else 1)

    return objective


def full_disk_from(step):
    """An objective that leaves its process no room from then on."""
    calls = []

    def objective(model, batch):
        calls.extend([batch] if model.training else [])
        if len(calls) == step:
            limit_files(100_000)
        return next_token(model, batch)

    return objective


def full_disk_at(step, saved):
    """An objective that leaves the second process no room from then on, when `saved` is there."""
    calls = []

    def objective(model, batch):
        calls.extend([batch] if model.training else [])
        if len(calls) == step and is_second():
            while not Path(saved).exists():
                time.sleep(0.01)
            limit_files(100_000)
        return next_token(model, batch)

    return objective


def recorded(folder):
    """An objective that writes down the tokens of each pass, a file per process."""

    def objective(model, batch):
        if model.training:
            with (Path(folder) / f"tokens-{dist.get_rank()}").open("a") as file:
                print(*batch.input_ids[0].tolist(), file=file)
        return next_token(model, batch)

    return objective


OBJECTIVES = {
    "next token": lambda: next_token,
    "stopped at": lambda call: stopped_at(call) if is_second() else next_token,
    "never finite": never_finite,
    "infinite at": infinite_at,
    "full disk from step 7": lambda: full_disk_from(7),
    "full disk at": full_disk_at,
    "recorded": recorded,
}


def losses(folder):
    """(kind, step, loss) of every line of metrics.jsonl."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()]
    return [
        ("val_loss", row["step"], row["val_loss"])
        if "val_loss" in row
        else ("loss", row["step"], row["loss"], row["grad_norm"], row["lr"], row["tokens"])
        for row in rows
    ]


def tensors_of(checkpoint):
    """All weights and moments of a checkpoint, whole."""
    return read_tensors(
        Path(checkpoint),
        lambda stored: {
            name: torch.zeros(entry.size, dtype=entry.properties.dtype)
            for name, entry in stored.items()
            if name not in ("torch", "cuda")
        },
        Team(),
    )


def assert_same_run(folder, other):
    """Every loss of every step, and the final weights, bit for bit."""
    assert losses(folder) == losses(other)
    a, b = (load_file(Path(f) / "model.safetensors") for f in (folder, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
