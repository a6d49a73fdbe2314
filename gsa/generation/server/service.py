"""What the routes do, apart from HTTP: a body becomes an answer, or an error that says why not."""

import asyncio
import copy
import secrets
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jinja2 import TemplateError

from gsa.generation.server.answers import Answer
from gsa.generation.server.bodies import ApiError, ChatRequest, CompletionRequest, WriteRequest
from gsa.generation.server.config import ServeConfig
from gsa.generation.server.engine import Engine, Prompt, Text
from gsa.generation.state import ModelState

COMPLETION_TOKENS = 16
"""Of a completion that does not say, as in OpenAI's API. A chat's answer may be as long as any."""


class Service:
    """What the routes do, apart from HTTP.

    Args:
        config: its limits.
        engine: not started yet.
        tokenizer: of the decoder's model.
        states: by name of the model that goes on after them; None after nothing.
    """

    def __init__(
        self,
        config: ServeConfig,
        engine: Engine,
        tokenizer: Any,
        states: Mapping[str, ModelState | None],
    ):
        self.engine, self.states, self.created = engine, states, int(time.time())
        self._config, self._decoder = config, engine.decoder
        # Encoding and decoding on two threads: each has a tokenizer of its own.
        self._encoder, self._tokenizer = copy.deepcopy(tokenizer), tokenizer
        self._thread = ThreadPoolExecutor(1, "tokenizer")

    async def complete(self, body: CompletionRequest) -> Answer:
        state = self.state(body.model)
        most = self._limit("max_tokens", body.max_tokens or COMPLETION_TOKENS)
        encoded = await self._in_thread(self._encode, body.prompt, state)
        return self._ask(body, encoded, most)

    async def chat(self, body: ChatRequest) -> Answer:
        self.state(body.model)
        field = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
        asked = body.max_completion_tokens or body.max_tokens
        encoded = [await self._in_thread(self._render, body)]
        most = self._limit(field, asked) if asked else self._most_after(body.model, encoded[0])
        return self._ask(body, encoded, most)

    async def _in_thread(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def state(self, model: str) -> ModelState | None:
        """Where texts of a model by this name begin; ApiError 404 if there is none such."""
        if model not in self.states:
            raise ApiError(
                404,
                f"model: expected one of {', '.join(map(repr, self.states))}, got {model!r}",
                param="model",
                code="model_not_found",
            )
        return self.states[model]

    def _limit(self, field: str, asked: int) -> int:
        most = self._config.max_tokens
        if asked > most:
            raise ApiError(400, f"{field}: expected at most {most}, got {asked}", param=field)
        return asked

    def _most_after(self, model: str, tokens: list[int]) -> int:
        """Tokens of an answer that does not say: all that are allowed and fit."""
        if not self._decoder.pool.is_bounded:
            return self._config.max_tokens
        state = self.states[model]
        left = self._decoder.pool.capacity + 1 - len(tokens) - (state.tokens if state else 0)
        return max(1, min(self._config.max_tokens, left))

    def _encode(self, prompt: Any, state: ModelState | None) -> list[list[int]]:
        """Each prompt's tokens. As in `gsa generate`, special ones only at the start of a text."""
        if isinstance(prompt, str):
            prompt = [prompt]
        if isinstance(prompt[0], int):
            prompt = [prompt]
        return [self._tokens(one, state is None) if isinstance(one, str) else one for one in prompt]

    def _tokens(self, text: str, special: bool) -> list[int]:
        return self._encoder(text, add_special_tokens=special)["input_ids"]

    def _render(self, body: ChatRequest) -> list[int]:
        if self._encoder.chat_template is None:
            raise ApiError(
                400,
                "messages: this model has no chat template; use /v1/completions, or start the "
                "server with --chat-template FILE",
                param="messages",
            )
        try:
            text = self._encoder.apply_chat_template(
                [message.for_template() for message in body.messages],
                tokenize=False,
                add_generation_prompt=True,
            )
        except TemplateError as error:
            reason = f"messages: the chat template refuses them: {error}"
            raise ApiError(400, reason, param="messages") from None
        return self._tokens(text, False)

    def _ask(self, body: WriteRequest, encoded: list[list[int]], most: int) -> Answer:
        name, state, n = body.model, self.states[body.model], body.n or 1
        if n * len(encoded) > self._decoder.rows:
            raise ApiError(
                400,
                f"n: expected at most {self._decoder.rows} texts (n times prompts), the rows of "
                f"this server, got {n * len(encoded)}",
                param="n",
            )
        texts = []
        for tokens in encoded:
            seed = secrets.randbits(62) if body.seed is None else body.seed
            self._check(tokens, state, most)
            prompt = Prompt(tokens, name, state)
            for k in range(n):
                wrapped = (seed + k + 2**63) % 2**64 - 2**63
                texts.append(Text(prompt, body.sampling(wrapped, most), len(texts), None))
        return Answer(self.engine, texts, self._tokenizer, body.stops)

    def _check(self, tokens: list[int], state: ModelState | None, most: int) -> None:
        words, longest = self._decoder.model.config.vocab_size, self._config.max_prompt
        before = state.tokens if state else 0
        if not tokens and not before:
            reason = "prompt: expected some text: this tokenizer starts no document by itself"
            raise ApiError(400, reason, param="prompt")
        if tokens and max(tokens) >= words:
            reason = f"prompt: expected tokens below {words}, got {max(tokens)}"
            raise ApiError(400, reason, param="prompt")
        if len(tokens) > longest:
            reason = f"prompt: expected at most {longest} tokens, got {len(tokens)}"
            raise ApiError(400, reason, code="context_length_exceeded")
        capacity = self._decoder.pool.capacity
        whole = before + len(tokens) - 1 + most
        if self._decoder.pool.is_bounded and whole > capacity:
            raise ApiError(
                400,
                f"max_tokens: expected prompt and answer of at most {capacity + 1} tokens, got "
                f"{before + len(tokens)} and {most}: this model has softmax layers that hold "
                f"{capacity}",
                code="context_length_exceeded",
            )
