"""What a model costs, from its configuration alone: parameters, FLOPs, bytes.

Counted from formulas, since FLOP counters do not see Triton kernels. D, H, G, K, V, M, F, W as in
the README. FLOPs are those of matrix products, two per multiplication with addition. Elementwise
work (norms, activations, decays, rotations, short convolutions) is left out.

The slot memory counts as the recurrence that defines it, per token and layer

    H · 2·M·(K+V)   two reads: memory[:, :K] · q and weightsᵀ · memory[:, K:]
    G · 2·M·(K+V)   one write: memory + w ⊗ [k ; v]

and the memory of gated linear attention as (H + G) · 2·K·V, a read and a write; Mamba's has a head
of V = 1 for each channel.

Products within chunks, memories computed again and recomputed activations belong to an
implementation, not to the model (docs/decisions.md).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from gsa.layers.options import (
    LinearAttentionOptions,
    MambaOptions,
    RWKV6Options,
    SlotAttentionOptions,
    SoftmaxAttentionOptions,
    check_positive_int,
)
from gsa.model.config import GSAConfig, MixerOptions
from gsa.ops.types import compute_dtype

Memory = SlotAttentionOptions | LinearAttentionOptions


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of trained parameters of a language model."""

    embeddings: int
    blocks: int
    """Mixers, MLPs and their norms."""
    norm: int
    """The last norm."""
    head: int
    """0 where the head is tied to the embeddings."""

    @property
    def total(self) -> int:
        """A tied head counts once."""
        return self.non_embedding + self.embeddings + self.head

    @property
    def non_embedding(self) -> int:
        """What does not grow with the vocabulary: neither embeddings nor head."""
        return self.blocks + self.norm


@dataclass(frozen=True, kw_only=True)
class TokenFlops:
    """FLOPs of a forward pass per token, mean over the tokens of a sequence."""

    projections: int
    """Linear layers of the token mixers, gates included."""
    mlp: int
    head: int
    """The logits, of every token: training needs them all, a prompt only the last."""
    memory: int
    """Reads and writes of the memories."""
    attention: float
    """q kᵀ and weights · v of softmax layers and window branches, over the tokens in sight."""

    @property
    def forward(self) -> float:
        return self.projections + self.mlp + self.head + self.memory + self.attention

    @property
    def forward_backward(self) -> float:
        """Three times the forward: a product's backward is one product for each of its factors."""
        return 3 * self.forward


@dataclass(frozen=True, kw_only=True)
class TrainingBytes:
    """Bytes that stay allocated throughout training; activations come on top."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def count_parameters(config: GSAConfig) -> Parameters:
    """The numbers that `GSAForCausalLM(config)` has, exactly."""
    D, W = config.hidden_size, config.vocab_size
    norms = 2 if config.mlp_width else 1
    mixers = sum(_projections(one) + _small_parameters(one) for one in _layers(config))
    mixers += config.num_hidden_layers * (config.lower_bound_width or 0)
    return Parameters(
        embeddings=W * D,
        blocks=mixers + config.num_hidden_layers * (3 * D * config.mlp_width + norms * D),
        norm=D,
        head=0 if config.tie_word_embeddings else W * D,
    )


def flops_per_token(config: GSAConfig, tokens: int) -> TokenFlops:
    """FLOPs per token of sequences of `tokens` tokens, a number that only softmax layers ask for.

    Of documents packed in one row, softmax attention sees only their own tokens: pass their length.
    ValueError if tokens is below 1.
    """
    check_positive_int("tokens", tokens)
    D = config.hidden_size
    layers = list(_layers(config))
    memories = [one for one in layers if not isinstance(one, SoftmaxAttentionOptions)]
    products = sum(map(_projections, layers)) + sum(map(_feature_products, memories))
    return TokenFlops(
        projections=2 * products,
        mlp=config.num_hidden_layers * 2 * 3 * D * config.mlp_width,
        head=2 * D * config.vocab_size,
        memory=sum(map(memory_flops, memories)),
        attention=sum(_attention_flops(one, tokens) for one in layers),
    )


def mixer_flops(options: MixerOptions, tokens: int) -> float:
    """A forward pass of one layer's token mixer, per token of sequences of `tokens` tokens."""
    products, own = _projections(options), 0
    if not isinstance(options, SoftmaxAttentionOptions):
        products, own = products + _feature_products(options), memory_flops(options)
    return 2 * products + own + _attention_flops(options, tokens)


def memory_flops(options: Memory) -> int:
    """The operator's FLOPs per token of one layer, forward, as a recurrence: (H + G)·2·M·(K+V), or
    (H + G)·2·K·V."""
    return (options.num_heads + options.kv_heads) * 2 * _memory_numbers(options)


def mean_visible(tokens: int, window: int | None) -> float:
    """How many of `tokens` tokens each sees causally, itself included, on average."""
    reach = tokens if window is None else min(window, tokens)
    return (reach * (reach + 1) / 2 + (tokens - reach) * reach) / tokens


