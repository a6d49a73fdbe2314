"""`gsa reproduce figure4a | figure4b | figure4c`: speed and memory of models of equal size.

An arm is an architecture, measured by itself (`gsa bench training`, `gsa bench decode`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from gsa.architectures import ARCHITECTURES, sized_alike
from gsa.benchmark.decode import BenchDecodeConfig, bench_decode, clear
from gsa.benchmark.decode_plot import plot_decode
from gsa.benchmark.device import bench_device
from gsa.benchmark.language_models import (
    OWN,
    NotInstalledError,
    check_contenders,
    contenders,
    recipe_keys,
)
from gsa.benchmark.training import BenchTrainingConfig, bench_training
from gsa.benchmark.training_plot import name_of, plot_training
from gsa.evaluation.report import markdown
from gsa.experiments.arms import (
    Arm,
    NotRunError,
    Result,
    begin,
    collect,
    made_with,
    paper_rows,
    run_arms,
)
from gsa.experiments.budget import FREE, BudgetConfig, estimate, hours_table
from gsa.model import GSAConfig
from gsa.model.cost import count_parameters
from gsa.recipes import RECIPES
from gsa.training import RunError
from gsa.training.distributed import Team
from gsa.training.files import write_text
from gsa.training.lock import RunLock, turn

Size = Literal["tiny", "small", "paper"]
KEYS = {name: make().model for name, make in RECIPES.items()}
ARCHS = {name: partial(sized_alike, name) for name in ARCHITECTURES}
ALL = tuple(name for name in contenders(ARCHS) if name != "fla")
"""fla is measured if it is asked for."""
COPY = 3e12
"""Bytes a second that an H100 copies, for the floor of decoding; an assumption."""
TINY: dict[str, Any] = {"size": "tiny", "vocab_size": 300, "repeats": 1}
TRAINING: dict[Size, dict[str, Any]] = {
    "tiny": TINY | {"tokens": 64, "lengths": (16, 32), "steps": 1, "eager": True},
    "small": {"size": "340m", "lean": True},
    "paper": {"size": "1.3b", "lean": True},
}
"""Fields of BenchTrainingConfig."""
DECODING: dict[Size, dict[str, Any]] = {
    "tiny": TINY | {"prefix": 8, "lengths": (4, 8), "dtype": "fp32"},
    "small": {"size": "340m", "lengths": (2048, 4096)},
    "paper": {"size": "1.3b"},
}
"""Fields of BenchDecodeConfig."""


@dataclass(frozen=True, kw_only=True)
class Figure4Config(BudgetConfig):
    """ValueError naming the field if a value makes no sense."""

    size: Size = "small"
    """small: the recipe 340m; paper: 1.3b; tiny: seconds, to see that it works."""
    arms: tuple[str, ...] = ()
    """Only these: architectures as gsa bench takes them, and fla; all but fla if none is given."""
    device: str = "auto"
    """auto, cuda or cpu."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_contenders("arms", self.arms, ARCHS)

    @property
    def chosen(self) -> list[str]:
        return [name for name in contenders(ARCHS) if name in (self.arms or ALL)]


@dataclass(frozen=True, kw_only=True)
class Figure4abConfig(Figure4Config):
    out: str = "runs/figure4ab"
    """Folder of the experiment, the same for figure4a and figure4b."""


@dataclass(frozen=True, kw_only=True)
class Figure4cConfig(Figure4Config):
    out: str = "runs/figure4c"
    """Folder of the experiment: a folder for each architecture, results.json, report.md, plot."""


def training_config(config: Figure4Config, name: str = "gsa", out: str = "") -> BenchTrainingConfig:
    return BenchTrainingConfig(
        arch=(name,), device=config.device, out=out, recompute=(0,), **TRAINING[config.size]
    )


def decode_config(config: Figure4Config, name: str = "gsa", out: str = "") -> BenchDecodeConfig:
    return BenchDecodeConfig(
        arch=(name,), device=config.device, out=out, batches=(0,), prefills=(0,),
        **DECODING[config.size],
    )  # fmt: skip


