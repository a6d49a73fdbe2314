"""What a server refuses and survives: limits, keys, fuzzed bodies, dying clients, signals."""

import json
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)
from serving import Serving, make_model, serving

from gsa.cli import main
from gsa.generation import Decoder, Sampling
from gsa.generation.server.bodies import ApiError
from gsa.generation.server.engine import Engine, Prompt, Text
from gsa.generation.server.metrics import Metrics
from gsa.generation.server.prefixes import Prefixes
from gsa.generation.text import load

ROOT = Path(__file__).parents[3]
LONG = dict(model="tiny", prompt="abc", max_tokens=100_000, seed=1)
KEY = "sk-a-long-secret"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose texts end by their length alone."""
    path = tmp_path_factory.mktemp("limits") / "tiny"
    make_model(path)
    return path


@pytest.fixture(scope="module")
def server(folder):
    options = ["--rows", 2, "--queue", 1, "--max-prompt", 5000, "--max-tokens", 100_000]
    options += ["--chat-template", folder / "template.jinja", "--prefix-mb", 0]
    with serving(folder, *options) as running:
        yield running
        assert running.errors == []


def raw(server, body):
    """A connection on which a completion was asked for."""
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps(body)
    connection = socket.create_connection((host, int(port)))
    connection.sendall(
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n{content}".encode()
    )
    return connection


def test_rows_of_clients_that_leave_are_freed(server):
    """Streamed, whole and still waiting for a row; by hanging up and by kill -9."""
    before = server.rest().get('gsa_texts_total{end="cancelled"}', 0)
    program = "import sys, openai; c = openai.OpenAI(base_url=sys.argv[1], api_key='x'); " + (
        f"print(*(1 for _ in c.completions.create(**{LONG!r}, stream=True)), sep='', flush=True)"
    )
    killed = subprocess.Popen([sys.executable, "-c", program, f"{server.url}/v1"])
    server.wait_for("gsa_rows_taken", 1)
    whole = raw(server, LONG)
    server.wait_for("gsa_rows_taken", 2)
    waiting = raw(server, LONG)
    server.wait_for("gsa_texts_open", 3)
    waiting.close()
    whole.close()
    killed.kill()
    killed.wait()
    assert server.rest()['gsa_texts_total{end="cancelled"}'] == before + 3


def test_a_full_queue_and_too_long_bodies_are_refused(server):
    client = server.client()
    streams = [client.completions.create(**LONG, stream=True) for _ in range(3)]
    with pytest.raises(openai.RateLimitError, match="at most 3 texts at a time") as caught:
        client.completions.create(**LONG)
    assert caught.value.response.headers["Retry-After"] == "1"
    assert caught.value.code == "queue_full"
    for stream in streams:
        stream.close()
    server.rest()
    with pytest.raises(openai.BadRequestError, match="at most 5000 tokens, got 5001") as caught:
        client.completions.create(model="tiny", prompt="a" * 5001)
    assert caught.value.code == "context_length_exceeded"
    most = 2**20 + 16 * 5000
    for content in (b" " * (most + 1), iter([b" " * most, b" "])):  # with its length, and without
        answer = httpx.post(
            server.url + "/v1/completions",
            content=content,
            headers={"Content-Type": "application/json"},
        )
        assert answer.status_code == 413
        assert answer.json()["error"]["message"] == f"body: expected at most {most} bytes, got more"


def test_a_long_prompt_does_not_stop_a_running_text(folder):
    """Tokens come while it is being read, chunk by chunk: the engine by itself, turn by turn."""
    decoder = Decoder(load(folder)[0], rows=2)
    engine = Engine(decoder, queue=0, prefixes=Prefixes(0), metrics=Metrics())
    events, done = [], threading.Event()

    def deliver(batch):
        events.extend(batch)
        if any(event.text.index == 1 and event.end for event in batch):
            done.set()

    short = Text(Prompt([5], "", None), Sampling(max_new_tokens=1000), 0, None)
    long = Text(Prompt([7] * 12_300, "", None), Sampling(max_new_tokens=1), 1, None)
    engine.submit([short, long])
    engine.start(deliver)
    assert done.wait(60)
    engine.stop()
    engine.join()
    order = [event.text.index for event in events]
    assert order.index(1) == 5  # a step before it came, and one with each of its four chunks


def test_a_decoder_that_fails_says_so(folder):
    decoder = Decoder(load(folder)[0], rows=1)
    engine = Engine(decoder, queue=2, prefixes=Prefixes(0), metrics=Metrics())
    events, done = [], threading.Event()
    texts = [Text(Prompt([5], "", None), Sampling(), k, None) for k in range(3)]
    engine.submit(texts)
    decoder.blocks.clear()
    engine.start(lambda batch: (events.extend(batch), done.set()))
    assert done.wait(60)
    engine.stop()
    engine.join()
    assert engine.failed and {e.text.index for e in events} == {0, 1, 2}
    assert all(event.error.status == 500 for event in events)
    with pytest.raises(ApiError, match="shutting down"):
        engine.submit(texts)


CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_bodies_made_from_the_schema_and_against_it(server, mode):
    """All answers are what the schema says; what it forbids is refused; nothing breaks."""
    asked = set()

    def ask(case):
        if isinstance(case.body, dict):
            if isinstance(case.body.get("model"), str):
                case.body["model"] = "tiny"
            if isinstance(case.body.get("n"), int):
                case.body["n"] = min(case.body["n"], 2)
            for field in ("max_tokens", "max_completion_tokens"):
                if isinstance(case.body.get(field), int):
                    case.body[field] = min(case.body[field], 4)
            if case.body.get("max_completion_tokens") is case.body.get("max_tokens") is None:
                case.body["max_tokens"] = 4  # or an answer would have as many as are allowed
        answer = case.call()
        asked.add((case.path, answer.status_code))
        case.validate_response(answer, checks=CHECKS)

    for found in schemathesis.openapi.from_url(f"{server.url}/openapi.json").get_all_operations():
        operation = found.ok()
        if operation.body or mode is GenerationMode.POSITIVE:
            bounded = settings(
                max_examples=60, deadline=None, suppress_health_check=list(HealthCheck),
                derandomize=True, database=None,
            )  # fmt: skip
            bounded(given(operation.as_strategy(generation_mode=mode))(ask))()
    expected = 200 if mode is GenerationMode.POSITIVE else 400
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert (path, expected) in asked
    server.rest()


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b'{"model": "tiny", "prompt": "\\ud800"}', b'{"\\ud800": 1}',
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}', b"[" * 100_000, b"\xff\xfe",
        b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "tiny", "prompt": "a", "top_k": 1e400}',
    ],
)  # fmt: skip
def test_malformed_bodies_are_refused(server, body):
    for kind in ("application/json", "text/plain"):
        answer = httpx.post(
            f"{server.url}/v1/completions", content=body, headers={"Content-Type": kind}
        )
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_key_is_asked_for(folder, tmp_path):
    (tmp_path / "key").write_text(f"{KEY}\n")
    with serving(folder, "--api-key-file", tmp_path / "key", "--name", "mine") as server:
        for key in ("none", KEY[:-1], KEY + "x", "é"):
            headers = {"Authorization": f"Bearer {key}".encode()}
            for path in ("/v1/models", "/metrics", "/openapi.json"):
                answer = httpx.get(server.url + path, headers=headers)
                assert answer.status_code == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
        assert server.post("/v1/completions", {"not": "read"}).status_code == 401
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
        client = server.client(key=KEY)
        made = client.completions.create(model="mine", prompt="a", max_tokens=3)
        assert made.usage.completion_tokens == 3
        found = server.metrics(Authorization=f"Bearer {KEY}")
        assert found['gsa_requests_total{path="/v1/completions",status="401"}'] == 1
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(20) == 0


def test_a_signal_lets_answers_finish_and_refuses_others(folder):
    server = Serving(folder, "--rows", 2, "--max-tokens", 3000)
    client = server.client()
    stream = client.completions.create(model="tiny", prompt="abc", max_tokens=1500, stream=True)
    next(stream)
    server.process.send_signal(signal.SIGTERM)
    with httpx.Client(base_url=server.url) as other:
        while (health := other.get("/health")).status_code == 200:
            pass
        refused = other.post("/v1/completions", json={"model": "tiny", "prompt": "a"})
    for answer in (health, refused):
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        assert "shutting down" in answer.json()["error"]["message"]
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
    assert server.process.wait(20) == 0
    assert server.errors == []


@pytest.mark.parametrize("grace", [0.3, 1000])
def test_what_outlasts_the_grace_or_a_second_signal_is_cut_off(folder, grace):
    server = Serving(folder, "--grace", grace, "--max-tokens", 100_000)
    stream = server.client().completions.create(**LONG, stream=True)
    next(stream)
    server.process.send_signal(signal.SIGTERM)
    if grace > 1:
        while httpx.get(f"{server.url}/health").status_code == 200:
            pass
        server.process.send_signal(signal.SIGINT)
    with pytest.raises(openai.APIError, match="shut down meanwhile"):
        for _ in stream:
            pass
    assert server.process.wait(20) == 0


def test_what_cannot_be_served_is_explained(folder, tmp_path, capsys, monkeypatch):
    other, book, empty = tmp_path / "other", tmp_path / "book.safetensors", tmp_path / "empty"
    make_model(other, num_slots=5)
    Decoder(load(other)[0]).prefill([1, 2, 3]).save(book)
    empty.write_text("\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for options, words in (
            (["--rows", "0"], "rows: expected at least 1, got 0"),
            (["--rows", str(10**12)], f"rows: {10**12} could not be made"),
            (["--queue", "-1"], "queue: expected at least 0, got -1"),
            (["--port", "65536"], "port: expected 0 to 65535"),
            (["--grace", "nan"], "grace: expected a number of seconds"),
            (["--states", "book"], "states: expected NAME=FILE, got 'book'"),
            (["--states", "tiny=x"], "states: expected other names"),
            (["--states", f"book={book}"], "states: book: state: expected one of this model"),
            (["--states", f"book={tmp_path}/none"], "no such file"),
            (["--api-key", "a", "--api-key-file", "b"], "api_key: expected none beside"),
            (["--api-key", "a b"], "api_key: expected printable ASCII"),
            (["--api-key-file", str(empty)], "expected a key in the first line"),
            (["--port", port], f"cannot listen at 127.0.0.1 port {port}"),
            (["--host", "nowhere.invalid"], "cannot listen at nowhere.invalid"),
        ):
            assert main(["serve", str(folder), *options]) == 2
            assert words in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "gsa.generation.server.run", raising=False)
    monkeypatch.delitem(sys.modules, "gsa.generation.server.app", raising=False)
    assert main(["serve", str(folder)]) == 2
    assert "pip install 'gated-slots[serve]'" in capsys.readouterr().err


def test_packages_of_the_extra_load_only_when_served():
    program = "import sys, gsa.cli, gsa.generation.server; print('fastapi' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
