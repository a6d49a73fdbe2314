"""Reading a text of any length into a state, chunk by chunk."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gsa.generation.state import ModelState
from gsa.model import GSACache, Snapshot

CHUNK = 4096
"""Tokens that are read at a time."""


@torch.no_grad()
def read(
    model: Any, tokens: Sequence[int] | Tensor, before: ModelState | None, fingerprint: str
) -> ModelState:
    """The state after tokens [T], read from the start or after those of another state.

    Memory does not depend on T (but for what softmax layers of a hybrid keep): the last token is
    left to the first step, so no logits are made. ValueError for no tokens at all, or ids that the
    model has not.
    """
    words = model.config.vocab_size
    ids = torch.as_tensor(tokens, dtype=torch.int64, device="cpu")
    if ids.dim() != 1 or (before is None and not len(ids)):
        raise ValueError(f"tokens: expected at least one, in one row, got {list(ids.shape)}")
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= words):
        raise ValueError(
            f"tokens: expected numbers from 0 to {words - 1}, got {int(ids.min())} to "
            f"{int(ids.max())}"
        )
    cache, seen, met = GSACache(model.config), 0, torch.zeros(words, dtype=torch.bool)
    if before is not None:
        seen, met = before.tokens - 1, before.met.cpu().clone()
        ids = torch.cat([torch.tensor([before.last]), ids])
        cache.restore(_snapshot(before, model.config.num_hidden_layers, model.device))
    met[ids] = True
    for part in ids[:-1].split(CHUNK):
        if len(part):
            model.model(input_ids=part[None].to(model.device), past_key_values=cache)
    return ModelState(
        tensors=cache.tensors(),
        tokens=seen + len(ids),
        last=int(ids[-1]),
        met=met,
        fingerprint=fingerprint,
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
