"""Decoding at the speed of memory: a pool of states at fixed addresses, one captured step.

decoder = Decoder(model, rows=64)
state = decoder.prefill(tokens)
for token in decoder.write(state, Sampling(max_new_tokens=100)):
    ...
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial, reduce
from operator import or_
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gsa.generation.prefill import Reading, Tokens
from gsa.generation.progress import Progress
from gsa.generation.sampling import MAX_ENDS, Choices, Needs, Sampling
from gsa.generation.skinny_block import SkinnyBlock, SkinnyHead, takes_skinny_blocks
from gsa.generation.state import ModelState, fingerprint
from gsa.generation.step import Head, StatePool, StepBlock
from gsa.generation.thin_block import ThinBlock, ThinHead, takes_thin_blocks


class Written(NamedTuple):
    """A token that a row has written; `end` says why it is the row's last, if it is."""

    row: int
    token: int
    end: Literal["", "stop", "length"]


@dataclass(eq=False)
class Text:
    """What the host knows about the text that a row is writing."""

    sampling: Sampling
    ends: frozenset[int]
    steps: int = 0
    """Steps begun."""
    written: int = 0
    """Tokens that came back."""
    done: bool = False

    @property
    def goes_on(self) -> bool:
        """Whether a further step could write a token, for all that is known yet."""
        return not self.done and self.steps < self.sampling.max_new_tokens


@dataclass(frozen=True)
class Flight:
    """A step whose tokens are on their way to the host."""

    box: Tensor
    arrived: Any
    texts: tuple[Text | None, ...] = field(repr=False)


class Decoder:
    """Writes up to `rows` texts at once; they start and stop whenever they like.

    A step always works on all rows of the pool, and a row that writes nothing keeps its state. So
    what a row writes depends on its state, its `Sampling` and the size of the pool, not on its
    neighbours or its place. On a CUDA device a step is one graph, and tokens come back one
    step late, so that the device never waits. On a CPU the same function runs eagerly.

    Args:
        model: a `GSAForCausalLM` in eval mode. Its input projections are copied, so that later
            changes of its weights are not seen.
        rows: P, texts at once.
        capacity: tokens of a text at most, for models with softmax layers without a window; None
            means the config's max_position_embeddings. Others have no limit.
        compile: whether what kernels of ours do not do of a step goes through torch.compile, on
            CUDA devices only: the first step takes long, all others less.

    Attributes:
        ends: tokens that end a text unless `start` is told others; the model's own.
    """

    def __init__(
        self, model: Any, *, rows: int = 1, capacity: int | None = None, compile: bool = False
    ):
        if rows < 1:
            raise ValueError(f"rows: expected at least 1, got {rows}")
        if capacity is not None and capacity < 1:
            raise ValueError(f"capacity: expected at least 1, got {capacity}")
        self.model, self.rows, self.device = model.eval(), rows, model.device
        self._on_cuda = self.device.type == "cuda"
        if compile and not self._on_cuda:  # its C++ writes beyond the end of the noise, torch 2.13
            raise ValueError(f"compile: expected False on {self.device}, got True")
        ends = model.generation_config.eos_token_id
        self.ends = frozenset([ends] if isinstance(ends, int) else ends or ())
        self.is_thin = takes_thin_blocks(model, rows)
        self.is_skinny = takes_skinny_blocks(model, rows)
        layers = model.model.layers
        if self.is_thin:
            self.blocks, self.head = [ThinBlock(block) for block in layers], ThinHead(model)
        elif self.is_skinny:
            self.blocks = [SkinnyBlock(block, rows) for block in layers]
            self.head = SkinnyHead(model)
        else:
            bounds = model.model.log_bounds()
            self.blocks = [StepBlock(*pair) for pair in zip(layers, bounds, strict=True)]
            self.head = Head(model)
        capacity = int(capacity or model.config.max_position_embeddings)
        self.pool = StatePool([block.attn for block in self.blocks], rows, capacity)
        self.choices = Choices(rows, model.config.vocab_size, self.device)
        self.at = Progress(rows, self.device)
        self.lag = 1 if self._on_cuda else 0  # steps begun before a step's tokens are looked at
        self._texts: list[Text | None] = [None] * rows
        self._flights: deque[Flight] = deque()
        self._boxes = [self._new_box() for _ in range(3)]
        self._graphs: dict[Needs, Any] = {}
        if compile:
            self._compile()

    def _new_box(self) -> Tensor:
        return torch.zeros(2, self.rows, dtype=torch.int64, pin_memory=self._on_cuda)

    def _compile(self) -> None:
        # Tuned by coordinate descent, products with one row become reductions fused with what
        # is around them, which read weights faster than matrix products do.
        options: dict[str, Any] = {"coordinate_descent_tuning": True}
        for part in () if self.is_thin or self.is_skinny else (*self.blocks, self.head):
            part.compile(fullgraph=True, dynamic=False, options=options)
        self.at.compile(partial(torch.compile, fullgraph=True, dynamic=False, options=options))

    @cached_property
    def fingerprint(self) -> str:
        """Of the model; states carry it."""
        return fingerprint(self.model)

    def prefill(self, tokens: Tokens, state: ModelState | None = None) -> ModelState:
        """The state after reading tokens [T], from the start or after those of another state.

        Reads in chunks: memory does not depend on T (but for what softmax layers of a hybrid keep).
        ValueError for no tokens at all, ids that the model has not, or a state of another model.
        """
        return self.reading(tokens, state).finish()

    def reading(self, tokens: Tokens, state: ModelState | None = None) -> Reading:
        """What `prefill` does, to be done chunk by chunk between steps; its errors."""
        if state is not None:
            self._check(state)
        return Reading(self.model, tokens, state, self.fingerprint)

    def _check(self, state: ModelState) -> None:
        if state.fingerprint != self.fingerprint:
            raise ValueError(
                f"state: expected one of this model ({self.fingerprint}), got one of another "
                f"({state.fingerprint}): other weights, dtype or config; read the text again "
                "with this model"
            )
        if state.tensors or state.tokens > 1:
            self.pool.check(state.tensors)

    @torch.no_grad()
    def start(
        self, state: ModelState, sampling: Sampling, *, ends: Iterable[int] | None = None
    ) -> int:
        """Lets a free row go on from a state; returns the row. The next step writes a token.

        Args:
            ends: tokens that end the text; None means the model's own.

        Raises:
            ValueError: no row is free, the text would not fit, or the state is another model's.
        """
        self._check(state)
        stops = self.ends if ends is None else frozenset(ends)
        if len(stops) > MAX_ENDS:
            raise ValueError(f"ends: expected at most {MAX_ENDS} tokens, got {len(stops)}")
        most = state.tokens - 1 + sampling.max_new_tokens
        if self.pool.is_bounded and most > self.pool.capacity:
            raise ValueError(
                f"capacity: expected at least {most} for a text of {state.tokens} tokens and "
                f"max_new_tokens = {sampling.max_new_tokens}, got {self.pool.capacity}, which is "
                "what softmax layers hold; give more, or ask for fewer tokens"
            )
        if None not in self._texts:
            raise ValueError(f"start: expected a free row, got {self.rows} taken; release one")
        row = self._texts.index(None)
        self.pool.put(row, state.tensors)
        self.choices.put(row, sampling)
        self.choices.met[row].copy_(state.met)
        self.at.start(row, state.last, state.tokens - 1, sampling.max_new_tokens, stops)
        self._texts[row] = Text(sampling, stops)
        return row

    def release(self, row: int) -> None:
        """Frees a row, finished or not. Does not wait for the device."""
        self.at.rest(row)
        self._texts[row] = None

    @torch.no_grad()
    def take(self, row: int) -> ModelState:
        """A copy of the state of a row that `start` returned, all it has written included."""
        if self._texts[row] is None:
            raise ValueError(f"row: expected one that start returned, got {row}, which is free")
        return ModelState(
            tensors=self.pool.take(row) if int(self.at.position[row]) else {},
            tokens=int(self.at.position[row]) + 1,
            last=int(self.at.token[row]),
            met=self.choices.met[row].cpu(),
            fingerprint=self.fingerprint,
        )

    def advance(self) -> list[Written]:
        """Begins a step if any row goes on, and returns the tokens that have come back.

        On a CUDA device these are the tokens of the step before. Nothing in flight and nothing
        written: all texts are finished.
        """
        texts = [text for text in self._texts if text is not None and text.goes_on]
        if texts:
            self._flights.append(self._launch(texts))
        if self._flights and (not texts or len(self._flights) > self.lag):
            return self._land(self._flights.popleft())
        return []

    @property
    def taken(self) -> int:
        """Rows that were started and not released yet."""
        return sum(text is not None for text in self._texts)

    @property
    def idle(self) -> bool:
        """Whether nothing is left to advance."""
        return not self._flights and not any(text and text.goes_on for text in self._texts)

    def _launch(self, texts: list[Text]) -> Flight:
        for text in texts:
            text.steps += 1
        needs = reduce(or_, (text.sampling.needs for text in texts))
        box, arrived = self._boxes.pop(0), None
        self._boxes.append(box)
        if self._on_cuda:
            with torch.cuda.device(self.device):
                if needs not in self._graphs:
                    self._graphs[needs] = self._capture(needs)
                self._graphs[needs].replay()
                box.copy_(self.at.emitted, non_blocking=True)
                arrived = torch.cuda.Event()
                arrived.record()
        else:
            self.step(needs)
            box.copy_(self.at.emitted)
        return Flight(box, arrived, tuple(self._texts))

    def _land(self, flight: Flight) -> list[Written]:
        if flight.arrived is not None:
            flight.arrived.synchronize()
        tokens, live = flight.box.tolist()
        written = []
        for row, text in enumerate(flight.texts):
            # A row that was released meanwhile belongs to no one or to another text.
            if text is None or text.done or text is not self._texts[row] or tokens[row] < 0:
                continue
            text.written += 1
            text.done = not live[row]
            end = "" if not text.done else "stop" if tokens[row] in text.ends else "length"
            written.append(Written(row, tokens[row], end))
        return written

    @torch.no_grad()
    def step(self, needs: Needs) -> None:
        """Reads one token in every live row and writes the next: what a graph captures.

        Works on tensors whose addresses stay, never waits for the device, and where no row is live
        changes nothing but `emitted`.
        """
        layout = self.at.layout
        x_P1D = self.model.model.embeddings(self.at.token[:, None])
        for block, state in zip(self.blocks, self.pool.layers, strict=True):
            x_P1D = block(x_P1D, layout, state)
        self.at.advance(self.head(x_P1D), self.choices, needs)

    def _capture(self, needs: Needs) -> Any:
        """A graph of the step. Warms up with no row live, which leaves every state as it is."""
        with self.at.all_at_rest():
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(3):
                    self.step(needs)
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step(needs)
        return graph

    def write(
        self, state: ModelState, sampling: Sampling, *, ends: Iterable[int] | None = None
    ) -> Iterator[int]:
        """The tokens of one text as they come, an end token included; the pool's only one."""
        if any(self._texts):
            raise ValueError("write: expected a pool without other texts; use start and advance")
        row = self.start(state, sampling, ends=ends)
        try:
            done = False
            while not done:
                for written in self.advance():
                    if written.row == row:
                        done = bool(written.end)
                        yield written.token
        finally:
            self.release(row)

    def write_all(
        self, states: Sequence[ModelState], samplings: Sequence[Sampling]
    ) -> list[list[int]]:
        """The tokens of many texts, each begun as soon as a row is free, in their order."""
        texts: list[list[int]] = [[] for _ in states]
        waiting = deque(enumerate(zip(states, samplings, strict=True)))
        owner: dict[int, int] = {}
        while waiting or owner:
            while waiting and None in self._texts:
                place, (state, sampling) = waiting.popleft()
                owner[self.start(state, sampling)] = place
            for row, token, end in self.advance():
                if row in owner:
                    texts[owner[row]].append(token)
                    if end:
                        del owner[row]
                        self.release(row)
        return texts
