"""From the engine's tokens to an answer: text cut at stop strings, as events or as a whole."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from pydantic import BaseModel

from gsa.generation.server.engine import Engine, Event, Text
from gsa.generation.text import TextStream


class Until:
    """Text up to the first of some strings; what may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held, self.found = stops, "", False
        self._longest = max(map(len, stops), default=1) - 1

    def add(self, piece: str, *, last: bool = False) -> str:
        """What of the text so far can be shown and was not yet."""
        held = self._held + piece
        places = [place for stop in self._stops if (place := held.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return held[: min(places)]
        keep = 0
        if not last:
            lengths = range(min(len(held), self._longest), 0, -1)
            ends = (n for n in lengths if any(s.startswith(held[-n:]) for s in self._stops))
            keep = next(ends, 0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


class Choice:
    """One text of an answer on its way from tokens to characters."""

    def __init__(self, text: Text, tokenizer: Any, stops: Sequence[str]):
        self.text, self.tokens, self.finish = text, 0, ""
        prompt = text.prompt
        last = [prompt.before.last] if prompt.before and not prompt.tokens else prompt.tokens
        self._stream, self._until = TextStream(tokenizer, last), Until(stops)

    def add(self, token: int, end: str) -> str:
        """The characters that a token completes; sets `finish` if they are the last."""
        self.tokens += 1
        piece = "" if end == "stop" else self._stream.add(token)
        if end:
            piece += self._stream.end()
        piece = self._until.add(piece, last=bool(end))
        self.finish = "stop" if self._until.found else end
        return piece


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class Answer:
    """All texts of one request. Whoever stops listening must call `give_up`.

    Args:
        engine: that writes them; its ApiErrors of `submit` are raised here.
        texts: whose inbox is this answer's queue.
        tokenizer: of the event loop's thread.
        stops: strings that end a text.
    """

    def __init__(self, engine: Engine, texts: Sequence[Text], tokenizer: Any, stops: Sequence[str]):
        self._engine = engine
        self.choices = [Choice(text, tokenizer, stops) for text in texts]
        self._inbox: asyncio.Queue[Event] = asyncio.Queue()
        for text in texts:
            text.inbox = self._inbox
        engine.submit(texts)

    async def pieces(self) -> AsyncIterator[tuple[Choice, str]]:
        """Characters as they come. Several tokens in one piece if they came in the meantime."""
        while not all(choice.finish for choice in self.choices):
            events = [await self._inbox.get()]
            while not self._inbox.empty():
                events.append(self._inbox.get_nowait())
            pieces: dict[int, str] = {}
            for event in events:
                choice = self.choices[event.text.index]
                if choice.finish:
                    continue  # written before the engine knew of the stop string
                if event.error is not None:
                    raise event.error
                piece = choice.add(event.token, event.end)
                pieces[event.text.index] = pieces.get(event.text.index, "") + piece
                if choice.finish and not event.end:
                    self._engine.leave([event.text], "stop")
            for index, piece in pieces.items():
                if piece or self.choices[index].finish:
                    yield self.choices[index], piece

    def give_up(self) -> None:
        """Frees what is not finished."""
        left = [choice.text for choice in self.choices if not choice.finish]
        if left:
            self._engine.leave(left, "cancelled")

    def usage(self) -> Usage:
        prompts = {id(choice.text.prompt): choice.text.prompt for choice in self.choices}.values()
        read = sum(len(prompt.tokens) for prompt in prompts)
        written = sum(choice.tokens for choice in self.choices)
        return Usage(
            prompt_tokens=read,
            completion_tokens=written,
            total_tokens=read + written,
            prompt_tokens_details={"cached_tokens": sum(prompt.reused for prompt in prompts)},
        )


class Form:
    """How an answer of one of the two kinds is written down.

    Args:
        chat: a chat's answer, or a completion.
        model: its name.
        fingerprint: of the model.
    """

    def __init__(self, *, chat: bool, model: str, fingerprint: str):
        self._chat = chat
        self._head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    async def whole(self, answer: Answer) -> dict[str, Any]:
        """The answer in one piece."""
        texts = [""] * len(answer.choices)
        async for choice, piece in answer.pieces():
            texts[choice.text.index] += piece
        choices = []
        for choice, text in zip(answer.choices, texts, strict=True):
            content = {"message": {"role": "assistant", "content": text}}
            shown = content if self._chat else {"text": text}
            choices.append(self._choice(choice.text.index, choice.finish, shown))
        kind = "chat.completion" if self._chat else "text_completion"
        usage = answer.usage().model_dump()
        return self._head | {"object": kind, "choices": choices, "usage": usage}

    async def events(self, answer: Answer, include_usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events, until the last: [DONE], or an error."""
        usage = {"usage": None} if include_usage else {}
        if self._chat:
            for choice in answer.choices:
                yield self._event(usage, choice.text.index, {"role": "assistant", "content": ""})
        async for choice, piece in answer.pieces():
            index = choice.text.index
            if not self._chat:
                yield self._event(usage, index, piece, choice.finish)
                continue
            if piece:
                yield self._event(usage, index, {"content": piece})
            if choice.finish:
                yield self._event(usage, index, {}, choice.finish)
        if include_usage:
            yield self._event({"usage": answer.usage().model_dump()})
        yield "data: [DONE]\n\n"

    def _event(
        self, usage: dict[str, Any], index: int = -1, content: Any = None, finish: str = ""
    ) -> str:
        shown = {"delta": content} if self._chat else {"text": content}
        choices = [] if index < 0 else [self._choice(index, finish, shown)]
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return sse(self._head | {"object": kind, "choices": choices} | usage)

    @staticmethod
    def _choice(index: int, finish: str, content: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, **content, "logprobs": None, "finish_reason": finish or None}


def sse(data: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(data)}\n\n"
