"""What a model remembers between calls, and how transformers' `generate` is served with it.

Everything in this package that knows transformers' cache interface is in this file.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache

from gsa.layers.linear_attention import replay_linear
from gsa.layers.mamba import replay_mamba
from gsa.layers.mixer import MixerOutput, State
from gsa.layers.options import (
    LinearAttentionOptions,
    MambaOptions,
    RWKV6Options,
    SlotAttentionOptions,
    SoftmaxAttentionOptions,
)
from gsa.layers.rwkv6 import replay_rwkv6
from gsa.layers.slot_attention import replay_slots
from gsa.layers.softmax_attention import replay_window
from gsa.model.config import GSAConfig, MixerOptions

REPLAYS: dict[type, Callable[..., State]] = {
    SlotAttentionOptions: replay_slots,
    LinearAttentionOptions: replay_linear,
    RWKV6Options: replay_rwkv6,
    MambaOptions: replay_mamba,
    SoftmaxAttentionOptions: replay_window,
}
"""How each kind of layer makes its state again from recorded steps."""


@dataclass
class LayerCache:
    """The state of one layer, and while past is recorded, how it came about since the last crop.

    States are replaced, never written into, so sharing their tensors is safe.
    """

    options: MixerOptions
    state: State | None = None
    base: State | None = None
    steps: list[State] = field(default_factory=list)

    @property
    def memory(self) -> Tensor | None:
        """The slot memory [B, G, M, K+V], a linear mixer's [B, G, K, V] or Mamba's [B, E, K]; None
        before the first token and in softmax layers."""
        return None if self.state is None else self.state.get("memory")

    def advance(self, state: State, step: State, *, record: bool) -> None:
        """Takes over the state after a step, keeping the step itself if `record`."""
        if record:
            if not self.steps:
                self.base = self.state
            self.steps.append(step)
        self.state = state

    def forget_past(self) -> None:
        self.base, self.steps = None, []

    def keep_recorded(self, tokens: int) -> None:
        """Goes back to the state after the first `tokens` of the recorded ones."""
        if tokens == 0:
            self.state = self.base
        else:
            names = self.steps[0]
            joined = {name: torch.cat([step[name] for step in self.steps], 1) for name in names}
            step = {name: value[:, :tokens] for name, value in joined.items()}
            self.state = REPLAYS[type(self.options)](self.options, self.base, step)

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Applies a change of the batch dimension to everything held."""

        def of(state: State | None) -> State | None:
            return None if state is None else {name: change(t) for name, t in state.items()}

        self.state, self.base = of(self.state), of(self.base)
        self.steps = [{name: change(t) for name, t in step.items()} for step in self.steps]


@dataclass(frozen=True)
class Snapshot:
    """A model's state at one moment: per layer, and how many columns it has seen."""

    states: tuple[State | None, ...]
    length: int


