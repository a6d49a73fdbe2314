"""What can be chosen about a token mixer, and which choices contradict each other."""

import math
from dataclasses import dataclass, fields

from gsa.layers.feature_map import FEATURE_MAPS, VALUE_ACTIVATIONS
from gsa.layers.gate import GATES
from gsa.layers.rope import ROPE_TYPES, SCALING_KEYS
from gsa.ops.types import SLOT_ACTIVATIONS, SlotActivation

DECAYS = ("data_dependent", "fixed", "tied")


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """What slot attention and gated linear attention have in common: sizes, and q, k and v."""

    hidden_size: int
    """D, width of the residual stream."""
    num_heads: int
    """H, query heads."""
    num_kv_heads: int | None = None
    """G, heads of keys, values, gates and memory; None means H."""
    head_dim: int | None = None
    """Width of a head before expansion; None means D / H."""
    expand_k: float = 1.0
    """K = head_dim · expand_k."""
    expand_v: float = 1.0
    """V = head_dim · expand_v."""
    gate_logit_normalizer: float = 8.0
    """tau in f = sigmoid(logits)^(1/tau): larger forgets more slowly. Not used by the abc gates."""
    feature_map: str = "swish"
    """On queries and keys: swish | relu | identity | t2r."""
    value_activation: str = "swish"
    """On values: swish | identity."""
    scale: float | str = 1.0
    """Factor on the scores: a number, or "rsqrt_key" for 1/sqrt(K)."""
    qkv_bias: bool = False
    """Biases on the q, k and v projections."""
    qk_norm: bool = False
    """An RMSNorm over each head's queries and keys, before the feature map."""
    rope_theta: float | None = None
    """Rotates queries and keys by position after the feature map; None leaves positions out."""
    rope_scaling: dict | None = None
    """Scaling of the rotation: rope_type default | linear | llama3 | yarn and its numbers."""
    elementwise_affine: bool = True
    """A learned weight in the norm before the output projection."""
    norm_eps: float = 1e-6
    """eps of the query/key norms."""
    output_norm_eps: float = 1e-5
    """eps of the norm before the output projection."""
    output_gate: bool = False
    """Multiplies the normed output by swish(W_g x)."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_heads"):
            check_positive_int(name, getattr(self, name))
        for name in ("num_kv_heads", "head_dim"):
            if getattr(self, name) is not None:
                check_positive_int(name, getattr(self, name))
        for name in (
            "expand_k",
            "expand_v",
            "gate_logit_normalizer",
            "norm_eps",
            "output_norm_eps",
        ):
            check_positive_number(name, getattr(self, name))
        check_heads(self.num_heads, self.num_kv_heads)
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of hidden_size = {self.hidden_size} (or head_dim "
                f"to be given), got {self.num_heads}"
            )
        for name in ("expand_k", "expand_v"):
            width = self._head_dim * getattr(self, name)
            if abs(width - round(width)) > 1e-6 or round(width) < 1:
                raise ValueError(
                    f"{name}: expected a factor that makes head_dim = {self._head_dim} a whole "
                    f"number >= 1, got {getattr(self, name)}"
                )
        check_choice("feature_map", self.feature_map, FEATURE_MAPS)
        check_choice("value_activation", self.value_activation, VALUE_ACTIVATIONS)
        if self.scale != "rsqrt_key" and not is_number(self.scale):
            raise ValueError(f'scale: expected a number or "rsqrt_key", got {self.scale!r}')
        check_flags(self)
        check_rope(self.rope_theta, self.rope_scaling, self.key_width)

    @property
    def _head_dim(self) -> int:
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """G."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def key_width(self) -> int:
        """K."""
        return round(self._head_dim * self.expand_k)

    @property
    def value_width(self) -> int:
        """V."""
        return round(self._head_dim * self.expand_v)

    @property
    def score_scale(self) -> float:
        """The number by which scores are multiplied."""
        return self.key_width**-0.5 if isinstance(self.scale, str) else float(self.scale)


@dataclass(frozen=True, kw_only=True)
class SlotAttentionOptions(MemoryOptions):
    """Sizes and variants of a `GatedSlotAttention`; the defaults are the paper's."""

    num_slots: int | None = 64
    """M, rows of a head's memory; None means K."""
    gate: str = "data_dependent"
    """data_dependent | data_independent | abc | abc_printed."""
    gate_bias: bool = False
    """A bias on the gate logits, for gates that depend on the token."""
    slot_activation: SlotActivation = "softmax"
    """From scores to read weights: softmax | identity | swish | relu | relu2."""
    use_short_conv: bool = False
    """A causal depthwise convolution after each of the q, k and v projections."""
    conv_size: int = 4
    """Taps of that convolution."""
    output_activation: str = "swish"
    """On what slots give, before the norm: swish | identity."""
    output_norm: bool = True
    """The RMSNorm before the output projection."""
    window_branch: int | None = None
    """A softmax branch over so many tokens, the query's own included, that shares q, k, v and o
    with the slots; a learned gate mixes the two. None leaves it out."""
    window_rope_theta: float | None = None
    """Rotates that branch's queries and keys by position; None leaves positions out."""
    window_rope_scaling: dict | None = None
    """Scaling of that rotation, as in rope_scaling."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_slots", "window_branch"):
            if getattr(self, name) is not None:
                check_positive_int(name, getattr(self, name))
        check_choice("gate", self.gate, GATES)
        check_choice("slot_activation", self.slot_activation, SLOT_ACTIVATIONS)
        check_choice("output_activation", self.output_activation, VALUE_ACTIVATIONS)
        if self.use_short_conv:
            check_conv_size(self.conv_size)
        if self.gate_bias and self.gate == "data_independent":
            raise ValueError("gate_bias: expected False with gate data_independent, which is one")
        self._check_window()

    def _check_window(self) -> None:
        rotation = (self.window_rope_theta, self.window_rope_scaling)
        check_rope(*rotation, self.key_width, prefix="window_")
        if self.window_branch is None and self.window_rope_theta is not None:
            raise ValueError(
                "window_rope_theta: expected None without window_branch (nothing to rotate), got "
                f"{self.window_rope_theta}"
            )
        if self.window_branch is not None and self.use_short_conv:
            raise ValueError(
                "window_branch: expected None with use_short_conv (its queries and keys are those "
                f"of the projections), got {self.window_branch}"
            )

    @property
    def slots(self) -> int:
        """M."""
        return self.key_width if self.num_slots is None else self.num_slots

    @property
    def swish_follows(self) -> bool:
        """Whether queries, keys and values go from their projections right into swish."""
        between = self.use_short_conv or self.qk_norm or self.window_branch is not None
        return {self.feature_map, self.value_activation} == {"swish"} and not between


@dataclass(frozen=True, kw_only=True)
class LinearAttentionOptions(MemoryOptions):
    """Sizes and variants of a `LinearAttention`."""

    decay: str
    """data_dependent (GLA's, for each key) | fixed (RetNet's, one number per head) | tied (HGRN2's,
    for each key, and keys are what it lets go of: queries and keys have no further options)."""
    gate_low_rank: int = 16
    """Rank of the weights of gates that depend on the token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("decay", self.decay, DECAYS)
        check_positive_int("gate_low_rank", self.gate_low_rank)


