"""`gsa bench training`: language models of equal size, trained beside each other on one device."""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gsa.benchmark.budget import OutOfTimeError, time_limit
from gsa.benchmark.device import bench_device
from gsa.benchmark.language_models import (
    Architectures,
    Recipes,
    Rival,
    check_contenders,
    recipe_keys,
    rival,
)
from gsa.benchmark.results import Results
from gsa.benchmark.tables import aligned
from gsa.model.cost import mfu, peak_flops
from gsa.training.blocks import prepare_blocks, recompute_blocks, sum_blocks_in
from gsa.training.config import TrainConfig
from gsa.training.environment import environment
from gsa.training.optimizer import Optimizers, build_optimizer

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class BenchTrainingConfig:
    arch: tuple[str, ...] = ("gsa", "transformer++")
    """Architectures as gsa train knows them: gsa, abc, gla, ...; but transformer++ is transformers'
    Llama with SDPA, own-transformer++ ours, and fla that library's own GSA model."""
    size: str = "1.3b"
    """The recipe whose model the others equal."""
    vocab_size: int = 32000
    """Words."""
    layers: int = 0
    """Blocks, for a smaller model of the same kind; 0 for the recipe's."""
    tokens: int = 16384
    """Tokens of an optimizer step."""
    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)
    """Tokens of a sequence; rows are as many as a step's tokens ask for."""
    recompute: tuple[int, ...] = (0, 1)
    """0: activations are kept; n: those within every n-th block are computed again."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """What weights, gradients and moments are kept in; products are in bf16 either way."""
    eager: bool = False
    """Do not compile blocks; fla's never are, it brings its own fused parts."""
    packed: bool = False
    """Lay rows end to end, with their boundaries, as gsa train does; not of other libraries."""
    lean: bool = False
    """Compiled blocks compute again what is elementwise (`gsa train --lean`)."""
    repeats: int = 5
    """Turns of each model; the median counts."""
    steps: int = 3
    """Optimizer steps of a turn."""
    device: str = "auto"
    """auto, cuda or cpu."""
    budget_seconds: float = 0.0
    """What would begin later than this is left out; 0 for no limit."""
    out: str = ""
    """JSON file to write; empty for none."""

    def __post_init__(self) -> None:
        for name in ("tokens", "repeats", "steps", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for length in self.lengths:
            if length < 2 or self.tokens % length:
                raise ValueError(
                    f"lengths: expected at least 2, dividing tokens = {self.tokens}, got {length}"
                )

    def keys(self, recipes: Recipes) -> dict[str, Any]:
        """Of GSAConfig, of the model that others equal; ValueError if no recipe has that name."""
        return recipe_keys(recipes, self.size, self.vocab_size, self.layers)


class Trainee:
    """A model with its optimizer, and steps of both."""

    def __init__(self, rival: Rival, config: BenchTrainingConfig, device: torch.device):
        torch.manual_seed(0)
        self.rival, self.device, self.weights = rival, device, config.weights
        with device:
            self.model: nn.Module = rival.build()
        settings = TrainConfig(
            name="bench", data="-", out="-", compile=not config.eager, lean=config.lean
        )
        self.model.to(torch.bfloat16 if config.weights == "bf16" else torch.float32).train()
        if config.weights == "fp32":
            sum_blocks_in(self.model, torch.bfloat16)
        if not rival.own_parts:
            prepare_blocks(self.model, settings)
        self.parameters = list(self.model.parameters())
        self.optimizer: Optimizers = build_optimizer(self.model, settings)

    def recompute(self, every: int) -> None:
        if not self.rival.own_parts:
            recompute_blocks(self.model, every)
        elif every:
            self.model.gradient_checkpointing_enable()  # pyright: ignore[reportCallIssue]
        else:
            self.model.gradient_checkpointing_disable()  # pyright: ignore[reportCallIssue]

    def step(self, tokens_BT: Tensor) -> float:
        """One step as the engine takes it: loss, gradients, clipping, update. Returns the loss."""
        with self._precision():
            loss = self.rival.loss(self.model, tokens_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step(1e-5)
        self.optimizer.zero_grad()
        return loss.item()

    def _precision(self) -> AbstractContextManager[Any]:
        on = self.weights == "fp32"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=on)

    def bytes(self) -> int:
        """What stays between steps: weights and the optimizer's state."""
        held = [*self.model.parameters(), *self.model.buffers()]
        for parameter in self.parameters:
            if self.optimizer.has_state(parameter):
                held += self.optimizer.state_of(parameter).values()
        return sum(x.numel() * x.element_size() for x in held)


def bench_training(
    config: BenchTrainingConfig, recipes: Recipes, architectures: Architectures
) -> dict[str, Any]:
    """Train models of equal size in turns, and report tokens per second, MFU and peak memory.

    Steps are whole: forward, loss, backward, clipping, AdamW, on random tokens. Times are wall
    times from step to step, each ending when the loss is read, as in training. Prints progress and
    a table.

    Args:
        recipes: keys of GSAConfig by the name of a recipe.
        architectures: by name, from such keys to those of a rival of equal size.
    """
    check_contenders("arch", config.arch, architectures)
    device = torch.device(bench_device(config.device))
    keys, longest = config.keys(recipes), max(config.lengths)
    rivals = [
        rival(name, keys, architectures, longest=longest, packed=config.packed)
        for name in config.arch
    ]
    cases = [(every, T) for every in config.recompute for T in config.lengths]
    head = {
        "benchmark": "training",
        "environment": environment(device),
        "config": asdict(config),
        "notes": [f"{one.name}: {one.note}" for one in rivals if one.note],
    }
    results = Results(config.out, head, [case_name(*case) for case in cases])
    trainees = {one.name: Trainee(one, config, device) for one in rivals}
    sizes = {name: sum(p.numel() for p in one.parameters) for name, one in trainees.items()}
    results.put("parameters", sizes)
    for name, number in sizes.items():
        print(f"{name}: {number / 1e6:.1f}M parameters", flush=True)
    limit = config.budget_seconds or float("inf")
    begin = time.monotonic()
    for every, T in cases:
        left = limit - (time.monotonic() - begin)
        try:
            with time_limit(max(left, 0.001)):
                row = measure_case(config, trainees, every, T, device)
        except OutOfTimeError:
            break
        results.reached(case_name(every, T), "rows", row)
        print(summary(row), flush=True)
    document = results.finish()
    print("\n" + training_table(document))
    return document


def case_name(every: int, T: int) -> str:
    return f"T={T}" + (f", recompute {every}" if every else "")


def measure_case(
    config: BenchTrainingConfig,
    trainees: dict[str, Trainee],
    every: int,
    T: int,
    device: torch.device,
) -> dict[str, Any]:
    """All models at one length, in turns. A model that runs out of memory is left out and named."""
    samples: dict[str, list[float]] = {}
    first: dict[str, float] = {}
    peaks: dict[str, int] = {}
    missing: dict[str, str] = {}

    def batch() -> Tensor:
        return torch.randint(config.vocab_size, (config.tokens // T, T), device=device)

    def turn(name: str, steps: int) -> float:
        """Seconds per step."""
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(steps):
            trainees[name].step(batch())
        synchronize(device)
        return (time.perf_counter() - begin) / steps

    torch.compiler.reset()  # each length is compiled for itself, as a run of that length is
    for name, trainee in trainees.items():
        trainee.recompute(every)
        try:
            first[name] = turn(name, 1)
            peaks[name] = peak_bytes(trainee, lambda name=name: turn(name, 1))
            samples[name] = []
        except torch.OutOfMemoryError:
            missing[name] = "out of memory"
            trainee.optimizer.zero_grad()
            torch.cuda.empty_cache()
    for _ in range(config.repeats):
        for name, taken in samples.items():
            taken.append(config.tokens / turn(name, config.steps))
    contenders = {
        name: facts_of(trainees[name], taken, T, peaks[name], first[name], device)
        for name, taken in samples.items()
    }
    return {"case": case_name(every, T), "recompute": every, "tokens": T,
            "rows": config.tokens // T, "contenders": contenders, "missing": missing}  # fmt: skip


def facts_of(
    trainee: Trainee, taken: list[float], T: int, peak: int, first: float, device: torch.device
) -> dict[str, Any]:
    speed = statistics.median(taken)
    facts: dict[str, Any] = {
        "tokens_per_s": speed,
        "slowest": min(taken),
        "fastest": max(taken),
        "turns": taken,
        "first_step_seconds": first,
        "held_gib": trainee.bytes() / GIB,
        "peak_gib": peak / GIB,
    }
    if device.type == "cuda" and (most := peak_flops(torch.cuda.get_device_name(device))):
        facts["mfu"] = mfu(speed, trainee.rival.flops(trainee.model, T), most)
    return facts


def peak_bytes(trainee: Trainee, run: Callable[[], object]) -> int:
    """Most memory in use during a step, without what the other models hold meanwhile."""
    if trainee.device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    others = torch.cuda.memory_allocated() - trainee.bytes()
    run()
    return torch.cuda.max_memory_allocated() - others


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def summary(row: dict[str, Any]) -> str:
    parts = [
        f"{name} {facts['tokens_per_s'] / 1e3:.1f} K tokens/s, {facts['peak_gib']:.1f} GiB"
        for name, facts in row["contenders"].items()
    ]
    parts += [f"{name} {reason}" for name, reason in row["missing"].items()]
    return f"{row['case']}: {'; '.join(parts)}"


def training_table(document: dict[str, Any]) -> str:
    """Thousands of tokens per second: the median and the spread; how many times ours the rivals."""
    top = ["", "model", "K tokens/s", "spread", "ours ×", "MFU", "peak GiB", "held GiB", "first s"]
    lines = [top]
    for row in document["rows"]:
        ours = row["contenders"].get("gsa")
        for name, facts in row["contenders"].items():
            low, high = facts["slowest"] / 1e3, facts["fastest"] / 1e3
            ratio = ours["tokens_per_s"] / facts["tokens_per_s"] if ours else None
            lines.append(
                [row["case"], name, f"{facts['tokens_per_s'] / 1e3:.2f}", f"{low:.2f}-{high:.2f}",
                 "–" if ratio is None else f"{ratio:.2f}",
                 f"{facts['mfu']:.1%}" if "mfu" in facts else "–", f"{facts['peak_gib']:.1f}",
                 f"{facts['held_gib']:.1f}", f"{facts['first_step_seconds']:.1f}"]
            )  # fmt: skip
        lines += [[row["case"], name, reason, *[""] * 6] for name, reason in row["missing"].items()]
    left: Sequence[str] = document["not_run"]
    return aligned(lines) + (f"\nnot run: {'; '.join(left)}" if left else "")
