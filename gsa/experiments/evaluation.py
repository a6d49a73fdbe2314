"""A suite of tasks on models that other experiments left: an arm for each model and task.

    out/
        <model>/<task>/result.json        and evaluation.json, what `gsa eval` wrote

A task whose data cannot be had is named in the report and does not keep others from running.
"""

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from gsa.benchmark.decode import clear
from gsa.benchmark.distill_cost import is_student, kept_config
from gsa.conversion.teacher import open_config
from gsa.evaluation import PerplexityConfig, TasksConfig
from gsa.evaluation.config import Dtype
from gsa.evaluation.perplexity import perplexity
from gsa.evaluation.report import markdown
from gsa.evaluation.suites import find_suite
from gsa.evaluation.tasks import MissingDataError, run_tasks
from gsa.experiments.arms import (
    EXPERIMENT,
    Arm,
    NotRunError,
    Result,
    begin,
    collect,
    made_with,
    read_result,
    run_arms,
)
from gsa.experiments.budget import BudgetConfig, estimate
from gsa.model import GSAConfig
from gsa.training import RunError
from gsa.training.distributed import Team
from gsa.training.files import read_object, sha256, write_json, write_text
from gsa.training.lock import RunLock, turn

PERPLEXITY = "perplexity"
NOT_RUN = "not_run.json"
PLANNED_INPUTS, PLANNED_LENGTH = 1000, 2048
"""For the estimate: of a task whose data is not at hand, of inputs that a suite does not cut."""


