"""What turns the scores of the slots into read weights (paper Table 2), and its gradient."""

import torch
from torch import Tensor
from torch.nn import functional as F

from gsa.ops.types import SlotActivation


def activate(score: Tensor, slot_activation: SlotActivation) -> Tensor:
    """Turns scores over the last axis (slots) into read weights."""
    if slot_activation == "softmax":
        return score.softmax(-1)
    if slot_activation == "swish":
        return F.silu(score)
    if slot_activation == "relu":
        return score.relu()
    if slot_activation == "relu2":
        return score.relu().square()
    return score


def activation_backward(
    score: Tensor, weight: Tensor, d_weight: Tensor, slot_activation: SlotActivation
) -> Tensor:
    """Gradient of the scores from that of the read weights."""
    if slot_activation == "softmax":
        return torch.ops.aten._softmax_backward_data(d_weight, weight, -1, weight.dtype)
    if slot_activation == "swish":
        gate = score.sigmoid()
        return d_weight * gate * (1 + score * (1 - gate))
    if slot_activation == "relu":
        return d_weight * (score > 0)
    if slot_activation == "relu2":
        return d_weight * 2 * score.relu()
    return d_weight