class GSACache(Cache):
    """The state of a whole model: `layers[i].state`, tensors by name, batch first.

    Slot layers hold a memory, with an abc gate its normaliser, with short convolutions their
    tails; layers of linear attention hold a memory, RWKV6's their last input too, Mamba's the tail
    of its convolution: sizes that do not depend on how much was read.
    Softmax layers of a hybrid hold keys and values, with a window at most window_size - 1 of them.

    Args:
        config: the model's.
    """

    layers: list[LayerCache]  # type: ignore[assignment]

    def __init__(self, config: GSAConfig):
        self.length = 0
        self.record_past = False
        self.recorded = 0
        layers = [LayerCache(config.mixer_options(i)) for i in range(config.num_hidden_layers)]
        super().__init__(layers=layers)  # type: ignore[arg-type]

    def advance(self, layer: int, mixed: MixerOutput) -> None:
        """Takes over what a layer's mixer returned for the current tokens."""
        self.layers[layer].advance(mixed.state, mixed.step, record=self.record_past)

    def seen(self, tokens: int) -> None:
        """Counts the columns of a finished forward pass, padding included."""
        self.length += tokens
        if self.record_past:
            self.recorded += tokens

    def snapshot(self) -> Snapshot:
        """The state as it is now. Shares tensors with the cache, costs nothing, stays as it is."""
        return Snapshot(tuple(layer.state for layer in self.layers), self.length)

    def restore(self, snapshot: Snapshot) -> None:
        """Goes back to a snapshot, of this cache or of another of the same model."""
        if len(snapshot.states) != len(self.layers):
            raise ValueError(
                f"snapshot: expected one of {len(self.layers)} layers, got {len(snapshot.states)}"
            )
        for layer, state in zip(self.layers, snapshot.states, strict=True):
            layer.state = state
            layer.forget_past()
        self.length, self.recorded = snapshot.length, 0

    def fork(self) -> "GSACache":
        """An independent cache with the same state: what one reads, the other does not."""
        twin = object.__new__(GSACache)
        twin.__dict__.update(self.__dict__)
        twin.layers = [LayerCache(layer.options) for layer in self.layers]
        twin.record_past = False
        twin.restore(self.snapshot())
        return twin

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens: -n removes n, a positive number is the length to keep.

        Only tokens read since `activate_past_recording` (or the last crop) can be removed: a
        recurrent memory is not cut, it is taken from before them and those kept are written again.
        """
        remove = -tokens_to_remove
        if tokens_to_remove > 0:
            remove = max(self.length - tokens_to_remove, 0)
        if remove > self.recorded:
            raise ValueError(
                f"tokens_to_remove: expected at most the {self.recorded} tokens recorded since "
                f"activate_past_recording() or the last crop, got {remove}; for longer ways back, "
                "take a snapshot() before and restore() it"
            )
        for layer in self.layers:
            if remove:
                layer.keep_recorded(self.recorded - remove)
            layer.forget_past()
        self.length -= remove
        self.recorded = 0

    def activate_past_recording(self) -> None:
        """From now on keeps what is needed to `crop` later; every crop lets go of it."""
        self.record_past = True

    def reset(self) -> None:
        """Back to before the first token."""
        self.restore(Snapshot((None,) * len(self.layers), 0))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        self._change_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows given by index or by a boolean mask."""
        self._change_rows(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row."""
        self._change_rows(lambda t: t.repeat_interleave(repeats, 0))

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        for layer in self.layers:
            layer.change_rows(change)

    def tensors(self) -> dict[str, Tensor]:
        """Everything in the state, by name: "layers.3.memory" and so on."""
        return {
            f"layers.{i}.{name}": tensor
            for i, layer in enumerate(self.layers)
            for name, tensor in (layer.state or {}).items()
        }

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many columns were read, padding included; the same for all layers."""
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no limit."""
        return -1

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """Whether anything was read."""
        return self.length > 0

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused: the cache belongs to a GSA model."""
        raise ValueError("past_key_values: a GSACache serves GSA models only")

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first token."""
        states = (layer.state or {} for layer in self.layers)
        return next((t.shape[0] for state in states for t in state.values()), -1)

    @property
    def is_initialized(self) -> bool:
        return self.length > 0

    @property
    def is_compileable(self) -> bool:
        """False, or generation would prepare four-dimensional masks."""
        return False

    @property
    def is_croppable(self) -> bool:
        """True: recorded tokens can be removed without a trace."""
        return True

    @property
    def is_sliding(self) -> list[bool]:
        return [getattr(layer.options, "window_size", None) is not None for layer in self.layers]

    @property
    def is_linear(self) -> list[bool]:
        return [not isinstance(layer.options, SoftmaxAttentionOptions) for layer in self.layers]


class GSAGenerationMixin(GenerationMixin):
    """`generate` with a `GSACache` where transformers would make a cache of its own."""

    config: GSAConfig

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise ValueError(
                "cache_implementation: expected None (a GSA model has one kind of cache), got "
                f"{generation_config.cache_implementation!r}"
            )
        given = model_kwargs.get("past_key_values")
        if given is not None:
            check_cache(given)
            given._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = GSACache(self.config)
            if getattr(generation_config, "is_assistant", False):
                model_kwargs["past_key_values"].activate_past_recording()


def check_cache(given: object) -> GSACache:
    """Refuses a cache that is not ours."""
    if not isinstance(given, GSACache):
        raise ValueError(
            f"past_key_values: expected a gsa.model.GSACache or None, got {type(given).__name__}"
        )
    return given