def models(config: Figure4Config, size: str, vocab_size: int) -> dict[str, GSAConfig]:
    """What is measured, as models of ours: another library's by the architecture it is of."""
    keys = recipe_keys(KEYS, size, vocab_size, 0)
    same = {name: "gsa" if name == "fla" else name.removeprefix(OWN) for name in config.chosen}
    return {name: GSAConfig(**ARCHS[arch](dict(keys))) for name, arch in same.items()}


def reproduce_figure4ab(
    config: Figure4abConfig, *, command: str, say: Callable[[str], None] = print
) -> int:
    """The paper's Figures 4a and 4b: tokens a second and peak memory of training, by row length.

    Both come out of one measurement, which either command makes or goes on with.

    Raises:
        ValueError: several processes, or settings that do not fit; nothing was written.
        RunError: the folder holds something else, or models failed.
    """
    asked = training_config(config)
    per_case = asked.tokens * (2 + asked.repeats * asked.steps)
    tokens = per_case * len(asked.lengths)
    made = models(config, asked.size, asked.vocab_size)
    say(estimate(config, made, seq_len=max(asked.lengths), tokens=tokens))
    run = partial(bench_training, recipes=KEYS, architectures=ARCHS)
    return _measure(
        config, "figure4ab",
        lambda name, out: run(training_config(config, name, out)),
        lambda results: training_report(config, results), command, say,
    )  # fmt: skip


def reproduce_figure4c(
    config: Figure4cConfig, *, command: str, say: Callable[[str], None] = print
) -> int:
    """The paper's Figure 4c: seconds to write a long text in one row, by its tokens.

    Raises as figure4a does.
    """
    asked = decode_config(config)
    made = models(config, asked.size, asked.vocab_size)
    sizes = {name: count_parameters(model).total for name, model in made.items()}
    tokens = sum(asked.lengths)
    say(
        f"{tokens:,} tokens written by each; a floor: weights read once a token in bf16 at "
        f"{COPY / 1e12:g} TB/s, an assumption\n"
        + hours_table({n: (size, tokens * 2 * size / COPY / 3600) for n, size in sizes.items()})
    )
    run = partial(bench_decode, recipes=KEYS, architectures=ARCHS)
    return _measure(
        config, "figure4c",
        lambda name, out: run(decode_config(config, name, out)),
        lambda results: decode_report(config, results), command, say,
    )  # fmt: skip


def _measure(
    config: Figure4abConfig | Figure4cConfig,
    experiment: str,
    bench: Callable[[str, str], dict[str, Any]],
    text: Callable[[Mapping[str, Result]], str],
    command: str,
    say: Callable[[str], None],
) -> int:
    """bench: from a contender's name and a file for its result to the bench's document."""
    if config.plan:
        return 0
    if torch.distributed.is_torchelastic_launched():
        raise ValueError("torchrun: expected one process; a measurement is of one device")
    device, out = torch.device(bench_device(config.device)), Path(config.out)
    free = {*FREE, "arms", "device", "out"}
    asked = {key: value for key, value in asdict(config).items() if key not in free}
    begin(out, asked | {"experiment": experiment})

    def one(name: str) -> Result:
        (out / name).mkdir(exist_ok=True)
        clear(device)
        try:
            with RunLock(out / name):
                return {"document": bench(name, str(out / name / "bench.json"))}
        except NotInstalledError as error:
            raise NotRunError(str(error)) from error
        except torch.OutOfMemoryError as error:
            raise RunError(f"out of memory: {error}") from error
        except ValueError as error:
            raise RunError(str(error)) from error

    @turn(out)
    def report() -> None:
        found = collect(out, {name: out / name for name in contenders(ARCHS)})
        write_text(out / "report.md", text(found))

    arms = [Arm(name=name, folder=out / name, run=partial(one, name)) for name in config.chosen]
    run_arms(arms, report=report, command=command, team=Team(), say=say)
    say(f"report: {out / 'report.md'}")
    return 0


