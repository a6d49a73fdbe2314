"""The student that follows from a teacher: its configuration, and where each weight comes from."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from gsa.conversion.config import TARGETS, ConvertConfig
from gsa.conversion.teacher import DTYPES, EMBEDDINGS, Teacher
from gsa.layers.options import check_choice
from gsa.layers.rope import ROPE_TYPES, SCALING_KEYS
from gsa.model import GSAConfig, GSAForCausalLM


@dataclass(frozen=True)
class Plan:
    """Every weight of the student, once.

    copied: the student's name to the teacher's.
    new: names of weights the teacher does not have.
    model: the student without storage, on the meta device.
    """

    config: GSAConfig
    copied: dict[str, str]
    new: tuple[str, ...]
    model: GSAForCausalLM


def student_config(teacher: Teacher, options: ConvertConfig) -> GSAConfig:
    """The student's configuration.

    ValueError, naming the key, for what a GSA model has no place for, or keep_layers that the
    teacher does not have.
    """
    theirs = teacher.config
    _check_teacher(theirs)
    layers = theirs.num_hidden_layers
    absent = [layer for layer in options.keep_layers if not 0 <= layer < layers]
    if absent:
        raise ValueError(
            f"keep_layers: expected numbers from 0 to {layers - 1} (the teacher has {layers} "
            f"layers), got {', '.join(map(str, absent))}"
        )
    heads, rope = _heads(teacher), rope_keys(theirs)
    return GSAConfig(
        **heads,
        **(rope if options.rope else {}),
        **_window(options, rope),
        **_mixer(options),
        vocab_size=theirs.vocab_size,
        hidden_size=theirs.hidden_size,
        num_hidden_layers=layers,
        norm_eps=theirs.rms_norm_eps,
        intermediate_size=theirs.intermediate_size,
        attn=_kept(teacher, options.keep_layers, heads | rope),
        max_position_embeddings=theirs.max_position_embeddings,
        initializer_range=theirs.initializer_range,
        tie_word_embeddings=theirs.tie_word_embeddings,
        pad_token_id=theirs.pad_token_id,
        bos_token_id=theirs.bos_token_id,
        eos_token_id=theirs.eos_token_id,
        dtype=student_dtype(teacher),
    )


def make_plan(teacher: Teacher, config: GSAConfig) -> Plan:
    """Where each of the student's weights comes from.

    ValueError unless every weight of the teacher has its place and the shape of that place.
    """
    with torch.device("meta"):
        model = GSAForCausalLM(config)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    sources = {name: teacher.family.to_teacher(name) for name in shapes}
    copied = {name: source for name, source in sources.items() if source is not None}
    new = tuple(name for name, source in sources.items() if source is None)
    came = teacher.weights
    problems = [
        f"no weight in the files for {source}" for source in copied.values() if source not in came
    ]
    problems += [f"no place for {name}" for name in sorted(set(came) - set(copied.values()))]
    problems += [
        f"{source} has shape {list(came[source].shape)} where the config says {list(shapes[name])}"
        for name, source in copied.items()
        if source in came and came[source].shape != shapes[name]
    ]
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ValueError(
            f"teacher: expected the weights of a {teacher.family.model_type} model that fit its "
            f"config.json, got: {'; '.join(problems[:6])}{more}. Take config and weights from the "
            "same place; if they are, such a model cannot be converted"
        )
    return Plan(config, copied, new, model)


def student_dtype(teacher: Teacher) -> str:
    """The dtype of the teacher's embeddings, as torch calls it; new weights take it."""
    entry = teacher.weights.get(EMBEDDINGS)
    return "float32" if entry is None else DTYPES[entry.dtype]


