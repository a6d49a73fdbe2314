"""Published weights: the names of September 2024 become today's, and nothing is lost on the way."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from safetensors import safe_open
from torch import Tensor
from transformers.utils import logging

_RENAMED = (
    (re.compile(r"(layers\.\d+\.)attn\.norm\."), r"\1attn_norm."),
    (re.compile(r"(layers\.\d+\.)mlp\.norm\."), r"\1mlp_norm."),
)
_GATE = re.compile(r"layers\.\d+\.mlp\.gate_proj\.weight$")


@contextmanager
def without_bars() -> Iterator[None]:
    """No progress bars of transformers within, where loading is a detail of something else."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def is_old_layout(names: Iterable[str]) -> bool:
    """Whether the weights carry the names of September 2024: pre-norms inside attn and mlp."""
    return any(pattern.search(name) for name in names for pattern, _ in _RENAMED)


def to_new_layout(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the pre-norms and splits each `mlp.gate_proj` [2F, D] into gate (first) and up."""
    converted: dict[str, Tensor] = {}
    for old_name, tensor in weights.items():
        name = old_name
        for pattern, replacement in _RENAMED:
            name = pattern.sub(replacement, name)
        if name != old_name and name in weights:
            raise ValueError(f"{old_name}: expected this or {name}, its name since 2025, got both")
        up_name = name.replace("gate_proj", "up_proj")
        if _GATE.search(name) and up_name not in weights:
            if tensor.shape[0] % 2:
                raise ValueError(
                    f"{name}: expected gate and up stacked in an even number of rows, got "
                    f"{list(tensor.shape)}"
                )
            half = tensor.shape[0] // 2
            converted[name], converted[up_name] = tensor[:half], tensor[half:]
        else:
            converted[name] = tensor
    return converted


def read_names(files: Iterable[str]) -> list[str]:
    """The names of all tensors in safetensors files."""
    names: list[str] = []
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names.extend(opened.keys())
    return names


def read_weights(files: Iterable[str]) -> dict[str, Tensor]:
    """All tensors of safetensors files, memory-mapped."""
    weights: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            weights.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return weights


def check_loaded(where: object, info: dict, *, allowed: tuple[str, ...] = ()) -> None:
    """Raises unless every weight found its place and every place its weight.

    Args:
        where: the checkpoint, for the message.
        info: what transformers reports: missing_keys, unexpected_keys, mismatched_keys.
        allowed: prefixes of weights that may be left over.
    """
    problems = [
        f"no place in the model for {name}"
        for name in sorted(info["unexpected_keys"])
        if not any(name.startswith(prefix) for prefix in allowed)
    ]
    problems += [f"no weight in the checkpoint for {name}" for name in sorted(info["missing_keys"])]
    problems += [
        f"{name} has shape {list(came)} where the model has {list(wanted)}"
        for name, came, wanted in sorted(info["mismatched_keys"])
    ]
    if problems:
        raise ValueError(
            f"{where}: expected weights that fit the config, got: {'; '.join(problems)}. Load it "
            "with the config it was saved with"
        )
