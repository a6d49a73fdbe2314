"""`gsa reproduce table1`: every architecture, sized alike, on the same text; then the tasks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from gsa.architectures import ARCHITECTURES, sized_alike
from gsa.evaluation.suites import find_suite
from gsa.experiments.evaluation import Evaluation, SuiteConfig
from gsa.experiments.text import Comparison, Keys, Sizes, TextConfig, reproduce

PAPER = {
    "gsa": "GSA",
    "transformer++": "Transformer++",
    "mamba": "Mamba",
    "gla": "GLA",
    "hgrn2": "HGRN2",
    "retnet": "RetNet",
}
"""The paper's names of its rows."""
EVALUATION = Evaluation(suite="commonsense", folder="commonsense", held_out=True)


@dataclass(frozen=True, kw_only=True)
class Table1Config(SuiteConfig, TextConfig):
    out: str = "runs/table1"
    """Folder of the experiment: a run folder for each arm, results.json, report.md, curves.png,
    and commonsense/ with the tasks."""

    sizes: ClassVar[Sizes] = {
        "tiny": ("tiny", 15360),
        "small": ("34m", 100e6),
        "paper": ("1.3b", 100e9),
    }


def arms(keys: Keys) -> dict[str, Keys]:
    """Each architecture with as many parameters as the recipe."""
    return {name: sized_alike(name, keys) for name in ARCHITECTURES}


def paper(recipe: str) -> tuple[str, dict[str, float]]:
    """WikiText perplexities of the half of the table that is of that size: 1.3B but for 2.7b."""
    suite, size = find_suite("commonsense"), "2.7B" if recipe == "2.7b" else "1.3B"
    place = [column.task for column in suite.columns].index("wikitext")
    rows = {row.model: row.values[place] for row in suite.rows}
    found = {arch: rows.get(f"{size} {name}") for arch, name in PAPER.items()}
    source = f"{suite.source}: WikiText perplexity of {size} models after 100B tokens"
    return source, {arch: value for arch, value in found.items() if value is not None}


TABLE1 = Comparison(
    name="table1",
    title="Architectures on the same text (the paper's Table 1)",
    arms=arms,
    label=lambda key, keys: "GSA" if key == "gsa" else key,
    paper=paper,
    notes=(
        "The paper's column is another measure, on other text: only its order is compared.",
        "tokens/s is that of the training engine, which packs the rows of a pass into one. Softmax "
        "attention then looks at blocks as long as a row and the one before each, under a mask: "
        "about four times the pairs it need look at. `gsa bench training` times it on rows.",
    ),
    evaluation=EVALUATION,
)


def reproduce_table1(
    config: Table1Config, *, command: str, say: Callable[[str], None] = print
) -> int:
    """The paper's Table 1: its rivals and GSA with as many parameters, on the same text.

    Perplexity, speed, and then the tasks of suite commonsense.
    """
    return reproduce(TABLE1, config, command=command, say=say)
