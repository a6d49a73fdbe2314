"""The pool writes what transformers' `generate` writes, whoever is beside whom."""

from functools import partial

import pytest
import torch
from tiny_models import VARIANTS, build_tiny

from gsa.generation import Decoder, Sampling

pytestmark = pytest.mark.filterwarnings("ignore")
GREEDY = Sampling(greedy=True, max_new_tokens=12)
WILD = Sampling(temperature=1.5, max_new_tokens=12)


def theirs(model, prompt, **options):
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": 12, "do_sample": False, **options}
    made = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return made[0, len(prompt) :].tolist()


def alone(model, prompt, sampling, **options):
    decoder = Decoder(model)
    return list(decoder.write(decoder.prefill(prompt), sampling, **options))


def wild(seed, **options):
    return Sampling(**{"temperature": 1.5, "max_new_tokens": 12, "seed": seed, **options})


def test_greedy_is_transformers_generate(model, prompts):
    texts = [alone(model, prompt, GREEDY) for prompt in prompts(4)]
    assert texts == [theirs(model, prompt) for prompt in prompts(4)]
    assert len({token for text in texts for token in text}) > 4


def test_repetition_penalty_is_that_of_transformers(model, prompts):
    sampling = Sampling(greedy=True, repetition_penalty=1.7, max_new_tokens=12)
    for prompt in prompts(3):
        assert alone(model, prompt, sampling) == theirs(model, prompt, repetition_penalty=1.7)


def test_rows_start_and_stop_independently_and_equal_the_row_alone(model, prompts):
    """Seven texts of other lengths and settings over three rows, each begun when a row is free."""
    choices = [
        wild(3), GREEDY, wild(3, top_k=5, max_new_tokens=3), wild(4, top_p=0.7),
        Sampling(greedy=True, repetition_penalty=2.0, max_new_tokens=7), wild(3, max_new_tokens=1),
        wild(9, repetition_penalty=1.3),
    ]  # fmt: skip
    decoder = Decoder(model, rows=3)
    states = [decoder.prefill(prompt) for prompt in prompts(7)]
    texts = decoder.write_all(states, choices)
    assert [len(text) for text in texts] == [c.max_new_tokens for c in choices]
    for prompt, sampling, text in zip(prompts(7), choices, texts, strict=True):
        assert alone(model, prompt, sampling) == text
    assert decoder.idle


def test_a_step_s_lag_changes_no_token(model, prompts):
    """On a GPU tokens come back one step late; the same here, by hand."""
    choices = [wild(seed, max_new_tokens=3 + seed) for seed in range(5)]
    texts = []
    for lag in (0, 1):
        decoder = Decoder(model, rows=2)
        decoder.lag = lag
        decoder.ends = frozenset(range(4, 40, 5))
        states = [decoder.prefill(prompt) for prompt in prompts(5)]
        texts.append(decoder.write_all(states, choices))
    assert texts[0] == texts[1]
    assert any(len(text) < c.max_new_tokens for text, c in zip(texts[0], choices, strict=True))


def test_a_row_goes_on_from_what_it_has_written(model, prompts):
    """A state taken from a row, finished or in the middle, is one that a prefill would give."""
    prompt, whole = prompts(1)[0], wild(1, repetition_penalty=1.2)
    text = alone(model, prompt, whole)
    decoder = Decoder(model, rows=2)
    start = decoder.prefill(prompt)
    decoder.start(decoder.prefill(prompts(2)[1]), GREEDY)
    row = decoder.start(start, wild(1, repetition_penalty=1.2, max_new_tokens=5))
    first = [w for _ in range(9) for w in decoder.advance() if w.row == row]
    assert [w.token for w in first] == text[:5] and first[-1].end == "length"
    taken = decoder.take(row)  # some steps after it has ended: it stood still
    read = decoder.prefill(text[:5], start)
    assert (taken.tokens, taken.last) == (read.tokens, read.last) == (len(prompt) + 5, text[4])
    assert torch.equal(taken.met, read.met)
    assert taken.tensors.keys() == read.tensors.keys()
    for name, tensor in read.tensors.items():
        torch.testing.assert_close(taken.tensors[name], tensor, atol=1e-9, rtol=1e-9)
    decoder.release(row)
    rest = wild(1, repetition_penalty=1.2, max_new_tokens=7)
    row = decoder.start(taken, rest)
    more = [w.token for _ in range(9) for w in decoder.advance() if w.row == row]
    assert more == text[5:]


