"""`gsa eval tasks`: suites of the paper and other tasks of lm-eval, beside the paper's figures."""

import difflib
import importlib.util
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gsa.evaluation.config import TasksConfig
from gsa.evaluation.models import (
    context_length,
    is_ours,
    model_facts,
    open_model,
    open_tokenizer,
    read_config,
)
from gsa.evaluation.report import check_out, markdown, write_report
from gsa.evaluation.suites import Suite, find_suite, suites
from gsa.training.environment import environment

NOTES = dict.fromkeys(
    ("fda", "swde", "squad_completion"),
    "lm-eval's version 1 strips prompts and targets and cuts documents at their start; published "
    "figures are of version 0. See recall_fda and the others",
)
"""Tasks of lm-eval whose numbers are no longer those that papers print."""
SPLITS = ("test_split", "validation_split", "training_split")
"""Of a task's config: the first that it has is evaluated."""


class MissingDataError(FileNotFoundError):
    """A task's examples cannot be had: a local file is missing, or the hub does not give them."""


@dataclass(frozen=True)
class Plan:
    """What is asked: a task or a group of them by name, its single tasks, and the shots.

    shots: None for the tasks' own.
    """

    name: str
    leaves: tuple[str, ...]
    shots: int | None


def run_tasks(config: TasksConfig) -> dict[str, Any]:
    """Tasks of a suite of the paper, or any others by name; prints and writes tables.

    Our own models are scored through their state, those of transformers by lm-eval's HFLM. Before
    the weights are read, ImportError without lm-eval, ValueError for an unknown suite or task,
    MissingDataError for a missing file of data_dir or a dataset that the hub does not give.
    """
    check_out(config.out)
    suite = find_suite(config.suite) if config.suite else None
    read_config(config.model)
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError('gsa eval tasks needs lm-eval; pip install "gated-slots[eval]"')
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager
    from transformers import AutoConfig

    from gsa.evaluation.own_tasks import OWN_TASKS

    logging.getLogger("lm_eval").setLevel(logging.ERROR)

    if suite is None:
        wanted: dict[str, int | None] = dict.fromkeys(config.tasks)
    else:
        wanted = {column.task: column.shots for column in suite.columns}
        if unknown := set(config.tasks) - set(wanted):
            known = ", ".join(wanted)
            raise ValueError(
                f"tasks: expected some of {known} in suite {suite.name}, got {', '.join(unknown)}"
            )
        wanted = {name: wanted[name] for name in config.tasks or wanted}
    catalogue = Catalogue()
    plans = [Plan(name, catalogue.leaves(name), shots) for name, shots in wanted.items()]
    files = {
        leaf: catalogue.files(leaf, plan.shots, Path(config.data_dir))
        for plan in plans
        for leaf in plan.leaves
        if config.data_dir
    }
    tokenizer = open_tokenizer(config.model)
    model_config = AutoConfig.from_pretrained(config.model, local_files_only=True)
    length = config.length or (suite.length if suite else 0) or context_length(config, model_config)
    tasks = [
        _build(catalogue, leaf, plan.shots, files.get(leaf), tokenizer, length)
        for plan in plans
        for leaf in plan.leaves
    ]
    model = open_model(config)
    run: Any = simple_evaluate
    found = run(
        _lm(model, tokenizer, config, length),
        tasks=tasks,
        task_manager=TaskManager(include_defaults=False),
        limit=config.limit or None,
        bootstrap_iters=0,
        log_samples=False,
    )
    document = {
        "evaluation": "tasks",
        "asked": asdict(config),
        "model": model_facts(model, config.model),
        "environment": environment(model.device) | {"lm_eval": version("lm_eval")},
        "scored_by": "forked states" if is_ours(model) else "lm-eval's HFLM",
        "length": length,
        "tasks": [_result(plan, found) for plan in plans],
    }
    columns = [column for one in suites().values() for column in one.columns]
    notes = NOTES | {column.task: column.note for column in columns if column.task in OWN_TASKS}
    notes |= {column.task: column.note for column in suite.columns} if suite else {}
    for result in document["tasks"]:
        result["note"] = notes.get(result["task"], "")
    if suite is not None:
        document["paper"] = {
            "source": suite.source,
            "columns": [asdict(column) for column in suite.columns],
            "model": _values(suite, document["tasks"]),
            "rows": [asdict(row) for row in suite.rows],
        }
    write_report(config.out, document, tasks_table(document, suite))
    return document


