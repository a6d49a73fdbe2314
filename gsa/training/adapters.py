"""Low-rank adapters on token mixers' projections: what frozen ones learn besides.

    adapt(model, rank=8, seed=0)            # q, k, v, o: only lora_down and lora_up are trained
    tensors = merged(saved_tensors(model))  # plain weights again

Hu et al. 2021, "LoRA", arXiv 2106.09685.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
DOWN, UP = "lora_down", "lora_up"
SCALE = 2.0
"""On what an adapter adds: LoRA's alpha is twice the rank."""


class AdaptedLinear(nn.Linear):
    """y = W x + b + SCALE · U D x: a layer's own weight and bias, frozen, and an adapter.

    lora_down: [rank, in], random. lora_up: [out, rank], zero at first, so that nothing changes.
    """

    def __init__(self, layer: nn.Linear, rank: int, generator: torch.Generator):
        nn.Module.__init__(self)  # nothing is made anew
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight.requires_grad_(False), layer.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        down = torch.randn(rank, self.in_features, generator=generator) * self.in_features**-0.5
        self.lora_down = nn.Parameter(down.to(self.weight))
        self.lora_up = nn.Parameter(self.weight.new_zeros(self.out_features, rank))

    def forward(self, input: Tensor) -> Tensor:
        own = F.linear(input, self.weight, self.bias)
        return own + SCALE * F.linear(F.linear(input, self.lora_down), self.lora_up)


def adapt(model: Any, rank: int, seed: int) -> None:
    """Gives every token mixer's projections adapters of that rank, and freezes what they were."""
    generator = torch.Generator().manual_seed(seed)
    for block in model.model.layers:
        for name in PROJECTIONS:
            layer = getattr(block.attn, name)
            setattr(block.attn, name, AdaptedLinear(layer, rank, generator))


def is_adapted(names: Iterable[str]) -> bool:
    """Whether there are adapters among weights of such names."""
    return any(name.endswith(f".{UP}") for name in names)


def merged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by name with their adapters added, W + SCALE · U D, and none beside them.

    Added in fp32, and rounded once to the weight's dtype.
    """
    plain = {name: t for name, t in tensors.items() if not name.endswith((f".{DOWN}", f".{UP}"))}
    for name in plain:
        owner = name.removesuffix("weight")
        if f"{owner}{UP}" in tensors and name.endswith(".weight"):
            up, down = (tensors[f"{owner}{part}"].detach().float() for part in (UP, DOWN))
            weight = plain[name].detach()
            plain[name] = (weight.float() + SCALE * (up @ down)).to(weight.dtype)
    return plain
