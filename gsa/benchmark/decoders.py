"""Language models of equal size that decode beside each other, each the fastest way it knows."""

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from gsa.benchmark.language_models import Rival
from gsa.generation.decoder import Decoder
from gsa.generation.sampling import Sampling

WARM_STEPS = 4
"""Steps before the clock starts; the first compiles and captures."""


class Contender(Protocol):
    """A model that reads a prefix in every row and then writes, greedily and without an end."""

    model: nn.Module
    note: str
    most_tokens: int
    """Tokens that are decoded at most, if it is slow; 0 for no limit."""

    def begin(self, rows: int, prefix: int, tokens: int) -> None:
        """Reads random tokens, makes room for so many more, and takes the first steps."""
        ...

    def decode(self, tokens: int) -> None:
        """Writes so many tokens in every row."""
        ...

    def prefill(self, tokens: int) -> None:
        """Reads one row of random tokens."""
        ...

    def end(self) -> None:
        """Lets go of what a case needed."""
        ...


def contender(one: Rival, device: torch.device, dtype: torch.dtype, *, compile: bool) -> Contender:
    """The model, with random weights, on the fastest way that there is for it."""
    made = {"transformer++": Transformer, "fla": Fla}.get(one.name, Ours)
    torch.manual_seed(0)
    with device:
        model: Any = one.build()
    return made(model.to(dtype).eval().requires_grad_(False), one.note, compile)


def random_tokens(model: Any, rows: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (rows, tokens), generator=generator)


@torch.no_grad()
def read_row(model: Any, tokens: int) -> None:
    """One row of random tokens, into a cache that is thrown away."""
    ids = random_tokens(model, 1, tokens).to(next(model.parameters()).device)
    model(input_ids=ids, use_cache=True, logits_to_keep=1)


class Ours:
    """`gsa.generation.Decoder`; every row goes on from one prefix, read once."""

    most_tokens = 0

    def __init__(self, model: Any, note: str, compile: bool):
        self.model, self.compile = model, compile
        self.note = note or "the decoder of gsa.generation"
        self._decoder: Decoder | None = None

    def _of(self, rows: int, tokens: int) -> Decoder:
        """A decoder of so many rows; layers that keep every token get room for just `tokens`."""
        decoder = self._decoder
        stale = decoder is not None and decoder.pool.is_bounded and decoder.pool.capacity != tokens
        if decoder is None or decoder.rows != rows or stale:
            self._decoder = None
            decoder = Decoder(self.model, rows=rows, capacity=tokens, compile=self.compile)
            self._decoder = decoder
        return decoder

    def begin(self, rows: int, prefix: int, tokens: int) -> None:
        decoder = self._of(rows, prefix + tokens + 2 * WARM_STEPS)
        state = decoder.prefill(random_tokens(self.model, 1, prefix)[0])
        sampling = Sampling(greedy=True, max_new_tokens=WARM_STEPS + tokens)
        for row in range(rows):
            decoder.release(row)
            decoder.start(state, sampling, ends=())
        for _ in range(WARM_STEPS):
            decoder.advance()

    def decode(self, tokens: int) -> None:
        assert self._decoder is not None
        while not self._decoder.idle:
            self._decoder.advance()

    def prefill(self, tokens: int) -> None:
        self._of(1, tokens + 1).prefill(random_tokens(self.model, 1, tokens)[0])

    def end(self) -> None:
        """A pool that grows with texts goes; else the step, compiled and captured, serves the next
        case of as many rows."""
        if self._decoder is not None and self._decoder.pool.is_bounded:
            self._decoder = None


class Transformer:
    """transformers' Llama with a static cache; on a GPU its step is compiled and captured."""

    most_tokens = 0

    def __init__(self, model: Any, note: str, compile: bool):
        self.model, self.compile = model, compile
        self.note = f"{note}, static cache"
        self._step: Callable[[], None] | None = None

    @torch.no_grad()
    def begin(self, rows: int, prefix: int, tokens: int) -> None:
        from transformers import StaticCache

        self.end()
        device = next(self.model.parameters()).device
        room = prefix + tokens + 2 * WARM_STEPS
        cache = StaticCache(config=self.model.config, max_cache_len=room)
        ids = random_tokens(self.model, rows, prefix).to(device)
        output = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
        torch._dynamo.reset()
        forward = self.model.forward
        if self.compile:
            forward = torch.compile(forward, fullgraph=True, dynamic=False)

        def step() -> None:
            logits = forward(input_ids=token, past_key_values=cache, use_cache=True).logits
            token.copy_(logits[:, -1:].argmax(-1))

        self._step = step
        if device.type == "cuda":
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_STEPS):
                    step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            self._step = graph.replay
        for _ in range(WARM_STEPS):
            self._step()

    @torch.no_grad()
    def decode(self, tokens: int) -> None:
        assert self._step is not None
        for _ in range(tokens):
            self._step()

    def prefill(self, tokens: int) -> None:
        read_row(self.model, tokens)

    def end(self) -> None:
        self._step = None


class Fla:
    """flash-linear-attention's GSA through its `generate`, prefix included; slow, so cut short."""

    most_tokens = 256

    def __init__(self, model: Any, note: str, compile: bool):
        self.model = model
        self.note = f"{note}; through generate(), which reads the prefix on the clock"
        self._ids: torch.Tensor | None = None

    def begin(self, rows: int, prefix: int, tokens: int) -> None:
        device = next(self.model.parameters()).device
        self._ids = random_tokens(self.model, rows, prefix).to(device)
        self.decode(WARM_STEPS)

    @torch.no_grad()
    def decode(self, tokens: int) -> None:
        assert self._ids is not None
        options: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        self.model.generate(  # pyright: ignore[reportCallIssue]
            self._ids, do_sample=False, use_cache=True, **options
        )

    def prefill(self, tokens: int) -> None:
        read_row(self.model, tokens)

    def end(self) -> None:
        self._ids = None


def clocked(run: Callable[[], None], device: torch.device) -> float:
    """Seconds, from an idle device to an idle device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin
