"""A conversation whose past is a state: what was said is never read again."""

import sys
from collections.abc import Generator
from typing import Any

from gsa.generation.config import ChatConfig
from gsa.generation.decoder import Decoder
from gsa.generation.sampling import Sampling
from gsa.generation.state import ModelState
from gsa.generation.text import TextStream, load, to_device


class Chat:
    """Messages and answers, in the tokenizer's chat template; without one, lines of plain text.

    Args:
        decoder: whose only text this is.
        tokenizer: of its model.
        state: read before the first message; None for nothing.
        system: instructions for the template; ValueError if there is none.
    """

    def __init__(
        self, decoder: Decoder, tokenizer: Any, *, state: ModelState | None = None, system: str = ""
    ):
        self._decoder, self._tokenizer = decoder, tokenizer
        self._templated = getattr(tokenizer, "chat_template", None) is not None
        if system and not self._templated:
            raise ValueError("system: expected none, since the tokenizer has no chat template")
        self._messages = [{"role": "system", "content": system}] if system else []
        self._before = self.state = state
        self._read = ""

    def answer(self, message: str, sampling: Sampling) -> Generator[str, None, None]:
        """The answer to a message, in pieces. Closed early, what was written so far is kept."""
        ids = self._unread(message)
        start = self._decoder.prefill(ids, self.state)
        row = self._decoder.start(start, sampling)
        stream = TextStream(self._tokenizer, ids)
        written: list[int] = []
        end = ""
        try:
            while not end:
                for _, token, end in self._decoder.advance():
                    written.append(token)
                    if end != "stop":
                        yield stream.add(token)
            yield stream.end()
        finally:
            # Cut off, the device may have written more than has come back.
            self.state = self._decoder.take(row) if end else self._decoder.prefill(written, start)
            self._decoder.release(row)
            said = written[:-1] if end == "stop" else written
            self._messages.append({"role": "assistant", "content": self._decode(said)})
            self._read += self._decode(written)

    def _unread(self, message: str) -> list[int]:
        """The tokens between what the state has read and the answer."""
        if not self._templated:
            first = self.state is None
            return self._tokenizer(message + "\n", add_special_tokens=first)["input_ids"]
        self._messages.append({"role": "user", "content": message})
        whole = self._tokenizer.apply_chat_template(
            self._messages, tokenize=False, add_generation_prompt=True
        )
        if not whole.startswith(self._read):  # a template that shows the past in another way
            self._read, self.state = "", self._before
        new, self._read = whole[len(self._read) :], whole
        return self._tokenizer(new, add_special_tokens=False)["input_ids"]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)


def chat(config: ChatConfig) -> None:
    """Talk to a model: a line from you, an answer from it, until the end of the input."""
    model, tokenizer = load(config.model, config.dtype)
    decoder = Decoder(
        model.to(to_device(config.device)),
        capacity=config.capacity or None,
        compile=config.compile,
    )
    state = ModelState.load(config.state) if config.state else None
    session = Chat(decoder, tokenizer, state=state, system=config.system)
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        print(prompt, end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if not line.strip():
            continue
        # A terminal in another encoding: bytes that are no text become U+FFFD, not an error.
        message = line.rstrip("\n").encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        pieces = session.answer(message, Sampling.of(config))
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pieces.close()
        print()
