"""The paper's rivals sized alike: from a GSA recipe's keys to those of another architecture.

Layers, width and vocabulary stay; the MLP's width is chosen so that the parameters are as many.
Mamba, which has no MLP, has about twice the layers instead.
"""

import math
from collections.abc import Callable
from typing import Any

Keys = dict[str, Any]
"""Keys of GSAConfig."""


def gla(keys: Keys) -> Keys:
    """GLA (arXiv 2312.06635): keys of half a head's width, gated output; heads as the recipe has.

    At the recipe of 1.3B: 4 heads, K = 256, V = 512, as in the paper.
    """
    return {
        "mixer": "gla",
        "num_heads": keys["num_heads"],
        "expand_k": 0.5,
        "feature_map": "identity",
        "value_activation": "identity",
        "scale": "rsqrt_key",
        "gate_logit_normalizer": 16,
        "output_gate": True,
    }


def retnet(keys: Keys) -> Keys:
    """RetNet (arXiv 2307.08621): heads of K = 256 where the width allows, V = 2K, gated output."""
    return {
        "mixer": "retnet",
        "num_heads": keys["hidden_size"] // math.gcd(keys["hidden_size"], 256),
        "expand_v": 2,
        "feature_map": "identity",
        "value_activation": "identity",
        "scale": "rsqrt_key",
        "rope_theta": 10000.0,
        "output_gate": True,
    }


def hgrn2(keys: Keys) -> Keys:
    """HGRN2 (arXiv 2404.07904): heads of 128 where the width allows, as in the paper."""
    return {
        "mixer": "hgrn2",
        "num_heads": keys["hidden_size"] // math.gcd(keys["hidden_size"], 128),
        "value_activation": "identity",
    }


def rwkv6(keys: Keys) -> Keys:
    """RWKV6's time mixing (arXiv 2404.05892): heads of 64, ranks 32 and 64 but in narrow models."""
    D = keys["hidden_size"]
    return {
        "mixer": "rwkv6",
        "num_heads": D // math.gcd(D, 64),
        "gate_low_rank": min(64, D // 4),
        "shift_low_rank": min(32, D // 8),
    }


def mamba(keys: Keys) -> Keys:
    """Mamba (arXiv 2312.00752): 2 D channels of 16 numbers, Δ of rank D / 16, no MLP."""
    D = keys["hidden_size"]
    return {
        "mixer": "mamba",
        "num_heads": 2 * D,
        "head_dim": 1,
        "expand_k": 16,
        "gate_low_rank": -(-D // 16),
        "intermediate_size": 0,
    }


def supra(keys: Keys) -> Keys:
    """SUPRA's linear attention (arXiv 2405.06640) in a Transformer's heads."""
    return {
        "mixer": "retnet",
        "num_heads": transformer_heads(keys),
        "feature_map": "t2r",
        "value_activation": "identity",
        "rope_theta": 10000.0,
    }


def transformer(keys: Keys) -> Keys:
    """Transformer++: softmax attention with rotary embeddings in every layer, as in Llama."""
    heads, layers = transformer_heads(keys), list(range(keys["num_hidden_layers"]))
    return {"num_heads": heads, "attn": {"layers": layers, "num_heads": heads}}


def mistral(keys: Keys) -> Keys:
    """Mistral (arXiv 2310.06825): Transformer++ with four query heads to a key/value head where the
    heads allow, and a window of 4096 tokens."""
    found = transformer(keys)
    heads = found["num_heads"]
    window = {"num_kv_heads": heads // math.gcd(heads, 4), "window_size": 4096}
    return found | {"attn": found["attn"] | window}


def transformer_heads(keys: Keys) -> int:
    """Heads of 64 up to a width of 1024, of 128 beyond."""
    D = keys["hidden_size"]
    return D // math.gcd(D, 64 if D <= 1024 else 128)


def gsa(keys: Keys) -> Keys:
    """Gated Slot Attention: the recipe as it is."""
    return keys


def abc(keys: Keys) -> Keys:
    """ABC (arXiv 2110.02488): slots without a gate of their own; Table 2's "no decay"."""
    return keys | {"gate": "abc"}


ARCHITECTURES: dict[str, Callable[[Keys], Keys]] = {
    "gsa": gsa,
    "abc": abc,
    "gla": gla,
    "retnet": retnet,
    "hgrn2": hgrn2,
    "rwkv6": rwkv6,
    "mamba": mamba,
    "supra": supra,
    "transformer++": transformer,
    "mistral": mistral,
}


def sized_alike(name: str, keys: Keys) -> Keys:
    """Keys of the architecture `name` with as many parameters as the GSA model of `keys` has.

    What is said of the width, layers, norms, vocabulary and ties is kept. Where MLPs take up the
    difference, their width is a multiple of 64 (of 8 in models narrower than 256); an architecture
    without MLPs has as many layers as come nearest.

    Raises:
        ValueError: no such architecture, or mixers so large that no MLP is left.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"arch: expected one of {', '.join(ARCHITECTURES)}, got {name!r}")
    if name == "gsa":
        return keys
    from gsa.model import GSAConfig
    from gsa.model.config import MIXER_KEYS, NOT_READ
    from gsa.model.cost import count_parameters

    own = ARCHITECTURES[name](keys)
    shared = {"hidden_size", "norm_eps", "output_norm_eps", "elementwise_affine"}
    shared -= set(NOT_READ.get(own.get("mixer", ""), ()))
    found = {key: x for key, x in keys.items() if key not in MIXER_KEYS or key in shared} | own

    def size(changed: Keys) -> int:
        return count_parameters(GSAConfig(**changed)).total

    D, L = keys["hidden_size"], keys["num_hidden_layers"]
    if own.get("intermediate_size") == 0:
        each = size(found | {"num_hidden_layers": L + 1}) - size(found)
        found["num_hidden_layers"] += round((size(keys) - size(found)) / each)
        return found
    step = 64 if D >= 256 else 8
    found["intermediate_size"] = GSAConfig(**keys).mlp_width
    found["intermediate_size"] += step * round((size(keys) - size(found)) / (3 * D * L * step))
    if found["intermediate_size"] < step:
        raise ValueError(f"arch: expected mixers smaller than the whole model, got {name} at {D}")
    return found
