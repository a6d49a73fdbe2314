"""Rotary position embedding, with the two scalings that Llama-family models use."""

import math

import torch
from torch import Tensor

SCALING_KEYS = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
}
"""The numbers that each kind of rotation is scaled by."""

ROPE_TYPES = tuple(SCALING_KEYS)


def rope_frequencies(width: int, theta: float, scaling: dict | None, device) -> Tensor:
    """Rotation per position of each of the width/2 pairs, in radians: fp32 [width/2].

    theta^(-2i/width), then by `scaling["rope_type"]`: "linear" divides by factor; "llama3" divides
    the slow rotations by factor, keeps the fast ones and blends between (wavelengths measured
    against original_max_position_embeddings / {low,high}_freq_factor).
    """
    exponent = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    frequency = 1 / theta**exponent  # rounded as transformers does it, bit for bit
    kind = "default" if scaling is None else scaling["rope_type"]
    if kind == "default":
        return frequency
    assert scaling is not None
    if kind == "linear":
        return frequency / scaling["factor"]
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi / frequency)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequency + (1 - keep) * frequency / scaling["factor"]


def rotate(x_BTHK: Tensor, positions: Tensor, theta: float, scaling: dict | None) -> Tensor:
    """Rotates each pair (x_i, x_{i+K/2}) by position · frequency_i; dtype is kept.

    Args:
        positions: int64 [B, T] or [1, T]. -1 (padding) is rotated like any other number.
    """
    K = x_BTHK.shape[-1]
    frequency = rope_frequencies(K, theta, scaling, x_BTHK.device)
    angle = positions[..., None].to(torch.float32) * frequency
    cos, sin = angle.cos()[:, :, None], angle.sin()[:, :, None]
    first, second = x_BTHK[..., : K // 2], x_BTHK[..., K // 2 :]
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return rotated.to(x_BTHK.dtype)
