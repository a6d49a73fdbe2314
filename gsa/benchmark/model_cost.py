"""`gsa bench cost`: what models cost to train and to run, computed, not measured."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gsa
from gsa.benchmark.results import check_out, write_result
from gsa.benchmark.tables import aligned
from gsa.model import GSAConfig
from gsa.model.cost import (
    DEVICES,
    count_parameters,
    device_hours,
    flops_per_token,
    kv_cache_bytes,
    peak_flops,
    state_bytes,
    training_bytes,
)
from gsa.training.environment import commit


@dataclass(frozen=True, kw_only=True)
class CostConfig:
    models: tuple[str, ...] = ()
    """Recipes, model folders or their config.json; all recipes if none is given."""
    arch: tuple[str, ...] = ("gsa",)
    """Architectures to show each recipe as, of equal parameters: gsa, abc, gla, ...; all of them:
    all."""
    lengths: tuple[int, ...] = (2048, 16384, 131072)
    """Tokens per sequence; training hours count at the first."""
    vocab_size: int = 32000
    """Vocabulary of the recipes, which take theirs from the data."""
    tokens: float = 0.0
    """Also say how long training on so many tokens takes, such as 100e9; 0 for not."""
    device: str = "H100"
    """The GPU for that: H100, A100, ... or the whole name torch gives it."""
    devices: int = 1
    """How many of them."""
    mfu: float = 0.4
    """Share of their bf16 peak that training reaches; a guess of yours, no promise of ours."""
    out: str = ""
    """JSON file to write; empty for none."""

    def __post_init__(self) -> None:
        for name, value in (("lengths", min(self.lengths, default=0)), ("devices", self.devices)):
            if value < 1:
                raise ValueError(f"{name}: expected whole numbers of at least 1, got {value}")
        if not (math.isfinite(self.tokens) and self.tokens >= 0):
            raise ValueError(f"tokens: expected a finite number ≥ 0, got {self.tokens}")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu: expected a number above 0, at most 1, got {self.mfu}")
        if self.tokens and peak_flops(self.device) is None:
            known = ", ".join(device.name for device in DEVICES)
            raise ValueError(f"device: expected one of {known}, got {self.device!r}")


def bench_cost(
    config: CostConfig,
    recipes: Mapping[str, dict[str, Any]],
    architectures: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]],
) -> dict[str, Any]:
    """Compute parameters, FLOPs, state and training memory of models; hours with --tokens.

    Prints tables and returns (and writes) the document.

    Args:
        recipes: keys of GSAConfig by recipe.
        architectures: by name, from such keys to those of a rival of equal size.

    Raises:
        ValueError: an unknown architecture, a model that is neither a recipe nor a GSA config, or
            one that contradicts itself.
        OSError: `out` is something else, or cannot be written.
    """
    check_out(config.out)
    models = {}
    for name in dict.fromkeys(config.models or recipes):
        if name not in recipes:
            models[name] = read_config(name, list(recipes))
            continue
        for arch in chosen_architectures(config, list(architectures)):
            label = name if list(config.arch) == ["gsa"] else f"{name} {arch}"
            keys = architectures[arch](dict(recipes[name]))
            models[label] = GSAConfig(**{"vocab_size": config.vocab_size, **keys})
    document = {
        "benchmark": "cost",
        "gsa": gsa.__version__,
        "commit": commit(),
        "asked": asdict(config),
        "models": [model_facts(name, model, config) for name, model in models.items()],
    }
    print(cost_tables(document))
    if config.out:
        write_result(Path(config.out), document)
    return document


def chosen_architectures(config: CostConfig, known: list[str]) -> list[str]:
    """What `arch` asks for; ValueError for one that is not known."""
    if list(config.arch) == ["all"]:
        return known
    for name in config.arch:
        if name not in known:
            raise ValueError(f"arch: expected all, or some of {', '.join(known)}, got {name!r}")
    return list(dict.fromkeys(config.arch))


def read_config(name: str, recipes: Sequence[str] = ()) -> GSAConfig:
    """The configuration of a model folder, or in a JSON file. ValueError if there is none."""
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        known = ", ".join(recipes)
        raise ValueError(
            f"models: expected a recipe ({known}), a folder with config.json or such a file, got "
            f"{name!r}"
        )
    try:
        keys = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON ({error})") from error
    if not isinstance(keys, dict) or keys.get("model_type", "gsa") != "gsa":
        raise ValueError(f"{path}: expected the config of a model of type gsa")
    return GSAConfig.from_dict(keys)


def model_facts(name: str, model: GSAConfig, config: CostConfig) -> dict[str, Any]:
    """One model's row: plain numbers, in FLOPs, bytes and hours."""
    parameters = count_parameters(model)
    memory = training_bytes(parameters.total)
    flops = {tokens: flops_per_token(model, tokens) for tokens in config.lengths}
    facts: dict[str, Any] = {
        "model": name,
        "vocab_size": model.vocab_size,
        "parameters": asdict(parameters)
        | {"total": parameters.total, "non_embedding": parameters.non_embedding},
        "training_bytes": asdict(memory) | {"total": memory.total},
        "lengths": [
            {
                "tokens": tokens,
                "forward_flops": asdict(one) | {"total": one.forward},
                "forward_backward_flops": one.forward_backward,
                "state_bytes": state_bytes(model, tokens),
                "state_bytes_per_layer": state_bytes(model, tokens) / model.num_hidden_layers,
                "kv_cache_bytes": kv_cache_bytes(model, tokens),
            }
            for tokens, one in flops.items()
        ],
    }
    peak = peak_flops(config.device)
    if config.tokens and peak is not None:
        per_token = flops[config.lengths[0]].forward_backward
        hours = device_hours(config.tokens, per_token, peak, config.mfu)
        facts["training"] = {"device_hours": hours, "days": hours / 24 / config.devices}
    return facts


