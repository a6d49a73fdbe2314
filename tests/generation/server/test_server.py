"""The real client against a running server: answers are those that the decoder gives by itself."""

import asyncio
import random

import openai
import pytest
from serving import make_model, serving

from gsa.generation import Decoder, Sampling
from gsa.generation.text import load

ROWS = 8
BOOK = "The slot forgets, the gate remembers. " * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("server") / "tiny"
    make_model(path, eos_token_id=[ord("t"), ord("+"), 256])
    model, tokenizer = load(path)
    Decoder(model).prefill(tokenizer(BOOK).input_ids).save(path / "book.safetensors")
    return path


@pytest.fixture(scope="module")
def server(folder):
    options = ["--rows", ROWS, "--queue", 64, "--chat-template", folder / "template.jinja"]
    with serving(folder, *options, "--states", f"book={folder}/book.safetensors") as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def offline(folder):
    """(text, tokens, end) that a pool of equal size writes: offline(prompt, **sampling)."""
    model, tokenizer = load(folder)
    decoder = Decoder(model, rows=ROWS)

    def write(prompt, **options):
        ids = tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
        tokens = list(decoder.write(decoder.prefill(ids), Sampling(**options)))
        ended = tokens[-1] in decoder.ends
        text = tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True)
        return text, len(tokens), "stop" if ended else "length"

    return write


async def listen(stream, leave_after=None):
    """(text, finish) of a stream; left early after some pieces, its text is the part that came."""
    text, finish, pieces = "", None, 0
    async for chunk in stream:
        choice = chunk.choices[0]
        text += choice.text
        finish = choice.finish_reason or finish
        pieces += bool(choice.text)
        if leave_after is not None and pieces >= leave_after:
            await stream.close()
            return text, "left"
    return text, finish


def test_64_streams_with_some_who_leave(server, offline):
    """Each text is what it would be alone; who leaves frees a row and disturbs nobody."""
    draw = random.Random(0)
    jobs = []
    for seed in range(64):
        prompt = "".join(draw.choices("abc xyz\n", k=draw.randint(1, 60)))
        leaves = draw.choice([None, None, 1, 4])
        sampling = dict(seed=seed, temperature=draw.choice([0.7, 1.5]), top_p=draw.choice([0.8, 1]))
        jobs.append((prompt, draw.randint(1, 60), leaves, sampling))
    before = server.metrics()

    async def all_of_them():
        async with server.client(openai.AsyncOpenAI) as client:

            async def one(prompt, most, leaves, sampling):
                stream = await client.completions.create(
                    model="tiny", prompt=prompt, max_tokens=most, stream=True, **sampling
                )
                return await listen(stream, leaves)

            return await asyncio.gather(*(one(*job) for job in jobs))

    answers = asyncio.run(all_of_them())
    left = 0
    for (prompt, most, _, sampling), (text, finish) in zip(jobs, answers, strict=True):
        whole, _, end = offline(prompt, max_new_tokens=most, **sampling)
        if finish == "left":
            left += 1
            assert whole.startswith(text)
        else:
            assert (text, finish) == (whole, end)
    assert 10 < left < 54
    after = server.rest()
    ends = {end: after.get(f'gsa_texts_total{{end="{end}"}}', 0) for end in ("stop", "length")}
    assert min(ends.values()) > 0
    texts = [name for name in after if name.startswith("gsa_texts_total")]
    assert sum(after[name] - before.get(name, 0) for name in texts) == 64
    assert 'gsa_texts_total{end="error"}' not in after


@pytest.mark.parametrize(
    "sampling",
    [
        dict(temperature=0.0),
        dict(seed=5),
        dict(seed=-(2**63), temperature=1.7, top_p=0.6),
        dict(seed=1, extra_body=dict(top_k=3, repetition_penalty=1.4)),
    ],
)
def test_every_setting_is_that_of_the_decoder(client, offline, sampling):
    made = client.completions.create(model="tiny", prompt="abcd", max_tokens=30, **sampling)
    own = {"seed": sampling.get("seed", 0), **sampling.get("extra_body", {})}
    own |= {k: v for k, v in sampling.items() if k in ("top_p", "temperature")}
    if own.get("temperature") == 0:
        own = dict(greedy=True)
    text, tokens, end = offline("abcd", max_new_tokens=30, **own)
    choice = made.choices[0]
    assert (choice.text, choice.finish_reason, choice.index) == (text, end, 0)
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (4, tokens)
    assert made.usage.total_tokens == 4 + tokens and made.object == "text_completion"