@cache
def stock_tasks() -> dict[str, Any]:
    """Where lm-eval's tasks, groups and tags are, by name; takes seconds to find out."""
    from lm_eval.tasks import TaskManager

    return TaskManager().task_index


class Catalogue:
    """All tasks by name: those of lm-eval and our own."""

    def __init__(self) -> None:
        from gsa.evaluation.own_tasks import OWN_TASKS

        self.own = OWN_TASKS

    @property
    def index(self) -> dict[str, Any]:
        return stock_tasks()

    def leaves(self, name: str) -> tuple[str, ...]:
        """The single tasks that a name stands for; ValueError for an unknown name."""
        if name in self.own:
            return (name,)
        entry = self.index.get(name)
        if entry is None:
            near = difflib.get_close_matches(name, [*self.own, *self.index], n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"tasks: expected names of tasks, got {name!r}{hint}")
        members = sorted(entry.tags) if entry.kind.name == "TAG" else None
        if entry.kind.name == "GROUP":
            members = self._config(name)["task"]
        if members is None:
            return (name,)
        if not all(isinstance(member, str) for member in members):
            raise ValueError(f"tasks: {name} changes its members; name single tasks instead")
        return tuple(leaf for member in members for leaf in self.leaves(member))

    def files(self, leaf: str, shots: int | None, folder: Path) -> dict[str, Path]:
        """A task's local files by split; MissingDataError naming one that is missing."""
        if leaf in self.own:
            splits = [self.own[leaf].split]
        else:
            config = self._config(leaf)
            if "class" in config:
                raise ValueError(f"data_dir: {leaf} reads its data itself; leave data_dir out")
            splits = [next(config[key] for key in SPLITS if config.get(key))]
            shots = config.get("num_fewshot") or 0 if shots is None else shots
            if shots and "samples" not in (config.get("fewshot_config") or {}):
                source = config.get("fewshot_split") or config.get("training_split")
                splits.append(source or config.get("validation_split") or splits[0])
        found = {split: folder / leaf / f"{split}.jsonl" for split in splits}
        for path in found.values():
            if not path.is_file():
                raise MissingDataError(f"data_dir: {path} is missing; docs/evaluation.md has keys")
        return found

    def build(
        self,
        leaf: str,
        shots: int | None,
        files: Mapping[str, Path] | None,
        tokenizer: Any,
        length: int,
    ) -> Any:
        """A task with its data, from files or else from the hub."""
        from datasets import Dataset, load_dataset
        from lm_eval.api.task import ConfigurableTask

        if leaf in self.own:
            from gsa.evaluation.own_tasks import build_own

            task = self.own[leaf]
            if files is None:
                rows: Any = load_dataset(*task.hub)[task.split]
            else:
                rows = read_rows(files[task.split])
            return build_own(leaf, rows, tokenizer, length)
        config = self._config(leaf, functions=True)
        kind = config.pop("class", None)
        for key in ("tag", "group", "task_list"):
            config.pop(key, None)
        if shots is not None:
            config["num_fewshot"] = shots
        if kind is not None:
            task = kind()
            task.config.task = leaf
            return task
        if files is not None:
            data = {split: Dataset.from_list(read_rows(path)) for split, path in files.items()}
            config["metadata"] = {"version": (config.get("metadata") or {}).get("version")}
            config |= {"dataset_kwargs": None, "custom_dataset": lambda version: data}
            for key in (*SPLITS, "fewshot_split"):
                if config.get(key) not in files:
                    config[key] = None
        return ConfigurableTask(config=config)

    def _config(self, name: str, functions: bool = False) -> dict[str, Any]:
        from lm_eval.tasks._yaml_loader import load_yaml

        entry = self.index[name]
        if entry.yaml_path is None:
            return dict(entry.cfg or {})
        return load_yaml(entry.yaml_path, resolve_func=functions)


def _build(
    catalogue: Catalogue,
    leaf: str,
    shots: int | None,
    files: Mapping[str, Path] | None,
    tokenizer: Any,
    length: int,
) -> Any:
    try:
        return catalogue.build(leaf, shots, files, tokenizer, length)
    except Exception as error:
        if files is not None or isinstance(error, ImportError):
            raise
        # datasets, the hub's client and its transport each have errors of their own.
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MissingDataError(
            f"{leaf}: no data from the Hugging Face hub ({first}); data_dir takes local files"
        ) from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a jsonl file; ValueError naming the line that is none."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: not a JSON object ({error})") from None
    return rows


