"""The thread that owns the decoder: who gets a row, what is read, one step after another."""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gsa.generation.decoder import Decoder
from gsa.generation.prefill import Reading
from gsa.generation.sampling import Sampling
from gsa.generation.server.bodies import ApiError
from gsa.generation.server.metrics import Metrics
from gsa.generation.server.prefixes import Prefixes
from gsa.generation.state import ModelState


@dataclass(eq=False)
class Prompt:
    """What is read once for all texts that go on from it."""

    tokens: list[int]
    after: str
    """Name of the model asked for: of what was read before the prompt."""
    before: ModelState | None
    """The state of that; None for nothing."""
    state: ModelState | None = None
    """After the prompt, once it is read."""
    reused: int = 0
    """Tokens that a kept state had read already."""


@dataclass(eq=False)
class Text:
    """One text to be written."""

    prompt: Prompt
    sampling: Sampling
    index: int
    """Its place in the answer."""
    inbox: Any
    """Where its events are put, by whoever the engine delivers them to."""
    asked: float = field(default_factory=time.monotonic)
    written: list[int] = field(default_factory=list)


class Event(NamedTuple):
    """What happened to a text: a token, which may be its last, or an error in its place."""

    text: Text
    token: int = -1
    end: str = ""
    error: ApiError | None = None


class Engine:
    """Writes texts on a thread of its own; other threads call its methods, which never wait long.

    Each turn reads a chunk of the prompt of the text that has waited longest (if a row is free for
    it) and steps the pool once, so that a long prompt slows others down but never stops them.

    Args:
        decoder: nobody else may use it once `start` was called.
        queue: texts that may be accepted beyond the decoder's rows.
        prefixes: where states are kept.
        metrics: what to count in.
    """

    def __init__(self, decoder: Decoder, *, queue: int, prefixes: Prefixes, metrics: Metrics):
        self.decoder, self._prefixes, self._metrics = decoder, prefixes, metrics
        self._most = decoder.rows + queue
        self._changed = threading.Condition()
        self._waiting: deque[Text] = deque()
        self._leaving: list[tuple[Text, str]] = []
        self._open: set[Text] = set()
        self._closed = self._stopped = self.failed = False
        self._rows: dict[int, Text] = {}
        self._reading: tuple[Text, Reading] | None = None
        self._deliver: Callable[[list[Event]], None] = lambda events: None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        metrics.rows.set(decoder.rows)
        metrics.rows_taken.set_function(lambda: decoder.taken)
        metrics.texts_open.set_function(lambda: len(self._open))
        metrics.prefix_bytes.set_function(lambda: prefixes.bytes)

    def start(self, deliver: Callable[[list[Event]], None]) -> None:
        """deliver: is handed each turn's events, on the engine's thread."""
        self._deliver = deliver
        self._thread.start()

    def submit(self, texts: Sequence[Text]) -> None:
        """Queues texts, all or none.

        ApiError 429 if not so many may wait, 503 after `close` or a failure.
        """
        with self._changed:
            if self._closed:
                raise ApiError(503, "the server is shutting down; try another", retry_after=5)
            if len(self._open) + len(texts) > self._most:
                raise ApiError(
                    429,
                    f"expected at most {self._most} texts at a time, {len(self._open)} are being "
                    f"written or waiting and {len(texts)} more came; try again later",
                    code="queue_full",
                    retry_after=1,
                )
            self._open.update(texts)
            self._waiting.extend(texts)
            self._changed.notify()

    def leave(self, texts: Sequence[Text], end: str) -> None:
        """Gives up texts wherever they are; those that have ended already do not mind.

        end: why, for the metrics.
        """
        with self._changed:
            self._leaving.extend((text, end) for text in texts)
            self._changed.notify()

    def close(self) -> None:
        """Accepts nothing more; what was accepted goes on."""
        with self._changed:
            self._closed = True

    def stop(self) -> None:
        """Ends the thread after its turn; texts not finished get ApiError 503."""
        with self._changed:
            self._closed = self._stopped = True
            self._changed.notify()

    def join(self) -> None:
        """Waits for the thread's end."""
        self._thread.join()

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def idle(self) -> bool:
        """Whether every text that was accepted has ended."""
        return not self._open

    def _run(self) -> None:
        try:
            while self._wait():
                self._turn()
            error = ApiError(503, "the server was shut down meanwhile; try another", retry_after=5)
        except Exception:
            traceback.print_exc()
            self.failed = True
            error = ApiError(500, "the decoder failed; the server's log says why")
        with self._changed:
            self._closed = True
            cut, self._open = list(self._open), set()
        for _ in cut:
            self._metrics.texts.labels("error").inc()
        self._deliver([Event(text, error=error) for text in cut])

    def _wait(self) -> bool:
        """Until there is something to do; whether to go on."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._stopped or self._leaving or self._waiting or self._reading or self._rows
                )
            )
            leaving, self._leaving = self._leaving, []
            for text, _ in leaving:
                if text in self._waiting:
                    self._waiting.remove(text)
        for text, end in leaving:
            self._end(text, end)
        return not self._stopped

    def _turn(self) -> None:
        text = self._reading[0] if self._reading else self._next()
        if text is not None:
            try:
                self._prepare(text)
            except ValueError as error:
                self._end(text, "error")
                self._deliver([Event(text, error=ApiError(400, str(error)))])
        events = []
        for row, token, end in self.decoder.advance():
            text = self._rows[row]
            if not text.written:
                self._metrics.first_token.observe(time.monotonic() - text.asked)
            text.written.append(token)
            events.append(Event(text, token, end))
            if end:
                self._keep(text, row)
                self._end(text, end)
        if events:
            self._metrics.steps.inc()
            self._metrics.written_tokens.inc(len(events))
            self._deliver(events)

    def _next(self) -> Text | None:
        """The text that has waited longest, if a row is free for it."""
        with self._changed:
            free = len(self._rows) < self.decoder.rows
            return self._waiting.popleft() if free and self._waiting else None

    def _prepare(self, text: Text) -> None:
        """Reads a chunk of a text's prompt; starts its row if that was the last."""
        prompt = text.prompt
        if prompt.state is None:
            if self._reading is None:
                known = self._prefixes.longest(prompt.after, prompt.tokens)
                before, prompt.reused = known or (prompt.before, 0)
                rest = prompt.tokens[prompt.reused :]
                self._reading = text, self.decoder.reading(rest, before)
            reading = self._reading[1]
            if not reading.done:
                reading.advance()
            if not reading.done:
                return
            prompt.state, self._reading = reading.finish(), None
            self._prefixes.put(prompt.after, prompt.tokens, prompt.state)
            self._metrics.prompt_tokens.inc(len(prompt.tokens))
            self._metrics.reused_tokens.inc(prompt.reused)
        self._rows[self.decoder.start(prompt.state, text.sampling)] = text

    def _keep(self, text: Text, row: int) -> None:
        """The state after a finished text, for the prompt that goes on from it."""
        if self._prefixes.enabled:
            tokens = text.prompt.tokens + text.written
            self._prefixes.put(text.prompt.after, tokens, self.decoder.take(row))

    def _end(self, text: Text, end: str) -> None:
        """Frees what a text holds, the first time."""
        with self._changed:
            if text not in self._open:
                return
            self._open.remove(text)
        for row in [row for row, owner in self._rows.items() if owner is text]:
            self.decoder.release(row)
            del self._rows[row]
        if self._reading is not None and self._reading[0] is text:
            self._reading = None
        self._metrics.texts.labels(end).inc()