@dataclass(frozen=True, kw_only=True)
class RWKV6Options(LinearAttentionOptions):
    """Sizes of an `RWKV6`; of what is inherited it reads widths, heads, norm and gate_low_rank."""

    shift_low_rank: int = 32
    """Rank of the weights by which a token chooses how far its inputs look back."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_int("shift_low_rank", self.shift_low_rank)


@dataclass(frozen=True, kw_only=True)
class MambaOptions(LinearAttentionOptions):
    """Sizes of a `Mamba`: num_heads channels are heads of width 1, with K = expand_k numbers of
    memory each. Of what is inherited it reads gate_low_rank besides, the rank of Δ's weights."""

    conv_size: int = 4
    """Taps of the convolution."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim != 1 or self.value_width != 1:
            raise ValueError(
                "head_dim: expected 1 with expand_v 1 (each of num_heads channels of Mamba is a "
                f"head), got {self.head_dim} with {self.expand_v}"
            )
        check_conv_size(self.conv_size)

    @property
    def channels(self) -> int:
        """E."""
        return self.num_heads


@dataclass(frozen=True, kw_only=True)
class SoftmaxAttentionOptions:
    """Sizes and variants of a `SoftmaxAttention` in a hybrid model."""

    hidden_size: int
    """D, width of the residual stream."""
    num_heads: int
    """H, query heads."""
    num_kv_heads: int | None = None
    """G, key/value heads; None means H."""
    head_dim: int | None = None
    """K = V; None means D / H."""
    window_size: int | None = None
    """How many tokens a query sees, its own included; None means all."""
    rope_theta: float | None = 10000.0
    """Base of the rotary embedding; None leaves positions out."""
    rope_scaling: dict | None = None
    """Scaling of the rotation: rope_type default | linear | llama3 | yarn and its numbers."""
    qkv_bias: bool = False
    """Biases on the q, k and v projections."""
    qk_norm: bool = False
    """An RMSNorm over each head's queries and keys."""
    norm_eps: float = 1e-6
    """eps of those norms."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_heads"):
            check_positive_int(name, getattr(self, name))
        for name in ("num_kv_heads", "head_dim", "window_size"):
            if getattr(self, name) is not None:
                check_positive_int(name, getattr(self, name))
        check_positive_number("norm_eps", self.norm_eps)
        check_heads(self.num_heads, self.num_kv_heads)
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of hidden_size = {self.hidden_size} (or head_dim "
                f"to be given), got {self.num_heads}"
            )
        check_flags(self)
        check_rope(self.rope_theta, self.rope_scaling, self.width)

    @property
    def kv_heads(self) -> int:
        """G."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def width(self) -> int:
        """K = V."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_heads


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_positive_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected a whole number >= 1, got {value!r}")


def check_positive_number(name: str, value: object) -> None:
    if not is_number(value) or not float(str(value)) > 0:
        raise ValueError(f"{name}: expected a number > 0, got {value!r}")


def check_conv_size(value: object) -> None:
    if not isinstance(value, int) or value < 2:
        raise ValueError(f"conv_size: expected a whole number >= 2, got {value!r}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_heads(num_heads: int, num_kv_heads: int | None) -> None:
    if num_kv_heads is not None and num_heads % num_kv_heads:
        raise ValueError(
            f"num_kv_heads: expected a divisor of num_heads = {num_heads}, got {num_kv_heads}"
        )


def check_flags(options: object) -> None:
    for field in fields(options):  # type: ignore[arg-type]
        value = getattr(options, field.name)
        if field.type in (bool, "bool") and not isinstance(value, bool):
            raise ValueError(f"{field.name}: expected True or False, got {value!r}")


def check_rope(theta: object, scaling: dict | None, width: int, *, prefix: str = "") -> None:
    """Refuses a rotation that could not be applied as it stands."""
    theta_name, scaling_name = f"{prefix}rope_theta", f"{prefix}rope_scaling"
    if theta is None:
        if scaling is not None:
            raise ValueError(
                f"{scaling_name}: expected None without {theta_name} (no rotation to scale)"
            )
        return
    check_positive_number(theta_name, theta)
    if width % 2:
        raise ValueError(f"{theta_name}: expected an even head width to rotate, got {width}")
    if scaling is None:
        return
    kind = scaling.get("rope_type") if isinstance(scaling, dict) else None
    check_choice(f"{scaling_name}['rope_type']", kind, ROPE_TYPES)
    wanted = SCALING_KEYS[str(kind)]
    if set(scaling) != wanted | {"rope_type"}:
        raise ValueError(
            f"{scaling_name}: expected the keys {sorted(wanted | {'rope_type'})} for {kind!r}, got "
            f"{sorted(scaling)}"
        )
    for name in wanted:
        check_positive_number(f"{scaling_name}[{name!r}]", scaling[name])
