"""Our own tasks: prompts, windows and metrics."""

import pytest
from teachers import build_tokenizer

from gsa.evaluation.own_tasks import (
    OWN_TASKS,
    Prompt,
    build_own,
    cloze,
    contains,
    cut,
    f1,
    key_and_value,
    rouge,
)

FILLER = "the rest of all that was read. "


def test_prompts_in_the_protocol_of_jrt():
    fda = key_and_value({"key": "device", "value": "slot", "text": "A slot.\n device: Device:"})
    assert (fda.document, fda.question, fda.answers) == ("A slot.", " Device:", ("slot",))
    text = "Name: X. Summary of information above... name:"
    swde = key_and_value({"key": "name", "value": "X", "text": text})
    assert swde.document + swde.question == "Name: X. Name:"
    squad = cloze({"text": "Rome fell.\nIt fell in ", "value": "476"})
    assert squad.document + squad.question == "Rome fell.\nIt fell in"
    row = {"context": "[DOC] [TLE] Rome fell. It fell in", "question": "It fell in"}
    row |= {"answers": ["476"]}
    for name, around in (("recall_nq", True), ("recall_triviaqa", False), ("recall_drop", False)):
        found = OWN_TASKS[name].ask(row)
        assert found.document + found.question == "Rome fell. It fell in"
        assert found.around is around and found.answers == ("476",)


def test_a_long_document_is_cut_around_the_answer():
    tokenizer = build_tokenizer()
    document = FILLER * 8 + "By Gate Inc. " + FILLER * 8
    prompt = Prompt(document, " Maker:", ("nobody", "gate inc"), around=True)
    text = cut(prompt, tokenizer, 60)
    assert text.endswith(" Maker:") and "Gate Inc" in text and text[:-7] in document
    assert 50 <= len(tokenizer.encode(text)) <= 60
    middle = text.index("Gate") / len(text)
    assert 0.3 < middle < 0.7
    for answers, place in ((("the rest",), 0), (("nowhere",), 0), (("",), 0)):
        head = cut(Prompt(document, " Maker:", answers, around=True), tokenizer, 60)
        assert document.index(head[:-7]) == place
    last = cut(Prompt(FILLER * 8 + "At end", " Maker:", ("end",), around=True), tokenizer, 60)
    assert last.endswith("At end Maker:") and len(tokenizer.encode(last)) > 50
    assert cut(Prompt("short", " Maker:", ("x",)), tokenizer, 60) == "short Maker:"
    with pytest.raises(ValueError, match="length: "):
        cut(prompt, tokenizer, 5)


def test_metrics():
    assert contains("it was the SLOT, I think", ["gate", "slot"]) == 1
    assert contains("", ["slot"]) == contains("a gate", ["", "slot"]) == 0
    assert f1("The gate, a slot!", ["slot"]) == pytest.approx(2 / 3)
    assert f1("the", ["a"]) == 1 and f1("gate", []) == f1("gate", ["slot"]) == 0
    assert rouge("the gate lets go", ["a slot keeps", "the gate lets go"]) == pytest.approx(1)
    assert 0 < rouge("the gate lets it go", ["the gate lets go"]) < 1
    assert rouge("x", []) == 0


def test_rows_without_their_keys_are_refused():
    tokenizer = build_tokenizer()
    with pytest.raises(ValueError, match=r"recall_fda, row 2: expected .* text, key, value"):
        good = {"text": "a", "key": "b", "value": "c"}
        build_own("recall_fda", [good, {"text": "a"}], tokenizer, 100)
    with pytest.raises(ValueError, match="at least one row"):
        build_own("recall_drop", [], tokenizer, 100)
    row = {"context": "Rome fell in", "question": "It fell in"}
    with pytest.raises(ValueError, match=r"row 1: .*answers: expected a list of texts, got '476'"):
        build_own("recall_drop", [row | {"answers": "476"}], tokenizer, 100)
    with pytest.raises(ValueError, match=r"row 1: .*answers: expected texts, got \(476"):
        build_own("recall_drop", [row | {"answers": [476]}], tokenizer, 100)
    with pytest.raises(ValueError, match=r"length: expected at least \d+ more"):
        build_own("recall_drop", [row | {"answers": ["476"]}], tokenizer, 30)
