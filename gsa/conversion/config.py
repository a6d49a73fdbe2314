"""What `gsa convert` can be asked for."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from gsa.layers.feature_map import FEATURE_MAPS
from gsa.layers.options import check_choice, check_positive_int, check_positive_number

GateInit = Literal["normal", "spread", "pooled_keys"]
FeatureMapName = Literal["swish", "relu", "identity", "t2r"]

MODEL_KEYS = (
    *("gate", "value_activation", "slot_activation", "scale", "output_norm", "output_norm_eps"),
    *("elementwise_affine", "output_gate", "use_short_conv", "conv_size"),
)
"""Keys of GSAConfig that a teacher says nothing about, besides those with options of their own."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What `convert` is asked to do; the defaults are the paper's."""

    teacher: str
    """Local folder of a Llama, Mistral, Qwen2, Qwen3 or SmolLM2, its weights as safetensors."""
    out: str
    """Folder to make; from_pretrained opens it."""
    slots: int = 64
    """Slots of each memory, one memory per key/value head."""
    tau: float = 8.0
    """Forget gates are sigmoid(logits)^(1/tau): larger forgets more slowly."""
    feature_map: FeatureMapName = "swish"
    """On queries and keys of slot layers. t2r: relu after a learned matrix, first the identity."""
    gate_init: GateInit = "normal"
    """Gates at first: small random weights; spread: with biases too, so that slots of a memory keep
    for 8 to 2000 tokens (at tau 8); pooled_keys: means over rows of the key projections."""
    rope: bool = False
    """Keep the teacher's rotary embedding in slot layers, after the feature map; kept layers
    always have it."""
    keep_layers: tuple[int, ...] = ()
    """Layers that stay softmax attention as the teacher has it, counted from 0."""
    keep_all: bool = False
    """Keep every layer: the teacher itself as a model of ours, to finetune it as students are."""
    window: int = 0
    """Tokens of a softmax branch beside each slot memory, with the teacher's rotary embedding, in a
    share that is learned; 0 for none."""
    seed: int = 0
    """Seeds the new weights."""
    check_tokens: int = 64
    """Before anything is written, compare logits on so many random tokens with every layer kept;
    more than a sliding window's length tries the window as well; 0 for no comparison."""
    model: dict[str, Any] = field(default_factory=dict)
    """Further keys of GSAConfig for the slot layers."""

    def __post_init__(self) -> None:
        for name in ("teacher", "out"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected a non-empty string")
        check_positive_int("slots", self.slots)
        check_positive_number("tau", self.tau)
        check_choice("feature_map", self.feature_map, FEATURE_MAPS)
        check_choice("gate_init", self.gate_init, get_args(GateInit))
        if not isinstance(self.rope, bool):
            raise ValueError(f"rope: expected true or false, got {self.rope!r}")
        for name in ("window", "seed", "check_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name}: expected a whole number >= 0, got {value!r}")
        if len(set(self.keep_layers)) < len(self.keep_layers):
            raise ValueError(f"keep_layers: expected each layer once, got {self.keep_layers}")
        if self.keep_all and self.keep_layers:
            raise ValueError(f"keep_layers: expected none with keep_all, got {self.keep_layers}")
        unknown = sorted(set(self.model) - set(MODEL_KEYS))
        if unknown:
            raise ValueError(
                f"model: expected keys of GSAConfig among {', '.join(MODEL_KEYS)}, got "
                f"{', '.join(unknown)}; others follow from the teacher or are options of their own"
            )
        if self.gate_init != "normal" and self.model.get("gate") == "data_independent":
            raise ValueError(
                f"gate_init: expected normal with gate data_independent, got {self.gate_init}"
            )
