"""`gsa distill`: a converted student learns from its teacher, stage by stage.

    print(distill(DistillConfig(student="models/slots", data="shards/prose", out="runs/distilled")))

Every stage is a run of `gsa.training` in a folder of its own, which begins with the weights of the
stage before; interrupted anywhere, the same command goes on from the last checkpoint.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gsa.conversion.distill_config import DistillConfig
from gsa.conversion.distill_report import (
    RECOVERY,
    REPORT,
    SETTINGS,
    circumstances,
    read_yardstick,
    recovery_json,
    report_text,
)
from gsa.conversion.objectives import Align, FrozenTeacher, Kl
from gsa.conversion.recall import Questions, make_questions, prose_of
from gsa.conversion.recovery import Comparison, Recovery, compare
from gsa.conversion.teacher import open_config
from gsa.data import MixedShards, TokenShards, open_rows
from gsa.layers.options import SoftmaxAttentionOptions
from gsa.model import GSAConfig, GSAForCausalLM
from gsa.model.loading import without_bars
from gsa.training import RunError, train
from gsa.training.distributed import Team, join
from gsa.training.files import incomplete, read_object, write_json, write_text
from gsa.training.objective import Objective, next_token
from gsa.training.report import sample
from gsa.training.setup import check_team, pick_device

FREE = (
    *("device", "checkpoint_interval", "held_out_tokens", "recall_distances", "recall_texts"),
    *("yardstick", "prompt", "recompute", "cuda_graph"),
)
"""What a later call may ask otherwise."""


@dataclass(frozen=True, kw_only=True)
class DistillResult:
    """How a call of `distill` ended.

    status: "finished", or "stopped" by `signal` with a checkpoint of the stage under way. model:
    folder of the newest model. comparison: student beside teacher; None if it was stopped. ratio:
    to the yardstick, if there is one.
    """

    model: Path
    status: str
    signal: int = 0
    comparison: Comparison | None = None
    ratio: float | None = None

    @property
    def recovery(self) -> Recovery | None:
        """Of held-out text; None if there is none."""
        return None if self.comparison is None else self.comparison.student.recovery

    def __str__(self) -> str:
        said = f": {self.recovery}" if self.recovery else ""
        if self.ratio is not None:
            said += f"; {self.ratio:.3f} × the better of the teacher and the teacher finetuned"
        return f"{self.status}, {self.model}{said}"


def distill(
    config: DistillConfig, *, command: str = "", say: Callable[[str], None] | None = None
) -> DistillResult:
    """Teach a converted student what its teacher knows; go on where an earlier call was stopped.

    In several processes, which torchrun starts, they share the student as in `train`; each has the
    teacher whole.

    Args:
        say: told how it ended, by one process only.

    In config.out: a run folder for each stage, recovery.json and report.md. The last stage's
    folder is the model.

    Raises:
        ValueError, FileNotFoundError: settings, student, teacher or shards that do not fit;
            nothing was written.
        RunError: the folder holds another distillation; and as from `train`.
    """
    with join(config.device) as team:
        result = _distill(config, command, team)
        if say is not None and team.first:
            say(str(result))
        return result


def _distill(config: DistillConfig, command: str, team: Team) -> DistillResult:
    teacher_folder = config.teacher_folder()
    _check_pair(Path(config.student), teacher_folder)
    _check_shards(config)
    _check_aligned(config)
    yardstick = None
    if config.yardstick:
        yardstick = read_yardstick(config.yardstick, circumstances(config, teacher_folder))
    questions = _questions(config)
    runs = config.runs()
    check_team(runs[0], team)
    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    device = str(pick_device(config.device, team))
    teacher = FrozenTeacher(teacher_folder, config.seq_len, device, dtype)
    objectives: dict[str, Objective] = {
        "align": Align(teacher, compiled=config.compile),
        "kl": Kl(teacher),
        "ce": next_token,
    }
    team.ask_first(lambda: _begin(config, command))
    for stage, asked in zip(config.plan(), runs, strict=True):
        ended = train(asked, command=command, objective=objectives[stage.objective])
        if ended.status == "stopped":
            return DistillResult(model=ended.folder, status="stopped", signal=ended.signal)
    model = Path(runs[-1].out)
    student = _open(model, teacher)
    found = compare(
        student,
        teacher,
        TokenShards(config.validation) if config.validation else None,
        questions,
        most_tokens=config.held_out_tokens,
        team=team,
    )

    def write() -> None:
        said = recovery_json(config, teacher_folder, model, found, yardstick)
        write_json(Path(config.out) / RECOVERY, said)
        samples = _samples(config, {"teacher": teacher.model, "student": student})
        text = report_text(config, teacher_folder, model, found, yardstick, samples, command)
        write_text(Path(config.out) / REPORT, text)

    team.ask_first(write)
    return DistillResult(
        model=model,
        status="finished",
        comparison=found,
        ratio=None if yardstick is None else yardstick.ratio(found),
    )


def _check_pair(student: Path, teacher: Path) -> None:
    for name, folder in (("student", student), ("teacher", teacher)):
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{name}: expected a model folder, got {folder}; give {name}")
    own = GSAConfig.from_pretrained(student)
    theirs = open_config(teacher).config
    for key in ("vocab_size", "hidden_size", "num_hidden_layers"):
        if getattr(own, key) != getattr(theirs, key):
            raise ValueError(
                f"teacher: expected {key} = {getattr(own, key)}, as the student has, got "
                f"{getattr(theirs, key)} in {teacher}"
            )


def _check_shards(config: DistillConfig) -> None:
    words = GSAConfig.from_pretrained(config.student).vocab_size
    shards = [open_rows(config.data, seq_len=config.seq_len, seed=0).shards]
    shards += [TokenShards(config.validation)] if config.validation else []
    for one in shards:
        one.require_vocab_size(words)
        one.require_tokenizer(config.student)


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
        there = {at.name for at in folder.iterdir()} if folder.is_dir() else {folder.name}
        if folder.exists() and there - {incomplete(path).name}:  # of a command that was killed
            raise RunError(f"out: {folder} holds something that is no distillation; choose another")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"command": command, "config": asked})
        return
    before = read_object(path, {"config": dict})["config"]
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


def _questions(config: DistillConfig) -> list[Questions]:
    """Of the recall task, between held-out prose, or training prose if there is none."""
    if not config.recall_texts:
        return []
    shards = open_rows(config.data, seq_len=config.seq_len, seed=0).shards
    one = shards.parts[0] if isinstance(shards, MixedShards) else shards
    prose = prose_of(TokenShards(config.validation) if config.validation else one)
    return make_questions(
        one.load_tokenizer(), prose, config.recall_distances, config.recall_texts, config.seed
    )


def _open(model: Path, teacher: FrozenTeacher) -> Any:
    """The student that was taught, where its teacher is."""
    with without_bars():
        student: Any = GSAForCausalLM.from_pretrained(model, dtype=torch.float32)
    return student.to(teacher.device)


def _samples(config: DistillConfig, models: dict[str, Any]) -> dict[str, str]:
    """How each continues the prompt, if there is one."""
    if not config.prompt:
        return {}
    shards = open_rows(config.data, seq_len=config.seq_len, seed=0).shards
    tokenizer = shards.load_tokenizer()
    return {
        name: sample(model, tokenizer, config.prompt, config.seed) for name, model in models.items()
    }
