"""Our lm-eval model beside lm-eval's own HFLM on the same weights."""

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from teachers import build_tokenizer
from tiny_models import VARIANTS, build_tiny

from gsa.evaluation import scoring
from gsa.evaluation.harness import StateLM
from gsa.evaluation.scoring import Request, families, score

HEAD = "the slot forgets what the gate lets go, and remembers the rest of all that was read. " * 2
CONTEXTS = ["what the gate", "the", HEAD + "what", HEAD + "which slot", HEAD + "all ", ""]
CHOICES = [" lets go", " rest", " the rest of it", "s"]


def both(variant, rows=3, max_length=100, **changes):
    """(ours, HFLM) on one model in fp64."""
    sizes = dict(vocab_size=320, eos_token_id=1, bos_token_id=0)
    model = build_tiny(**(VARIANTS[variant] | sizes | changes))
    tokenizer = build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    theirs = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=max_length, device="cpu"
    )
    return StateLM(model, tokenizer, rows=rows, max_length=max_length), theirs


def instances(kind, arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


PAIRS = [(context, choice) for context in CONTEXTS for choice in CHOICES]


@pytest.mark.parametrize("variant", VARIANTS)
def test_loglikelihood_is_that_of_hflm(variant):
    ours, theirs = both(variant)
    pairs = [*PAIRS, (HEAD * 3, " rest"), (HEAD * 3, " the rest"), ("the", HEAD)]
    requests = instances("loglikelihood", pairs)
    found, expected = ours.loglikelihood(requests), theirs.loglikelihood(requests)
    for (logprob, greedy), (their_logprob, their_greedy) in zip(found, expected, strict=True):
        assert logprob == pytest.approx(their_logprob, rel=1e-5) and greedy is their_greedy


def test_a_greedy_continuation_is_known_as_such():
    ours, theirs = both("paper")
    prompt = ours.tok_encode("the slot")
    written = ours.model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)
    likeliest = written[0, len(prompt) :].tolist()
    other = [*likeliest[:-1], (likeliest[-1] + 1) % 320]
    requests = [(None, prompt, likeliest), (None, prompt, other), (None, prompt, likeliest[:1])]
    found = ours._loglikelihood_tokens(requests)
    assert [greedy for _, greedy in found] == [True, False, True]
    assert found[0][0] == pytest.approx(theirs._loglikelihood_tokens(requests)[0][0], rel=1e-5)


@pytest.mark.parametrize("variant", ["paper", "hybrid", "gla"])
def test_rolling_is_that_of_hflm(variant):
    ours, theirs = both(variant, max_length=20)
    requests = instances("loglikelihood_rolling", [(HEAD,), ("the",), (HEAD[:40],)])
    expected = theirs.loglikelihood_rolling(requests)
    assert ours.loglikelihood_rolling(requests) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("variant", ["paper", "hybrid", "retnet"])
def test_answers_are_those_of_hflm(variant):
    ours, theirs = both(variant, max_length=60)
    options = [{"until": ["e"], "max_gen_toks": 12}, {"until": "th", "max_gen_toks": 9}, {}]
    options[2] = {"until": [], "max_gen_toks": 5, "do_sample": False, "temperature": 0.0}
    asked = [(context, option) for context in ["the slot", HEAD * 2, "re"] for option in options]
    requests = instances("generate_until", asked)
    found = ours.generate_until(requests)
    assert found == theirs.generate_until(requests) and len(set(found)) > 4


def test_sampling_differs_by_request_and_repeats():
    ours, _ = both("paper")
    option = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 2.0, "top_k": 50}
    requests = instances("generate_until", [("the slot", option)] * 3)
    found = ours.generate_until(requests)
    assert len(set(found)) == 3 and ours.generate_until(requests) == found


def test_unknown_wishes_are_refused():
    ours, _ = both("paper")
    for option, message in (({"num_beams": 4}, "num_beams"), ({"max_gen_toks": 100}, "length: ")):
        with pytest.raises(ValueError, match=message):
            ours.generate_until(instances("generate_until", [("the", option)]))
    with pytest.raises(ValueError, match="at most 100"):
        ours._loglikelihood_tokens([(None, [1], [2] * 101)])


def test_what_texts_share_is_read_once(monkeypatch):
    model, read = build_tiny(), []
    model.model.register_forward_pre_hook(
        lambda _, args, options: read.append(options["input_ids"].shape.numel()), with_kwargs=True
    )
    head = tuple(range(1, 36))
    one, other, alone = (*head, 36, 37), (*head, 38), (2, 3, 4)
    answers = [(5,), (6,), (7, 8), (7, 9)]
    requests = [Request(context, text) for context in (one, other, alone) for text in answers]
    together = score(model, requests, rows=4)
    # The head; one token of the first, 0 of the second; then [last] and [last, 7] of each.
    assert read == [35, 2, 2 * 4, 2, 2 * 2]
    monkeypatch.setattr(scoring, "TOKENS", 3)
    monkeypatch.setattr(scoring, "LOGITS", 40)
    apart = [score(model, [request], rows=1)[0] for request in requests]
    for (logprob, greedy), expected in zip(together, apart, strict=True):
        assert logprob == pytest.approx(expected.logprob, rel=1e-9) and greedy is expected.is_greedy


def test_families():
    head = tuple(range(40))
    longer = (*head, *range(100, 200))
    contexts = [(0, 1), head, (*head, 1, 2), (*longer, 1, 1), (*longer, 2, 1), (7,)]
    found = families(sorted(contexts))
    assert sorted(text for _, family in found for text in family) == sorted(contexts)
    assert [(len(start), len(family)) for start, family in found] == [(39, 4), (0, 2)]
    for start, family in found:
        assert all(text[: len(start)] == start and len(text) > len(start) for text in family)
