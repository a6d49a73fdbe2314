"""Models that differ in one thing, trained on the same text in the same order, and compared.

What `gsa reproduce table1` and `gsa reproduce table2` share. Each arm is a run of `gsa.training`.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar, Literal

from gsa.data import TokenShards, open_rows
from gsa.experiments.arms import (
    RESULTS,
    Arm,
    Result,
    StoppedError,
    begin,
    collect,
    made_with,
    records,
    run_arms,
)
from gsa.experiments.budget import FREE, BudgetConfig, estimate
from gsa.experiments.evaluation import SUITE_FREE, Evaluation, SuiteConfig
from gsa.model import GSAConfig
from gsa.model.cost import count_parameters
from gsa.recipes import RECIPES
from gsa.training import TrainConfig, train
from gsa.training.comparison import ReportConfig, compare_runs
from gsa.training.distributed import join
from gsa.training.files import write_text
from gsa.training.lock import turn
from gsa.training.metrics import METRICS, read_metrics
from gsa.training.setup import build_model_config, check_team, pick_device

Size = Literal["tiny", "small", "paper"]
Sizes = Mapping[Size, tuple[str, float]]
"""Recipe and tokens."""
CURVES = "curves.png"
PLANNED_VOCABULARY = 32000
"""Where only a plan is asked for, without shards: that of the paper's tokenizer."""

Keys = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared.

    arms: from the recipe's keys of GSAConfig to those of each arm, by its key, which is also its
    folder. label: an arm's name for people, from its key and GSAConfig keys. paper: from the
    recipe's name to the paper's perplexities and where they stand. notes: for the report.
    evaluation: of the models, once all are trained.
    """

    name: str
    title: str
    arms: Callable[[Keys], dict[str, Keys]]
    label: Callable[[str, Keys], str]
    paper: Callable[[str], tuple[str, Mapping[str, float]]]
    notes: Sequence[str] = ()
    evaluation: Evaluation | None = None


@dataclass(frozen=True, kw_only=True)
class TextConfig(BudgetConfig):
    """ValueError naming the field if a value makes no sense."""

    data: str = ""
    """Shard folder to train on, or several with weights; as in gsa train."""
    validation: str = ""
    """Shard folder of held-out text."""
    out: str = ""
    """Folder of the experiment: a run folder for each arm, results.json, report.md, curves.png."""
    size: Size = "small"
    """small: recipe 34m on 100M tokens; paper: the paper's; tiny: seconds, to see that it works."""
    recipe: str = ""
    """Another recipe than the size's, such as 2.7b."""
    arms: tuple[str, ...] = ()
    """Only these arms, by their folders' names; all if none is given."""
    tokens: float = 0.0
    """Tokens of each arm, such as 700e6; 0 for those of the size."""
    seed: int = 0
    """Seeds initial weights and the order of rows of every arm."""
    device: str = "cuda"
    """Where to train: cpu, cuda, cuda:1, ..."""
    eager: bool = False
    """Do not compile blocks where the recipe does, nor record passes as CUDA graphs."""

    sizes: ClassVar[Sizes]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recipe and self.recipe not in RECIPES:
            raise ValueError(f"recipe: expected {', '.join(RECIPES)}, got {self.recipe!r}")
        if not (math.isfinite(self.tokens) and self.tokens >= 0):
            raise ValueError(f"tokens: expected a finite number ≥ 0, got {self.tokens}")
        if not self.plan:
            for name in ("data", "validation"):
                if not getattr(self, name):
                    raise ValueError(f"{name}: expected a shard folder; gsa data prepare makes one")