def _check_teacher(theirs: Any) -> None:
    for name, wanted in (("attention_bias", False), ("mlp_bias", False)):
        if getattr(theirs, name, wanted) != wanted:
            raise ValueError(
                f"teacher: {name}: expected {wanted}, got {getattr(theirs, name)!r}: a GSA model "
                "has no bias there (o_proj, MLP), so this teacher cannot be converted"
            )
    if theirs.hidden_act not in ("silu", "swish"):
        raise ValueError(
            f"teacher: hidden_act: expected silu, got {theirs.hidden_act!r}: a GSA model's MLP has "
            "no other, so this teacher cannot be converted"
        )


def _heads(teacher: Teacher) -> dict[str, Any]:
    """What converted layers and kept layers have in common, as keys of either."""
    theirs, family = teacher.config, teacher.family
    width = getattr(theirs, "head_dim", None)
    if width is None:
        width = theirs.hidden_size // theirs.num_attention_heads
    return {
        "num_heads": theirs.num_attention_heads,
        "num_kv_heads": theirs.num_key_value_heads,
        "head_dim": width,
        "qkv_bias": family.has("model.layers.*.attn.q_proj.bias"),
        "qk_norm": family.has("model.layers.*.attn.q_norm.weight"),
    }


def rope_keys(theirs: Any) -> dict[str, Any]:
    """The teacher's rotation as keys of converted layers and kept layers."""
    given = dict(theirs.rope_parameters)
    kind = given.get("rope_type", "default")
    check_choice("teacher: rope_parameters['rope_type']", kind, ROPE_TYPES)
    part = given.get("partial_rotary_factor", 1.0)
    if part != 1.0:
        raise ValueError(f"teacher: partial_rotary_factor: expected 1 (whole heads), got {part}")
    given.setdefault("original_max_position_embeddings", theirs.max_position_embeddings)
    if kind == "yarn":
        given |= _yarn(given)
    scaling = {name: given[name] for name in sorted(SCALING_KEYS[kind])}
    return {
        "rope_theta": float(given["rope_theta"]),
        "rope_scaling": {"rope_type": kind} | scaling if scaling else None,
    }


def _yarn(given: dict[str, Any]) -> dict[str, float]:
    """What a yarn rotation takes where its config says nothing, as transformers has it."""
    if given.get("truncate", True) is not True or given.get("factor") is None:
        raise ValueError(
            "teacher: rope_parameters: expected a factor, and truncate true, with rope_type yarn, "
            f"got {given}"
        )
    factor = given["factor"]

    def stretch(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    one, all_pairs = given.get("mscale"), given.get("mscale_all_dim")
    attention = stretch(one) / stretch(all_pairs) if one and all_pairs else stretch(1)
    return {
        "beta_fast": given.get("beta_fast") or 32,
        "beta_slow": given.get("beta_slow") or 1,
        "attention_factor": given.get("attention_factor") or attention,
    }


def _mixer(options: ConvertConfig) -> dict[str, Any]:
    """Keys that the target and the options say; those of `options.model` come first."""
    keys = TARGETS[options.target].keys | {"feature_map": options.feature_map}
    if options.tau is not None:
        keys["gate_logit_normalizer"] = options.tau
    if options.slots is not None:
        keys |= {"num_slots": options.slots, "gate_bias": options.gate_init == "spread"}
    return keys | options.model


def _window(options: ConvertConfig, rope: dict[str, Any]) -> dict[str, Any]:
    """Keys of the softmax branch beside the slots."""
    if not options.window:
        return {}
    return {"window_branch": options.window} | {f"window_{key}": rope[key] for key in rope}


def _kept(teacher: Teacher, layers: Iterable[int], keys: dict[str, Any]) -> list | None:
    """GSAConfig's `attn`: the kept layers, one entry for each window among them."""
    by_window: dict[int | None, list[int]] = {}
    windows = teacher.family.layer_windows(teacher.config)
    for layer in sorted(layers):
        by_window.setdefault(windows[layer], []).append(layer)
    return [
        {"layers": chosen, "window_size": window} | keys for window, chosen in by_window.items()
    ] or None
