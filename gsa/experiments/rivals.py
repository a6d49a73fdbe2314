"""`gsa reproduce rivals`: every architecture, sized alike, on the same text."""

from collections.abc import Callable
from dataclasses import dataclass

from gsa.architectures import ARCHITECTURES, sized_alike
from gsa.experiments.text import Comparison, Keys, TextConfig, reproduce


@dataclass(frozen=True, kw_only=True)
class RivalsConfig(TextConfig):
    out: str = "runs/rivals"
    """Folder of the experiment: a run folder for each arm, results.json, report.md, curves.html."""


def arms(keys: Keys) -> dict[str, Keys]:
    """Each architecture with as many parameters as the recipe."""
    return {name: sized_alike(name, keys) for name in ARCHITECTURES}


RIVALS = Comparison(
    name="rivals",
    title="Rivals on the same text",
    arms=arms,
    label=lambda key, keys: "GSA" if key == "gsa" else key,
    notes=(
        "The paper's column is another measure, on other text, at 1.3B: only its order is compared."
        " Mamba, which it has too, is not here.",
        "tokens/s is that of the training engine, which packs the rows of a pass into one. Softmax "
        "attention then looks at blocks as long as a row and the one before each, under a mask: "
        "about four times the pairs it need look at. `gsa bench training` times it on rows.",
    ),
)


def reproduce_rivals(
    config: RivalsConfig, *, command: str, say: Callable[[str], None] = print
) -> int:
    """The paper's rivals and GSA with as many parameters, on the same text; perplexity, speed."""
    return reproduce(RIVALS, config, command=command, say=say)