def test_chunked_prefill_gives_the_same_state(model, monkeypatch):
    decoder = Decoder(model)
    tokens = torch.arange(3, 33)
    whole = decoder.prefill(tokens)
    monkeypatch.setattr("gsa.generation.prefill.CHUNK", 7)
    pieces = decoder.prefill(tokens[20:], decoder.prefill(tokens[:20]))
    assert pieces.tensors.keys() == whole.tensors.keys() and pieces.tokens == whole.tokens == 30
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(pieces.tensors[name], tensor, atol=1e-9, rtol=1e-9)


def test_a_window_turns_round_in_its_ring(prompts):
    """Texts far longer than the ring, and a full layer up to the last place of its own."""
    attn = [
        {"layers": [0], "num_heads": 2, "window_size": 5, "rope_theta": 50.0},
        {"layers": [1], "num_heads": 4, "num_kv_heads": 2},
    ]
    model = build_tiny(attn=attn, num_hidden_layers=3)
    prompt = prompts(1)[0]
    decoder = Decoder(model, capacity=len(prompt) - 1 + 30)
    state = decoder.prefill(prompt)
    sampling = Sampling(greedy=True, max_new_tokens=30)
    assert list(decoder.write(state, sampling)) == theirs(model, prompt, max_new_tokens=30)
    with pytest.raises(
        ValueError, match=r"capacity: expected at least \d+ for a text of \d+ tokens"
    ):
        decoder.start(state, Sampling(max_new_tokens=31))


def test_end_tokens_end_a_text(prompts):
    model, prompt = build_tiny(**VARIANTS["abc"]), prompts(1)[0]
    text = alone(model, prompt, WILD)
    end = text[6]
    until = text[: text.index(end) + 1]
    assert alone(model, prompt, WILD, ends=[2, end]) == until
    model.generation_config.eos_token_id = [2, end]
    assert alone(model, prompt, WILD) == until
    assert alone(model, prompt, WILD, ends=()) == text


def test_a_released_row_is_given_to_another_text(prompts):
    """Cut off with a step in flight: what was on its way belongs to no one."""
    model = build_tiny()
    expected = alone(model, prompts(2)[1], WILD)
    decoder = Decoder(model, rows=1)
    decoder.lag = 1
    row = decoder.start(decoder.prefill(prompts(1)[0]), GREEDY)
    decoder.advance()
    decoder.release(row)
    assert decoder.start(decoder.prefill(prompts(2)[1]), WILD) == row
    written = []
    while not decoder.idle:
        written += decoder.advance()
    assert [w.token for w in written] == expected
    assert [w.end for w in written] == [""] * 11 + ["length"]


def test_the_same_seed_writes_the_same_and_another_something_else(prompts):
    model, prompt = build_tiny(), prompts(1)[0]
    texts = [alone(model, prompt, wild(seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_whole_step_is_one_graph_per_block(prompts):
    """Traced as on a GPU, without code generation: no break, and one graph for equal blocks."""
    model = build_tiny(num_hidden_layers=3)
    expected = [alone(model, prompt, WILD) for prompt in prompts(2)]
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    decoder = Decoder(model, rows=2)
    for part in (*decoder.blocks, decoder.head):
        part.compile(fullgraph=True, dynamic=False, backend=keep)
    decoder.at.compile(partial(torch.compile, fullgraph=True, backend=keep))
    states = [decoder.prefill(prompt) for prompt in prompts(2)]
    assert decoder.write_all(states, [WILD, WILD]) == expected
    assert len(graphs) == 3
    torch._dynamo.reset()


def test_what_does_not_fit_is_explained(prompts):
    model = build_tiny()
    decoder = Decoder(model)
    state = decoder.prefill([5])
    with pytest.raises(ValueError, match="tokens: expected at least one"):
        decoder.prefill([])
    with pytest.raises(ValueError, match="tokens: expected numbers from 0 to 39, got 3 to 40"):
        decoder.prefill([3, 40])
    with pytest.raises(ValueError, match="ends: expected at most 8 tokens, got 9"):
        decoder.start(state, GREEDY, ends=range(9))
    with pytest.raises(ValueError, match="row: expected one that start returned, got 0"):
        decoder.take(0)
    decoder.start(state, GREEDY)
    with pytest.raises(ValueError, match="start: expected a free row, got 1 taken"):
        decoder.start(state, GREEDY)
    with pytest.raises(ValueError, match="write: expected a pool without other texts"):
        next(decoder.write(state, GREEDY))
    with pytest.raises(ValueError, match="rows: expected at least 1, got 0"):
        Decoder(model, rows=0)
    with pytest.raises(ValueError, match="compile: expected False on cpu, got True"):
        Decoder(model, compile=True)
    model.model.layers[1].mlp.up_proj = torch.nn.Sequential(model.model.layers[1].mlp.up_proj)
    with pytest.raises(ValueError, match="expected plain linear layers, got Sequential"):
        Decoder(model)
