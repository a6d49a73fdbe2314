"""Rotary position embedding, with the scalings that Llama and Qwen models use."""

import math

import torch
from torch import Tensor

SCALING_KEYS = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "yarn": frozenset(
        {
            *("factor", "beta_fast", "beta_slow", "attention_factor"),
            "original_max_position_embeddings",
        }
    ),
}
"""The numbers that each kind of rotation is scaled by."""

ROPE_TYPES = tuple(SCALING_KEYS)


def rope_frequencies(width: int, theta: float, scaling: dict | None, device) -> Tensor:
    """Rotation per position of each of the width/2 pairs, in radians: fp32 [width/2].

    theta^(-2i/width), then by `scaling["rope_type"]`: "linear" divides by factor; "llama3" divides
    the slow rotations by factor, keeps the fast ones and blends between (wavelengths measured
    against original_max_position_embeddings / {low,high}_freq_factor); "yarn" blends evenly between
    the pairs that turn beta_fast and beta_slow times within original_max_position_embeddings.
    """
    exponent = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    # All is rounded as transformers does it, bit for bit.
    period = theta**exponent
    frequency = 1 / period
    kind = "default" if scaling is None else scaling["rope_type"]
    if kind == "default":
        return frequency
    assert scaling is not None
    if kind == "linear":
        return frequency / scaling["factor"]
    if kind == "yarn":
        keep = 1 - _slowness(width, theta, scaling, device)
        return 1 / (scaling["factor"] * period) * (1 - keep) + frequency * keep
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi / frequency)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequency + (1 - keep) * frequency / scaling["factor"]


def _slowness(width: int, theta: float, scaling: dict, device) -> Tensor:
    """yarn's ramp [width/2] from the last pair that turns beta_fast times, 0, to beta_slow, 1."""

    def pair(turns: float) -> float:
        length = scaling["original_max_position_embeddings"]
        return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair(scaling["beta_fast"])), 0)
    high = min(math.ceil(pair(scaling["beta_slow"])), width - 1)
    ramp = torch.arange(width // 2, dtype=torch.float32, device=device) - low
    return (ramp / (high - low if high != low else 0.001)).clamp(0, 1)


def rotate(x_BTHK: Tensor, positions: Tensor, theta: float, scaling: dict | None) -> Tensor:
    """Rotates each pair (x_i, x_{i+K/2}) by position · frequency_i; dtype is kept.

    With yarn the result is also multiplied by attention_factor.

    Args:
        positions: int64 [B, T] or [1, T]. -1 (padding) is rotated like any other number.
    """
    K = x_BTHK.shape[-1]
    frequency = rope_frequencies(K, theta, scaling, x_BTHK.device)
    angle = positions[..., None].to(torch.float32) * frequency
    cos, sin = angle.cos()[:, :, None], angle.sin()[:, :, None]
    if scaling is not None and "attention_factor" in scaling:
        cos, sin = cos * scaling["attention_factor"], sin * scaling["attention_factor"]
    first, second = x_BTHK[..., : K // 2], x_BTHK[..., K // 2 :]
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return rotated.to(x_BTHK.dtype)
