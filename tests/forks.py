"""Processes of their own, without the seconds that imports take: forked from one that made them.

They are processes like any other: memory, signals, output and exit status are their own. What else
a command's start does, tests that start the command see: `start_command` and `torchrun`.
"""

import atexit
import multiprocessing
import os
import resource
import sys
import tempfile
from pathlib import Path

import torch

FORKS = multiprocessing.get_context("forkserver")
LOADED = ["training.loop", "conversion.distillation", "generation.server.run"]
FORKS.set_forkserver_preload(["torch.distributed.run", *(f"gsa.{name}" for name in LOADED)])


class Forked:
    """A process that calls a function of a module; to be asked as subprocess.Popen is."""

    def __init__(self, call, *arguments):
        self.folder = tempfile.TemporaryDirectory()
        self.said = [Path(self.folder.name) / name for name in ("output", "errors")]
        given = (self.said, torch.get_num_threads(), call, arguments)
        self.process = FORKS.Process(target=_run, args=given)
        self.process.start()
        self.pid, self.kill = self.process.pid, self.process.kill
        atexit.register(self.kill)  # what a test that failed left behind

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def wait(self, timeout=None):
        self.process.join(timeout)
        assert self.returncode is not None, f"still running after {timeout} s"
        return self.returncode

    def communicate(self, timeout=None):
        """(what it wrote, its errors), when it has ended."""
        self.wait(timeout)
        return tuple(path.read_text() for path in self.said)


def _run(said, threads, call, arguments):
    for number, path in zip((1, 2), said, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    torch.set_num_threads(threads)
    call(*arguments)


def limit_files(size):
    """What writes more into a file than that finds the disk full."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def gsa(arguments, room=resource.RLIM_INFINITY):
    """The command of those arguments; room: bytes that no file may outgrow."""
    from gsa.cli import main

    limit_files(room)
    sys.exit(main(arguments))


ALONE = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
"""Options of torchrun for a launch on one host, at a port of its own."""


def launch(processes, options, call, *arguments):
    """What torchrun does with a script, its agent does with a function: `call` in each process.

    One thread each: more than there are cores wait for one another.
    """
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    chosen = [*options, "--nproc-per-node", str(processes), "function"]
    config, _, _ = config_from_args(parse_args(chosen))
    config.start_method = "fork"
    torch.set_num_threads(1)
    elastic_launch(config, call)(*arguments)
