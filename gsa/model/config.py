"""The model's configuration: the published keys, ours beside them, and nothing silently ignored."""

from dataclasses import fields
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from gsa.layers.options import (
    LinearAttentionOptions,
    MambaOptions,
    RWKV6Options,
    SlotAttentionOptions,
    SoftmaxAttentionOptions,
    check_choice,
    check_positive_int,
    check_positive_number,
)

DEAD_KEYS = frozenset(
    (
        *("clamp_min", "clamp_max", "gate_fn", "gate_low_rank_dim", "mode", "use_norm"),
        *("use_output_gate", "conv_bias", "share_conv_kernel", "use_l2warp", "fuse_norm"),
        *("fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy"),
    )
)
"""Keys of published configs that never changed what a GSA model computes, whatever their value."""

KEYS_DEAD_WHEN_OFF = ("attnres_block_size", "use_rope")
"""Keys of published configs that would change the model if they were set; they never are."""

LEGACY_BASE_KEYS = frozenset(
    (
        *("add_cross_attention", "auto_map", "cross_attention_hidden_size", "finetuning_task"),
        *("decoder_start_token_id", "is_composition", "is_decoder", "label_smoothing"),
        *("model_type", "name_or_path", "num_labels", "output_attentions", "prefix"),
        *("pruned_heads", "quantization_config", "sep_token_id", "task_specific_params"),
        *("tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "torch_dtype"),
        *("torchscript", "use_bfloat16", "attn_implementation", "experts_implementation"),
        *("use_return_dict", "return_dict_in_generate", "revision", "unk_token_id"),
    )
)
"""Keys that every transformers config may carry, now or from before version 5."""

ATTENTION_KEYS = (
    *("layers", "num_heads", "num_kv_heads", "head_dim", "window_size"),
    *("rope_theta", "rope_scaling", "qkv_bias", "qk_norm"),
)


DECAYS = {
    "gla": "data_dependent",
    "retnet": "fixed",
    "hgrn2": "tied",
    "rwkv6": "data_dependent",
    "mamba": "data_dependent",
}
"""What the memory of each linear mixer forgets by."""

_GATE = ("gate_logit_normalizer", "gate_low_rank")
_QK = ("qkv_bias", "qk_norm", "rope_theta", "rope_scaling", "feature_map")
NOT_READ = {
    "gla": (),
    "retnet": _GATE,
    "hgrn2": (*_GATE, *_QK),
    "rwkv6": (
        *("gate_logit_normalizer", "num_kv_heads", "value_activation", "scale", "output_gate"),
        *_QK,
    ),
    "mamba": (
        *("gate_logit_normalizer", "num_kv_heads", "value_activation", "scale", "output_gate"),
        *("expand_v", "elementwise_affine"),
        *_QK,
    ),
}
"""Fields of its options that a linear mixer has no use for."""

MIXERS = ("gsa", *DECAYS)

MIXER_KEYS = frozenset(
    field.name
    for kind in (SlotAttentionOptions, RWKV6Options, MambaOptions)
    for field in fields(kind)
    if field.name != "decay"
)
"""Fields that some mixer with a memory reads."""

MixerOptions = SlotAttentionOptions | LinearAttentionOptions | SoftmaxAttentionOptions


class GSAConfig(PreTrainedConfig):
    """Configuration of a Gated Slot Attention language model, or of a rival in its place.

    Accepts the configs of the published `fla-hub/gsa-*` checkpoints as they are. Every field below
    changes the model or is refused; keys known to do nothing (`DEAD_KEYS`) are dropped; any other
    unknown key raises ValueError. The fields of the token mixer are described in
    `gsa.layers.options`, `SlotAttentionOptions`, `LinearAttentionOptions`,
    `RWKV6Options` and `MambaOptions`. The rest:

        mixer: gsa, or gated linear attention in its place as in gla, retnet, hgrn2, rwkv6 or
            mamba (see docs/rivals.md); fields that the chosen one does not have must be left alone.
        hidden_ratio, intermediate_size: the MLP's width F; where intermediate_size is None, two
            thirds of hidden_size · hidden_ratio, rounded up to a multiple of 256. An
            intermediate_size of 0 leaves the MLP out.
        hidden_act: "swish" (or its other name, "silu"), the only activation of the gated MLP.
        norm_eps: eps of the norms in the residual stream.
        output_norm_eps: eps of the norm before each output projection, saved as a number. Where
            None: norm_eps for a config with `norm_first` (September 2024), else 1e-5, as those
            checkpoints were run; weights under the names of 2025 settle it to 1e-5 when loaded.
        attn: layers that use softmax attention instead: {"layers": [...], "num_heads": ...} and
            further keys of `gsa.layers.options.SoftmaxAttentionOptions`; or a list of such.
        sliding_window: window of the softmax layers that name none of their own.
        max_position_embeddings: the length trained for. The model has no limit; generation and
            evaluation read it.

    Raises:
        ValueError: an unknown key, or values that contradict each other.
    """

    model_type = "gsa"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 32000
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    mixer: str = "gsa"
    num_heads: int = 4
    num_kv_heads: int | None = None
    num_slots: int | None = 64
    head_dim: int | None = None
    expand_k: float = 1
    expand_v: float = 1
    gate: str = "data_dependent"
    gate_bias: bool = False
    gate_logit_normalizer: float = 8
    gate_low_rank: int = 16
    shift_low_rank: int = 32
    feature_map: str = "swish"
    value_activation: str = "swish"
    slot_activation: str = "softmax"
    scale: float | str = 1.0
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_theta: float | None = None
    rope_scaling: dict | None = None
    use_short_conv: bool = False
    conv_size: int = 4
    output_activation: str = "swish"
    output_norm: bool = True
    output_norm_eps: float | None = None
    output_gate: bool = False
    window_branch: int | None = None
    window_rope_theta: float | None = None
    window_rope_scaling: dict | None = None
    elementwise_affine: bool = True
    norm_eps: float = 1e-6
    hidden_ratio: float | None = 4
    intermediate_size: int | None = None
    hidden_act: str = "swish"
    attn: dict | list | None = None
    sliding_window: int | None = None
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        norm_first = "norm_first" in kwargs
        super().__post_init__(**self._without_dead_keys(kwargs))
        if self.output_norm_eps is None:
            self.output_norm_eps = self.norm_eps if norm_first else 1e-5
            if norm_first:
                self._eps_follows_layout = True
        self._check()
        # What transformers' own tools ask to know how each layer keeps its past.
        self.layer_types = [
            _layer_type(self.mixer_options(i)) for i in range(self.num_hidden_layers)
        ]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but overridden fields are checked together with the others."""
        given = {name: kwargs.pop(name) for name in _own_fields() & set(kwargs)}
        return super().from_dict(config_dict | given, **kwargs)

    def settle_output_norm_eps(self) -> bool:
        """Corrects an output_norm_eps guessed from `norm_first`, once weights of 2025 were seen.

        A config of September 2024 that flash-linear-attention has loaded and saved again still says
        norm_first, but stands beside weights under the new names, which it runs at 1e-5.

        Returns:
            whether output_norm_eps was a guess, and may have changed.
        """
        if not self.__dict__.pop("_eps_follows_layout", False):
            return False
        self.output_norm_eps = 1e-5
        return True

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without guesses about weights, and fields the mixer has not."""
        left_out = {"_eps_follows_layout"} | (MIXER_KEYS - self._mixer_fields())
        return {key: v for key, v in super().to_dict().items() if key not in left_out}

    def _without_dead_keys(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Drops what is known to do nothing, takes over misspelt keys, refuses what is unknown."""
        for name in ("expand_k", "expand_v"):
            misspelt = kwargs.pop(name.replace("pa", "ap"), None)
            if misspelt is not None:
                setattr(self, name, misspelt)
        for name in KEYS_DEAD_WHEN_OFF:
            value = kwargs.pop(name, None)
            if value:
                raise ValueError(f"{name}: expected None or False (not supported), got {value!r}")
        kept = {
            key: value
            for key, value in kwargs.items()
            if key not in DEAD_KEYS | {"norm_first", "layer_types"}
        }
        known = {field.name for field in fields(PreTrainedConfig)} | LEGACY_BASE_KEYS
        known |= set(GenerationConfig._get_default_generation_params())
        unknown = sorted(
            key
            for key in kept
            if key not in known and not key.startswith("_") and "attn_imp" not in key
        )
        if unknown:
            raise ValueError(
                f"GSAConfig: unknown key {', '.join(map(repr, unknown))}; expected its fields "
                f"({', '.join(sorted(_own_fields()))}) or a key every transformers config may "
                "have. Correct the spelling or remove it: an unknown key would change nothing"
            )
        return kept

    def _check(self) -> None:
        for name in ("vocab_size", "num_hidden_layers", "max_position_embeddings"):
            check_positive_int(name, getattr(self, name))
        if self.intermediate_size != 0 and self.intermediate_size is not None:
            check_positive_int("intermediate_size", self.intermediate_size)
        if self.hidden_ratio is not None:
            check_positive_number("hidden_ratio", self.hidden_ratio)
        check_positive_number("initializer_range", self.initializer_range)
        check_choice("hidden_act", self.hidden_act, ("swish", "silu"))
        for name in ("use_cache", "tie_word_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if self.pad_token_id is not None and not -1 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id: expected a token below vocab_size = {self.vocab_size}, got "
                f"{self.pad_token_id}"
            )
        self._check_mixer()
        self._check_attention_layers()
        for layer in range(self.num_hidden_layers):
            self.mixer_options(layer)

    def _check_mixer(self) -> None:
        check_choice("mixer", self.mixer, MIXERS)
        defaults = {field.name: field.default for field in fields(type(self))}
        for name in sorted(MIXER_KEYS - self._mixer_fields()):
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"{name}: expected {defaults[name]!r} with mixer {self.mixer!r}, which has no "
                    f"use for it, got {getattr(self, name)!r}"
                )

    def _mixer_fields(self) -> set[str]:
        """Fields that the mixer reads, of those which its options have."""
        if self.mixer == "gsa":
            return {field.name for field in fields(SlotAttentionOptions)}
        names = {field.name for field in fields(self._linear_kind())} & MIXER_KEYS
        return names - set(NOT_READ[self.mixer])

    def _linear_kind(self) -> type[LinearAttentionOptions]:
        kinds = {"rwkv6": RWKV6Options, "mamba": MambaOptions}
        return kinds.get(self.mixer, LinearAttentionOptions)

    def _check_attention_layers(self) -> None:
        seen: set[int] = set()
        for spec in self._attention_specs():
            if not isinstance(spec, dict) or not {"layers", "num_heads"} <= set(spec):
                raise ValueError(
                    "attn: expected None, a dict with at least 'layers' and 'num_heads', or a list "
                    f"of such dicts, got {spec!r}"
                )
            unknown = sorted(set(spec) - set(ATTENTION_KEYS))
            if unknown:
                raise ValueError(
                    f"attn: unknown key {unknown}; expected {', '.join(ATTENTION_KEYS)}"
                )
            for layer in spec["layers"]:
                if not isinstance(layer, int) or not 0 <= layer < self.num_hidden_layers:
                    raise ValueError(
                        f"attn['layers']: expected numbers below {self.num_hidden_layers}, got "
                        f"{layer!r}"
                    )
                if layer in seen:
                    raise ValueError(f"attn['layers']: expected each layer once, got {layer} twice")
                seen.add(layer)
        if self.sliding_window is not None and not seen:
            raise ValueError(
                "sliding_window: expected None without softmax layers in attn (a slot memory has "
                f"no window), got {self.sliding_window}"
            )

    def _attention_specs(self) -> list:
        if self.attn is None:
            return []
        return self.attn if isinstance(self.attn, list) else [self.attn]

    def mixer_options(self, layer: int) -> MixerOptions:
        """What the token mixer of that layer is to be."""
        for spec in self._attention_specs():
            if layer in spec["layers"]:
                chosen = {key: value for key, value in spec.items() if key != "layers"}
                chosen.setdefault("window_size", None)
                if chosen["window_size"] is None:
                    chosen["window_size"] = self.sliding_window
                return SoftmaxAttentionOptions(
                    hidden_size=self.hidden_size, norm_eps=self.norm_eps, **chosen
                )
        chosen = {name: getattr(self, name) for name in self._mixer_fields()}
        if self.mixer == "gsa":
            return SlotAttentionOptions(**chosen)
        return self._linear_kind()(**chosen, decay=DECAYS[self.mixer])

    @property
    def lower_bound_width(self) -> int | None:
        """G·K, forget gates of a layer that have lower bounds; None if no layer has such gates."""
        for one in map(self.mixer_options, range(self.num_hidden_layers)):
            if isinstance(one, LinearAttentionOptions) and one.decay == "tied":
                return one.kv_heads * one.key_width
        return None

    @property
    def mlp_width(self) -> int:
        """F, the width of the MLP."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        ratio = 4 if self.hidden_ratio is None else self.hidden_ratio
        return 256 * -(-int(self.hidden_size * ratio * 2 / 3) // 256)


def _layer_type(options: MixerOptions) -> str:
    if not isinstance(options, SoftmaxAttentionOptions):
        return "linear_attention"
    return "full_attention" if options.window_size is None else "sliding_attention"


def _own_fields() -> set[str]:
    return {field.name for field in fields(GSAConfig)} - {
        field.name for field in fields(PreTrainedConfig)
    }
