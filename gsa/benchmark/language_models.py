"""Language models of equal size that are trained beside each other, each with its loss."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gsa.model import GSAConfig, GSAForCausalLM
from gsa.model.cost import flops_per_token, mean_visible
from gsa.model.loss import IGNORE, next_token_loss_of_hidden

OWN = "own-"
"""Before an architecture's name where the name alone is another library's model."""
HEAD_WIDTH = 128
"""Of the Transformer's heads: what FlashAttention is fastest at."""


Recipes = Mapping[str, Mapping[str, Any]]
"""Keys of GSAConfig by the name of a recipe."""
Architectures = Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]
"""By name, from a recipe's keys to those of a rival of equal size."""


def contenders(architectures: Architectures) -> tuple[str, ...]:
    """The names of all models that are timed beside each other.

    An architecture's name is the model that gsa trains, but where another library's is known: then
    it is that one, and ours has OWN before it.
    """
    known = [name for name in architectures if name not in FOREIGN]
    ours = [OWN + name for name in architectures if name in FOREIGN]
    return (*known, *ours, *FOREIGN)


def check_contenders(field: str, names: Sequence[str], architectures: Architectures) -> None:
    """ValueError, naming the field of a config, for a name that is no contender's."""
    for name in names:
        if name not in contenders(architectures):
            known = ", ".join(contenders(architectures))
            raise ValueError(f"{field}: expected {known}, got {name!r}")


def recipe_keys(recipes: Recipes, size: str, vocab_size: int, layers: int) -> dict[str, Any]:
    """Keys of a recipe's model with so many words and, unless 0, layers; ValueError if unknown."""
    if size not in recipes:
        raise ValueError(f"size: expected {', '.join(recipes)}, got {size!r}")
    keys = dict(recipes[size]) | {"vocab_size": vocab_size}
    return keys | ({"num_hidden_layers": layers} if layers else {})


class NotInstalledError(ValueError):
    """A contender is another library's, which is not there."""


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A model on its way to be built."""

    name: str
    build: Callable[[], nn.Module]
    loss: Callable[[Any, Tensor], Tensor]
    """(model, tokens [B, T]) to the mean cross-entropy of next tokens."""
    flops: Callable[[nn.Module, int], float]
    """(model, T) to its FLOPs per token, forward and backward."""
    own_parts: bool = False
    """Brings fused parts of its own, so its blocks are left as they are."""
    note: str = ""


def rival(
    name: str,
    keys: Mapping[str, Any],
    architectures: Architectures,
    *,
    longest: int,
    packed: bool = False,
) -> Rival:
    """The contender of that name, of as many parameters as the GSA model of `keys`.

    NotInstalledError if it is not installed, ValueError if it has no room for an MLP at that size.

    Args:
        keys: of GSAConfig.
        longest: tokens of the longest sequence.
        packed: models of gsa get their rows end to end in one, with their boundaries, as they are
            trained.
    """
    if name in FOREIGN:
        return FOREIGN[name](GSAConfig(**keys), longest)
    config = GSAConfig(**architectures[name.removeprefix(OWN)](dict(keys)))
    return Rival(
        name=name,
        build=lambda: GSAForCausalLM(config),
        loss=packed_loss if packed else gsa_loss,
        flops=lambda _, tokens: flops_per_token(config, tokens).forward_backward,
    )


def gsa_loss(model: Any, tokens_BT: Tensor) -> Tensor:
    return model(input_ids=tokens_BT, labels=tokens_BT, loss_only=True).loss


def packed_loss(model: Any, tokens_BT: Tensor) -> Tensor:
    """`gsa_loss` of the same rows as gsa train lays them out."""
    B, T = tokens_BT.shape
    labels = tokens_BT.clone()
    labels[:, 0] = IGNORE
    bounds = torch.arange(0, B * T + 1, T, dtype=torch.int32)
    return model(
        input_ids=tokens_BT.view(1, -1),
        labels=labels.view(1, -1),
        cu_seqlens=bounds,
        max_seqlen=T,
        loss_only=True,
    ).loss


def transformer(config: GSAConfig, longest: int) -> Rival:
    """transformers' Llama with torch's scaled_dot_product_attention and our loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(1, config.hidden_size // HEAD_WIDTH)
    equal = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=longest,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        use_cache=False,
    )
    equal._attn_implementation = "sdpa"

    def loss(model: Any, tokens: Tensor) -> Tensor:
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        return next_token_loss_of_hidden(hidden, model.lm_head.weight, tokens)

    def flops(model: nn.Module, tokens: int) -> float:
        """6 for each weight of a product, and 12 a token seen, width and layer."""
        weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
        seen = mean_visible(tokens, None)
        return 6.0 * weights + 12.0 * config.num_hidden_layers * config.hidden_size * seen

    note = f"transformers' Llama, {heads} heads of {config.hidden_size // heads}, SDPA"
    return Rival(
        name="transformer++",
        build=lambda: LlamaForCausalLM(equal),
        loss=loss,
        flops=flops,
        note=note,
    )


def fla(config: GSAConfig, longest: int) -> Rival:
    """flash-linear-attention's own GSA model with its own fused parts, not compiled."""
    if importlib.util.find_spec("fla") is None:
        raise NotInstalledError(
            "arch: fla needs flash-linear-attention, which is not installed; "
            "pip install 'gated-slots[peers]'"
        )
    from fla.models import GSAConfig as FlaConfig  # type: ignore
    from fla.models import GSAForCausalLM as FlaModel  # type: ignore

    equal = FlaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.num_hidden_layers,
        num_heads=config.num_heads,
        num_slots=config.num_slots,
        use_cache=False,
    )
    return Rival(
        name="fla",
        build=lambda: FlaModel(equal),
        loss=lambda model, tokens: model(input_ids=tokens, labels=tokens).loss,
        flops=lambda _, tokens: flops_per_token(config, tokens).forward_backward,
        own_parts=True,
        note="flash-linear-attention's GSA model, its own kernels and fused parts, not compiled",
    )


FOREIGN: dict[str, Callable[[GSAConfig, int], Rival]] = {"transformer++": transformer, "fla": fla}
"""Of other libraries: from the GSA model that they equal, and the tokens of the longest row."""
