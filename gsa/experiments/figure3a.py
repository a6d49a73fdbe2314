"""`gsa reproduce figure3a`: who recalls how much at which width, on MQAR."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from gsa.architectures import ARCHITECTURES
from gsa.experiments.arms import (
    Arm,
    Result,
    begin,
    collect,
    made_with,
    paper_rows,
    records,
    run_arms,
)
from gsa.experiments.budget import FREE, BudgetConfig, estimate
from gsa.experiments.mqar import Task
from gsa.experiments.recall_run import Examples, train_recall
from gsa.model import GSAConfig
from gsa.training import TrainConfig
from gsa.training.config import Dtype
from gsa.training.distributed import Team
from gsa.training.files import write_text
from gsa.training.lock import turn
from gsa.training.setup import pick_device

PLOT = "figure3a.png"
Size = Literal["tiny", "small", "paper"]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Task, models and training of one size; rates: the most promising first.

    model: keys of GSAConfig for all architectures. clip: as in TrainConfig.
    """

    task: Task
    arms: tuple[str, ...]
    widths: tuple[int, ...]
    rates: tuple[float, ...]
    examples: Examples
    rows: int
    model: Mapping[str, Any]
    clip: float = float("inf")
    compile: bool = True


ALL = tuple(name for name in ARCHITECTURES if name != "mistral")
"""Mistral's window is wider than the task: it would be transformer++."""
SIZES: dict[Size, Protocol] = {
    "tiny": Protocol(
        task=Task(seq_len=32, pairs=4, vocab_size=64),
        arms=("gsa", "abc"),
        widths=(64,),
        rates=(1e-2,),
        examples=Examples(train=3200, held_out=200, epochs=6),
        rows=32,
        model={"num_hidden_layers": 2, "use_short_conv": True, "initializer_range": 0.1},
        clip=1.0,
        compile=False,
    ),
    "small": Protocol(
        task=Task(),
        arms=ALL,
        widths=(64, 128),
        rates=(2e-3, 1e-3, 5e-3),
        examples=Examples(train=100_000, held_out=3000, epochs=16),
        rows=128,
        model={"num_hidden_layers": 4},
    ),
    "paper": Protocol(
        task=Task(),
        arms=ALL,
        widths=(64, 128, 256, 512),
        rates=(2e-3, 1e-3, 5e-3, 5e-4, 1e-2, 1e-4),
        examples=Examples(train=100_000, held_out=3000, epochs=64),
        rows=128,
        model={"num_hidden_layers": 4},
    ),
}


@dataclass(frozen=True, kw_only=True)
class Figure3aConfig(BudgetConfig):
    """ValueError naming the field if a value makes no sense."""

    out: str = "runs/figure3a"
    """Folder of the experiment: a folder for each model, results.json, report.md, figure3a.png."""
    size: Size = "small"
    """small: 2 widths, 3 rates, 16 epochs; paper: 4, 6, 64; tiny: seconds, to see that it works."""
    arms: tuple[str, ...] = ()
    """Only these architectures: gsa, gla, retnet, ...; all that the size has if none is given."""
    widths: tuple[int, ...] = ()
    """Only these widths of models; those of the size if none is given."""
    rates: tuple[float, ...] = ()
    """Only these learning rates; those of the size if none is given."""
    epochs: int = 0
    """Most passes over the training examples; 0 for those of the size."""
    seed: int = 0
    """Seeds examples, their order and initial weights."""
    device: str = "cuda"
    """Where to train: cpu, cuda, cuda:1, ..."""
    dtype: Dtype = "bf16"
    """Of the forward pass; weights are fp32."""
    eager: bool = False
    """Do not compile blocks, nor record passes as CUDA graphs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = SIZES[self.size].arms
        unknown = [name for name in self.arms if name not in known]
        if unknown:
            raise ValueError(
                f"arms: expected some of {', '.join(known)} at size {self.size}, got "
                f"{', '.join(unknown)}"
            )
        for width in self.widths:
            if width < 16 or width % 16:
                raise ValueError(f"widths: expected multiples of 16, got {width}")
        for rate in self.rates:
            if not 0 < rate < 1:
                raise ValueError(f"rates: expected numbers between 0 and 1, got {rate}")
        if self.epochs < 0:
            raise ValueError(f"epochs: expected a number ≥ 0, got {self.epochs}")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model of the sweep."""

    arch: str
    width: int
    rate: float

    @property
    def key(self) -> str:
        return f"{self.arch}-{self.width}-{self.rate:g}"


