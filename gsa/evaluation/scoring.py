"""Log-likelihoods of continuations: what texts have in common is read once, and its state forked.

A recurrent state costs next to nothing to fork, so a context is read once however many choices
follow it, and examples before many contexts once for all of them.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gsa.model import GSACache

LEAST_HEAD = 32
"""Tokens that contexts must begin with alike to be read as a family."""
TOKENS = 1 << 14
"""Tokens that go through the model at a time, rows times columns."""
LOGITS = 1 << 26
"""Logits held at a time."""

Tokens = tuple[int, ...]


class Request(NamedTuple):
    """A continuation to score after a context; each has at least one token."""

    context: Tokens
    continuation: Tokens


class Score(NamedTuple):
    """log p of a continuation, in nats, and whether each of its tokens is the likeliest."""

    logprob: float
    is_greedy: bool


@dataclass
class Batch:
    """Texts that were read, one a row: the cache after them, and which columns hold tokens.

    real: bool [B, T], False at padding.
    """

    cache: GSACache
    real: Tensor

    def rows(self, chosen: Sequence[int]) -> "Batch":
        """The rows named, any of them as often as one likes; this batch stays as it is."""
        cache = self.cache.fork()
        cache.batch_select_indices(torch.tensor(chosen))
        return Batch(cache, self.real[list(chosen)])

    def read(self, model: Any, texts: Sequence[Tokens], most: int) -> Iterator[Tensor]:
        """Reads on, a text per row: hidden states [B, T, D] of at most `most` columns at a time.

        Texts are filled up at their end, where padding leaves a state as it is.
        """
        width = max(map(len, texts))
        ids = torch.zeros(len(texts), width, dtype=torch.int64)
        real = torch.zeros(len(texts), width, dtype=torch.bool)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text, dtype=torch.int64)
            real[row, : len(text)] = True
        before = self.real.shape[1]
        self.real = torch.cat([self.real, real], 1)
        mask = None if bool(self.real.all()) else self.real.to(model.device)
        for start in range(0, width, most):
            end = min(start + most, width)
            yield model.model(
                input_ids=ids[:, start:end].to(model.device),
                attention_mask=None if mask is None else mask[:, : before + end],
                past_key_values=self.cache,
            ).last_hidden_state


@torch.no_grad()
def score(model: Any, requests: Sequence[Request], *, rows: int) -> list[Score]:
    """Scores of all requests, in their order.

    Args:
        model: a `GSAForCausalLM` in eval mode, of any architecture.
        rows: contexts, and after them continuations, read at once.
    """
    asked: dict[Tokens, list[int]] = defaultdict(list)
    for place, request in enumerate(requests):
        asked[request.context].append(place)
    scores: dict[int, Score] = {}
    for head, contexts in families(sorted(asked)):
        start = Batch(GSACache(model.config), torch.zeros(1, 0, dtype=torch.bool))
        if head:
            for _ in start.read(model, [head], TOKENS):
                pass
        contexts.sort(key=len)
        for first in range(0, len(contexts), rows):
            some = contexts[first : first + rows]
            # The last token of a context is read with its continuations, whose first it predicts.
            tails = [context[len(head) : -1] for context in some]
            batch = start.rows([0] * len(some))
            if any(tails):
                for _ in batch.read(model, tails, max(1, TOKENS // len(some))):
                    pass
            scores |= _score_after(model, batch, some, requests, asked, rows)
    return [scores[place] for place in range(len(requests))]


def families(contexts: Sequence[Tokens]) -> list[tuple[Tokens, list[Tokens]]]:
    """(what they begin with, contexts), for contexts in lexicographic order.

    A context joins those before it if it shares at least `LEAST_HEAD` tokens, its last left out,
    and at least half of what they share. Those that join nobody are one family without a head.
    """
    found, alone, start = [], [], 0
    while start < len(contexts):
        first = contexts[start]
        shared, end = len(first) - 1, start + 1
        while end < len(contexts):
            common = _common(first, contexts[end], min(shared, len(contexts[end]) - 1))
            if common < LEAST_HEAD or (end > start + 1 and 2 * common < shared):
                break
            shared, end = common, end + 1
        if end == start + 1:
            alone.append(first)
        else:
            found.append((first[:shared], list(contexts[start:end])))
        start = end
    return [*found, ((), alone)] if alone else found


def _common(one: Tokens, other: Tokens, most: int) -> int:
    """How many of the first `most` tokens are the same."""
    if one[:most] == other[:most]:
        return most
    return next(i for i in range(most) if one[i] != other[i])


def _score_after(
    model: Any,
    batch: Batch,
    contexts: Sequence[Tokens],
    requests: Sequence[Request],
    asked: dict[Tokens, list[int]],
    rows: int,
) -> dict[int, Score]:
    """Scores by place among the requests of what follows the contexts that a batch has read."""
    # Continuations that differ in their last token only (A, B, C, D) are read as one.
    reads: dict[tuple[int, Tokens], list[int]] = defaultdict(list)
    for row, context in enumerate(contexts):
        for place in asked[context]:
            text = (context[-1], *requests[place].continuation[:-1])
            reads[row, text].append(place)
    waiting = sorted(reads, key=lambda key: len(key[1]))
    scores = {}
    for first in range(0, len(waiting), rows):
        some = waiting[first : first + rows]
        places = [(at, place) for at, key in enumerate(some) for place in reads[key]]
        taker = torch.tensor([at for at, _ in places], device=model.device)
        width = max(len(text) for _, text in some)
        targets = torch.zeros(len(places), width, dtype=torch.int64)
        counts = torch.zeros(len(places), width, dtype=torch.bool)
        for row, (_, place) in enumerate(places):
            continuation = requests[place].continuation
            targets[row, : len(continuation)] = torch.tensor(continuation)
            counts[row, : len(continuation)] = True
        targets, counts = targets.to(model.device), counts.to(model.device)
        most = min(LOGITS // model.config.vocab_size, TOKENS) // max(len(some), 1)
        logprob = torch.zeros(len(places), dtype=torch.float64, device=model.device)
        greedy, column = torch.ones(len(places), dtype=torch.bool, device=model.device), 0
        texts = [text for _, text in some]
        for hidden in batch.rows([row for row, _ in some]).read(model, texts, max(1, most)):
            logits = model.lm_head(hidden)
            here = slice(column, column + hidden.shape[1])
            column += hidden.shape[1]
            logits = logits if logits.dtype == torch.float64 else logits.float()
            logs, likeliest = logits.log_softmax(-1), logits.argmax(-1)
            chosen = logs[taker].gather(2, targets[:, here, None])[..., 0].double()
            logprob += chosen.where(counts[:, here], 0.0).sum(1)
            greedy &= ((likeliest[taker] == targets[:, here]) | ~counts[:, here]).all(1)
        for (_, place), value, is_greedy in zip(
            places, logprob.tolist(), greedy.tolist(), strict=True
        ):
            scores[place] = Score(value, is_greedy)
    return scores
