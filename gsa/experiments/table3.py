"""`gsa reproduce table3`: a Transformer converted to each linear mixer, and taught again."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from gsa.benchmark.distill_cost import kept_config, stage_flops
from gsa.conversion import ConvertConfig, DistillConfig, convert, distill
from gsa.conversion.config import Target
from gsa.conversion.stages import Preset, planned
from gsa.conversion.student import student_config
from gsa.conversion.teacher import open_config
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
from gsa.experiments.budget import FREE, assumed, hours, hours_table
from gsa.experiments.evaluation import SUITE_FREE, Evaluation, SuiteConfig
from gsa.model.cost import count_parameters
from gsa.training.distributed import Team, join
from gsa.training.files import write_text
from gsa.training.lock import turn
from gsa.training.metrics import read_metrics
from gsa.training.setup import pick_device

Size = Literal["tiny", "small", "paper"]
TEACHER = "teacher"
STUDENTS = "students"
RECIPES: dict[str, Preset] = {"paper": "paper", "ours": "default"}
"""How students are taught, by name: the paper's finetuning, and what gsa distill does by itself."""
ARMS: dict[str, tuple[Target, Preset]] = {
    f"{target}-{name}": (target, preset)
    for name, preset in RECIPES.items()
    for target in get_args(Target)
    if (target, name) != ("slots", "paper")
}
SIZES: dict[Size, dict[str, Any]] = {
    "tiny": {"tokens": 1280, "seq_len": 32, "rows": 2, "recall_texts": 0, "held_out_tokens": 1000},
    "small": {"tokens": 50_000_000, "seq_len": 1024, "rows": 16, "dtype": "bf16", "compile": True},
    "paper": {
        **{"tokens": 20_000_000_000, "seq_len": 2048, "rows": 8, "accumulation": 128},
        **{"dtype": "bf16", "compile": True, "recompute": 1},
    },
}
"""Fields of DistillConfig."""
EVALUATION = Evaluation(suite="t2r", folder="t2r")


@dataclass(frozen=True, kw_only=True)
class Table3Config(SuiteConfig):
    """ValueError naming the field if a value makes no sense."""

    teacher: str = ""
    """Local folder of a Llama, Mistral, Qwen2, Qwen3 or SmolLM2; the paper's is Mistral-7B-v0.1."""
    data: str = ""
    """Shard folder of text in the teacher's tokens, or several with weights; as in gsa train."""
    validation: str = ""
    """Shard folder of held-out text."""
    out: str = "runs/table3"
    """Folder of the experiment: students as converted, a folder for each arm, results.json,
    report.md, and t2r/ with the tasks."""
    size: Size = "small"
    """small: 50M tokens an arm; paper: 20B, in steps of 2M; tiny: to see that it works."""
    arms: tuple[str, ...] = ()
    """Only these: teacher, gsa-paper, gla-paper, ..., gsa-ours, ...; all if none is given."""
    tokens: float = 0.0
    """Tokens of each arm, such as 100e9; 0 for those of the size."""
    seed: int = 0
    """Seeds new weights and the order of rows."""
    eager: bool = False
    """Do not compile blocks, nor record passes as CUDA graphs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("teacher",) if self.plan else ("teacher", "data", "validation"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected a folder, got an empty string")
        if unknown := [name for name in self.arms if name not in (TEACHER, *ARMS)]:
            known = ", ".join((TEACHER, *ARMS))
            raise ValueError(f"arms: expected some of {known}, got {', '.join(unknown)}")
        if not 0 <= self.tokens < float("inf"):
            raise ValueError(f"tokens: expected a finite number ≥ 0, got {self.tokens}")


def lesson(config: Table3Config, name: str) -> DistillConfig:
    """How an arm is taught."""
    target, preset = ARMS[name]
    options: dict[str, Any] = SIZES[config.size] | (
        {"tokens": int(config.tokens)} if config.tokens else {}
    )
    options |= {"compile": False} if config.eager else {}
    return DistillConfig(
        student=str(Path(config.out) / STUDENTS / target),
        teacher=config.teacher,
        preset=preset,
        data=config.data or "none",
        validation=config.validation,
        out=str(Path(config.out) / name / "taught"),
        seed=config.seed,
        device=config.device,
        **options,
    )


def plan_text(config: Table3Config, names: list[str]) -> str:
    """What training and then the tasks take; the teacher's config.json is enough."""
    theirs = open_config(config.teacher)
    teacher = kept_config(theirs)
    rows, models = {}, {TEACHER: teacher}
    for name in names:
        target, preset = ARMS[name]
        student = student_config(theirs, ConvertConfig(teacher="-", out="-", target=target))
        asked = lesson(config, name)
        spent = sum(
            hours(config, stage.tokens, stage_flops(stage, student, teacher, asked.seq_len))
            for stage in planned(preset, asked.tokens)
        )
        rows[name] = (count_parameters(student).total, spent)
        models[name] = student
    tokens = lesson(config, next(iter(ARMS))).tokens
    head = f"{tokens:,} tokens for each; {assumed(config)}"
    return f"{head}\n{hours_table(rows)}\n{EVALUATION.plan(config, models)}"


