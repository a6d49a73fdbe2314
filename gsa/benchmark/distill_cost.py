"""`gsa bench distill`: what a distillation takes, computed from two config.json, not measured.

Per GPU, stage by stage: bytes that stay (the student's weights, gradients and moments, of which
each GPU has its share, and the teacher, whole on each), bytes that come and go (gathered weights,
activations, logits), the FLOPs of all GPUs together, and hours at an assumed utilisation.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gsa
from gsa.benchmark.model_cost import read_config
from gsa.benchmark.results import check_out, write_result
from gsa.benchmark.tables import aligned
from gsa.conversion.config import ConvertConfig
from gsa.conversion.distill_config import Lesson
from gsa.conversion.stages import Stage
from gsa.conversion.student import student_config
from gsa.conversion.teacher import Teacher, open_config
from gsa.layers.options import LinearAttentionOptions, SoftmaxAttentionOptions
from gsa.model import GSAConfig, GSAForCausalLM
from gsa.model.config import MixerOptions
from gsa.model.cost import (
    DEVICES,
    count_parameters,
    device_hours,
    flops_per_token,
    mixer_flops,
    peak_flops,
    training_bytes,
)
from gsa.model.loss import CHUNK_LOGITS
from gsa.training.adapters import adapt
from gsa.training.environment import commit
from gsa.training.optimizer import rate_of

FP32 = torch.float32.itemsize


@dataclass(frozen=True, kw_only=True)
class DistillCostConfig(Lesson):
    """What `bench_distill` is asked."""

    student: str
    """Folder that gsa convert made, or of a Transformer: then of what it makes by default."""
    gpus: int = 8
    """How many there are."""
    gpu: str = "H100"
    """Which: H100, A100, ... or the whole name torch gives it."""
    mfu: float = 0.4
    """Share of their bf16 peak that is reached; a guess of yours, no promise of ours."""
    out: str = ""
    """JSON file to write; empty for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpus < 1 or self.rows % self.gpus:
            raise ValueError(
                f"gpus: expected at least 1, and rows = {self.rows} a multiple of it, got "
                f"{self.gpus}"
            )
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu: expected a number above 0, at most 1, got {self.mfu}")
        if peak_flops(self.gpu) is None:
            known = ", ".join(device.name for device in DEVICES)
            raise ValueError(f"gpu: expected one of {known}, got {self.gpu!r}")

    @property
    def compute(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32


@dataclass(frozen=True, kw_only=True)
class StageBytes:
    """Of one GPU. Weights, gradients, moments and the teacher are exact but for the remainders of
    what does not divide by the number of GPUs; the others are estimates for eager mode."""

    weights: float
    gradients: float
    optimizer: float
    teacher: int
    gathered: int
    """Copies of weights in the dtype of products: of two blocks, embeddings and head; in one
    process of everything, if in bf16."""
    activations: float
    logits: int

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def bench_distill(config: DistillCostConfig) -> dict[str, Any]:
    """Compute what a distillation takes: bytes on each GPU, FLOPs and hours, stage by stage.

    Prints tables and returns (and writes) the document.

    Raises:
        ValueError, FileNotFoundError: a folder without the config of a GSA model or of a
            Transformer that gsa convert knows.
        OSError: `out` is something else, or cannot be written.
    """
    check_out(config.out)
    student, teacher = read_pair(config)
    theirs = count_parameters(teacher).total
    taught, stages = False, []
    for stage in config.plan():
        taught = taught or stage.objective != "ce"
        stages.append(_facts(config, stage, student, teacher, theirs if taught else 0))
    document = {
        "benchmark": "distill",
        "gsa": gsa.__version__,
        "commit": commit(),
        "asked": asdict(config),
        "student": count_parameters(student).total,
        "teacher": theirs,
        "stages": stages,
        "hours": sum(stage["hours"] for stage in stages),
    }
    print(cost_text(document))
    if config.out:
        write_result(Path(config.out), document)
    return document


def read_pair(config: DistillCostConfig) -> tuple[GSAConfig, GSAConfig]:
    """(student, teacher as a model of ours: with every layer kept)"""
    folder = Path(config.student)
    if is_student(folder):
        return read_config(config.student), kept_config(open_config(config.teacher_folder()))
    teacher = open_config(folder)
    options = ConvertConfig(teacher=config.student, out="none")
    return student_config(teacher, options), kept_config(teacher)


def is_student(folder: Path) -> bool:
    """Whether a folder's config.json is that of a model of ours."""
    path = folder / "config.json"
    return path.is_file() and json.loads(path.read_text()).get("model_type") == "gsa"


def kept_config(teacher: Teacher) -> GSAConfig:
    """A teacher as a model of ours: with every layer kept."""
    layers = tuple(range(teacher.config.num_hidden_layers))
    options = ConvertConfig(teacher=str(teacher.folder), out="none", keep_layers=layers)
    return student_config(teacher, options)


def trained_parameters(student: GSAConfig, stage: Stage) -> tuple[int, int]:
    """(all parameters of the student in that stage, those that get gradients)"""
    with torch.device("meta"):
        model: Any = GSAForCausalLM(student)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(rate_of(name, stage.rates) > 0)
    if stage.lora:
        adapt(model, stage.lora, seed=0)
    reached: Iterable[nn.Module] = [model]
    if stage.objective == "align":
        options = [student.mixer_options(i) for i in range(student.num_hidden_layers)]
        pairs = zip(model.model.layers, options, strict=True)
        reached = [block for block, own in pairs if not isinstance(own, SoftmaxAttentionOptions)]
    trained = sum(p.numel() for part in reached for p in part.parameters() if p.requires_grad)
    return sum(p.numel() for p in model.parameters()), trained


def stage_bytes(
    config: DistillCostConfig,
    stage: Stage,
    student: GSAConfig,
    numbers: tuple[int, int],
    teacher: int,
) -> StageBytes:
    """What a stage keeps on each GPU.

    numbers: from `trained_parameters`. teacher: its parameters, 0 if it is not there.
    """
    parameters, trained = numbers
    kept = training_bytes(trained)
    size = config.compute.itemsize
    tokens = config.rows * config.seq_len // config.gpus
    return StageBytes(
        weights=training_bytes(parameters).weights / config.gpus,
        gradients=kept.gradients / config.gpus,
        optimizer=kept.optimizer / config.gpus,
        teacher=teacher * size,
        gathered=_gathered(config, student),
        activations=tokens * size * _activations(config, stage, student),
        logits=_logits(stage, tokens, size, student),
    )


def _gathered(config: DistillCostConfig, student: GSAConfig) -> int:
    counts, size = count_parameters(student), config.compute.itemsize
    if config.gpus == 1:
        return counts.total * size if config.dtype == "bf16" else 0
    blocks = 2 * counts.blocks // student.num_hidden_layers
    return (blocks + counts.embeddings + counts.head + counts.norm) * size


def _activations(config: DistillCostConfig, stage: Stage, student: GSAConfig) -> float:
    """Numbers per token that wait for the backward pass."""
    D, L = student.hidden_size, student.num_hidden_layers
    mixers = [mixer_activations(student.mixer_options(layer)) for layer in range(L)]
    if stage.objective == "align":  # and what the teacher's attention was given and gave
        return 2 * L * D + sum(mixers)
    whole = [one + block_activations(student) for one in mixers]
    if not config.recompute:
        return sum(whole)
    every = config.recompute
    return max(whole) + sum(D if i % every == 0 else one for i, one in enumerate(whole))


def mixer_activations(options: MixerOptions) -> int:
    """Numbers per token that an eager token mixer keeps: the inputs of its products, activations,
    norm and operator."""
    H, G = options.num_heads, options.kv_heads
    if isinstance(options, SoftmaxAttentionOptions):
        return options.hidden_size + (2 * (H + G) + G + 2 * H) * options.width
    K, V = options.key_width, options.value_width
    if isinstance(options, LinearAttentionOptions):
        gates, outputs = 3 * G * K, (5 if options.output_gate else 3) * H * V
        return options.hidden_size + 2 * (H + G) * K + G * V + gates + outputs
    M = options.slots
    qkv = H * K + G * (K + V)
    window = 0 if options.window_branch is None else qkv + 3 * H * V
    return options.hidden_size + 2 * qkv + 3 * H * V + 3 * G * M + 4 * H * M + window


def block_activations(student: GSAConfig) -> int:
    """The same of a block around its mixer: norms, and the products of its MLP."""
    return 3 * student.hidden_size + 4 * student.mlp_width


def _logits(stage: Stage, tokens: int, size: int, student: GSAConfig) -> int:
    """Logits of some tokens, their softmax and gradient, and the head's gradient in fp32."""
    if stage.objective == "align":
        return 0
    words = student.vocab_size
    held = min(tokens * words, CHUNK_LOGITS)
    each = 2 * size + FP32
    if stage.objective == "kl":
        each += size + 2 * FP32
    return held * each + words * student.hidden_size * FP32


def stage_flops(stage: Stage, student: GSAConfig, teacher: GSAConfig, seq_len: int) -> float:
    """FLOPs per token: the student's products forward and backward, the teacher's forward.

    Backward is a product for an input's gradient, and one for a weight's where it is trained (while
    aligning, for all). Blocks computed again do not count.
    """
    theirs = flops_per_token(teacher, seq_len)
    if stage.objective == "align":
        options = [student.mixer_options(i) for i in range(student.num_hidden_layers)]
        taught = [one for one in options if not isinstance(one, SoftmaxAttentionOptions)]
        mixers = sum(mixer_flops(one, seq_len) for one in taught)
        return 3 * mixers + theirs.forward - theirs.head
    own = flops_per_token(student, seq_len)
    frozen = 0 if stage.rest else own.mlp + own.head
    frozen += own.projections if stage.lora else 0
    taught = theirs.forward if stage.objective == "kl" else 0
    return own.forward_backward - frozen + taught


def _facts(
    config: DistillCostConfig, stage: Stage, student: GSAConfig, teacher: GSAConfig, theirs: int
) -> dict[str, Any]:
    numbers = trained_parameters(student, stage)
    memory = stage_bytes(config, stage, student, numbers, theirs)
    flops = stage_flops(stage, student, teacher, config.seq_len)
    peak = peak_flops(config.gpu)
    assert peak is not None
    hours = device_hours(stage.tokens, flops, peak, config.mfu) / config.gpus
    return {
        "objective": stage.objective,
        "tokens": stage.tokens,
        "trained": numbers[1],
        "bytes": asdict(memory) | {"total": memory.total},
        "flops_per_token": flops,
        "hours": hours,
    }


def cost_text(document: dict[str, Any]) -> str:
    """Everything, in paragraphs."""
    asked, stages = document["asked"], document["stages"]
    names = list(stages[0]["bytes"])
    sizes = [["", "tokens", "trained", *names]]
    times = [["", "GFLOPs per token", "PFLOPs", "hours"]]
    for number, stage in enumerate(stages, 1):
        name = f"{number} {stage['objective']}"
        cells = [f"{stage['bytes'][key] / 2**30:,.2f}" for key in names]
        sizes.append([name, f"{stage['tokens']:,}", f"{stage['trained'] / 1e6:,.1f}M", *cells])
        per_token, tokens = stage["flops_per_token"], stage["tokens"]
        work = f"{per_token * tokens / 1e15:,.1f}"
        times.append([name, f"{per_token / 1e9:,.1f}", work, f"{stage['hours']:,.2f}"])
    rows = f"{asked['rows']} rows of {asked['seq_len']} a pass"
    return "\n\n".join(
        [
            f"student {document['student'] / 1e6:,.1f}M parameters, teacher "
            f"{document['teacher'] / 1e6:,.1f}M",
            f"GiB on each of {asked['gpus']} GPUs, {rows}, {asked['dtype']}; gathered weights, "
            f"activations and logits are estimates\n{aligned(sizes)}",
            f"time on {asked['gpus']} × {asked['gpu']} if {asked['mfu']:.0%} of the bf16 peak is "
            f"reached: {document['hours']:,.2f} hours\n{aligned(times)}",
        ]
    )
