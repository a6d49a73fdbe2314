"""The model as one step reads it: weights that share an input laid out one below the other."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gsa.layers.gate import StaticGate
from gsa.layers.in_sight import NAMES
from gsa.layers.mixer import State
from gsa.layers.projections import is_linear
from gsa.layers.ring import from_ring, to_ring
from gsa.layers.slot_attention import GatedSlotAttention
from gsa.layers.softmax_attention import SoftmaxAttention
from gsa.layers.token_layout import TokenLayout


class StepBlock(nn.Module):
    """A block for one token of each row: four matrix products, whatever is projected.

    The products of q, k, v, gate and output gate are one, those of the MLP's gate and up another;
    their weights are copies. All else is the block's own.

    Args:
        block: a `GSABlock`; ValueError unless its linear layers are plain.
        log_bound: what its forget gates stay above, from `GSAModel.log_bounds`.
    """

    inputs: Tensor | None
    inputs_bias: Tensor | None
    gate_up: Tensor

    def __init__(self, block: Any, log_bound: Tensor | None = None):
        super().__init__()
        self.bound = () if log_bound is None else (log_bound.detach(),)
        self.attn_norm, self.attn, self.mlp_norm = block.attn_norm, block.attn, block.mlp_norm
        self.down_proj = _plain(block.mlp.down_proj)
        _plain(block.attn.o_proj)
        layers = {name: getattr(block.attn, f"{name}_proj", None) for name in "qkvfg"}
        layers = {name: layer for name, layer in layers.items() if layer is not None}
        static = isinstance(layers.get("f"), StaticGate)
        self.static_gate = layers.pop("f") if static else None
        self.widths = {name: _plain(layer).out_features for name, layer in layers.items()}
        weights = [layer.weight.detach() for layer in layers.values()]
        self.register_buffer("inputs", torch.cat(weights) if weights else None)
        self.register_buffer("inputs_bias", joined_biases(layers))
        both = (block.mlp.gate_proj, block.mlp.up_proj)
        self.register_buffer("gate_up", torch.cat([_plain(x).weight.detach() for x in both]))

    def forward(self, x_P1D: Tensor, layout: TokenLayout, state: State) -> Tensor:
        """One token of each row [P, 1, D]; writes into the tensors of `state`."""
        h = self.attn_norm(x_P1D)
        projected = {}
        if self.inputs is not None:
            parts = F.linear(h, self.inputs, self.inputs_bias).split([*self.widths.values()], -1)
            projected = dict(zip(self.widths, parts, strict=True))
        if self.static_gate is not None:
            projected["f"] = self.static_gate(h)
        x_P1D = x_P1D + self.attn.step_(h, projected, layout, state, *self.bound)
        gate, up = F.linear(self.mlp_norm(x_P1D), self.gate_up).chunk(2, -1)
        return x_P1D + self.down_proj(F.silu(gate) * up)


class Head(nn.Module):
    """Logits [P, W] of what the last block returns, [P, 1, D]: the model's norm and head."""

    def __init__(self, model: Any):
        super().__init__()
        self.norm, self.lm_head = model.model.norm, model.lm_head

    def forward(self, x_P1D: Tensor) -> Tensor:
        return self.lm_head(self.norm(x_P1D))[:, 0]


def _plain(layer: Any) -> nn.Linear:
    if not is_linear(layer):
        raise ValueError(
            f"model: expected plain linear layers, got {type(layer).__name__}; merge adapters "
            "into the weights first (PEFT: model.merge_and_unload()), or use generate()"
        )
    return layer


def joined_biases(layers: Mapping[str, nn.Module]) -> Tensor | None:
    """One bias for all, 0 where a layer has none; None if none has one."""
    plain = [_plain(layer) for layer in layers.values()]
    if all(layer.bias is None for layer in plain):
        return None
    biases = [x.weight.new_zeros(x.out_features) if x.bias is None else x.bias for x in plain]
    return torch.cat(biases).detach()


class StatePool:
    """The states of P rows at addresses that stay, one set of tensors per layer.

    Args:
        layers: mixers of the model.
        rows: P.
        capacity: tokens that softmax layers without a window can hold.
    """

    def __init__(self, layers: list[Any], rows: int, capacity: int):
        self._mixers, self.rows, self.capacity = layers, rows, capacity
        self.layers = [mixer.empty_state(rows, capacity) for mixer in layers]

    @property
    def is_bounded(self) -> bool:
        """Whether some layer keeps every token, so that texts longer than capacity do not fit."""
        return any(
            isinstance(mixer, SoftmaxAttention) and mixer.options.window_size is None
            for mixer in self._mixers
        )

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """ValueError unless these are all tensors of a row's state, in their shapes and dtypes."""
        left = dict(tensors)
        for place, pool in enumerate(self.layers):
            prefix = f"layers.{place}."
            for name, like in pool.items():
                _check_tensor(prefix + name, like, left.pop(prefix + name, None))
        if left:
            raise ValueError(f"state: expected no tensor {sorted(left)[0]!r} for this model")

    def put(self, row: int, tensors: Mapping[str, Tensor]) -> None:
        """Gives a row a state that was checked: that of the first token if there are no tensors."""
        for place, (mixer, pool) in enumerate(zip(self._mixers, self.layers, strict=True)):
            one, prefix = mixer.empty_state(1, self.capacity), f"layers.{place}."
            state = {name: tensors[prefix + name] for name in one if tensors}
            if state:
                if "positions" in one:
                    to_ring(state, one)
                one |= {name: tensor for name, tensor in state.items() if name not in NAMES}
            for name, tensor in pool.items():
                tensor[row].copy_(one[name][0])

    def take(self, row: int) -> dict[str, Tensor]:
        """A copy of a row's state, as a forward pass would return it."""
        taken = {}
        for place, (mixer, pool) in enumerate(zip(self._mixers, self.layers, strict=True)):
            state = {name: tensor[row : row + 1].clone() for name, tensor in pool.items()}
            if "positions" in state:
                slots = isinstance(mixer, GatedSlotAttention)
                window = mixer.options.window_branch if slots else mixer.options.window_size
                state |= from_ring(state, window)
            taken |= {f"layers.{place}.{name}": tensor for name, tensor in state.items()}
        return taken


def _check_tensor(name: str, pool: Tensor, got: Tensor | None) -> None:
    """ValueError unless `got` is what a row of `pool` holds; keys and values may be any number."""
    shape, found = [1, *pool.shape[1:]], None if got is None else list(got.shape)
    if name.rpartition(".")[2] in NAMES:
        shape[1] = -1
        if found is not None and len(found) > 1:
            found[1] = -1
    if found != shape or got is None or got.dtype != pool.dtype:
        raise ValueError(
            f"state: expected {name} of shape {shape} and {pool.dtype}, got "
            f"{found} {'' if got is None else got.dtype}; made by another version, or damaged?"
        )