def reproduce_table3(
    config: Table3Config, *, command: str, say: Callable[[str], None] = print
) -> int:
    """The paper's Table 3: a Transformer made linear (gsa, gla, retnet, supra) and taught again.

    Each target by the paper's finetuning and by ours, then the tasks of suite t2r. In several
    processes that torchrun starts, they share each student as in `distill`. Returns the signal that
    stopped it, or 0.

    Raises:
        ValueError, FileNotFoundError: settings, teacher or shards that do not fit; nothing was
            written.
        RunError: the folder holds something else, or arms failed.
    """
    chosen = [name for name in ARMS if name in config.arms or not config.arms]
    plan = plan_text(config, chosen)
    if config.plan:
        say(plan)
        return 0
    out = Path(config.out)
    with join(config.device) as team:

        def tell(text: str) -> None:
            if team.first:
                say(text)

        seq_len = SIZES[config.size]["seq_len"]
        shards = open_rows(config.data, seq_len=seq_len, seed=config.seed).shards
        validation = TokenShards(config.validation)
        words = open_config(config.teacher).config.vocab_size
        for one in (shards, validation):
            one.require_vocab_size(words)
            one.require_tokenizer(config.teacher)
        pick_device(config.device, team)
        free = {*FREE, *SUITE_FREE, "arms", "device", "out", "data", "validation", "eager"}
        asked = {key: value for key, value in asdict(config).items() if key not in free}
        marks = {"data": shards.fingerprint, "validation": validation.fingerprint}
        tell(plan)

        def begun() -> None:
            begin(out, asked | {"experiment": "table3", "fingerprints": marks})
            EVALUATION.check(out, config)

        team.ask_first(begun)
        folders = {name: out / name for name in (TEACHER, *ARMS)}
        arms = [Arm(name=TEACHER, folder=out / TEACHER, run=partial(_teacher, config, team))]
        arms = arms if TEACHER in config.arms or not config.arms else []
        arms += [
            Arm(name=name, folder=out / name, run=partial(_teach, config, name, command, team))
            for name in chosen
        ]

        @turn(out)
        def report() -> None:
            results = collect(out, folders)
            write_text(out / "report.md", report_text(config, results, EVALUATION.section(out)))

        signal = run_arms(arms, report=report, command=command, team=team, say=tell)
        if not signal:
            only = [arm.name for arm in arms]
            EVALUATION.run(out, config, command=command, team=team, say=tell, only=only)
            team.ask_first(report)
        tell(f"report: {out / 'report.md'}")
        return signal


def _teacher(config: Table3Config, team: Team) -> Result:
    """The teacher as it is: only its tasks are asked for."""
    team.ask_first(lambda: (Path(config.out) / TEACHER).mkdir(exist_ok=True))
    return {"model": str(Path(config.teacher).resolve())}


def _teach(config: Table3Config, name: str, command: str, team: Team) -> Result:
    asked = lesson(config, name)

    def make_student() -> None:
        if not Path(asked.student).exists():
            target = ARMS[name][0]
            convert(
                ConvertConfig(
                    teacher=config.teacher, out=asked.student, target=target, seed=config.seed
                )
            )

    team.ask_first(lambda: Path(asked.student).parent.mkdir(exist_ok=True))
    team.ask_first(make_student)
    graph = records(config.device, team, eager=config.eager)
    ended = distill(replace(asked, cuda_graph=graph), command=command)
    if ended.status == "stopped":
        raise StoppedError(ended.signal)
    found = ended.recovery
    assert found is not None, "there is held-out text"
    steps = [read_metrics(Path(run.out))[0][-1] for run in asked.runs()]
    return {
        "model": str(ended.model.relative_to(Path(config.out) / name)),
        "seconds": sum(step["seconds"] for step in steps),
        "trained_tokens": sum(step["tokens"] for step in steps),
        **found.to_dict(),
    }


def report_text(config: Table3Config, results: Mapping[str, Result], tasks: str) -> str:
    """report.md: what each student lost, on held-out text and in the tasks."""
    head = "| | tokens | perplexity | ÷ teacher's | divergence, nats | same token first | seconds |"
    lines = [head, "|---|--:|--:|--:|--:|--:|--:|"]
    for name in ARMS:
        found = results.get(name)
        cells = ["–"] * 6
        if found is not None:
            own, theirs = found["student_perplexity"], found["teacher_perplexity"]
            cells = [f"{found['trained_tokens']:,}", f"{own:.3f}", f"{own / theirs:.3f}",
                     f"{found['kl']:.4f}", f"{found['agreement']:.1%}",
                     f"{found['seconds']:,.0f}"]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    parts = [
        "# A Transformer made linear (the paper's Table 3)",
        f"Teacher: {Path(config.teacher).name}. …-paper: finetuned on text alone, at the paper's "
        "rate and warm-up; …-ours: aligned, then distilled, then finetuned (docs/conversion.md), "
        "on as many tokens.",
        "\n".join(lines),
        "Perplexities of the held-out text, in rows of the training length. Curves: each stage's "
        f"folder. Numbers: {RESULTS}.",
    ]
    parts += [tasks] if tasks else []
    return "\n\n".join([*parts, made_with(results, config.seed)]) + "\n"
