"""Which teachers can be read: per family its names for our weights, and its sliding windows."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

_LAYER = re.compile(r"(?<=\blayers\.)\d+(?=\.)")

LLAMA_NAMES = {
    "model.embed_tokens.weight": "model.embeddings.weight",
    "model.layers.*.input_layernorm.weight": "model.layers.*.attn_norm.weight",
    "model.layers.*.self_attn.q_proj.weight": "model.layers.*.attn.q_proj.weight",
    "model.layers.*.self_attn.k_proj.weight": "model.layers.*.attn.k_proj.weight",
    "model.layers.*.self_attn.v_proj.weight": "model.layers.*.attn.v_proj.weight",
    "model.layers.*.self_attn.o_proj.weight": "model.layers.*.attn.o_proj.weight",
    "model.layers.*.post_attention_layernorm.weight": "model.layers.*.mlp_norm.weight",
    "model.layers.*.mlp.gate_proj.weight": "model.layers.*.mlp.gate_proj.weight",
    "model.layers.*.mlp.up_proj.weight": "model.layers.*.mlp.up_proj.weight",
    "model.layers.*.mlp.down_proj.weight": "model.layers.*.mlp.down_proj.weight",
    "model.norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
QWEN2_NAMES = LLAMA_NAMES | {
    "model.layers.*.self_attn.q_proj.bias": "model.layers.*.attn.q_proj.bias",
    "model.layers.*.self_attn.k_proj.bias": "model.layers.*.attn.k_proj.bias",
    "model.layers.*.self_attn.v_proj.bias": "model.layers.*.attn.v_proj.bias",
}
QWEN3_NAMES = LLAMA_NAMES | {
    "model.layers.*.self_attn.q_norm.weight": "model.layers.*.attn.q_norm.weight",
    "model.layers.*.self_attn.k_norm.weight": "model.layers.*.attn.k_norm.weight",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """How the models of one `model_type` are written down."""

    model_type: str
    names: Mapping[str, str]
    """The teacher's name of each weight and ours; * stands for the number of a layer."""
    windows: Literal["none", "every layer", "by layer"]
    """Which layers the config's sliding_window is for; by layer: where its layer_types say so."""

    def to_student(self, name: str) -> str | None:
        """Our name of a teacher's weight; None if the family has no such weight."""
        return _translate(name, self.names)

    def to_teacher(self, name: str) -> str | None:
        """The teacher's name of one of our weights; None if it is new."""
        return _translate(name, {ours: theirs for theirs, ours in self.names.items()})

    def has(self, name: str) -> bool:
        """Whether the family has a weight for ours of that name, with * for the layer."""
        return name in self.names.values()

    def layer_windows(self, config: Any) -> list[int | None]:
        """The sliding window of each layer, None where a token sees all before it.

        ValueError for a kind of layer that is neither full nor sliding attention.
        """
        layers = config.num_hidden_layers
        if self.windows == "none":
            return [None] * layers
        if self.windows == "every layer":
            return [config.sliding_window] * layers
        known = {"full_attention": None, "sliding_attention": config.sliding_window}
        unknown = sorted(set(config.layer_types) - set(known))
        if unknown:
            raise ValueError(
                f"layer_types: expected {' or '.join(known)}, got {', '.join(unknown)}, which "
                "cannot be converted"
            )
        return [known[kind] for kind in config.layer_types]


FAMILIES = {
    family.model_type: family
    for family in (
        Family(model_type="llama", names=LLAMA_NAMES, windows="none"),  # SmolLM2 too
        Family(model_type="mistral", names=LLAMA_NAMES, windows="every layer"),
        Family(model_type="qwen2", names=QWEN2_NAMES, windows="by layer"),
        Family(model_type="qwen3", names=QWEN3_NAMES, windows="by layer"),
    )
}


def is_left_out(name: str) -> bool:
    """Whether a file may hold it though the model computes it: rotations, in old folders."""
    return name.endswith("rotary_emb.inv_freq")


def _translate(name: str, names: Mapping[str, str]) -> str | None:
    layer = _LAYER.search(name)
    if layer is None:
        return names.get(name)
    found = names.get(_LAYER.sub("*", name, count=1))
    return None if found is None else found.replace("*", layer.group())