def _lm(model: Any, tokenizer: Any, config: TasksConfig, length: int) -> Any:
    if is_ours(model):
        from gsa.evaluation.harness import StateLM

        return StateLM(model, tokenizer, rows=config.rows, max_length=length)
    from lm_eval.models import huggingface

    hflm: Any = huggingface.HFLM  # its base class hides what it takes
    return hflm(pretrained=model, tokenizer=tokenizer, batch_size=config.rows, max_length=length)


def _result(plan: Plan, found: dict[str, Any]) -> dict[str, Any]:
    """A task's metrics; of a group the means over all examples, for metrics that all tasks have."""
    sizes = {leaf: found["n-samples"][leaf]["effective"] for leaf in plan.leaves}
    each = {leaf: _metrics(found["results"][leaf]) for leaf in plan.leaves}
    shared = set.intersection(*(set(metrics) for metrics in each.values()))
    total = sum(sizes.values())
    result = {
        "task": plan.name,
        "versions": sorted({str(found["versions"][leaf]) for leaf in plan.leaves}),
        "shots": sorted({int(found["n-shot"][leaf]) for leaf in plan.leaves}),
        "examples": total,
        "metrics": {
            metric: sum(each[leaf][metric] * sizes[leaf] for leaf in plan.leaves) / total
            for metric in next(iter(each.values()))
            if metric in shared
        },
    }
    if len(plan.leaves) > 1:
        result["members"] = {
            leaf: {"examples": sizes[leaf], "metrics": each[leaf]} for leaf in plan.leaves
        }
    return result


def _metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """Numbers by metric, of whatever filter comes first."""
    found: dict[str, float] = {}
    for key, value in result.items():
        metric, comma, _ = key.partition(",")
        if comma and isinstance(value, int | float) and not metric.endswith("_stderr"):
            found.setdefault(metric, float(value))
    return found


def _values(suite: Suite, results: list[dict[str, Any]]) -> list[float | None]:
    metrics = {result["task"]: result["metrics"] for result in results}
    return [
        metrics[column.task][column.metric] * column.scale if column.task in metrics else None
        for column in suite.columns
    ]


def tasks_table(document: dict[str, Any], suite: Suite | None) -> str:
    """The result as Markdown: beside the paper's rows if there are, and what each task was."""
    asked, parts = document["asked"], []
    parts.append(f"{asked['model']}, inputs of at most {document['length']} tokens")
    if asked["limit"]:
        parts[0] += f"; **only the first {asked['limit']} examples of each task**"
    notes = {result["task"]: result["note"] for result in document["tasks"] if result["note"]}
    if suite is not None:
        shares = [place for place, column in enumerate(suite.columns) if column.scale == 100]
        marked = [f"{column.name}{' *' if column.note else ''}" for column in suite.columns]
        lines = [["", *marked, "mean"]]
        rows = {asked["model"]: document["paper"]["model"]}
        rows |= {row.model: row.values for row in suite.rows}
        for name, values in rows.items():
            cells = ["–" if value is None else f"{value:.1f}" for value in values]
            known = [values[place] for place in shares if values[place] is not None]
            whole = len(known) == len(shares)
            lines.append([name, *cells, f"{sum(known) / len(known):.1f}" if whole else "–"])
        parts.append(f"{markdown(lines)}\n\nBelow the first line: {suite.source}.")
    lines = [["task", "version", "shots", "examples", "metrics"]]
    for result in document["tasks"]:
        numbers = [f"{name} {value:.4g}" for name, value in result["metrics"].items()]
        versions, shots = ", ".join(result["versions"]), ", ".join(map(str, result["shots"]))
        name = f"{result['task']}{' *' if result['note'] else ''}"
        lines.append([name, versions, shots, str(result["examples"]), "; ".join(numbers)])
    parts.append(markdown(lines))
    if notes:
        said = "\n".join(f"- {name}: {note}." for name, note in notes.items())
        parts.append(f"\\* Not comparable with published figures as it stands:\n\n{said}")
    return "\n\n".join(parts)
