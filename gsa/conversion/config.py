"""What `gsa convert` can be asked for."""

from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, get_args

from gsa.layers.options import check_choice, check_positive_int, check_positive_number

Target = Literal["slots", "gsa", "gla", "retnet", "supra"]
GateInit = Literal["auto", "normal", "spread", "pooled_keys"]
FeatureMapName = Literal["auto", "swish", "relu", "identity", "t2r"]


@dataclass(frozen=True, kw_only=True)
class TargetMixer:
    """What takes attention's place for one target, and which options it has."""

    keys: dict[str, Any]
    """Keys of GSAConfig that make the mixer what its name says."""
    slots: int | None = None
    """If none are asked for; None where there are none."""
    tau: float | None = None
    """If none is asked for; None where gates do not depend on the token."""
    rotates: bool = False
    """Whether queries and keys are rotated, asked for or not."""
    window: bool = False
    """Whether a softmax branch can stand beside it."""
    gate_inits: tuple[GateInit, ...] = ("normal",)
    """What can be asked for; the first is the target's own."""


_AS_IN_ATTENTION = {"value_activation": "identity", "scale": "rsqrt_key"}

TARGETS: dict[Target, TargetMixer] = {
    "slots": TargetMixer(
        keys={
            **{"feature_map": "identity", "output_activation": "identity", "output_norm": False},
            **_AS_IN_ATTENTION,
        },
        slots=64,
        tau=8.0,
        rotates=True,
        window=True,
        gate_inits=("spread", "normal", "pooled_keys"),
    ),
    "gsa": TargetMixer(
        keys={"feature_map": "swish"},
        slots=64,
        tau=8.0,
        window=True,
        gate_inits=("normal", "spread", "pooled_keys"),
    ),
    "gla": TargetMixer(
        keys={"mixer": "gla", "feature_map": "relu", **_AS_IN_ATTENTION},
        tau=16.0,
        gate_inits=("normal", "spread"),
    ),
    "retnet": TargetMixer(
        keys={"mixer": "retnet", "feature_map": "relu", **_AS_IN_ATTENTION}, rotates=True
    ),
    "supra": TargetMixer(
        keys={"mixer": "retnet", "feature_map": "t2r", "value_activation": "identity"},
        rotates=True,
    ),
}
"""As teachers were converted to them: gsa, gla and retnet in "Gated Slot Attention", §3.2 and §4.2
(gla and retnet: relu, no output gate), supra in arXiv 2405.06640. slots is gated slot attention in
the form of the attention whose place it takes: rotated, and nothing between projections and slots.
"""

MODEL_KEYS = (
    *("gate", "gate_low_rank", "value_activation", "slot_activation", "scale", "output_activation"),
    *("output_norm", "output_norm_eps", "elementwise_affine", "output_gate", "use_short_conv"),
    "conv_size",
)
"""Keys of GSAConfig that a teacher says nothing about, besides those with options of their own."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What `convert` is asked to do; the defaults are the papers'."""

    teacher: str
    """Local folder of a Llama, Mistral, Qwen2, Qwen3 or SmolLM2, its weights as safetensors."""
    out: str
    """Folder to make; from_pretrained opens it."""
    target: Target = "slots"
    """What takes attention's place. slots: gated slot attention in attention's own form; gsa: as
    the paper has it, with swish, a norm and no rotation; or a rival, see docs/rivals.md."""
    slots: int | None = None
    """Slots of each memory, one memory per key/value head; 64 if not given; slots and gsa only."""
    tau: float | None = None
    """Forget gates are sigmoid(logits)^(1/tau): larger forgets more slowly; if not given 8 for
    slots and gsa, 16 for gla."""
    feature_map: FeatureMapName = "auto"
    """On queries and keys of converted layers; auto: the target's own (slots: identity; gsa: swish;
    gla, retnet: relu; supra: t2r). t2r: relu after a learned matrix, first the identity."""
    gate_init: GateInit = "auto"
    """Gates at first; auto: the target's own (slots: spread; others: normal). normal: small random
    weights; spread: with biases too, so that slots of a memory (of gla: keys) keep for 8 to 2000
    tokens (at tau 8); pooled_keys (slots, gsa): means over rows of the key projections."""
    rope: bool = False
    """Keep the teacher's rotary embedding in converted layers, after the feature map; slots, retnet
    and supra always do, and so do kept layers."""
    keep_layers: tuple[int, ...] = ()
    """Layers that stay softmax attention as the teacher has it, counted from 0."""
    keep_all: bool = False
    """Keep every layer: the teacher itself as a model of ours, to finetune it as students are."""
    window: int = 0
    """Tokens of a softmax branch beside each slot memory, with the teacher's rotary embedding, in a
    share that is learned; 0 for none; slots and gsa only."""
    seed: int = 0
    """Seeds the new weights."""
    check_tokens: int = 64
    """Before anything is written, compare logits on so many random tokens with every layer kept;
    more than a sliding window's length tries the window as well; 0 for no comparison."""
    model: dict[str, Any] = field(default_factory=dict)
    """Further keys of GSAConfig for the converted layers."""

    def __post_init__(self) -> None:
        for name in ("teacher", "out"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected a non-empty string")
        check_choice("target", self.target, get_args(Target))
        check_choice("feature_map", self.feature_map, get_args(FeatureMapName))
        check_choice("gate_init", self.gate_init, get_args(GateInit))
        if not isinstance(self.rope, bool):
            raise ValueError(f"rope: expected true or false, got {self.rope!r}")
        for name in ("window", "seed", "check_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name}: expected a whole number >= 0, got {value!r}")
        if self.seed >= 1 << 63:
            raise ValueError(f"seed: expected a number below 2^63, got {self.seed}")
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
        self._settle_target()
        if self.gate_init != "normal" and self.model.get("gate") == "data_independent":
            raise ValueError(
                f"gate_init: expected normal with gate data_independent, got {self.gate_init}"
            )

    def _settle_target(self) -> None:
        """Fills in what the target has of its own; ValueError for what it has not."""
        target = TARGETS[self.target]
        for name, own in (("slots", target.slots), ("tau", target.tau)):
            if own is None and getattr(self, name) is not None:
                self._refuse(name, "none")
            elif getattr(self, name) is None:
                object.__setattr__(self, name, own)
        if self.window and not target.window:
            self._refuse("window", "none")
        if self.gate_init == "auto":
            fixed = self.model.get("gate") == "data_independent"
            object.__setattr__(self, "gate_init", "normal" if fixed else target.gate_inits[0])
        if self.gate_init not in target.gate_inits:
            self._refuse("gate_init", " or ".join(target.gate_inits))
        if self.feature_map == "auto":
            object.__setattr__(self, "feature_map", target.keys["feature_map"])
        object.__setattr__(self, "rope", self.rope or target.rotates)
        if self.slots is not None:
            check_positive_int("slots", self.slots)
        if self.tau is not None:
            check_positive_number("tau", self.tau)

    def _refuse(self, name: str, expected: str) -> NoReturn:
        got = getattr(self, name)
        raise ValueError(f"{name}: expected {expected} with target {self.target}, got {got}")