def state_bytes(config: GSAConfig, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes that a `GSACache` holds for one sequence of `tokens` tokens, in a model of that dtype.

    Memories [G, M, K+V] or [G, K, V], and normalisers of abc gates, are fp32 (fp64 for fp64) and do
    not depend on tokens. Tails of short convolutions, keys and values have the model's dtype.
    """
    return sum(_state_bytes(one, tokens, dtype) for one in _layers(config))


def kv_cache_bytes(config: GSAConfig, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of keys and values that a Transformer of the same heads, widths and layers would keep.

    Softmax layers of a hybrid count as they are, but without their windows. Mamba has no such
    heads: two of its blocks count as one of a Transformer of its width.
    """
    numbers = 0
    for one in _layers(config):
        if isinstance(one, MambaOptions):
            numbers += one.hidden_size
            continue
        softmax = isinstance(one, SoftmaxAttentionOptions)
        numbers += one.kv_heads * (2 * one.width if softmax else one.key_width + one.value_width)
    return numbers * tokens * dtype.itemsize


def training_bytes(
    parameters: int,
    *,
    weights: torch.dtype = torch.float32,
    gradients: torch.dtype = torch.float32,
    moments: torch.dtype = torch.float32,
    moment_count: int = 2,
) -> TrainingBytes:
    """Weights, gradients and optimizer state of so many parameters, over all devices.

    The defaults are AdamW's with everything in fp32: 16 bytes per parameter. Activations depend on
    rows, kernels and recomputation and are not estimated.
    """
    return TrainingBytes(
        weights=parameters * weights.itemsize,
        gradients=parameters * gradients.itemsize,
        optimizer=parameters * moment_count * moments.itemsize,
    )


@dataclass(frozen=True, kw_only=True)
class Device:
    """A kind of GPU: its name here, its dense bf16 peak, the names torch gives it."""

    name: str
    tflops: float
    torch_names: tuple[str, ...]


DEVICES = (
    Device(name="H100", tflops=989, torch_names=("NVIDIA H100 80GB HBM3",)),
    Device(name="H100-NVL", tflops=835, torch_names=("NVIDIA H100 NVL",)),
    Device(name="H100-PCIe", tflops=756, torch_names=("NVIDIA H100 PCIe",)),
    Device(name="H200", tflops=989, torch_names=("NVIDIA H200",)),
    Device(name="H800", tflops=989, torch_names=("NVIDIA H800",)),
    Device(name="B200", tflops=2250, torch_names=("NVIDIA B200",)),
    Device(
        name="A100",
        tflops=312,
        torch_names=(
            *("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB"),
            *("NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"),
        ),
    ),
    Device(name="L40S", tflops=362, torch_names=("NVIDIA L40S",)),
)
"""Peaks from NVIDIA's data sheets: bf16 tensor cores, without sparsity, accumulated in fp32."""


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of a device by name; None if it is not in `DEVICES`.

    device_name: what `torch.cuda.get_device_name` says, or the short name of the table. Compared
    as a whole: a slice of a GPU ("... MIG 1g.10gb") or an unknown variant must not pass for a GPU.
    """
    for device in DEVICES:
        if device_name == device.name or device_name in device.torch_names:
            return device.tflops * 1e12
    return None


def mfu(
    tokens_per_second: float, flops_per_token: float, peak: float | None, *, devices: int = 1
) -> float | None:
    """Model FLOPs utilisation: the share of the peak that the model's own FLOPs make up.

    Args:
        tokens_per_second: of all devices together.
        flops_per_token: in training `flops_per_token(config, T).forward_backward`.
        peak: FLOP/s of one device, from `peak_flops`; None (unknown) gives None.
        devices: how many there are.
    """
    return None if peak is None else tokens_per_second * flops_per_token / (peak * devices)


def device_hours(tokens: float, flops_per_token: float, peak: float, utilisation: float) -> float:
    """Hours of one device to compute `tokens` tokens at an MFU of `utilisation`, in (0, 1]."""
    if not (math.isfinite(utilisation) and 0 < utilisation <= 1):
        raise ValueError(f"mfu: expected a number above 0, at most 1, got {utilisation}")
    return tokens * flops_per_token / (peak * utilisation) / 3600


def _layers(config: GSAConfig) -> Iterable[MixerOptions]:
    return (config.mixer_options(layer) for layer in range(config.num_hidden_layers))


def _projections(options: MixerOptions) -> int:
    """Weights of the linear layers on the residual stream: each multiplies every token once."""
    D, H, G = options.hidden_size, options.num_heads, options.kv_heads
    if isinstance(options, SoftmaxAttentionOptions):
        return 2 * D * (H + G) * options.width
    K, V = options.key_width, options.value_width
    if isinstance(options, MambaOptions):
        E, R = options.channels, options.gate_low_rank
        return 3 * D * E + E * (R + 2 * K) + R * E
    gated = options.output_gate or isinstance(options, RWKV6Options)
    qkvo = D * (H + G) * (K + V) + (D * H * V if gated else 0)
    if isinstance(options, RWKV6Options):
        qkvo += 2 * 5 * options.shift_low_rank * D
    if isinstance(options, LinearAttentionOptions):
        depends = options.decay == "data_dependent"
        return qkvo + (options.gate_low_rank * (D + G * K) if depends else 0)
    gate = 0 if options.gate == "data_independent" else D * G * options.slots
    share = 0 if options.window_branch is None else D * H
    return qkvo + gate + share


def _memory_numbers(options: Memory) -> int:
    """Numbers in the memory of one head."""
    K, V = options.key_width, options.value_width
    return K * V if isinstance(options, LinearAttentionOptions) else options.slots * (K + V)


def _attention_flops(options: MixerOptions, tokens: int) -> float:
    """q kᵀ and weights · v per token."""
    if isinstance(options, SoftmaxAttentionOptions):
        widths, window = 2 * options.width, options.window_size
    elif isinstance(options, LinearAttentionOptions) or options.window_branch is None:
        return 0.0
    else:
        widths, window = options.key_width + options.value_width, options.window_branch
    return 2 * options.num_heads * widths * mean_visible(tokens, window)


def _feature_products(options: Memory) -> int:
    """Multiplications by a learned feature map [K, K]: one per query head and one per key head."""
    if options.feature_map != "t2r":
        return 0
    return (options.num_heads + options.kv_heads) * options.key_width**2


def _small_parameters(options: MixerOptions) -> int:
    """Parameters of a mixer besides its projections."""
    H, G = options.num_heads, options.kv_heads
    if isinstance(options, SoftmaxAttentionOptions):
        K = V = options.width
        own = 0
    else:
        K, V = options.key_width, options.value_width
        own = K * K if options.feature_map == "t2r" else 0
        if isinstance(options, LinearAttentionOptions):
            own += _linear_parameters(options)
        else:
            own += _slot_parameters(options)
    biases = H * K + G * (K + V) if options.qkv_bias else 0
    return own + biases + (2 * K if options.qk_norm else 0)


def _linear_parameters(options: LinearAttentionOptions) -> int:
    """Parameters that only linear attention has, besides its projections."""
    if isinstance(options, RWKV6Options):
        D, K, V = options.hidden_size, options.key_width, options.value_width
        normed = 2 * V if options.elementwise_affine else 0
        return 6 * D + options.num_heads * (2 * K + normed)
    if isinstance(options, MambaOptions):
        # log_rate; the convolution with its bias; skip and the bias of steps
        return options.channels * (options.key_width + options.conv_size + 1 + 2)
    bias = options.kv_heads * options.key_width if options.decay == "data_dependent" else 0
    normed = options.value_width * (options.num_heads if options.decay == "tied" else 1)
    return bias + (normed if options.elementwise_affine else 0)


def _slot_parameters(options: SlotAttentionOptions) -> int:
    """Parameters that only slot attention has, besides its projections."""
    H, G, V = options.num_heads, options.kv_heads, options.value_width
    own = G * options.slots if options.gate == "data_independent" else 0
    own += options.conv_size * _qkv_width(options) if options.use_short_conv else 0
    own += H * V if options.output_norm and options.elementwise_affine else 0
    own += G * options.slots if options.gate_bias else 0
    return own + (0 if options.window_branch is None else H)


def _qkv_width(options: SlotAttentionOptions) -> int:
    K, V = options.key_width, options.value_width
    return options.num_heads * K + options.kv_heads * (K + V)


def _state_bytes(options: MixerOptions, tokens: int, dtype: torch.dtype) -> int:
    G = options.kv_heads
    if isinstance(options, SoftmaxAttentionOptions):
        kept = tokens if options.window_size is None else min(tokens, options.window_size - 1)
        position = torch.int64.itemsize
        return kept * (2 * G * options.width * dtype.itemsize + position)
    X, numbers = options.key_width + options.value_width, G * _memory_numbers(options)
    if isinstance(options, LinearAttentionOptions):
        tail = options.hidden_size if isinstance(options, RWKV6Options) else 0
        if isinstance(options, MambaOptions):
            tail = (options.conv_size - 1) * options.channels
        return numbers * compute_dtype(dtype).itemsize + tail * dtype.itemsize
    if options.gate in ("abc", "abc_printed"):
        numbers += G * options.slots
    tails = (options.conv_size - 1) * _qkv_width(options) if options.use_short_conv else 0
    kept = 0 if options.window_branch is None else min(tokens, options.window_branch - 1)
    in_sight = kept * (G * X * dtype.itemsize + torch.int64.itemsize)
    return numbers * compute_dtype(dtype).itemsize + tails * dtype.itemsize + in_sight
