"""A conversation is one text that is read once."""

import io

import pytest
import torch

from gsa.cli import main
from gsa.generation import Decoder, Sampling
from gsa.generation.chat import Chat
from gsa.generation.text import load

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}#{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
GREEDY = Sampling(greedy=True, max_new_tokens=12)
END = ord("#")


@pytest.fixture
def parts(folder):
    """A decoder whose model likes to end its answers, and a tokenizer with a template."""
    model, tokenizer = load(folder)
    with torch.no_grad():
        model.lm_head.weight[END] *= 4
    decoder = Decoder(model)
    decoder.ends = frozenset({END})
    tokenizer.chat_template = TEMPLATE
    return decoder, tokenizer


def count_reads(decoder):
    lengths = []
    read = decoder.prefill
    decoder.prefill = lambda tokens, state=None: lengths.append(len(tokens)) or read(tokens, state)
    return lengths


@pytest.mark.parametrize("most", [3, 500], ids=["cut by length", "ended"])
def test_answers_are_those_to_the_whole_conversation(parts, most):
    """Token by token: what was written is the past, not what its text would be split into."""
    decoder, tokenizer = parts
    sampling = Sampling(max_new_tokens=most, seed=most)
    decoder.ends = frozenset({END} if most == 500 else ())
    session, ids = Chat(decoder, tokenizer, system="Be brief."), []
    lengths = count_reads(decoder)
    new = "[system]Be brief.#[user]Who?#[assistant]"
    for message in ("Who?", "Why do you ask?", "Well."):
        answer = "".join(session.answer(message, sampling))
        ids += tokenizer(new).input_ids
        assert lengths[-1] == len(new)
        said = list(decoder.write(decoder.prefill(ids), sampling))
        ended = most == 500
        assert (said[-1] in decoder.ends) is ended
        assert answer == tokenizer.decode(said[:-1] if ended else said)
        ids += said
        after = {"Who?": "Why do you ask?", "Why do you ask?": "Well."}.get(message)
        new = f"{'' if ended else '#'}[user]{after}#[assistant]"
        assert session.state.tokens == len(ids)


def test_an_answer_cut_off_is_part_of_the_conversation(parts):
    decoder, tokenizer = parts
    session = Chat(decoder, tokenizer)
    decoder.ends = frozenset()
    pieces = session.answer("Who?", GREEDY)
    part = next(piece for piece in pieces if piece)
    pieces.close()
    ids = tokenizer("[user]Who?#[assistant]").input_ids
    ids += list(decoder.write(decoder.prefill(ids), GREEDY))[: session.state.tokens - len(ids)]
    assert tokenizer.decode(ids).endswith("[assistant]" + part)
    answer = "".join(session.answer("Go on.", GREEDY))
    ids += tokenizer("#[user]Go on.#[assistant]").input_ids
    said = list(decoder.write(decoder.prefill(ids), GREEDY))
    assert answer == tokenizer.decode(said)


def test_a_template_that_tells_the_past_otherwise_is_read_anew(parts):
    decoder, tokenizer = parts
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    session = Chat(decoder, tokenizer)
    lengths = count_reads(decoder)
    for message in ("Who?", "Why?"):
        "".join(session.answer(message, GREEDY))
    assert lengths[1] > 2 * len("[user]Why?")
    assert session.state.tokens <= lengths[1] + 12


def test_without_a_template_lines_are_read_as_they_are(parts):
    decoder, tokenizer = parts
    tokenizer.chat_template = None
    session = Chat(decoder, tokenizer)
    first = "".join(session.answer("ROMEO:", GREEDY))
    second = "".join(session.answer("JULIET:", GREEDY))
    ids = tokenizer("ROMEO:\n").input_ids
    said = list(decoder.write(decoder.prefill(ids), GREEDY))
    assert first == tokenizer.decode([token for token in said if token != END])
    ids += said + tokenizer("JULIET:\n", add_special_tokens=False).input_ids
    said = list(decoder.write(decoder.prefill(ids), GREEDY))
    assert second == tokenizer.decode([token for token in said if token != END])
    with pytest.raises(ValueError, match="system: expected none"):
        Chat(decoder, tokenizer, system="Be brief.")


def test_chat_prefill_and_generate_as_typed(folder, tmp_path, capsys, monkeypatch):
    text, state = tmp_path / "book.txt", tmp_path / "book.safetensors"
    text.write_text("The slot forgets, the gate remembers. " * 20)
    assert main(["prefill", str(folder), str(text), "--state", str(state)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{state}: 760 tokens read in ") and said.endswith(" MB\n")
    options = ["--max-new-tokens", "20", "--greedy"]
    assert main(["generate", str(folder), "--state", str(state), "--prompt", "It", *options]) == 0
    after = capsys.readouterr().out
    whole = text.read_text() + "It"
    assert main(["generate", str(folder), "--prompt", whole, *options]) == 0
    assert capsys.readouterr().out == text.read_text() + after

    monkeypatch.setattr("sys.stdin", io.StringIO("Who?\n\nWhy, Ren\udce9?\n"))
    assert main(["chat", str(folder), "--state", str(state), *options]) == 0
    lines = capsys.readouterr().out
    assert lines.endswith("\n") and len(lines) > 10

    other = tmp_path / "empty.txt"
    other.write_text("")
    for arguments, words in (
        (["prefill", str(folder), str(other), "--state", str(state)], "expected some text"),
        (["generate", str(folder), "--state", str(text), "--prompt", "x"], "cannot be read"),
        (["chat", str(folder), "--capacity", "-1"], "capacity: expected at least 0"),
        (["generate", str(folder), "--prompt", "x", "--compile"], "compile: expected False on cpu"),
    ):
        assert main(arguments) == 2
        assert words in capsys.readouterr().err
