"""From a model's folder to a listening process, until a signal."""

import socket
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from gsa.generation.decoder import Decoder
from gsa.generation.sampling import Sampling
from gsa.generation.server.app import build_app
from gsa.generation.server.config import ServeConfig
from gsa.generation.server.engine import Engine
from gsa.generation.server.metrics import Metrics
from gsa.generation.server.prefixes import Prefixes
from gsa.generation.server.service import Service
from gsa.generation.state import ModelState
from gsa.generation.text import load, to_device

LOOPBACK = ("127.0.0.1", "::1", "localhost")
LAST_WORDS = 5
"""Seconds after the grace for answers on their way to clients."""


def run(config: ServeConfig) -> None:
    """Answers requests until a signal. RuntimeError if the decoder failed."""
    key = config.key()
    if not key and config.host not in LOOPBACK:
        print(
            f"warning: anyone who reaches {config.host} may ask; see --api-key-file",
            file=sys.stderr,
        )
    with listen(config.host, config.port) as listener:
        service, metrics = build_service(config)
        app = build_app(service, metrics, key, max_body=2**20 + 16 * config.max_prompt)
        settings = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=LAST_WORDS,
        )
        server = Server(settings, service.engine, config, listener)
        server.run(sockets=[listener])
    if service.engine.failed:
        raise RuntimeError("the decoder failed; see above")


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address. OSError saying which, if that cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise OSError(f"host, port: cannot listen at {host} port {port}: {error}") from error
    return listener


def build_service(config: ServeConfig) -> tuple[Service, Metrics]:
    """The model and all that answers with it. First steps are made, so that they fail here."""
    template = Path(config.chat_template).read_text("utf-8") if config.chat_template else None
    saved: dict[str, Any] = {n: ModelState.load(file) for n, file in config.state_files().items()}
    model, tokenizer = load(config.model, config.dtype)
    if template is not None:
        tokenizer.chat_template = template
    model.to(to_device(config.device))
    capacity = config.capacity or None
    try:
        decoder = Decoder(model, rows=config.rows, capacity=capacity, compile=config.compile)
    except RuntimeError as error:  # out of memory
        why = str(error).partition("\n")[0]
        raise ValueError(f"rows: {config.rows} could not be made ({why}); try fewer") from error
    for name, state in saved.items():
        try:
            decoder.reading([], state)
        except ValueError as error:
            raise ValueError(f"states: {name}: {error}") from error
        if decoder.pool.is_bounded and state.tokens > decoder.pool.capacity:
            raise ValueError(
                f"capacity: expected more than {state.tokens}, the tokens of state {name!r}, got "
                f"{decoder.pool.capacity}, which is what softmax layers hold: nothing could follow"
            )
    for greedy in (True, False):
        list(decoder.write(decoder.prefill([0]), Sampling(max_new_tokens=1, greedy=greedy)))
    metrics = Metrics()
    prefixes = Prefixes(config.prefix_mb * 10**6)
    engine = Engine(decoder, queue=config.queue, prefixes=prefixes, metrics=metrics)
    states = {config.model_name: None, **saved}
    return Service(config, engine, tokenizer, states), metrics


class Server(uvicorn.Server):
    """Says where it listens. The first signal lets answers finish, a second cuts them off."""

    def __init__(
        self, settings: uvicorn.Config, engine: Engine, config: ServeConfig, listener: socket.socket
    ):
        super().__init__(settings)
        self._engine, self._config, self._listener = engine, config, listener
        self._deadline: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self._listener.getsockname()[:2]
        at = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        print(f"serving {self._config.model_name} at http://{at}/v1", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Within a signal handler: no lock, no call into the loop; on_tick looks ten times a second.
        grace = 0 if self._deadline else self._config.grace
        self._deadline = time.monotonic() + grace

    async def on_tick(self, counter: int) -> bool:
        if self._deadline is not None:
            self._engine.close()
            over = time.monotonic() >= self._deadline
            if over:
                self._engine.stop()
            self.should_exit |= over or self._engine.idle
        self.should_exit |= self._engine.failed
        return await super().on_tick(counter)