def test_several_prompts_and_choices(client, offline):
    """Choice k of a prompt has seed + k; tokens are as good as text."""
    made = client.completions.create(
        model="tiny", prompt=["abc", "xyz"], n=3, seed=7, max_tokens=20, temperature=1.2
    )
    wanted = [
        offline(prompt, seed=7 + k, max_new_tokens=20, temperature=1.2)
        for prompt in ("abc", "xyz")
        for k in range(3)
    ]
    assert [(c.text, c.finish_reason) for c in made.choices] == [(t, e) for t, _, e in wanted]
    assert [c.index for c in made.choices] == list(range(6))
    assert made.usage.prompt_tokens == 6
    assert made.usage.completion_tokens == sum(tokens for _, tokens, _ in wanted)
    tokens = [list(b"abc"), list(b"xyz")]
    again = client.completions.create(
        model="tiny", prompt=tokens, n=3, seed=7, max_tokens=20, temperature=1.2
    )
    assert [c.text for c in again.choices] == [c.text for c in made.choices]
    chance = client.completions.create(model="tiny", prompt=["abc"] * 2, max_tokens=40)
    assert chance.choices[0].text != chance.choices[1].text, "no seed, other chances"


def test_characters_come_whole_and_usage_last(client, offline):
    """Random bytes hold many broken characters: the pieces joined are what the bytes decode to."""
    stream = client.completions.create(
        model="tiny", prompt="é€", max_tokens=200, seed=4, stream=True,
        stream_options={"include_usage": True}, logit_bias={}, logprobs=None,
    )  # fmt: skip
    *chunks, last = stream
    text, tokens, end = offline("é€", max_new_tokens=200, seed=4)
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == [end]
    assert all(chunk.usage is None for chunk in chunks) and last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (5, tokens)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_a_text_before_it(server, client, offline, stream):
    seed = next(s for s in range(99) if len(offline("ab", seed=s, max_new_tokens=80)[0]) > 50)
    whole, tokens, _ = offline("ab", seed=seed, max_new_tokens=80)
    stop = whole[30:33]
    until = whole[: whole.index(stop)]
    made = client.completions.create(
        model="tiny",
        prompt="ab",
        seed=seed,
        max_tokens=80,
        stop=["never seen", stop],
        stream=stream,
    )
    if stream:
        chunks = list(made)
        assert "".join(chunk.choices[0].text for chunk in chunks) == until
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        assert (made.choices[0].text, made.choices[0].finish_reason) == (until, "stop")
        assert made.usage.completion_tokens < tokens
    server.rest()


def rendered(messages):
    return "".join(f"[{m['role']}]{m['content']}#" for m in messages) + "[assistant]"


