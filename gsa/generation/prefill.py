"""Reading a text of any length into a state, chunk by chunk."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gsa.generation.state import ModelState
from gsa.model import GSACache, Snapshot

CHUNK = 4096
"""Tokens that are read at a time."""

Tokens = Sequence[int] | Tensor
"""Of one text, [T]."""


class Reading:
    """A text on its way into a state, a chunk at a time.

    Memory does not depend on its length (but for what softmax layers of a hybrid keep): the last
    token is left to the first step, so no logits are made.

    Args:
        model: a `GSAForCausalLM`.
        tokens: [T], to be read from the start or after those of another state.
        before: that state; None for the start.
        fingerprint: of the model.

    Raises:
        ValueError: no tokens at all, or ids that the model has not.
    """

    def __init__(
        self,
        model: Any,
        tokens: Tokens,
        before: ModelState | None,
        fingerprint: str,
    ):
        words = model.config.vocab_size
        ids = torch.as_tensor(tokens, dtype=torch.int64, device="cpu")
        if ids.dim() != 1 or (before is None and not len(ids)):
            raise ValueError(f"tokens: expected at least one, in one row, got {list(ids.shape)}")
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= words):
            raise ValueError(
                f"tokens: expected numbers from 0 to {words - 1}, got {int(ids.min())} to "
                f"{int(ids.max())}"
            )
        self._model, self._fingerprint, self._cache = model, fingerprint, GSACache(model.config)
        seen, met = 0, torch.zeros(words, dtype=torch.bool)
        if before is not None:
            seen, met = before.tokens - 1, before.met.cpu().clone()
            ids = torch.cat([torch.tensor([before.last]), ids])
            self._cache.restore(_snapshot(before, model.config.num_hidden_layers, model.device))
        met[ids] = True
        self._met, self._tokens, self._last = met, seen + len(ids), int(ids[-1])
        self._left = deque(part for part in ids[:-1].split(CHUNK) if len(part))

    @property
    def done(self) -> bool:
        """Whether all is read."""
        return not self._left

    @torch.no_grad()
    def advance(self) -> None:
        """Reads the next chunk."""
        part = self._left.popleft()[None].to(self._model.device)
        self._model.model(input_ids=part, past_key_values=self._cache)

    def finish(self) -> ModelState:
        """Reads what is left; the state after the text."""
        while not self.done:
            self.advance()
        return ModelState(
            tensors=self._cache.tensors(),
            tokens=self._tokens,
            last=self._last,
            met=self._met,
            fingerprint=self._fingerprint,
        )


def _snapshot(state: ModelState, layers: int, device: torch.device) -> Snapshot:
    states = []
    for layer in range(layers):
        prefix = f"layers.{layer}."
        found = {
            name.removeprefix(prefix): tensor.to(device)
            for name, tensor in state.tensors.items()
            if name.startswith(prefix)
        }
        states.append(found or None)
    return Snapshot(tuple(states), state.tokens - 1)
