"""MQAR, multi-query associative recall (Arora et al. 2023, "Zoology", arXiv 2312.04927).

    inputs   k1 v1 k2 v2 k3 v3 0  0  k2 0  0  0  k1 0  k3 0
    answers  .  .  .  .  .  .  .  .  v2 .  .  .  v1 .  v3 .

Keys and values come first; then each key stands once more among zeros, and there its value is to be
said. The answer itself is never shown.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gsa.data import Batch, Rows
from gsa.data.permutation import shuffled
from gsa.model.loss import IGNORE, next_tokens
from gsa.training.objective import Objective

HELD_OUT = 1 << 32
"""Index of the first example that no training sees."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Sizes of the task. ValueError if they leave no room. Defaults: the paper's Figure 3a.

    power: a, where a key at two-token gap g = 0, 1, … after the last value comes again with a
    probability in proportion to (g + 1)^(a − 1), among those gaps that are left; 1 is uniform.
    """

    seq_len: int = 512
    pairs: int = 64
    vocab_size: int = 8192
    power: float = 0.01

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.seq_len % 2 or self.seq_len < 4 * self.pairs:
            raise ValueError(
                "seq_len: expected an even number of at least four tokens for each of "
                f"pairs = {self.pairs} ≥ 1, got {self.seq_len}"
            )
        if self.vocab_size % 2 or self.vocab_size < 2 * self.pairs + 2:
            raise ValueError(
                f"vocab_size: expected an even number of at least 2 · pairs + 2 = "
                f"{2 * self.pairs + 2} (keys, as many values, and 0), got {self.vocab_size}"
            )
        if not self.power > 0:
            raise ValueError(f"power: expected a number above 0, got {self.power}")


class Example(NamedTuple):
    """inputs [T]; places [N] where the N pairs are asked for; values [N], their answers. int32."""

    inputs: np.ndarray
    places: np.ndarray
    values: np.ndarray


def example(task: Task, seed: int, index: int) -> Example:
    """The example of that index: a pure function of its arguments, on any machine.

    Keys are 1 … vocab_size/2 − 1, values the upper half of the vocabulary, none twice. Random bits
    are those of Philox with the key (seed, index).
    """
    N, half = task.pairs, task.vocab_size // 2
    gaps = (task.seq_len - 2 * N) // 2
    key = np.array([seed, index], dtype=np.uint64)
    bits = np.random.Philox(key=key).random_raw(half - 1 + half + gaps)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    of_keys, of_values, of_gaps = np.split(uniform, [half - 1, 2 * half - 1])
    keys = 1 + _smallest(of_keys, N)
    values = half + _smallest(of_values, N)
    # The first N to arrive, at rates p: drawn by weight without replacement (Efraimidis and
    # Spirakis, "Weighted random sampling with a reservoir", 2006).
    rates = np.arange(1, gaps + 1, dtype=np.float64) ** (task.power - 1)
    places = 2 * N + 2 * _smallest(-np.log(of_gaps) / rates, N)
    inputs = np.zeros(task.seq_len, dtype=np.int32)
    inputs[0 : 2 * N : 2], inputs[1 : 2 * N : 2], inputs[places] = keys, values, keys
    return Example(inputs, places.astype(np.int32), values.astype(np.int32))


def _smallest(numbers: np.ndarray, count: int) -> np.ndarray:
    """Where the smallest ones stand, in rising order."""
    found = np.argpartition(numbers, count - 1)[:count]
    return found[np.argsort(numbers[found])]


class MQARRows(Rows):
    """`count` examples from index `first` on, held in memory: in order, or shuffled in each epoch.

    Shuffled as `PackedRows` are.
    """

    def __init__(self, task: Task, *, seed: int, first: int, count: int, shuffled: bool) -> None:
        self.task, self.seq_len, self.seed = task, task.seq_len, seed
        self.count, self.shuffled = count, shuffled
        made = [example(task, seed, first + i) for i in range(count)]
        self._inputs, self._places, self._values = map(np.stack, zip(*made, strict=True))

    def batch(self, position: int, rows: int) -> Batch:
        """Labels are one place behind what they answer, as a language model has them."""
        T = self.seq_len
        if self.shuffled:
            chosen = shuffled(position, rows, size=self.count, seed=self.seed)
        else:
            chosen = np.arange(position, position + rows) % self.count
        labels = np.full((rows, T), IGNORE, dtype=np.int64)
        np.put_along_axis(labels, self._places[chosen] + 1, self._values[chosen], axis=1)
        inputs = torch.from_numpy(self._inputs[chosen].astype(np.int64))
        boundaries = torch.arange(0, rows * T + 1, T, dtype=torch.int32)
        return Batch(inputs.view(1, -1), torch.from_numpy(labels).view(1, -1), boundaries, T)


def answers_of(task: Task, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """(logits [A, W] at the A places of the batch that are asked for, their answers [A])

    The rows go in as rows, not packed, and logits of other places are never computed. As many are
    asked for in every row, so nothing waits for a device to count them.
    """
    tokens, labels = (x.view(-1, task.seq_len) for x in (batch.input_ids, batch.labels))
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    targets = next_tokens(labels).flatten()
    asked = (targets != IGNORE).to(torch.uint8)
    places = asked.argsort(descending=True, stable=True)[: len(tokens) * task.pairs]
    return model.lm_head(hidden.flatten(0, 1)[places]), targets[places]


def recall_loss(task: Task) -> Objective:
    """Cross-entropy of the answers in nats, summed; of nothing else."""

    def objective(model: Any, batch: Batch) -> Tensor:
        logits, answers = answers_of(task, model, batch)
        return F.cross_entropy(logits.float(), answers, reduction="sum")

    return objective


def is_right(task: Task, model: Any, batch: Batch) -> Tensor:
    """[A] bool: whether the likeliest token is the answer."""
    logits, answers = answers_of(task, model, batch)
    return logits.argmax(-1) == answers