def reproduce(
    comparison: Comparison, config: TextConfig, *, command: str, say: Callable[[str], None] = print
) -> int:
    """Trains the arms that are not done, one after another, and reports; or says what it would.

    In several processes that torchrun starts, they share each model as in `train`. Returns the
    signal that stopped it, or 0.

    Raises:
        ValueError, FileNotFoundError: settings or shards that do not fit; nothing was written.
        RunError: the folder holds something else, or arms failed.
    """
    recipe = base_run(config)
    keys = comparison.arms(recipe.model)
    unknown = [name for name in config.arms if name not in keys]
    if unknown:
        raise ValueError(f"arms: expected some of {', '.join(keys)}, got {', '.join(unknown)}")
    chosen = [key for key in keys if key in config.arms or not config.arms]
    tokens = recipe.steps * recipe.seq_len * recipe.rows * recipe.accumulation
    labels = {key: comparison.label(key, of) for key, of in keys.items()}
    if config.plan:
        models = {
            labels[k]: GSAConfig(**{"vocab_size": PLANNED_VOCABULARY, **keys[k]}) for k in chosen
        }
        say(estimate(config, models, seq_len=recipe.seq_len, tokens=tokens))
        if comparison.evaluation and isinstance(config, SuiteConfig):
            say(comparison.evaluation.plan(config, models))
        return 0
    out = Path(config.out)
    with join(config.device) as team:
        shards = open_rows(config.data, seq_len=recipe.seq_len, seed=config.seed).shards
        validation = TokenShards(config.validation)
        graph = records(config.device, team, eager=config.eager)
        runs = {
            key: replace(recipe, name=labels[key], out=str(out / key), model=own, cuda_graph=graph)
            for key, own in keys.items()
        }
        configs = {k: build_model_config(runs[k], shards, validation) for k in chosen}
        pick_device(config.device, team)
        check_team(recipe, team)
        marks = {"data": shards.fingerprint, "validation": validation.fingerprint}
        free = {*FREE, *SUITE_FREE, "arms", "device", "out", "data", "validation"}
        asked = {key: value for key, value in asdict(config).items() if key not in free}
        asked |= {"experiment": comparison.name, "fingerprints": marks}

        def tell(text: str) -> None:
            if team.first:
                say(text)

        tell(estimate(config, {labels[k]: c for k, c in configs.items()},
                      seq_len=recipe.seq_len, tokens=tokens))  # fmt: skip
        evaluation = comparison.evaluation

        def begun() -> None:
            begin(out, asked)
            if evaluation and isinstance(config, SuiteConfig):
                evaluation.check(out, config)

        team.ask_first(begun)
        folders = {key: out / key for key in keys}
        arms = [
            Arm(
                name=labels[key],
                folder=folders[key],
                run=partial(_train, runs[key], configs[key], command),
            )
            for key in chosen
        ]

        @turn(out)
        def report() -> None:
            results = collect(out, folders)
            begun = [str(at) for at in folders.values() if (at / METRICS).is_file()]
            if begun:
                compare_runs(ReportConfig(runs=tuple(begun), out=str(out / CURVES)))
            text = report_text(
                comparison, labels, results, comparison.paper(recipe_name(config)),
                tasks=evaluation.section(out) if evaluation else "",
                seed=config.seed, curves=bool(begun),
            )  # fmt: skip
            write_text(out / "report.md", text)

        signal = run_arms(arms, report=report, command=command, team=team, say=tell)
        if evaluation and not signal and isinstance(config, SuiteConfig):
            evaluation.run(
                out, config, command=command, team=team, say=tell,
                validation=config.validation, only=chosen,
            )  # fmt: skip
            team.ask_first(report)
        tell(f"report: {out / 'report.md'}")
        return signal


def recipe_name(config: TextConfig) -> str:
    return config.recipe or config.sizes[config.size][0]


