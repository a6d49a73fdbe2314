"""An experiment is a list of arms, each in a folder of its own, and one report about all of them.

    out/
        experiment.json     what was asked; another experiment is refused the folder
        <arm>/result.json   what came out of an arm; an arm that has it is done
        results.json        all of that in one file
        report.md           for people

Whatever interrupts it, the same command goes on: arms that are done are skipped, and an arm under
way goes on from its own checkpoint. Several commands may share the folder, with different arms;
they report in turns.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gsa.training import RunError
from gsa.training.distributed import Team
from gsa.training.environment import environment
from gsa.training.files import incomplete, read_object, write_json
from gsa.training.lock import LOCK, turn

EXPERIMENT, RESULT, RESULTS = "experiment.json", "result.json", "results.json"
Result = dict[str, Any]
"""What came out of an arm: plain numbers, beside its command and environment."""


class StoppedError(Exception):
    """An arm was stopped by a signal, with what it needs to go on saved."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


class NotRunError(Exception):
    """What an arm needs is not there: it is left out and told of, and is no failure."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """name: for people. run: trains or goes on, and returns the numbers; StoppedError, NotRunError.

    Where an arm leaves a model, its numbers have "model": the model's folder, from the arm's.
    """

    name: str
    folder: Path
    run: Callable[[], Result]


def records(device: str, team: Team, *, eager: bool) -> bool:
    """Whether an arm's passes are recorded as CUDA graphs: one process can, and is the sooner done
    with small models."""
    return device.startswith("cuda") and team.mesh is None and not eager


def begin(out: Path, asked: dict[str, Any]) -> None:
    """Writes what is asked of a new folder. RunError if it holds anything else."""
    path, now = out / EXPERIMENT, json.loads(json.dumps(asked))
    if out.exists():
        there = {at.name for at in out.iterdir()} if out.is_dir() else {out.name}
        ours = {LOCK, incomplete(path).name}  # of a command that began just now, or was killed
        if there - ours and not path.is_file():
            raise RunError(f"out: {out} holds something that is no experiment; choose another out")
    out.mkdir(parents=True, exist_ok=True)
    with turn(out):
        if not path.is_file():
            write_json(path, now)
    before = read_object(path)
    differing = [
        f"{key}: {before.get(key)!r} there, {now.get(key)!r} asked"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]
    if differing:
        raise RunError(
            f"out: {out} is of an experiment with other settings ({'; '.join(differing)}); ask for "
            "the same, or choose another out"
        )


def run_arms(
    arms: Sequence[Arm],
    *,
    report: Callable[[], None],
    command: str,
    team: Team,
    say: Callable[[str], None],
) -> int:
    """Runs the arms that are not done, in order; reports after each. Returns the signal, if any.

    RunError at the end if arms failed; the others were run nevertheless.
    """
    failed = []
    for number, arm in enumerate(arms, 1):
        if team.ask_first(lambda arm=arm: read_result(arm.folder)) is not None:
            continue
        say(f"{number} of {len(arms)}: {arm.name}")
        torch.compiler.reset()  # dynamo allows few versions of a block: each arm starts anew
        try:
            told = {"arm": arm.name, "asked": _asked(arm.folder), "command": command}
            found = told | {"environment": environment()} | arm.run()
        except StoppedError as stopped:
            team.ask_first(report)
            return stopped.signal
        except NotRunError as reason:
            say(f"{arm.name} not run: {reason}")
            continue
        except RunError as error:
            say(f"{arm.name} failed: {error}")
            failed.append(arm.name)
            continue
        team.ask_first(lambda arm=arm, found=found: write_json(arm.folder / RESULT, found))
        team.ask_first(report)
    team.ask_first(report)
    if failed:
        raise RunError(
            f"failed: {', '.join(failed)}; why is said above; the same command tries again"
        )
    return 0


def read_result(folder: Path) -> Result | None:
    """None if the arm is not done. RunError for a file that is damaged or another experiment's."""
    path = folder / RESULT
    if not path.is_file():
        return None
    found = read_object(path, {"arm": str, "command": str, "environment": dict})
    here = _asked(folder)
    if found.get("asked", here) != here:
        raise RunError(
            f"{folder}: is of an experiment with other settings ({found['asked']} there, {here} "
            "here); move it away, and it is made anew"
        )
    return found


def _asked(folder: Path) -> dict[str, Any]:
    """What was asked of the experiment that an arm's folder lies in; {} outside of any."""
    places = (place / EXPERIMENT for place in folder.absolute().parents)
    return next((read_object(path) for path in places if path.is_file()), {})


def collect(out: Path, folders: Mapping[str, Path]) -> dict[str, Result]:
    """Results by the key of each arm that is done; writes them into results.json."""
    every = {key: read_result(folder) for key, folder in folders.items()}
    done = {key: found for key, found in every.items() if found is not None}
    missing = [key for key in every if key not in done]
    asked = read_object(out / EXPERIMENT)
    write_json(out / RESULTS, {"asked": asked, "missing": missing, "arms": done})
    return done


def made_with(results: Mapping[str, Result], seed: int | None = None) -> str:
    """The last section of a report: commands, seed, devices and versions of all results."""
    keys = ("device", "operators", "torch", "triton", "gsa", "commit")
    lines = [f"- `{command}`" for command in dict.fromkeys(r["command"] for r in results.values())]
    lines += [] if seed is None else [f"- seed {seed}"]
    made_on = [r["environment"] for r in results.values()]
    every = [", ".join(f"{key} {facts.get(key)}" for key in keys) for facts in made_on]
    lines += [f"- {line}" for line in dict.fromkeys(every)]
    return "## Made with\n\n" + "\n".join(lines or ["Nothing is done yet."])


def paper_rows(name: str) -> tuple[str, dict[str, Any]]:
    """(where they stand, the rows) of a table or figure in paper.json."""
    every = read_object(Path(__file__).parent / "paper.json")
    return every[name]["source"], every[name]["rows"]
