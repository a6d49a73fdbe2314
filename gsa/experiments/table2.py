"""`gsa reproduce table2`: the paper's ablation. What each part of GSA is worth, at equal rest."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from gsa.architectures import abc
from gsa.experiments.arms import paper_rows
from gsa.experiments.text import Comparison, Keys, Sizes, TextConfig, reproduce

NAMES = {
    "gsa": "GSA",
    "no-gate": "no gate of its own (ABC)",
    "data-independent": "gate without data",
    "identity": "no softmax (identity)",
    "swish": "swish for softmax",
    "relu": "ReLU for softmax",
    "relu2": "ReLU² for softmax",
    "half-slots": "",
    "double-slots": "",
}


@dataclass(frozen=True, kw_only=True)
class Table2Config(TextConfig):
    out: str = "runs/table2"
    """Folder of the experiment: a run folder for each arm, results.json, report.md, curves.png."""

    sizes: ClassVar[Sizes] = {
        "tiny": ("tiny", 15360),
        "small": ("34m", 100e6),
        "paper": ("340m", 10e9),
    }


def arms(keys: Keys) -> dict[str, Keys]:
    """The arms of Table 2: the recipe, and the recipe with one thing changed."""
    slots = keys["num_slots"]
    found = {
        "gsa": keys,
        "no-gate": abc(keys),
        "data-independent": keys | {"gate": "data_independent"},
    }
    for activation in ("identity", "swish", "relu", "relu2"):
        found[activation] = keys | {"slot_activation": activation}
    found["half-slots"] = keys | {"num_slots": slots // 2}
    found["double-slots"] = keys | {"num_slots": slots * 2}
    return found


def label(key: str, keys: Keys) -> str:
    return NAMES[key] or f"{keys['num_slots']} slots"


TABLE2 = Comparison(
    name="table2",
    title="Ablation (the paper's Table 2)",
    arms=arms,
    label=label,
    paper=lambda recipe: paper_rows("table2"),
    notes=(
        "Arms are not made equal in size: as in the paper, a part is taken away and nothing put in "
        "its place.",
    ),
)


def reproduce_table2(
    config: Table2Config, *, command: str, say: Callable[[str], None] = print
) -> int:
    """The paper's ablation (Table 2): GSA without its parts, on the same text; perplexities."""
    return reproduce(TABLE2, config, command=command, say=say)