def model_keys(arch: str, width: int, protocol: Protocol) -> dict[str, Any]:
    """Keys of GSAConfig of an architecture at that width, without MLPs.

    Heads, slots and tau are those of the author's sweep (4 heads, d/4 slots, tau 16, scale K^−1/2;
    2 heads for GLA and RetNet, keys of GLA as wide as values); those of abc are gsa's, those of
    hgrn2, rwkv6, supra and transformer++ (2 heads) ours. Others are as ARCHITECTURES has them.
    """
    slots = {
        "num_heads": 4,
        "num_slots": max(1, width // 4),
        "gate_logit_normalizer": 16,
        "scale": "rsqrt_key",
    }
    linear = {"num_heads": 2, "value_activation": "identity"}
    plain = linear | {"feature_map": "identity", "scale": "rsqrt_key", "output_gate": True}
    layers = protocol.model["num_hidden_layers"]
    own: dict[str, dict[str, Any]] = {
        "gsa": slots,
        "abc": slots | {"gate": "abc"},
        "gla": plain | {"mixer": "gla", "gate_logit_normalizer": 16},
        "retnet": plain | {"mixer": "retnet", "expand_v": 2, "rope_theta": 10000.0},
        "hgrn2": linear | {"mixer": "hgrn2"},
        "rwkv6": {
            "mixer": "rwkv6",
            "num_heads": 2,
            "gate_low_rank": width // 4,
            "shift_low_rank": width // 8,
        },
        "supra": linear | {"mixer": "retnet", "feature_map": "t2r", "rope_theta": 10000.0},
        "transformer++": {
            "num_heads": 2,
            "attn": {"layers": list(range(layers)), "num_heads": 2},
        },
    }
    return {
        "vocab_size": protocol.task.vocab_size,
        "hidden_size": width,
        "intermediate_size": 0,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "max_position_embeddings": protocol.task.seq_len,
        **protocol.model,
        **(own[arch] if arch in own else ARCHITECTURES[arch]({"hidden_size": width})),
    }


def train_config(point: Point, config: Figure3aConfig) -> TrainConfig:
    """AdamW with decay 0.1, a cosine to 0 without warm-up, as the author's trainer has them."""
    protocol = SIZES[config.size]
    epochs = config.epochs or protocol.examples.epochs
    return TrainConfig(
        name=f"{point.arch}, d = {point.width}, rate {point.rate:g}",
        data="mqar",
        out=str(Path(config.out) / point.key),
        model=model_keys(point.arch, point.width, protocol),
        seq_len=protocol.task.seq_len,
        rows=protocol.rows,
        steps=epochs * (protocol.examples.train // protocol.rows),
        lr=point.rate,
        min_lr=0.0,
        warmup=0,
        weight_decay=0.1,
        beta2=0.999,
        clip=protocol.clip,
        dtype=config.dtype,
        compile=protocol.compile and not config.eager,
        cuda_graph=records(config.device, Team(), eager=config.eager),
        seed=config.seed,
        device=config.device,
    )


def reproduce_figure3a(
    config: Figure3aConfig, *, command: str, say: Callable[[str], None] = print
) -> int:
    """MQAR (the paper's Figure 3a): accuracy by width of the model, the best of several rates.

    Trains the models that are not done, one after another, and reports. Returns the signal that
    stopped it, or 0.

    Raises:
        ValueError: settings that do not fit, or several processes; nothing was written.
        RunError: the folder holds something else, or models failed.
    """
    protocol = SIZES[config.size]
    widths, rates = config.widths or protocol.widths, config.rates or protocol.rates
    archs = [arch for arch in protocol.arms if arch in config.arms or not config.arms]
    points = [Point(arch=a, width=d, rate=r) for d in widths for r in rates for a in archs]
    runs = {point: train_config(point, config) for point in points}
    models = {
        f"{arch}, d = {width}": GSAConfig(**model_keys(arch, width, protocol))
        for width in widths
        for arch in archs
    }
    steps = next(iter(runs.values())).steps
    tokens = len(rates) * steps * protocol.rows * protocol.task.seq_len
    say(estimate(config, models, seq_len=protocol.task.seq_len, tokens=tokens))
    if config.plan:
        return 0
    if torch.distributed.is_torchelastic_launched():
        raise ValueError(
            "torchrun: expected one process; start one for each GPU, each with its own --arms "
            "and all with one --out"
        )
    pick_device(config.device, Team())
    out = Path(config.out)
    free = {*FREE, "arms", "widths", "rates", "device", "out"}
    asked = {key: value for key, value in asdict(config).items() if key not in free}
    begin(out, asked | {"experiment": "figure3a"})
    epochs = config.epochs or protocol.examples.epochs
    examples = replace(protocol.examples, epochs=epochs)

    @turn(out)
    def report() -> None:
        results = collect(out, {at.name: at for at in sorted(out.iterdir()) if at.is_dir()})
        best = best_points(results)
        missing = [run.name for point, run in runs.items() if point.key not in results]
        write_text(out / "report.md", report_text(config, results, best, missing))
        draw(out / PLOT, protocol.task, best)

    arms = [
        Arm(
            name=run.name,
            folder=out / point.key,
            run=partial(_train, point, run, config, examples, say),
        )
        for point, run in runs.items()
    ]
    signal = run_arms(arms, report=report, command=command, team=Team(), say=say)
    say(f"report: {out / 'report.md'}")
    return signal


def _train(
    point: Point,
    run: TrainConfig,
    config: Figure3aConfig,
    examples: Examples,
    say: Callable[[str], None],
) -> Result:
    found = train_recall(run, SIZES[config.size].task, examples, say=say)
    return asdict(point) | found


Best = dict[str, dict[int, Result]]
"""The result with the best accuracy by architecture and width."""


def best_points(results: Mapping[str, Result]) -> Best:
    best: Best = {}
    for found in results.values():
        at = best.setdefault(found["arch"], {})
        before = at.get(found["width"])
        if before is None or found["accuracy"] > before["accuracy"]:
            at[found["width"]] = found
    order = {arch: place for place, arch in enumerate(ARCHITECTURES)}
    return {arch: dict(sorted(best[arch].items())) for arch in sorted(best, key=order.__getitem__)}


def report_text(
    config: Figure3aConfig, results: Mapping[str, Result], best: Best, missing: Sequence[str]
) -> str:
    """report.md: the best accuracy by architecture and width, beside the paper's.

    missing: names of models asked for that are not done.
    """
    protocol = SIZES[config.size]
    task = protocol.task
    source, paper = paper_rows("figure3a")
    same = task == SIZES["paper"].task
    widths = sorted({width for row in best.values() for width in row})
    lines = [f"| | {' | '.join(f'd = {w}' for w in widths)} |", f"|---|{'--:|' * len(widths)}"]
    for arch, row in best.items():
        cells = [_cell(row.get(width)) for width in widths]
        lines.append(f"| {arch} | {' | '.join(cells)} |")
        if same and arch in paper:
            cells = [f"{paper[arch].get(str(width), '–')}" for width in widths]
            lines.append(f"| {arch}, paper | {' | '.join(cells)} |")
    every = ["| model | % right | steps | seconds | |", "|---|--:|--:|--:|---|"]
    every += [
        f"| {found['arm']} | {100 * found['accuracy']:.1f} | {found['steps']:,} | "
        f"{found['seconds']:,.0f} | {'diverged' if found['diverged'] else ''} |"
        for found in results.values()
    ]
    parts = [
        "# MQAR (the paper's Figure 3a)",
        f"{task.seq_len} tokens, {task.pairs} pairs, vocabulary {task.vocab_size}; % of answers "
        "right on held-out examples, the best of the learning rates tried (in parentheses).",
        f"![accuracy by width]({PLOT})",
        "\n".join(lines),
    ]
    if same:
        parts.append(f"Paper: {source}.")
    parts += ["## Every model\n\n" + "\n".join(every)]
    parts += [f"Not there yet: {'; '.join(missing)}."] if missing else []
    parts.append(made_with(results, config.seed))
    return "\n\n".join(parts) + "\n"


def _cell(found: Result | None) -> str:
    return "–" if found is None else f"{100 * found['accuracy']:.1f} ({found['rate']:g})"


def draw(out: Path, task: Task, best: Best) -> None:
    """figure3a.png: accuracy over width; the paper's, where the task is the paper's, dashed."""
    from matplotlib.figure import Figure

    paper = paper_rows("figure3a")[1] if task == SIZES["paper"].task else {}
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    widths = sorted({width for row in best.values() for width in row})
    for place, (arch, row) in enumerate(best.items()):
        heights = [100 * found["accuracy"] for found in row.values()]
        axes.plot(list(row), heights, "o-", color=f"C{place}", label=arch)
        if arch in paper:
            theirs = {int(width): value for width, value in paper[arch].items()}
            widths = sorted({*widths, *theirs})
            axes.plot(list(theirs), list(theirs.values()), ":", color=f"C{place}", alpha=0.6)
    axes.set_xscale("log", base=2)
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.set_ylim(-3, 103)
    axes.set_xlabel("width of the model")
    axes.set_ylabel("% of answers right")
    dotted = "; dotted: the paper's" if paper else ""
    axes.set_title(f"MQAR, {task.seq_len} tokens, {task.pairs} pairs{dotted}", fontsize=10)
    axes.grid(alpha=0.3)
    if best:
        axes.legend()
    beside = out.with_name(f".{out.name}.incomplete")
    figure.savefig(beside, format="png", dpi=130)
    beside.replace(out)