def table(
    results: Mapping[str, Result],
    cell: Callable[[dict[str, Any]], str],
    figure: str,
    number: str,
    size: Size,
) -> str:
    """Ours and the paper's, a row each, by tokens.

    number: the key of a row's tokens. size: the paper's figures stand beside its own size alone.
    """
    source, paper = paper_rows(figure)
    documents = {name: found["document"] for name, found in results.items()}
    every = sorted({row[number] for one in documents.values() for row in one["rows"]})
    rows = [["", *map(name_of, every)]]
    for name, one in documents.items():
        by_tokens = {row[number]: row for row in one["rows"]}
        cells = []
        for tokens in every:
            row = by_tokens.get(tokens, {"contenders": {}, "missing": {}})
            facts = row["contenders"].get(name)
            cells.append(cell(facts) if facts else row["missing"].get(name, "–"))
        rows.append([name, *cells])
        if size == "paper" and name in paper:
            rows.append([f"{name}, paper", *(str(paper[name].get(str(n), "–")) for n in every)])
    said = f"{markdown(rows)}\n\n"
    return said + (f"Paper: {source}." if size == "paper" else "The paper's are of 1.3B.")


def _finish(
    config: Figure4Config,
    title: str,
    about: Sequence[str],
    results: Mapping[str, Result],
    draw: Callable[[Sequence[dict[str, Any]], Path], Path],
    plot: Path,
) -> str:
    documents = [found["document"] for found in results.values()]
    try:
        picture = f"![{title}]({draw(documents, plot).name})"
    except ValueError as error:  # measured on several devices, or not at all
        picture = f"No plot: {error}."
    notes = [f"- {note}" for note in dict.fromkeys(n for one in documents for n in one["notes"])]
    missing = [name for name in config.chosen if name not in results]
    absent = f"Not there yet: {', '.join(missing)}." if missing else ""
    parts = [f"# {title}", picture, *about, absent, "\n".join(notes)]
    return "\n\n".join([*filter(None, parts), made_with(results, 0)]) + "\n"


ALONE = (
    "Each architecture was measured by itself, one after another, not in turns: a card that grew "
    "warmer meanwhile is not told apart. Weights and tokens are random. "
    f"transformer++ is transformers' Llama, {OWN}transformer++ the one that gsa train makes."
)


def training_report(config: Figure4abConfig, results: Mapping[str, Result]) -> str:
    speed = table(
        results, lambda x: f"{x['tokens_per_s'] / 1e3:.2f}", "figure4a", "tokens", config.size
    )
    memory = table(results, lambda x: f"{x['peak_gib']:.1f}", "figure4b", "tokens", config.size)
    about = [f"## Thousand tokens a second (4a)\n\n{speed}",
             f"## Peak GiB (4b)\n\n{memory}\n\n0 on a CPU, where it is not measured.",
             ALONE]  # fmt: skip
    plot = Path(config.out) / "figure4ab.png"
    title = "Training (the paper's Figures 4a, 4b)"
    return _finish(config, title, about, results, plot_training, plot)


def decode_report(config: Figure4cConfig, results: Mapping[str, Result]) -> str:
    asked = decode_config(config)
    seconds = table(
        results,
        lambda x: f"{x['seconds']:.2f} ({x['ms_per_token']:.3f} ms)",
        "figure4c", "number", config.size,
    )  # fmt: skip
    about = [
        f"Seconds to write so many tokens in one row after {asked.prefix} were read, and "
        f"milliseconds a token, in {asked.dtype}.",
        seconds,
        "fla writes at most 256 tokens.",
        ALONE,
    ]
    plot = Path(config.out) / "figure4c.png"
    title = "Decoding (the paper's Figure 4c)"
    return _finish(config, title, about, results, plot_decode, plot)
