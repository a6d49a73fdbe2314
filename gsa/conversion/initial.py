"""The weights a teacher does not have: each drawn from its own seed, so files do not matter."""

import copy
import zlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gsa.conversion.config import ConvertConfig
from gsa.conversion.student import Plan
from gsa.layers.feature_map import FeatureMap
from gsa.layers.gate import spread_logits
from gsa.layers.options import (
    LinearAttentionOptions,
    SlotAttentionOptions,
    SoftmaxAttentionOptions,
)

GATE = "attn.f_proj.weight"
GATE_BIASES = ("attn.f_proj.bias", "attn.f_out.bias")


def new_weight(name: str, plan: Plan, options: ConvertConfig, keys: Tensor | None) -> Tensor:
    """A new weight of the student, fp32.

    As in a model trained from scratch, but for a learned feature map, which starts as the identity,
    and gates as `options.gate_init` says.

    Args:
        keys: the layer's key projection [G·K, D], which only pooled gates ask for.
    """
    owner, _, parameter = name.rpartition(".")
    layer = int(name.split(".")[2])
    mixer = plan.config.mixer_options(layer)
    assert not isinstance(mixer, SoftmaxAttentionOptions)
    if options.gate_init == "pooled_keys" and name.endswith(GATE):
        assert keys is not None and isinstance(mixer, SlotAttentionOptions)
        return pooled_keys(keys, mixer)
    if options.gate_init == "spread" and name.endswith(GATE_BIASES):
        linear = isinstance(mixer, LinearAttentionOptions)
        return spread_logits(mixer.kv_heads, mixer.key_width if linear else mixer.slots).flatten()
    module = plan.model.get_submodule(owner)
    if isinstance(plan.model.get_submodule(owner.rpartition(".")[0]), FeatureMap):
        return torch.eye(mixer.key_width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{options.seed} {name}".encode()))
        real = _on_cpu(module)
        plan.model._init_weights(real)
    return real.get_parameter(parameter).detach().float()


def pooled_keys(keys: Tensor, mixer: SlotAttentionOptions) -> Tensor:
    """Gate weights [G·M, D]: in each head, means over M stretches of its K rows of keys."""
    keys_GDK = keys.float().unflatten(0, (mixer.kv_heads, mixer.key_width)).transpose(1, 2)
    return F.adaptive_avg_pool1d(keys_GDK, mixer.slots).transpose(1, 2).flatten(0, 1)


def check_new(plan: Plan, options: ConvertConfig) -> None:
    """ValueError for a branch beside no slots, or pooled gates that make slots the same."""
    layers = plan.config.num_hidden_layers
    if options.window and len(options.keep_layers) == layers:
        raise ValueError(
            f"window: expected 0 with every layer kept (there are no slots to stand beside), got "
            f"{options.window}"
        )
    width = plan.config.head_dim
    slots = options.slots or 0
    if options.gate_init == "pooled_keys" and width is not None and slots > width:
        raise ValueError(
            f"slots: expected at most {width}, the width of a head, with gate_init pooled_keys "
            f"(more would be equal pairwise), got {slots}"
        )


def _on_cpu(module: nn.Module) -> nn.Module:
    """A copy of a module of the meta device with storage, not yet filled."""
    return copy.deepcopy(module).to_empty(device="cpu")