def base_run(config: TextConfig) -> TrainConfig:
    """The run that all arms share but for the model: the recipe of the size, on so many tokens.

    Warm-up is the recipe's hundredth of the steps, but at least 100, or a tenth of a short run.
    """
    recipe = RECIPES[recipe_name(config)]()
    per_step = recipe.seq_len * recipe.rows * recipe.accumulation
    steps = max(2, round((config.tokens or config.sizes[config.size][1]) / per_step))
    return replace(
        recipe,
        data=config.data or "none",
        validation=config.validation,
        out=config.out,
        steps=steps,
        warmup=max(steps // 100, min(100, steps // 10)),
        checkpoint_interval=max(1, min(500, steps // 4)),
        keep_checkpoints=1,
        seed=config.seed,
        device=config.device,
        compile=recipe.compile and not config.eager,
        lean=recipe.lean and not config.eager,
    )


def _train(run: TrainConfig, model: GSAConfig, command: str) -> Result:
    ended = train(run, command=command)
    if ended.status == "stopped":
        raise StoppedError(ended.signal)
    steps, validations = read_metrics(Path(run.out))
    last = validations[-1]
    return {
        "model": ".",
        "perplexity": math.exp(last["val_loss"]),
        "val_loss": last["val_loss"],
        "val_tokens": last["val_tokens"],
        "tokens": steps[-1]["tokens"],
        "steps": steps[-1]["step"],
        "skipped": steps[-1]["skipped"],
        "tokens_per_s": statistics.median(row["tokens_per_s"] for row in steps),
        "seconds": steps[-1]["seconds"],
        "parameters": count_parameters(model).total,
    }


def report_text(
    comparison: Comparison,
    labels: Mapping[str, str],
    results: Mapping[str, Result],
    theirs: tuple[str, Mapping[str, float]],
    *,
    tasks: str,
    seed: int,
    curves: bool,
) -> str:
    """report.md: perplexities beside the paper's, and which of its orderings are found here.

    theirs: as from Comparison.paper. tasks: a section about them. curves: whether they are drawn.
    """
    source, paper = theirs
    ours = {key: found["perplexity"] for key, found in results.items()}
    head = "| | parameters | tokens | tokens/s | perplexity | ÷ GSA | paper | ÷ GSA |"
    lines = [head, "|---|--:|--:|--:|--:|--:|--:|--:|"]
    for key, label in labels.items():
        found = results.get(key)
        cells = ["–"] * 5
        if found is not None:
            cells = [
                f"{found['parameters']:,}",
                f"{found['tokens']:,}",
                f"{found['tokens_per_s']:,.0f}",
                f"{found['perplexity']:.3f}",
                _ratio(ours, key),
            ]
        cells += [f"{paper[key]:g}" if key in paper else "–", _ratio(paper, key)]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    parts = [
        f"# {comparison.title}",
        "\n".join(lines),
        f"Paper: {source}. Models, text and tokens are others there: compare orders, not numbers.",
    ]
    missing = [labels[key] for key in labels if key not in results]
    if missing:
        parts.append(f"Not there yet: {', '.join(missing)}.")
    parts += [f"## Orderings\n\n{orderings(labels, ours, paper)}", *comparison.notes]
    parts.append(
        "Perplexity: exp of the mean loss over all held-out text, rows of the training length. "
        "tokens/s: the median step. All arms have the same data, order of rows, seed and schedule. "
        "With one seed there is no telling a small difference from chance."
    )
    parts += [f"![curves]({CURVES})"] if curves else []
    parts.append(f"Settings: `gsa report` of the arms' folders. Numbers: {RESULTS}.")
    parts += [tasks] if tasks else []
    parts.append(made_with(results, seed))
    return "\n\n".join(parts) + "\n"


def orderings(
    labels: Mapping[str, str], ours: Mapping[str, float], paper: Mapping[str, float]
) -> str:
    """Which pairs of arms are in the paper's order here, in Markdown; ties there are left out."""
    known = [key for key in labels if key in ours and key in paper]
    pairs = [
        (a, b) if paper[a] < paper[b] else (b, a)
        for a, b in combinations(known, 2)
        if paper[a] != paper[b]
    ]
    if not pairs:
        return "Fewer than two arms that the paper has are done."
    other = [(a, b) for a, b in pairs if not ours[a] < ours[b]]
    said = f"{len(pairs) - len(other)} of {len(pairs)} pairs are in the paper's order."
    if not other:
        return said
    lines = [
        f"- {labels[a]} ({ours[a]:.3f}) is not better than {labels[b]} ({ours[b]:.3f}); "
        f"paper: {paper[a]:g} and {paper[b]:g}"
        for a, b in other
    ]
    return "\n".join([f"{said} Not reproduced:", "", *lines])


def _ratio(values: Mapping[str, float], key: str) -> str:
    return f"{values[key] / values['gsa']:.3f}" if key in values and "gsa" in values else "–"
