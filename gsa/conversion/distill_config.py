"""What `gsa distill` can be asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gsa.conversion.conversion import REPORT as CONVERSION
from gsa.conversion.stages import PRESETS, Preset, Stage, parse_stage, planned
from gsa.training import RunError, TrainConfig
from gsa.training.files import read_object


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What a distillation costs depends on this alone."""

    student: str
    """Folder that gsa convert made."""
    teacher: str = ""
    """Folder of the teacher; empty for the one in the student's conversion.json."""
    preset: Preset = "default"
    """default: align, kl, ce; paper: ce alone; lora, smoke: default by adapters, and in small."""
    tokens: int = 50_000_000
    """Of all stages of the preset together."""
    stages: tuple[str, ...] = ()
    """In place of a preset: objective:tokens:lr:rest, such as align:10M:1e-3:0 kl:40M:3e-4:0.3;
    rest is the share of lr for all that is not a token mixer; or lora, for adapters and gates."""
    seq_len: int = 1024
    """Tokens of a row."""
    rows: int = 16
    """Rows of a pass, of all processes together."""
    accumulation: int = 1
    """Passes of as many rows each that make a step."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """bf16: student and teacher compute in bf16; the student's weights stay fp32."""
    recompute: int = 0
    """Keep no activations within every so-manieth block of the student, but compute them again
    backwards: 1 for all blocks (least memory), 0 for none."""

    def __post_init__(self) -> None:
        if not self.student:
            raise ValueError("student: expected a non-empty string")
        if self.preset not in PRESETS:
            raise ValueError(f"preset: expected {', '.join(PRESETS)}, got {self.preset!r}")
        for text in self.stages:
            parse_stage(text)
        for name in ("tokens", "seq_len", "rows", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.recompute < 0:
            raise ValueError(f"recompute: expected at least 0, got {self.recompute}")

    def plan(self) -> list[Stage]:
        """The stages, in order."""
        if self.stages:
            return [parse_stage(text) for text in self.stages]
        return planned(self.preset, self.tokens)

    def teacher_folder(self) -> Path:
        """The teacher's; ValueError if nothing says which one it is."""
        if self.teacher:
            return Path(self.teacher)
        path = Path(self.student) / CONVERSION
        if not path.is_file():
            raise ValueError(
                f"student: expected a folder that gsa convert made, got {self.student} without "
                f"{CONVERSION}; if it is a model of ours, say which teacher is its own: teacher"
            )
        found = read_object(path).get("teacher")
        folder = found.get("folder") if isinstance(found, dict) else found
        if not isinstance(folder, str):
            raise RunError(f"{path}: damaged (it does not say which teacher); say it: teacher")
        return Path(folder)


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Lesson):
    """What `distill` is asked to do."""

    data: str
    """Shard folder of text in the student's tokens, or several with weights; see gsa train."""
    out: str
    """Folder of the stages' runs and the report."""
    validation: str = ""
    """Shard folder of held-out text that both read at the end; empty for none."""
    compile: bool = False
    """Compile the student's blocks: faster steps after half a minute."""
    cuda_graph: bool = False
    """Record a pass of teacher and student, and replay it: see gsa train. Rows without a document's
    beginning in them have the teacher round otherwise."""
    seed: int = 0
    """Seeds the order of rows; each stage has its own."""
    checkpoint_interval: int = 200
    """Steps between checkpoints."""
    validation_interval: int = 0
    """Steps between values of a stage's own loss on held-out text; 0 for none."""
    held_out_tokens: int = 1_000_000
    """Of the held-out text, how much both read at the end."""
    recall_distances: tuple[int, ...] = (64, 256, 1024)
    """Tokens between a fact and the question about it, for the recall task at the end."""
    recall_texts: int = 100
    """Questions of each distance; 0 for no recall task."""
    yardstick: str = ""
    """Folder of a finished distillation of the teacher itself (gsa convert --keep-all) on the same
    tokens: what it learned from the text alone is then not counted as recovery."""
    prompt: str = ""
    """The report shows how teacher and student continue this; empty for no samples."""
    device: str = "cpu"
    """Where to train: cpu, cuda, cuda:1, ..."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("data", "out"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected a non-empty string")
        if self.held_out_tokens < 1:
            raise ValueError(f"held_out_tokens: expected at least 1, got {self.held_out_tokens}")
        if self.recall_texts < 0:
            raise ValueError(f"recall_texts: expected at least 0, got {self.recall_texts}")
        if self.yardstick and not self.validation:
            raise ValueError("yardstick: expected none without held-out text; set validation")

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
            lora=stage.lora,
            seq_len=self.seq_len,
            rows=self.rows,
            accumulation=self.accumulation,
            steps=steps,
            lr=stage.lr,
            min_lr=stage.lr / 10,
            warmup=min(stage.warmup, steps // 10),
            weight_decay=0.01,
            dtype=self.dtype,
            recompute=self.recompute,
            compile=self.compile,
            lean=self.compile,
            cuda_graph=self.cuda_graph,
            seed=self.seed + number,
            checkpoint_interval=self.checkpoint_interval,
            validation_interval=self.validation_interval,
            device=self.device,
        )
