"""A recall task in running text: facts are stated, prose goes on, and one of them is asked for.

    … The password of Alice is river. …prose and other facts… The password of Alice is

The answer counts if each of its tokens is the likeliest, so if greedy decoding gives it. In the
manner of needles in a haystack, with several needles: who only remembers that passwords were named
is right once in `FACTS` times.
"""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gsa.data import TokenShards
from gsa.training.distributed import Team

NAMES = (
    *("Alice", "Arthur", "Anna", "Charles", "Clara", "Daniel", "Edward", "Ellen", "Emma", "Frank"),
    *("George", "Grace", "Helen", "Henry", "Jack", "James", "Jane", "John", "Joseph", "Julia"),
    *("Kate", "Laura", "Lewis", "Lucy", "Maria", "Martin", "Mary", "Oliver", "Paul", "Peter"),
    *("Philip", "Robert", "Rose", "Ruth", "Samuel", "Sarah", "Simon", "Thomas", "Walter"),
)
WORDS = (
    *("apple", "arrow", "bell", "bird", "boat", "book", "bread", "bridge", "cat", "chair"),
    *("cloud", "coat", "corn", "cup", "door", "egg", "field", "fire", "fish", "flower"),
    *("garden", "glass", "gold", "hat", "horse", "island", "key", "lake", "lamp", "leaf"),
    *("milk", "moon", "mountain", "paper", "rain", "river", "road", "salt", "ship", "silver"),
    *("snow", "stone", "sugar", "table", "tower", "train", "tree", "water", "wheel", "window"),
)
FACTS = 4
"""Stated in each text, at random places; one is asked for."""
CHANCE = 1 / FACTS
"""Of being right by naming one of the answers in sight."""
_PROSE = 1 << 20
_LEAD = 32
_TOKENS_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class Questions:
    """Texts of one distance, all of one length, each with its answer at its end.

    distance: tokens from the end of the fact to the answer. ids_BT: int64. answers: tokens of each.
    """

    distance: int
    ids_BT: Tensor
    answers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Recall:
    """The share of answers that a model gave, by distance in tokens."""

    texts: int
    shares: dict[int, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"chance": CHANCE}


def prose_of(shards: TokenShards) -> np.ndarray:
    """Tokens to put between facts: the beginning of some shards, without ends of documents."""
    tokens = shards.tokens[:_PROSE].astype(np.int64)
    tokens = tokens[tokens != shards.eos_id]
    if not len(tokens):
        raise ValueError(f"{shards.folder}: expected text, got ends of documents only")
    return tokens


def make_questions(
    tokenizer: Any, prose: np.ndarray, distances: tuple[int, ...], texts: int, seed: int
) -> list[Questions]:
    """So many texts of each distance, the same for the same seed.

    ValueError for a distance that the question alone exceeds in this tokenizer's tokens.
    """
    return [
        _Writer(tokenizer, prose, np.random.default_rng([seed, distance])).write(distance, texts)
        for distance in distances
    ]


@torch.no_grad()
def recall(model: Any, questions: list[Questions], team: Team) -> Recall:
    """How often a causal language model of transformers' interface answers; processes share it."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    right = torch.zeros(len(questions), dtype=torch.float64)
    try:
        for i, asked in enumerate(questions):
            rows = max(1, _TOKENS_AT_ONCE // asked.ids_BT.shape[1])
            for first in range(team.rank * rows, len(asked.ids_BT), team.world * rows):
                part = slice(first, first + rows)
                right[i] += _count(model, asked.ids_BT[part].to(device), asked.answers[part])
    finally:
        model.train(was_training)
    counts = team.sum(right).tolist()
    shares = {q.distance: n / len(q.answers) for q, n in zip(questions, counts, strict=True)}
    return Recall(texts=len(questions[0].answers), shares=shares)


def _count(model: Any, ids_BT: Tensor, answers: tuple[int, ...]) -> int:
    kept = max(answers) + 1
    logits = model(input_ids=ids_BT, logits_to_keep=kept, use_cache=False).logits
    first = logits.argmax(-1)[:, :-1] == ids_BT[:, 1 - kept :]
    return sum(int(row[-length:].all()) for row, length in zip(first, answers, strict=True))


class _Fact(NamedTuple):
    """A sentence on a line of its own, in tokens."""

    question: list[int]
    answer: list[int]
    end: list[int]

    @property
    def sentence(self) -> list[int]:
        return self.question + self.answer + self.end


class _Writer:
    """Writes texts of facts and prose in a tokenizer's tokens."""

    def __init__(self, tokenizer: Any, prose: np.ndarray, rng: np.random.Generator) -> None:
        self.tokenizer, self.prose, self.rng = tokenizer, prose, rng

    def write(self, distance: int, texts: int) -> Questions:
        stated = [self._facts() for _ in range(texts)]
        most = max(sum(len(fact.sentence) for fact in facts) for facts in stated)
        length = distance + most + _LEAD
        rows = [self._text(facts, distance, length) for facts in stated]
        answers = tuple(len(facts[0].answer) for facts in stated)
        return Questions(distance, torch.tensor(rows), answers)

    def _facts(self) -> list[_Fact]:
        names = self.rng.choice(len(NAMES), FACTS, replace=False)
        words = self.rng.choice(len(WORDS), FACTS, replace=False)
        return [self._fact(NAMES[i], WORDS[j]) for i, j in zip(names, words, strict=True)]

    def _fact(self, name: str, word: str) -> _Fact:
        """Encoded as a whole and cut where its parts alone end: a tokenizer looks around itself."""
        text = f"\nThe password of {name} is"
        question, said, whole = map(self._encode, (text, f"{text} {word}", f"{text} {word}.\n"))
        cut, end = _common(question, said), _common(said, whole)
        return _Fact(said[:cut], said[cut:], whole[end:])

    def _text(self, facts: list[_Fact], distance: int, length: int) -> list[int]:
        """The first of the facts is asked for."""
        asked, others = facts[0], [fact.sentence for fact in facts[1:]]
        room = distance - len(asked.end) - len(asked.question)
        if room < 0:
            raise ValueError(
                f"recall_distances: expected at least {distance - room}, the tokens of a question, "
                f"got {distance}"
            )
        inside: list[list[int]] = []
        outside: list[list[int]] = []
        for fact in others:
            fits = sum(map(len, inside)) + len(fact) <= room
            (inside if fits and self.rng.random() < 0.5 else outside).append(fact)
        stated = asked.question + asked.answer
        lead = self._scatter(outside, length - distance - len(stated) - len(asked.answer))
        return [*lead, *stated, *asked.end, *self._scatter(inside, room), *stated]

    def _scatter(self, facts: list[list[int]], length: int) -> list[int]:
        """Facts at random places of prose, so many tokens in all."""
        size = length - sum(map(len, facts))
        start = self.rng.integers(len(self.prose))
        prose = self.prose[(start + np.arange(size)) % len(self.prose)].tolist()
        cuts = [0, *sorted(self.rng.integers(0, size + 1, len(facts)).tolist()), size]
        text = prose[: cuts[1]]
        for fact, a, b in zip(facts, cuts[1:], cuts[2:], strict=False):
            text += fact + prose[a:b]
        return text

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
