"""`gsa distill`: a converted student learns from its teacher, stage by stage.

    print(distill(DistillConfig(student="models/slots", data="shards/prose", out="runs/distilled")))

Every stage is a run of `gsa.training` in a folder of its own, which begins with the weights of the
stage before; interrupted anywhere, the same command goes on from the last checkpoint.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from gsa.conversion.conversion import REPORT as CONVERSION
from gsa.conversion.objectives import Align, FrozenTeacher, Kl
from gsa.conversion.recovery import Recovery, recovery
from gsa.conversion.stages import PRESETS, Preset, Stage, parse_stage, planned
from gsa.data import TokenShards, open_rows
from gsa.layers.options import SoftmaxAttentionOptions
from gsa.model import GSAConfig, GSAForCausalLM
from gsa.training import RunError, TrainConfig, train
from gsa.training.files import write_json, write_text
from gsa.training.objective import Objective, next_token

SETTINGS = "distill.json"
RECOVERY = "recovery.json"
REPORT = "report.md"
FREE = ("device", "checkpoint_interval", "held_out_tokens", "prompt")
"""What a later call may ask otherwise."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What `distill` is asked to do."""

    student: str
    """Folder that gsa convert made."""
    data: str
    """Shard folder of text in the student's tokens, or several with weights; see gsa train."""
    out: str
    """Folder of the stages' runs and the report."""
    teacher: str = ""
    """Folder of the teacher; empty for the one in the student's conversion.json."""
    validation: str = ""
    """Shard folder of held-out text, to compare both on; empty for no comparison."""
    preset: Preset = "default"
    """default: align, kl, ce; paper: ce alone; smoke: default in small."""
    tokens: int = 50_000_000
    """Of all stages of the preset together."""
    stages: tuple[str, ...] = ()
    """In place of a preset: objective:tokens:lr:rest, such as align:10M:1e-3:0 kl:40M:3e-4:0.3;
    rest is the share of lr for all that is not a token mixer."""
    seq_len: int = 1024
    """Tokens of a row."""
    rows: int = 16
    """Rows of a step."""
    accumulation: int = 1
    """Passes of as many rows each that make a step."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """bf16: student and teacher compute in bf16; the student's weights stay fp32."""
    compile: bool = False
    """Compile the student's blocks: faster steps after half a minute."""
    seed: int = 0
    """Seeds the order of rows; each stage has its own."""
    checkpoint_interval: int = 200
    """Steps between checkpoints."""
    validation_interval: int = 0
    """Steps between values of a stage's own loss on held-out text; 0 for none."""
    held_out_tokens: int = 1_000_000
    """Of the held-out text, how much both read at the end."""
    prompt: str = ""
    """The report shows how the student continues this; empty for no sample."""
    device: str = "cpu"
    """Where to train: cpu, cuda, cuda:1, ..."""

    def __post_init__(self) -> None:
        for name in ("student", "data", "out"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected a non-empty string")
        if self.preset not in PRESETS:
            raise ValueError(f"preset: expected {', '.join(PRESETS)}, got {self.preset!r}")
        for text in self.stages:
            parse_stage(text)
        for name in ("tokens", "held_out_tokens", "seq_len", "rows", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    def plan(self) -> list[Stage]:
        """The stages, in order."""
        if self.stages:
            return [parse_stage(text) for text in self.stages]
        return planned(self.preset, self.tokens)

    def runs(self) -> list[TrainConfig]:
        """The runs of all stages, each from the model of the one before."""
        found: list[TrainConfig] = []
        for number, stage in enumerate(self.plan(), 1):
            found.append(self._run(number, stage, found[-1].out if found else self.student))
        return found

    def _run(self, number: int, stage: Stage, start: str) -> TrainConfig:
        step = self.seq_len * self.rows * self.accumulation
        steps = max(1, round(stage.tokens / step))
        return TrainConfig(
            name=f"{stage.objective}, stage {number} of {Path(self.out).name}",
            data=self.data,
            out=str(Path(self.out) / f"{number}-{stage.objective}"),
            validation=self.validation if self.validation_interval else "",
            init=start,
            rates=stage.rates,
            seq_len=self.seq_len,
            rows=self.rows,
            accumulation=self.accumulation,
            steps=steps,
            lr=stage.lr,
            min_lr=stage.lr / 10,
            warmup=min(stage.warmup, steps // 10),
            weight_decay=0.01,
            dtype=self.dtype,
            compile=self.compile,
            lean=self.compile,
            seed=self.seed + number,
            checkpoint_interval=self.checkpoint_interval,
            validation_interval=self.validation_interval,
            prompt=self.prompt if number == len(self.plan()) else "",
            device=self.device,
        )


@dataclass(frozen=True, kw_only=True)
class DistillResult:
    """How a call of `distill` ended.

    status: "finished", or "stopped" by `signal` with a checkpoint of the stage under way. model:
    folder of the newest model. recovery: None if it was stopped or there is no held-out text.
    """

    model: Path
    status: str
    signal: int = 0
    recovery: Recovery | None = None

    def __str__(self) -> str:
        said = f": {self.recovery}" if self.recovery else ""
        return f"{self.status}, {self.model}{said}"


def distill(config: DistillConfig, *, command: str = "") -> DistillResult:
    """Teach a converted student what its teacher knows; go on where an earlier call was stopped.

    In config.out: a run folder for each stage, recovery.json and report.md. The last stage's
    folder is the model.

    Raises:
        ValueError, FileNotFoundError: settings, student, teacher or shards that do not fit;
            nothing was written.
        RunError: the folder holds another distillation; and as from `train`.
    """
    if dist.is_torchelastic_launched():
        raise ValueError("gsa distill: expected one process, got torchrun; start it by itself")
    teacher_folder = _teacher_folder(config)
    _check_pair(Path(config.student), teacher_folder)
    _check_shards(config)
    _check_aligned(config)
    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    teacher = FrozenTeacher(teacher_folder, config.seq_len, config.device, dtype)
    objectives: dict[str, Objective] = {
        "align": Align(teacher, compiled=config.compile),
        "kl": Kl(teacher),
        "ce": next_token,
    }
    runs = config.runs()
    _begin(config, command)
    for stage, asked in zip(config.plan(), runs, strict=True):
        ended = train(asked, command=command, objective=objectives[stage.objective])
        if ended.status == "stopped":
            return DistillResult(model=ended.folder, status="stopped", signal=ended.signal)
    model = Path(runs[-1].out)
    found = _compare(config, teacher, model) if config.validation else None
    write_text(
        Path(config.out) / REPORT, report_text(config, teacher_folder, model, found, command)
    )
    return DistillResult(model=model, status="finished", recovery=found)


def _teacher_folder(config: DistillConfig) -> Path:
    if config.teacher:
        return Path(config.teacher)
    path = Path(config.student) / CONVERSION
    if not path.is_file():
        raise ValueError(
            f"student: expected a folder that gsa convert made, got {config.student} without "
            f"{CONVERSION}; if it is a model of ours, say which teacher is its own: teacher"
        )
    found = json.loads(path.read_text(encoding="utf-8"))["teacher"]
    return Path(found["folder"] if isinstance(found, dict) else found)


def _check_pair(student: Path, teacher: Path) -> None:
    for name, folder in (("student", student), ("teacher", teacher)):
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{name}: expected a model folder, got {folder}; give {name}")
    own = GSAConfig.from_pretrained(student)
    theirs = json.loads((teacher / "config.json").read_text(encoding="utf-8"))
    for key in ("vocab_size", "hidden_size", "num_hidden_layers"):
        if getattr(own, key) != theirs.get(key):
            raise ValueError(
                f"teacher: expected {key} = {getattr(own, key)}, as the student has, got "
                f"{theirs.get(key)} in {teacher}"
            )


def _check_shards(config: DistillConfig) -> None:
    words = GSAConfig.from_pretrained(config.student).vocab_size
    shards = [open_rows(config.data, seq_len=config.seq_len, seed=0).shards]
    shards += [TokenShards(config.validation)] if config.validation else []
    for one in shards:
        one.require_vocab_size(words)


def _check_aligned(config: DistillConfig) -> None:
    own: Any = GSAConfig.from_pretrained(config.student)
    layers = (own.mixer_options(layer) for layer in range(own.num_hidden_layers))
    kept = all(isinstance(options, SoftmaxAttentionOptions) for options in layers)
    if kept and any(stage.objective == "align" for stage in config.plan()):
        raise ValueError(
            f"stages: expected no align for {config.student}, which keeps softmax in every layer"
        )


def _begin(config: DistillConfig, command: str) -> None:
    """Writes what was asked, or RunError if something else was asked of the folder before."""
    folder, asked = Path(config.out), asdict(config)
    path = folder / SETTINGS
    if not path.is_file():
        if folder.exists() and any(folder.iterdir()):
            raise RunError(f"out: {folder} holds something that is no distillation; choose another")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"command": command, "config": asked})
        return
    before = json.loads(path.read_text(encoding="utf-8"))["config"]
    now = json.loads(json.dumps(asked))
    differing = [
        f"{key}: {before.get(key)!r} there, {value!r} asked"
        for key, value in now.items()
        if key not in FREE and before.get(key) != value
    ]
    if differing:
        raise RunError(
            f"{folder} is of a distillation with other settings ({'; '.join(differing)}); ask for "
            "the same, or choose another out"
        )


def _compare(config: DistillConfig, teacher: FrozenTeacher, model: Path) -> Recovery:
    path = Path(config.out) / RECOVERY
    student: Any = GSAForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = recovery(
        student.to(config.device),
        teacher,
        TokenShards(config.validation),
        most_tokens=config.held_out_tokens,
    )
    write_json(path, found.to_dict())
    return found


def report_text(
    config: DistillConfig, teacher: Path, model: Path, found: Recovery | None, command: str
) -> str:
    """The text of report.md."""
    lines = ["| stage | objective | tokens | rate | of it for the rest |", "|---|---|--:|--:|--:|"]
    for number, stage in enumerate(config.plan(), 1):
        numbers = f"{stage.tokens:,} | {stage.lr:g} | {stage.rest:g}"
        lines.append(f"| {number} | {stage.objective} | {numbers} |")
    parts = [
        f"# {Path(config.out).name}",
        f"{config.student}, taught by {teacher}. The model is in {model}; each stage's folder has "
        "its curve.",
        "\n".join(lines),
    ]
    if found is not None:
        parts.append(f"On held-out text ({config.validation}): {found}.")
    if command:
        parts.append(f"Command: `{command}`")
    return "\n\n".join(parts) + "\n"
