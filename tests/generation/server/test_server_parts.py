"""Stop strings, kept states and what fits into a pool, by themselves."""

import asyncio
from dataclasses import replace

import pytest
import torch
from serving import make_model

from gsa.generation import ModelState
from gsa.generation.server import ServeConfig
from gsa.generation.server.answers import Until
from gsa.generation.server.bodies import ApiError, ChatRequest, CompletionRequest
from gsa.generation.server.prefixes import Prefixes
from gsa.generation.server.run import build_service


@pytest.mark.parametrize(
    ("stops", "pieces", "shown"),
    [
        ([], ["ab", "c"], ["ab", "c"]),
        (["xyz"], ["ax", "y", "b", "xy"], ["a", "", "xyb", "xy"]),
        (["xyz"], ["ax", "y", "zb"], ["a", "", ""]),
        (["b", "abc"], ["a", "b"], ["", "a"]),
        (["abc", "b"], ["zabc"], ["z"]),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", ""]),
    ],
)
def test_text_up_to_a_stop_string(stops, pieces, shown):
    until, last = Until(stops), len(pieces) - 1
    found = [until.add(piece, last=place == last) for place, piece in enumerate(pieces)]
    assert found == shown
    whole = "".join(pieces)
    assert until.found is any(stop in whole for stop in stops)


def state(tokens, size=100):
    return ModelState(
        tensors={"x": torch.zeros(size, dtype=torch.uint8)},
        tokens=tokens,
        last=0,
        met=torch.zeros(4, dtype=torch.bool),
        fingerprint="",
    )


def test_the_longest_beginning_is_found():
    kept = Prefixes(10**6)
    for tokens in ([1], [1, 2, 3], [1, 2, 3, 4, 5], [256], [2]):
        kept.put("", tokens, state(len(tokens)))
    found, length = kept.longest("", [1, 2, 3, 4, 9])
    assert (found.tokens, length) == (3, 3)
    assert kept.longest("", [1, 2, 3])[1] == 3
    assert kept.longest("", [3, 1]) is None and kept.longest("book", [1, 2]) is None


def test_what_was_used_longest_ago_goes_first():
    one = 100 + 4 + 8
    kept = Prefixes(3 * one)
    for token in range(3):
        kept.put("", [token], state(1))
    assert kept.bytes == 3 * one
    kept.longest("", [0, 7])
    kept.put("", [3], state(1))
    kept.put("", [3], state(1))
    assert kept.bytes == 3 * one
    assert [kept.longest("", [token]) is not None for token in range(4)] == [
        True,
        False,
        True,
        True,
    ]
    kept.put("", [4], state(1, size=1000))
    assert kept.longest("", [4]) is None and kept.bytes == 3 * one


def test_texts_longer_than_softmax_layers_hold_are_refused(tmp_path):
    make_model(tmp_path, attn={"layers": [1], "num_heads": 2})
    template = str(tmp_path / "template.jinja")
    config = ServeConfig(
        model=str(tmp_path), name="mixed", capacity=50, chat_template=template, prefix_mb=0
    )
    service, _ = build_service(config)

    def length(ask, **body):
        answer = asyncio.run(ask(body))
        return answer.choices[0].text.sampling.max_new_tokens

    def complete(body):
        return service.complete(CompletionRequest(model="mixed", prompt="a" * 31, **body))

    def chat(body):
        messages = [{"role": "user", "content": "abc"}]
        return service.chat(ChatRequest(model="mixed", messages=messages, **body))

    assert length(complete, max_tokens=20) == 20
    with pytest.raises(ApiError, match="at most 51 tokens, got 31 and 21") as caught:
        length(complete, max_tokens=21)
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
    assert length(chat) == 51 - len("[user]abc#[assistant]")
    book = tmp_path / "book.safetensors"
    service.engine.decoder.prefill([5] * 51).save(book)
    with pytest.raises(ValueError, match=r"capacity: expected more than 51, .* 'book', got 50"):
        build_service(replace(config, states=(f"book={book}",)))
