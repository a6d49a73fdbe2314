"""The routes: bodies in, answers out, and who may ask."""

import asyncio
import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gsa.generation.server.answers import Answer, Form, sse
from gsa.generation.server.bodies import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    ErrorBody,
    WriteRequest,
    explain,
)
from gsa.generation.server.engine import Event
from gsa.generation.server.metrics import Metrics
from gsa.generation.server.service import Service

PATHS = {"/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions"}
"""Those that are counted apart; /health is open to all."""


class EventStream(StreamingResponse):
    """Server-sent events; a client that leaves frees the rows of its answer."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, events: AsyncIterator[str]):
        super().__init__(self._with_errors(events), headers={"Cache-Control": "no-cache"})
        self._answer = answer

    @staticmethod
    async def _with_errors(events: AsyncIterator[str]) -> AsyncIterator[str]:
        try:
            async for event in events:
                yield event
        except ApiError as error:
            yield sse(error.body())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.give_up()


async def respond(request: Request, body: WriteRequest, answer: Answer, form: Form) -> Response:
    if body.stream:
        return EventStream(answer, form.events(answer, body.include_usage))
    writing = asyncio.ensure_future(form.whole(answer))
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not writing.done():
            return Response(status_code=499)  # nobody reads it; nginx's number, for the metrics
        return JSONResponse(writing.result())
    finally:
        writing.cancel()
        leaving.cancel()
        answer.give_up()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Gate:
    """Lets those in who bring the key and no more than fits, before a body is read; counts all."""

    def __init__(self, app: ASGIApp, key: str, max_body: int, metrics: Metrics):
        self._app, self._max_body, self._metrics = app, max_body, metrics
        self._expected = f"Bearer {key}".encode() if key else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path = scope["path"] if scope["path"] in PATHS else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_body:  # a body that did not say its length
                raise self._too_large()
            return message

        refused = self._refuse(scope["path"], dict(scope["headers"]))
        answer = self._app if refused is None else error_response(refused)
        await answer(scope, limited, counted)

    def _refuse(self, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        given = headers.get(b"authorization", b"")
        needs_key = self._expected and path != "/health"
        if needs_key and not hmac.compare_digest(given, self._expected):
            got = "another" if given else "none"
            reason = f"Authorization: expected 'Bearer' and this server's API key, got {got}"
            return ApiError(401, reason, code="invalid_api_key")
        if int(headers.get(b"content-length", b"0")) > self._max_body:
            return error_of(self._too_large())
        return None

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"body: expected at most {self._max_body} bytes, got more")


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)


def build_app(service: Service, metrics: Metrics, key: str, max_body: int) -> FastAPI:
    """The application.

    Args:
        key: that requests must bring; "" for none.
        max_body: bytes of a request at most.
    """
    engine = service.engine

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()

        def deliver(events: list[Event]) -> None:
            loop.call_soon_threadsafe(_hand_out, events)

        engine.start(deliver)
        yield
        engine.stop()
        await asyncio.to_thread(engine.join)

    async def explained(request: Request, error: Exception) -> Response:
        return error_response(error_of(error))

    app = FastAPI(
        title="gated-slots",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        exception_handlers=dict.fromkeys(
            (ApiError, RequestValidationError, HTTPException, Exception), explained
        ),
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    _add_routes(app, service, metrics)
    app.add_middleware(Gate, key=key, max_body=max_body, metrics=metrics)
    return app


def _hand_out(events: list[Event]) -> None:
    for event in events:
        event.text.inbox.put_nowait(event)


def error_of(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return explain(list(error.errors()))
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
    return ApiError(500, "the server failed; its log says why")


def _add_routes(app: FastAPI, service: Service, metrics: Metrics) -> None:
    engine = service.engine

    either: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
    }

    @app.post("/v1/completions", responses=either)
    async def completions(body: CompletionRequest, request: Request) -> Any:
        answer = await service.complete(body)
        return await respond(request, body, answer, form(body, chat=False))

    @app.post("/v1/chat/completions", responses=either)
    async def chat_completions(body: ChatRequest, request: Request) -> Any:
        answer = await service.chat(body)
        return await respond(request, body, answer, form(body, chat=True))

    def form(body: WriteRequest, *, chat: bool) -> Form:
        return Form(chat=chat, model=body.model, fingerprint=engine.decoder.fingerprint)

    def about(name: str) -> dict[str, Any]:
        service.state(name)
        facts = {"object": "model", "created": service.created, "owned_by": "gated-slots"}
        return {"id": name, **facts}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [about(name) for name in service.states]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return about(name)

    @app.get("/health")
    async def health() -> Any:
        if engine.failed or engine.closed:
            raise ApiError(503, "failed" if engine.failed else "shutting down", retry_after=5)
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response)
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type=metrics.content_type)
