"""`gsa reproduce recall | table4`: suites of tasks on models that other experiments trained."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from gsa.experiments.evaluation import Evaluation, SuiteConfig, find_models, model_config
from gsa.training.distributed import Team


@dataclass(frozen=True, kw_only=True)
class RecallConfig(SuiteConfig):
    models: tuple[str, ...] = ("runs/table1",)
    """Folders of experiments, whose models that are done are all taken, or of single models."""
    out: str = "runs/recall"
    """Folder of the experiment: a folder for each model and task, results.json, report.md."""


@dataclass(frozen=True, kw_only=True)
class Table4Config(SuiteConfig):
    models: tuple[str, ...] = ("runs/table3",)
    """Folders of experiments, whose models that are done are all taken, or of single models."""
    out: str = "runs/table4"
    """Folder of the experiment: a folder for each model and task, results.json, report.md."""


def reproduce_recall(
    config: RecallConfig, *, command: str, say: Callable[[str], None] = print
) -> int:
    """The paper's recall-intensive tasks (inputs of 2K tokens), on the models of table1."""
    return _run(Evaluation(suite="recall", folder="."), config, command, say)


def reproduce_table4(
    config: Table4Config, *, command: str, say: Callable[[str], None] = print
) -> int:
    """The paper's Table 4, long contexts (16K tokens), on the models of table3."""
    return _run(Evaluation(suite="long", folder="."), config, command, say)


def _run(
    evaluation: Evaluation,
    config: RecallConfig | Table4Config,
    command: str,
    say: Callable[[str], None],
) -> int:
    """Says what it takes, then runs it, unless only a plan is asked for."""
    models = find_models(config.models)
    say(evaluation.plan(config, {name: model_config(at) for name, at in models.items()}))
    if config.plan:
        return 0
    if torch.distributed.is_torchelastic_launched():
        raise ValueError("torchrun: expected one process; models are evaluated by one")
    out = Path(config.out)
    evaluation.run(out, config, command=command, team=Team(), say=say, sources=config.models)
    return 0
