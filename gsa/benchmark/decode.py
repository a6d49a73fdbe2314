"""`gsa bench decode`: milliseconds per token and prefill of models of equal size on one device."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from gsa.benchmark.budget import OutOfTimeError, time_limit
from gsa.benchmark.decoders import Contender, clocked, contender
from gsa.benchmark.device import bench_device
from gsa.benchmark.language_models import (
    Architectures,
    Recipes,
    check_contenders,
    recipe_keys,
    rival,
)
from gsa.benchmark.results import Results, check_out
from gsa.benchmark.tables import aligned
from gsa.training.environment import environment

GIB = 1 << 30
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class BenchDecodeConfig:
    arch: tuple[str, ...] = ("gsa", "transformer++")
    """Architectures as gsa train knows them: gsa, abc, gla, ...; but transformer++ is transformers'
    Llama with a static cache, own-transformer++ ours, and fla that library's own GSA model."""
    size: str = "1.3b"
    """The recipe whose model the others equal."""
    vocab_size: int = 32000
    """Words."""
    layers: int = 0
    """Blocks, for a smaller model of the same kind; 0 for the recipe's."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Of the weights."""
    prefix: int = 2048
    """Tokens that every row has read before it writes."""
    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)
    """Tokens to write in one row; 0 alone for none of these cases."""
    batches: tuple[int, ...] = (1, 8, 64, 256)
    """Rows that write at once; 0 alone for none of these cases."""
    batch_tokens: int = 256
    """Tokens that each of them writes."""
    prefills: tuple[int, ...] = (2048, 16384, 131072)
    """Tokens of one row to read; 0 alone for none of these cases."""
    repeats: int = 3
    """Times each prefill and each batch is measured; the median counts. Lengths once."""
    eager: bool = False
    """Do not compile the steps; on a CPU they never are."""
    device: str = "auto"
    """auto, cuda or cpu."""
    budget_seconds: float = 0.0
    """What would begin later than this is left out; 0 for no limit."""
    out: str = ""
    """JSON file to write; empty for none."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "prefix", "batch_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("lengths", "batches", "prefills"):
            if any(n < 0 for n in getattr(self, name)):
                raise ValueError(
                    f"{name}: expected numbers above 0, or 0, got {getattr(self, name)}"
                )

    def keys(self, recipes: Recipes) -> dict[str, Any]:
        """Of GSAConfig, of the model that others equal; ValueError if no recipe has that name."""
        keys = recipe_keys(recipes, self.size, self.vocab_size, self.layers)
        longest = max(self.prefix + max(*self.lengths, self.batch_tokens), *self.prefills)
        return keys | {"max_position_embeddings": longest + 64}

    def cases(self) -> list[tuple[str, int]]:
        """(kind, its number): lengths, batches, prefills."""
        kinds = {"length": self.lengths, "batch": self.batches, "prefill": self.prefills}
        return [(kind, number) for kind, numbers in kinds.items() for number in numbers if number]


def bench_decode(
    config: BenchDecodeConfig, recipes: Recipes, architectures: Architectures
) -> dict[str, Any]:
    """Let models of equal size read and write, and report milliseconds per token and memory.

    Times are wall times of whole runs, greedy, without an end. Models take turns within a case and
    have random weights. Prints progress and tables.

    Args:
        recipes: keys of GSAConfig by the name of a recipe.
        architectures: by name, from such keys to those of a rival of equal size.
    """
    check_out(config.out)
    check_contenders("arch", config.arch, architectures)
    device = torch.device(bench_device(config.device))
    keys, compile = config.keys(recipes), device.type == "cuda" and not config.eager
    dtype = DTYPES[config.dtype]
    longest = keys["max_position_embeddings"]
    made = {
        name: contender(
            rival(name, keys, architectures, longest=longest), device, dtype, compile=compile
        )
        for name in config.arch
    }
    head = {
        "benchmark": "decode",
        "environment": environment(device),
        "config": asdict(config),
        "notes": [f"{name}: {one.note}" for name, one in made.items()],
    }
    results = Results(config.out, head, [case_name(*case) for case in config.cases()])
    bandwidth = copy_bandwidth(device)
    results.put("copy_bytes_per_second", bandwidth)
    sizes = {name: sum(p.numel() for p in one.model.parameters()) for name, one in made.items()}
    results.put("parameters", sizes)
    for name, number in sizes.items():
        print(f"{name}: {number / 1e6:.1f}M parameters", flush=True)
    limit = config.budget_seconds or float("inf")
    begin = time.monotonic()
    for kind, number in config.cases():
        try:
            with time_limit(max(limit - (time.monotonic() - begin), 0.001)):
                row = measure_case(config, made, kind, number, device, bandwidth)
        except OutOfTimeError:
            break
        results.reached(case_name(kind, number), "rows", row)
        print(summary(row), flush=True)
    document = results.finish()
    print("\n" + decode_table(document))
    return document


def case_name(kind: str, number: int) -> str:
    units = {"length": "tokens in a row", "batch": "rows", "prefill": "tokens read"}
    return f"{number} {units[kind]}"


def measure_case(
    config: BenchDecodeConfig,
    made: Mapping[str, Contender],
    kind: str,
    number: int,
    device: torch.device,
    bandwidth: float,
) -> dict[str, Any]:
    """One case of every model; one that runs out of memory is left out and named."""
    facts: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    for name, one in made.items():
        try:
            if kind == "prefill":
                facts[name] = measure_prefill(one, number, config.repeats, device)
                continue
            rows, tokens = (1, number) if kind == "length" else (number, config.batch_tokens)
            repeats = 1 if kind == "length" else config.repeats
            facts[name] = measure_steps(one, rows, config.prefix, tokens, repeats, device)
            if name == "gsa":
                floor = step_bytes(one.model, rows) / bandwidth * 1e3
                facts[name]["floor_ms"] = floor
                facts[name]["of_floor"] = floor / facts[name]["ms_per_token"]
        except torch.OutOfMemoryError:
            missing[name] = "out of memory"
        finally:
            one.end()
            clear(device)
    return {"case": case_name(kind, number), "kind": kind, "number": number,
            "contenders": facts, "missing": missing}  # fmt: skip


def measure_steps(
    one: Contender, rows: int, prefix: int, tokens: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    """Milliseconds per step; the seconds until it was ready, prefix and compilation included."""
    tokens = min(tokens, one.most_tokens or tokens)
    held = start_peak(device)
    first, turns = 0.0, []
    for turn in range(repeats):
        ready = clocked(lambda: one.begin(rows, prefix, tokens), device)
        first = first if turn else ready
        turns.append(clocked(lambda: one.decode(tokens), device))
    seconds = statistics.median(turns)
    return {
        "ms_per_token": seconds / tokens * 1e3,
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_s": rows * tokens / seconds,
        "turns": turns,
        "ready_seconds": first,
        "peak_gib": read_peak(device, held),
    }


def measure_prefill(
    one: Contender, tokens: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    """Tokens per second, and the most memory beyond what was held before."""
    first = clocked(lambda: one.prefill(tokens), device)
    held = start_peak(device)
    turns = [clocked(lambda: one.prefill(tokens), device) for _ in range(repeats)]
    seconds = statistics.median(turns)
    return {
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "turns": turns,
        "ready_seconds": first,
        "peak_gib": read_peak(device, held),
    }


def step_bytes(model: Any, rows: int) -> int:
    """What a step of ours must move: weights once, every row's memory in and out."""
    sizes = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    if not model.config.tie_word_embeddings:
        del sizes["model.embeddings.weight"]  # of which a row is read
    state = [block.attn.empty_state(1, 1) for block in model.model.layers]
    memory = sum(t.numel() * t.element_size() for one in state for t in one.values())
    return sum(sizes.values()) + 2 * rows * memory


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read plus written, of a large copy."""
    size = 1 << (30 if device.type == "cuda" else 26)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    turns = [clocked(lambda: run_many(lambda: target.copy_(source), 5), device) for _ in range(4)]
    return 5 * 2 * size / min(turns[1:])


def run_many(run: Callable[[], object], count: int) -> None:
    for _ in range(count):
        run()


def clear(device: torch.device) -> None:
    """Gives a GPU's memory back that nobody holds any more."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def start_peak(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def read_peak(device: torch.device, held: int) -> float:
    """GiB beyond `held`; 0 on a CPU."""
    return (torch.cuda.max_memory_allocated() - held) / GIB if device.type == "cuda" else 0.0


