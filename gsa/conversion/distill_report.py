"""What a distillation found: recovery.json, report.md, and the yardstick they are held against."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gsa.conversion.distill_config import DistillConfig
from gsa.conversion.recovery import Comparison
from gsa.data import TokenShards, open_rows
from gsa.layers.options import SoftmaxAttentionOptions
from gsa.model import GSAConfig
from gsa.training.files import read_object
from gsa.training.report import quoted
from gsa.training.run_folder import fingerprints

SETTINGS = "distill.json"
RECOVERY = "recovery.json"
REPORT = "report.md"


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """The teacher finetuned on the tokens that its student learned from.

    loss: its cross-entropy on the held-out text, in nats.
    """

    folder: str
    loss: float

    def ratio(self, found: Comparison) -> float | None:
        """The student's perplexity over the better of the teacher's, finetuned or not."""
        read = found.student.recovery
        return None if read is None else math.exp(read.student - min(read.teacher, self.loss))


def circumstances(config: DistillConfig, teacher: Path) -> dict[str, Any]:
    """What two distillations must share to be held against each other; kept in recovery.json."""
    shards = open_rows(config.data, seq_len=config.seq_len, seed=0).shards
    return {
        "teacher": str(teacher.resolve()),
        "data": fingerprints(shards, None),
        "tokens": sum(stage.tokens for stage in config.plan()),
        "held_out": TokenShards(config.validation).fingerprint if config.validation else "",
        "held_out_tokens": config.held_out_tokens,
        "seq_len": config.seq_len,
        "dtype": config.dtype,
    }


def read_yardstick(folder: str, own: dict[str, Any]) -> Yardstick:
    """Opens a finished distillation whose student was the teacher with every layer kept.

    own: the `circumstances` to be held against it. ValueError, naming what differs, unless it is
    one, and of the same teacher, tokens and held-out text.
    """
    path = Path(folder) / RECOVERY
    if not path.is_file():
        raise ValueError(
            f"yardstick: expected a finished distillation with held-out text, got {folder} without "
            f"{RECOVERY}"
        )
    found = read_object(path, {"circumstances": dict, "model": str})
    theirs = found["circumstances"]
    differing = [
        f"{key}: {theirs.get(key)} there, {value} here"
        for key, value in own.items()
        if theirs.get(key) != value
    ]
    if differing:
        raise ValueError(
            f"yardstick: expected the same teacher, tokens and held-out text, got in {folder}: "
            f"{'; '.join(differing)}"
        )
    model: Any = GSAConfig.from_pretrained(Path(folder) / found["model"])
    layers = (model.mixer_options(layer) for layer in range(model.num_hidden_layers))
    if not all(isinstance(options, SoftmaxAttentionOptions) for options in layers):
        raise ValueError(
            "yardstick: expected the teacher itself, finetuned (gsa convert --keep-all, then gsa "
            f"distill --stages ce:…), got {folder}, whose student has converted layers"
        )
    return Yardstick(folder=folder, loss=found["student"])


def recovery_json(
    config: DistillConfig,
    teacher: Path,
    model: Path,
    found: Comparison,
    yardstick: Yardstick | None,
) -> dict[str, Any]:
    """The contents of recovery.json."""
    said = found.to_dict()
    if yardstick is not None:
        said["yardstick"] = {
            "folder": yardstick.folder,
            "loss": yardstick.loss,
            "perplexity": math.exp(yardstick.loss),
            "ratio": yardstick.ratio(found),
        }
    return said | {"model": model.name, "circumstances": circumstances(config, teacher)}


def report_text(
    config: DistillConfig,
    teacher: Path,
    model: Path,
    found: Comparison,
    yardstick: Yardstick | None,
    samples: dict[str, str],
    command: str,
) -> str:
    """The text of report.md. samples: how each model continues the prompt, by its name."""
    lines = ["| stage | objective | tokens | rate | of it for the rest |", "|---|---|--:|--:|--:|"]
    for number, stage in enumerate(config.plan(), 1):
        rest = f"adapters of rank {stage.lora}" if stage.lora else f"{stage.rest:g}"
        numbers = f"{stage.tokens:,} | {stage.lr:g} | {rest}"
        lines.append(f"| {number} | {stage.objective} | {numbers} |")
    parts = [
        f"# {Path(config.out).name}",
        f"{config.student}, taught by {teacher}. The model is in {model}; each stage's folder has "
        "its curve.",
        "\n".join(lines),
    ]
    read = found.student.recovery
    if read is not None:
        parts.append(f"On held-out text ({config.validation}): {read}.")
    if found.teacher_recall is not None or read is not None:
        parts.append(found.table())
    if yardstick is not None:
        parts.append(
            f"The teacher finetuned on the same tokens ({yardstick.folder}) has perplexity "
            f"{math.exp(yardstick.loss):.3f}; the student's is {yardstick.ratio(found):.3f} × that "
            "of the better of both."
        )
    for name, text in samples.items():
        parts.append(f"The {name} continues {config.prompt!r}:\n\n{quoted(text)}")
    if command:
        parts.append(f"Command: `{command}`")
    return "\n\n".join(parts) + "\n"
