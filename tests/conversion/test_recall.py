"""The recall task: texts that can be answered, and only by who remembers the right fact."""

import numpy as np
import pytest
import torch
from teachers import build_tokenizer
from torch import nn

from gsa.conversion.recall import CHANCE, make_questions, recall
from gsa.data.encoding import load_encoder, load_tokenizer
from gsa.training.distributed import Team

DISTANCES = (60, 150)


def tokenizer_of(kind, folder):
    if kind == "mistral":
        pytest.importorskip("mistral_common")
    if kind == "pairs":
        return build_tokenizer()
    load_encoder(kind).save(folder)
    return load_tokenizer(folder)


@pytest.fixture(params=["bytes", "pairs", "mistral"])
def asked(request, tmp_path):
    tokenizer = tokenizer_of(request.param, tmp_path)
    prose = np.array(tokenizer("what the gate lets go, ", add_special_tokens=False).input_ids)
    return tokenizer, prose, make_questions(tokenizer, prose, DISTANCES, 40, seed=1)


class Reader(nn.Module):
    """Says what stood behind the question `which` it names: its own, or that of any fact."""

    def __init__(self, tokenizer, words, any_fact=False):
        super().__init__()
        self.tokenizer, self.any_fact = tokenizer, any_fact
        self.weight = nn.Parameter(torch.zeros(words))
        self.rng = np.random.default_rng(0)

    def forward(self, input_ids, logits_to_keep, use_cache):
        logits = torch.zeros(*input_ids.shape, len(self.weight))
        for row, ids in enumerate(input_ids.tolist()):
            text = self.tokenizer.decode(ids)
            *facts, question = text.split("The password of ")[-5:]
            stem, answer = question.split(" is ")
            said = [fact.split(".\n")[0].split(" is ") for fact in facts]
            chosen = dict(said)[stem]
            if self.any_fact:
                chosen = said[self.rng.integers(len(said))][1]
            right = torch.tensor(ids)
            if chosen != answer:
                right = (right + 1) % len(self.weight)
            logits[row, :-1].scatter_(1, right[1:, None], 1.0)
        return type("Output", (), {"logits": logits[:, -logits_to_keep:]})


def test_a_reader_who_remembers_is_right_and_one_who_guesses_by_chance(asked):
    tokenizer, _, questions = asked
    words = 1 + max(int(q.ids_BT.max()) for q in questions)
    found = recall(Reader(tokenizer, words), questions, Team())
    assert found.texts == 40 and found.shares == dict.fromkeys(DISTANCES, 1.0)
    shares = recall(Reader(tokenizer, words, any_fact=True), questions, Team()).shares
    guessed = sum(shares.values()) / 2
    assert abs(guessed - CHANCE) < 4 * (CHANCE * (1 - CHANCE) / 80) ** 0.5


def test_distances_are_in_tokens_and_facts_on_both_sides(asked):
    tokenizer, _, questions = asked
    for one in questions:
        places = []
        assert len({tuple(row) for row in one.ids_BT.tolist()}) == 40
        for ids, length in zip(one.ids_BT.tolist(), one.answers, strict=True):
            answer = ids[-length:]
            fact = slice(len(ids) - one.distance - 2 * length, len(ids) - one.distance - length)
            assert ids[fact] == answer
            question = tokenizer.decode(ids).rsplit("\n", 1)[1]
            name, word = question.removeprefix("The password of ").split(" is ")
            stated = tokenizer.decode(ids[: fact.stop])
            assert stated.endswith(f"The password of {name} is {word}")
            places.append(stated.count("The password of "))
        # Where a question takes nearly all of the distance, the other facts come before.
        assert set(places) >= ({4} if one.distance == 60 else {2, 3, 4})


def test_the_same_seed_writes_the_same_texts(asked):
    tokenizer, prose, questions = asked
    again = make_questions(tokenizer, prose, DISTANCES, 40, seed=1)
    assert all(torch.equal(a.ids_BT, b.ids_BT) for a, b in zip(questions, again, strict=True))
    other = make_questions(tokenizer, prose, DISTANCES, 40, seed=2)
    assert not torch.equal(questions[0].ids_BT, other[0].ids_BT)
    alone = make_questions(tokenizer, prose, DISTANCES[1:], 40, seed=1)
    assert torch.equal(alone[0].ids_BT, questions[1].ids_BT), "each distance by itself"


def test_shares_of_processes_add_up(asked):
    """What two processes count, each in its turn, is what one counts."""
    tokenizer, _, questions = asked
    torch.manual_seed(0)
    words = 1 + max(int(q.ids_BT.max()) for q in questions)
    reader = Reader(tokenizer, words)
    parts = [recall(reader, questions, Team(rank=rank, world=2)) for rank in (0, 1)]
    for distance in DISTANCES:
        assert sum(part.shares[distance] for part in parts) == 1.0