def cost_tables(document: dict[str, Any]) -> str:
    """Everything, in paragraphs."""
    rows, asked = document["models"], document["asked"]
    lengths = [short(tokens) for tokens in asked["lengths"]]
    sizes = [["", "parameters", "without embeddings", "vocabulary", "training GiB"]]
    for row in rows:
        found = row["parameters"]
        sizes.append(
            [
                row["model"],
                f"{found['total'] / 1e6:,.1f}M",
                f"{found['non_embedding'] / 1e6:,.1f}M",
                str(row["vocab_size"]),
                f"{row['training_bytes']['total'] / 2**30:.2f}",
            ]
        )
    parts = [
        "sizes; training: weights, gradients and AdamW in fp32, without activations",
        aligned(sizes),
        "GFLOPs per token, forward + backward, by sequence length",
        by_length(rows, lengths, lambda one: f"{one['forward_backward_flops'] / 1e9:.3f}"),
        "KiB of state per layer, the mean over layers",
        by_length(rows, lengths, lambda one: f"{one['state_bytes_per_layer'] / 2**10:,.0f}"),
        "MiB per sequence: state (fp32 memory) / keys and values of such a Transformer (bf16)",
        by_length(
            rows,
            lengths,
            lambda one: f"{one['state_bytes'] / 2**20:,.2f} / {one['kv_cache_bytes'] / 2**20:,.0f}",
        ),
    ]
    if asked["tokens"]:
        parts += [training_title(asked), training_table(rows)]
    return "\n".join(f"{part}\n" if place % 2 else part for place, part in enumerate(parts)).strip()


def by_length(
    rows: Sequence[dict[str, Any]], lengths: Sequence[str], cell: Callable[[dict[str, Any]], str]
) -> str:
    lines = [[row["model"], *(cell(one) for one in row["lengths"])] for row in rows]
    return aligned([["", *lengths], *lines])


def training_title(asked: dict[str, Any]) -> str:
    return (
        f"training on {asked['tokens'] / 1e9:,.4g}B tokens in rows of {asked['lengths'][0]}, by "
        f"{asked['devices']} × {asked['device']} if {asked['mfu']:.0%} of the bf16 peak is reached"
    )


def training_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [["", "GPU-hours", "days"]]
    for row in rows:
        found = row["training"]
        lines.append([row["model"], f"{found['device_hours']:,.1f}", f"{found['days']:,.2f}"])
    return aligned(lines)


def short(tokens: int) -> str:
    """2048 as 2K."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