def summary(row: dict[str, Any]) -> str:
    unit = "tokens_per_s" if row["kind"] == "prefill" else "ms_per_token"
    parts = [
        f"{name} {facts[unit]:.4g} {'tokens/s' if unit == 'tokens_per_s' else 'ms'}"
        for name, facts in row["contenders"].items()
    ]
    parts += [f"{name} {reason}" for name, reason in row["missing"].items()]
    return f"{row['case']}: {'; '.join(parts)}"


def decode_table(document: dict[str, Any]) -> str:
    """Milliseconds per token, tokens per second, and how many times longer the rivals take."""
    lines = [
        ["", "model", "ms", "tokens/s", "ours ×", "of floor", "seconds", "peak GiB", "ready s"]
    ]
    for row in document["rows"]:
        ours = row["contenders"].get("gsa")
        for name, facts in row["contenders"].items():
            ratio = facts["seconds"] / facts["tokens"]
            ratio = None if ours is None else ratio / (ours["seconds"] / ours["tokens"])
            lines.append(
                [row["case"], name,
                 f"{facts['ms_per_token']:.3f}" if "ms_per_token" in facts else "–",
                 f"{facts['tokens_per_s']:.1f}", "–" if ratio is None else f"{ratio:.2f}",
                 f"{facts['of_floor']:.1%}" if "of_floor" in facts else "–",
                 f"{facts['seconds']:.2f}", f"{facts['peak_gib']:.2f}",
                 f"{facts['ready_seconds']:.1f}"]
            )  # fmt: skip
        lines += [[row["case"], name, why, *[""] * 6] for name, why in row["missing"].items()]
    left = document["not_run"]
    return aligned(lines) + (f"\nnot run: {'; '.join(left)}" if left else "")