def test_a_chat_reads_only_what_is_new(server, client, offline):
    read = 0
    messages = [{"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}]
    shown = [{"role": "system", "content": "Be brief."}]
    for turn in range(3):
        new = {"role": "user", "content": f"Question {turn}?"}
        messages, shown = [*messages, new], [*shown, new]
        made = client.chat.completions.create(
            model="tiny", messages=messages, max_completion_tokens=15, seed=20 + turn
        )
        prompt = rendered(shown)
        text, tokens, end = offline(prompt, max_new_tokens=15, seed=20 + turn)
        choice = made.choices[0]
        assert (choice.message.content, choice.finish_reason) == (text, end)
        assert choice.message.role == "assistant"
        used = made.usage
        assert (used.prompt_tokens, used.completion_tokens) == (len(prompt.encode()), tokens)
        assert used.prompt_tokens_details.cached_tokens >= read
        read = used.prompt_tokens
        messages.append(choice.message)
        shown.append({"role": "assistant", "content": text})
    assert server.rest()["gsa_prompt_tokens_reused_total"] >= read


def test_an_answer_is_part_of_what_was_read(client, folder):
    """The prompt goes on after tokens that the server itself wrote: none of them is read again."""
    model, tokenizer = load(folder)
    decoder = Decoder(model, rows=ROWS)
    ids = tokenizer("Once upon").input_ids
    first = list(decoder.write(decoder.prefill(ids), Sampling(seed=8, max_new_tokens=12)))
    client.completions.create(model="tiny", prompt="Once upon", seed=8, max_tokens=12)
    longer = ids + first + tokenizer(" a time").input_ids
    made = client.completions.create(model="tiny", prompt=longer, seed=9, max_tokens=12)
    assert made.usage.prompt_tokens_details.cached_tokens == len(ids) + len(first)
    second = list(decoder.write(decoder.prefill(longer), Sampling(seed=9, max_new_tokens=12)))
    said = second[:-1] if second[-1] in decoder.ends else second
    assert made.choices[0].text == tokenizer.decode(said, skip_special_tokens=True)


def test_chat_streams(client, offline):
    messages = [{"role": "user", "content": "Stream!"}]
    stream = client.chat.completions.create(
        model="tiny", messages=messages, n=2, seed=1, stream=True, max_tokens=40
    )
    texts, finishes, roles = ["", ""], [None, None], []
    for chunk in stream:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        finishes[choice.index] = choice.finish_reason or finishes[choice.index]
        roles += [choice.delta.role] if choice.delta.role else []
        assert chunk.object == "chat.completion.chunk"
    wanted = [offline(rendered(messages), seed=1 + k, max_new_tokens=40) for k in range(2)]
    assert texts == [text for text, _, _ in wanted]
    assert finishes == [end for _, _, end in wanted]
    assert roles == ["assistant", "assistant"]


def test_a_state_is_a_model_that_has_read_it(client, offline):
    names = [model.id for model in client.models.list()]
    assert names == ["tiny", "book"]
    assert client.models.retrieve("book").id == "book"
    with pytest.raises(openai.NotFoundError, match="expected one of 'tiny', 'book', got 'b/x'"):
        client.models.retrieve("b/x")
    for prompt in ("", "It"):
        made = client.completions.create(model="book", prompt=prompt, seed=2, max_tokens=20)
        assert made.choices[0].text == offline(BOOK + prompt, seed=2, max_new_tokens=20)[0]
        assert made.usage.prompt_tokens == len(prompt)


def test_errors_are_openais(client):
    def refused(kind, **body):
        with pytest.raises(kind) as caught:
            client.completions.create(**{"model": "tiny", "prompt": "a", **body})
        return caught.value.body

    assert refused(openai.NotFoundError, model="gpt")["code"] == "model_not_found"
    for body, param, words in (
        (dict(logprobs=2), "logprobs", "does not support it"),
        (dict(logit_bias={"5": 1}), "logit_bias", "does not support it"),
        (dict(extra_body={"tempurature": 1}), "tempurature", "no such field"),
        (dict(temperature=2.5), "temperature", "less than or equal to 2"),
        (dict(top_p=0.0), "top_p", "greater than 0"),
        (dict(max_tokens=0), "max_tokens", "greater than or equal to 1"),
        (dict(max_tokens=5000), "max_tokens", "at most 4096"),
        (dict(n=9), "n", "at most 8 texts"),
        (dict(prompt=["a"] * 3, n=3), "n", "at most 8 texts"),
        (dict(prompt=""), "prompt", "expected some text"),
        (dict(prompt=[4, 258]), "prompt", "tokens below 258, got 258"),
        (dict(stop=[""]), "stop", "at least 1"),
        (dict(extra_body={"stream_options": {}}), "stream_options", "only with stream"),
    ):  # fmt: skip
        error = refused(openai.BadRequestError, **body)
        assert (error["param"], error["type"]) == (param, "invalid_request_error")
        assert words in error["message"]
    for messages, words in (
        ([{"role": "user", "content": "raise"}], "the chat template refuses them: not so"),
        ([{"role": "tool", "content": "x"}], "messages.0.role: Input should be"),
        ([], "at least 1 item"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            client.chat.completions.create(model="tiny", messages=messages)