@dataclass(frozen=True, kw_only=True)
class SuiteConfig(BudgetConfig):
    """What an evaluation is asked, whatever else its experiment is."""

    data_dir: str = ""
    """Folder with TASK/SPLIT.jsonl for the tasks instead of the Hugging Face hub; the keys are in
    docs/evaluation.md."""
    limit: int = 0
    """The first so many examples of each task only, to try things; 0 for all."""
    texts: int = 8
    """Texts that an evaluation reads at once."""
    dtype: Dtype = "auto"
    """Of the weights in an evaluation: auto as they were saved, fp32 or bf16."""
    device: str = "cuda"
    """Where to run: cpu, cuda, cuda:1, ..."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit < 0:
            raise ValueError(f"limit: expected at least 0, got {self.limit}")
        if self.texts < 1:
            raise ValueError(f"texts: expected at least 1, got {self.texts}")


SUITE_FREE = ("data_dir", "limit", "texts", "dtype")
"""Fields above: they change nothing but the evaluation, which has a folder of its own."""


def find_models(sources: Sequence[str]) -> dict[str, Path]:
    """Model folders by name: those that experiments have finished, and folders of models.

    FileNotFoundError, or ValueError for a folder without a model or two of one name.
    """
    found: dict[str, Path] = {}
    for source in map(Path, sources):
        if not source.is_dir():
            raise FileNotFoundError(
                f"models: {source}: no such folder; expected that of an experiment with models "
                "(gsa reproduce table1, table3) or of a model"
            )
        own = {source.name: source} if (source / "config.json").is_file() else {}
        if (source / EXPERIMENT).is_file():
            results = {at.name: (at, read_result(at)) for at in sorted(source.iterdir())}
            own = {
                name: at / result["model"]
                for name, (at, result) in results.items()
                if result is not None and "model" in result
            }
        if not own:
            raise ValueError(f"models: {source} has no model that is done, and is none")
        if twice := own.keys() & found.keys():
            raise ValueError(f"models: expected different names, got {', '.join(twice)} twice")
        found |= own
    return found


def model_config(folder: Path) -> GSAConfig:
    """A model folder's; a teacher's as that of a model of ours. ValueError, FileNotFoundError."""
    if is_student(folder):
        return GSAConfig.from_pretrained(folder)
    return kept_config(open_config(folder))


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A suite, and where in an experiment's folder its results go.

    held_out: also perplexity of the experiment's validation text, by `gsa eval perplexity`.
    """

    suite: str
    folder: str
    held_out: bool = False

    def tasks(self) -> list[str]:
        names = dict.fromkeys(column.task for column in find_suite(self.suite).columns)
        return [*([PERPLEXITY] if self.held_out else []), *names]

    def plan(self, config: SuiteConfig, models: Mapping[str, GSAConfig]) -> str:
        """What it takes at most; inputs are counted where their files are at hand."""
        length = find_suite(self.suite).length or PLANNED_LENGTH
        counted = {task: _lines(config.data_dir, task) for task in self.tasks()}
        inputs = sum(
            min(n or PLANNED_INPUTS, config.limit or n or PLANNED_INPUTS) for n in counted.values()
        )
        guessed = [task for task, n in counted.items() if n is None]
        said = f"suite {self.suite}, forward alone, every input as long as its limit"
        if guessed:
            said += f", {PLANNED_INPUTS:,} inputs assumed for {', '.join(guessed)}"
        table = estimate(config, models, seq_len=length, tokens=inputs * length, training=False)
        return f"{said}:\n{table}"

    def check(self, base: Path, config: SuiteConfig) -> None:
        """RunError if it was begun in `base` with other settings: told before training."""
        if (base / self.folder / EXPERIMENT).is_file():
            begin(base / self.folder, self._asked(config))

    def _asked(self, config: SuiteConfig) -> dict[str, Any]:
        asked = {"limit": config.limit, "dtype": config.dtype}
        return asked | {"experiment": f"suite {self.suite}"}

    def run(
        self,
        base: Path,
        config: SuiteConfig,
        *,
        command: str,
        team: Team,
        say: Callable[[str], None],
        validation: str = "",
        sources: Sequence[str] = (),
        only: Sequence[str] = (),
    ) -> None:
        """Every task on every model, but for what is done; writes report.md.

        validation: shards, for held_out. sources: as in `find_models`; the experiment in `base` if
        none is given. only: of these names; all if none is given.

        Raises:
            ValueError, FileNotFoundError: no models.
            RunError: the folder is of another evaluation, or of models with other weights; tasks
                failed, the others having been run.
        """
        if team.world > 1:
            say(f"{self.suite}: give the same command without torchrun; one process evaluates")
            return
        out = base / self.folder
        begin(out, self._asked(config))
        models = find_models(sources or [str(base)])
        chosen = [name for name in models if name in only or not only]
        marks = {name: _weights(models[name]) for name in chosen}
        reasons: dict[str, str] = {}
        arms = []
        for name, task in product(chosen, self.tasks()):
            folder, at = models[name], out / name / task
            done = read_result(at)
            if done is not None and done.get("weights") != marks[name]:
                raise RunError(f"{at}: is of other weights than {folder} has; remove {out / name}")
            one = partial(self._one, task, folder, at, config, validation, reasons)
            run = partial(_marked, one, marks[name])
            arms.append(Arm(name=f"{task} on {name}", folder=at, run=run))

        @turn(out)
        def report() -> None:
            pairs = product(models, self.tasks())
            folders = {f"{name}/{task}": out / name / task for name, task in pairs}
            write_json(out / NOT_RUN, reasons)
            results = collect(out, folders)
            text = f"# Suite {self.suite}\n\n{self.section(base)}\n\n{made_with(results)}\n"
            write_text(out / "report.md", text)

        run_arms(arms, report=report, command=command, team=team, say=say)
        say(f"report: {out / 'report.md'}")

    def _one(
        self,
        task: str,
        folder: Path,
        at: Path,
        config: SuiteConfig,
        validation: str,
        reasons: dict[str, str],
    ) -> Result:
        """The numbers of one task on one model. reasons: why tasks cannot be had, by task."""
        if task in reasons:
            raise NotRunError(reasons[task])
        clear(torch.device(config.device))  # of the model before
        at.mkdir(parents=True, exist_ok=True)
        asked: dict[str, Any] = {"model": str(folder), "out": str(at / "evaluation.json"),
                                 "device": config.device, "rows": config.texts,
                                 "dtype": config.dtype}  # fmt: skip
        try:
            with RunLock(at), contextlib.redirect_stdout(io.StringIO()):
                if task == PERPLEXITY:
                    found = perplexity(PerplexityConfig(**asked, data=validation))
                    return {"metrics": {PERPLEXITY: found["overall"][PERPLEXITY]}}
                asked |= {"data_dir": config.data_dir, "limit": config.limit}
                found = run_tasks(TasksConfig(**asked, suite=self.suite, tasks=(task,)))
        except (MissingDataError, ImportError) as error:
            reasons[task] = str(error)
            raise NotRunError(str(error)) from error
        except ValueError as error:
            raise RunError(str(error)) from error
        keys = ("metrics", "examples", "versions", "shots")
        kept = {key: found["tasks"][0][key] for key in keys}
        return kept | {"length": found["length"], "lm_eval": found["environment"]["lm_eval"]}

    def section(self, base: Path) -> str:
        """Markdown: what was found, beside the paper's rows; empty if it was never begun."""
        out, suite = base / self.folder, find_suite(self.suite)
        if not (out / EXPERIMENT).is_file():
            return ""
        asked = read_object(out / EXPERIMENT)
        reasons = read_object(out / NOT_RUN) if (out / NOT_RUN).is_file() else {}
        head = [""] + (["held-out ppl"] if self.held_out else [])
        head += [f"{column.name}{' *' if column.note else ''}" for column in suite.columns]
        rows = [head]
        for at in sorted(path for path in out.iterdir() if path.is_dir()):
            found = {task: read_result(at / task) for task in self.tasks()}
            if not any(found.values()):
                continue
            values = [_value(found, PERPLEXITY, PERPLEXITY, 1)] if self.held_out else []
            values += [_value(found, c.task, c.metric, c.scale) for c in suite.columns]
            rows.append([f"**{at.name}**", *map(_cell, values)])
        for row in suite.rows:
            rows.append([row.model, *(["–"] if self.held_out else []), *map(_cell, row.values)])
        parts = [
            "## Tasks",
            markdown(rows),
            f"In bold: models of here. Others: {suite.source}. Answers are greedy; examples "
            "before a question are drawn as lm-eval draws them, by its own fixed seed.",
        ]
        if asked.get("limit"):
            parts.append(f"**Only the first {asked['limit']} examples of each task.**")
        if reasons:
            lines = [f"- {task}: {reason}" for task, reason in reasons.items()]
            parts.append("Not run, for want of what they need:\n\n" + "\n".join(lines))
        notes = dict.fromkeys(f"- {c.name}: {c.note}" for c in suite.columns if c.note)
        if notes:
            parts.append("\\* Not comparable as it stands:\n\n" + "\n".join(notes))
        return "\n\n".join(parts)


def _marked(run: Callable[[], Result], mark: str) -> Result:
    return {"weights": mark} | run()


def _value(
    found: Mapping[str, Result | None], task: str, metric: str, scale: float
) -> float | None:
    result = found[task]
    return None if result is None else result["metrics"][metric] * scale


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _weights(folder: Path) -> str:
    """The SHA-256 of a model's weights; ValueError if it has none in safetensors."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"models: {folder} has no weights as safetensors")
    return " ".join(map(sha256, files))


def _lines(data_dir: str, task: str) -> int | None:
    """Examples in a task's local files; None if there are none."""
    files = list(Path(data_dir).glob(f"{task}*/*.jsonl")) if data_dir else []
    if not files:
        return None
    return sum(sum(1 for _ in file.open("rb")) for file in files)
