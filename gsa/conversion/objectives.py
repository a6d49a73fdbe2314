"""What a student learns from its teacher: objectives for `gsa.training.train`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import AutoModelForCausalLM

from gsa.data import Batch
from gsa.layers import SoftmaxAttention, TokenLayout
from gsa.model.loading import without_bars
from gsa.model.loss import IGNORE, linear_kl, next_tokens
from gsa.training.distributed import is_sharded

Seen = Callable[[int, Tensor, Tensor], None]
"""(layer, what its attention was given, what it gave), each [1, N, D]."""


class FrozenTeacher:
    """A pretrained Transformer that reads what its student reads; loaded when it is first asked.

    folder: of the model. seq_len: tokens of a row. device, dtype: where and in what it computes.
    """

    def __init__(self, folder: str | Path, seq_len: int, device: str, dtype: torch.dtype):
        self.folder, self.seq_len, self.device, self.dtype = folder, seq_len, device, dtype

    @cached_property
    def model(self) -> Any:
        with without_bars():
            model: Any = AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.dtype)
        return model.to(self.device).eval().requires_grad_(False)

    @property
    def head_WD(self) -> Tensor:
        return self.model.get_output_embeddings().weight

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        """Its normed last hidden states [N, D], each document by itself."""
        return torch.cat([self._read(*part) for part in self._parts(batch)])

    @torch.no_grad()
    def attention(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """What each layer's attention is given and gives, both [1, N, D]."""
        parts = []
        for part in self._parts(batch):
            with self._watched() as seen:
                self._read(*part)
            parts.append(seen)
        layers = zip(*parts, strict=True)
        return [tuple(torch.cat(both, 1) for both in zip(*one, strict=True)) for one in layers]  # pyright: ignore[reportReturnType]

    def _read(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Hidden states of some rows, end to end."""
        output = self.model.model(input_ids=ids, position_ids=positions, use_cache=False)
        return output.last_hidden_state.flatten(0, 1)

    def _parts(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens and positions of all whole rows, [rows, T], and of what is left, [1, rest].

        transformers keeps documents of a row apart by positions that begin anew.
        """
        ids = batch.input_ids
        positions = TokenLayout.of_packed(ids.shape[1], ids.device, batch.cu_seqlens).positions
        whole = ids.shape[1] // self.seq_len * self.seq_len
        for part, length in ((slice(0, whole), self.seq_len), (slice(whole, None), -1)):
            if (found := ids[:, part]).numel():
                length = found.shape[1] if length < 0 else length
                yield found.view(-1, length), positions[:, part].view(-1, length)

    @contextmanager
    def _watched(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """What layers' attention is given and gives meanwhile, in order."""
        seen: list[tuple[Tensor, Tensor]] = []

        def note(module: Any, args: Any, given: dict[str, Any], output: Any) -> None:
            x = given["hidden_states"] if "hidden_states" in given else args[0]
            seen.append((x.reshape(1, -1, x.shape[-1]), output[0].reshape(1, -1, x.shape[-1])))

        hooks = [
            layer.self_attn.register_forward_hook(note, with_kwargs=True)
            for layer in self.model.model.layers
        ]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()


class Align:
    """Each layer with a memory by itself gives what the teacher's attention gives for its input.

    The loss of a token is ‖student - teacher‖₂ / √D, the mean over those layers; the teacher's
    attention drives the residual stream, so that no layer's error reaches another.
    """

    def __init__(self, teacher: FrozenTeacher, *, compiled: bool = False):
        self.teacher, self.compiled = teacher, compiled

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        if not hasattr(model, "gap"):
            self._prepare(model)
        counts = (next_tokens(batch.labels) != IGNORE)[0]
        ids = batch.input_ids
        layout = TokenLayout.of_packed(ids.shape[1], ids.device, batch.cu_seqlens, batch.max_seqlen)
        return model.gap(self.teacher.attention(batch), layout, counts)

    def _prepare(self, model: Any) -> None:
        """Gives the model and its blocks ways in besides `forward`.

        A sharded model gathers a block's weights on that way too; mixers are compiled, if asked
        for, when they are first called.
        """
        for block in model.model.layers:
            if self.compiled:
                block.attn.compile(fullgraph=True)
            block.mix = MethodType(_mix, block)
            register_fsdp_forward_method(block, "mix")
        model.gap = MethodType(_gap, model)
        register_fsdp_forward_method(model, "gap")


def _gap(
    model: Any, wanted: list[tuple[Tensor, Tensor]], layout: TokenLayout, counts_N: Tensor
) -> Tensor:
    """How far layers with a memory are from what is wanted of them: (input, output) of each."""
    losses = []
    for block, (x, y) in zip(model.model.layers, wanted, strict=True):
        if not isinstance(block.attn, SoftmaxAttention):
            # With a gradient to hand on, a sharded block lets its weights go as soon as it may.
            gap = (block.mix(x.requires_grad_(is_sharded(model)), layout) - y)[0].float()
            losses.append((gap.norm(dim=1) * counts_N).sum() / gap.shape[1] ** 0.5)
    return torch.stack(losses).mean()


def _mix(block: Any, x_BTD: Tensor, layout: TokenLayout) -> Tensor:
    return block.attn(x_BTD, layout).output


class Kl:
    """KL(teacher ‖ student) of each next token, in nats, at temperature 1."""

    def __init__(self, teacher: FrozenTeacher):
        self.teacher = teacher

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        wanted = self.teacher.hidden(batch)
        hidden = hidden_states(model, batch)
        counts = (next_tokens(batch.labels) != IGNORE)[0]
        return linear_kl(hidden, model.lm_head.weight, wanted, self.teacher.head_WD, counts)


def hidden_states(model: Any, batch: Batch) -> Tensor:
    """A student's normed last hidden states [N, D] of packed rows."""
    output = model(
        input_ids=batch.input_ids,
        cu_seqlens=batch.cu_seqlens,
        max_seqlen=batch.max_seqlen,
        output_hidden_states=True,
        logits_to_keep=1,
    )
    return output.hidden_states[-1][0]
