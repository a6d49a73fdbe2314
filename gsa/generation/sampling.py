"""Which token comes next: for all rows of a pool at once, on its device."""

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from gsa.generation.config import check_sampling

MAX_ENDS = 8
"""Tokens that may end one text."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one text is written. ValueError naming the field if a value makes no sense."""

    max_new_tokens: int = 200
    """Tokens to write at most, an end token included."""
    greedy: bool = False
    """Always the likeliest token; temperature, top_k, top_p and seed play no part."""
    temperature: float = 1.0
    """Divides the logits before sampling."""
    top_k: int = 0
    """Sample among the k likeliest tokens (and those as likely as the last); 0 for all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together reach this probability; 1 for all."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens read or written before, multiplies negative ones."""
    seed: int = 0
    """Same seed, same state: same tokens."""

    def __post_init__(self) -> None:
        check_sampling(self)

    @staticmethod
    def of(options: object) -> "Sampling":
        """From an object whose fields have the same names."""
        return Sampling(**{f.name: getattr(options, f.name) for f in fields(Sampling)})

    @property
    def needs(self) -> "Needs":
        """What `sample` has to do for this text."""
        return Needs(
            chance=not self.greedy,
            penalty=self.repetition_penalty != 1,
            cut=not self.greedy and (self.top_k > 0 or self.top_p < 1),
        )


class Needs(NamedTuple):
    """Parts of sampling that some row asks for; the others are left out for all rows.

    A part that a row does not ask for leaves it as it is, bit for bit, so that it makes no
    difference to a row whether its neighbours need it.
    """

    chance: bool
    penalty: bool
    cut: bool

    def __or__(self, other: "Needs") -> "Needs":  # type: ignore[override]
        return Needs(*(a or b for a, b in zip(self, other, strict=True)))


class Choices:
    """The settings of every row of a pool, as tensors whose addresses stay.

    Args:
        rows: P.
        words: W, size of the vocabulary.
    """

    def __init__(self, rows: int, words: int, device: torch.device):
        def numbers(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full((rows,), value, dtype=dtype, device=device)

        self.chance, self.temperature = numbers(0.0), numbers(1.0)
        self.top_k, self.top_p = numbers(0, torch.int64), numbers(1.0, torch.float64)
        self.penalty, self.seed = numbers(1.0), numbers(0, torch.int64)
        self.words = word_keys(words, device)
        self.met = torch.zeros(rows, words, dtype=torch.bool, device=device)
        """[P, W], tokens that each row has read or written."""

    def put(self, row: int, sampling: Sampling) -> None:
        """Settings of a row, without waiting for the device."""
        greedy = sampling.greedy
        self.chance[row] = 0.0 if greedy else 1.0
        self.temperature[row] = 1.0 if greedy else sampling.temperature
        self.top_k[row] = 0 if greedy else sampling.top_k
        self.top_p[row] = 1.0 if greedy else sampling.top_p
        self.penalty[row] = sampling.repetition_penalty
        self.seed[row] = sampling.seed


def sample(logits_PW: Tensor, choices: Choices, position_P: Tensor, needs: Needs) -> Tensor:
    """The next token of every row, int64 [P].

    Args:
        position_P: int64 [P], how many tokens each row has read.
    """
    return draw(shape(logits_PW, choices, needs), choices, position_P, needs)


def shape(logits_PW: Tensor, choices: Choices, needs: Needs) -> Tensor:
    """Logits in fp32 after repetition penalty, temperature, top-k and top-p, in that order."""
    logits = logits_PW.float()
    if needs.penalty:
        penalty = choices.penalty[:, None]
        changed = torch.where(logits < 0, logits * penalty, logits / penalty)
        logits = torch.where(choices.met, changed, logits)
    if needs.chance:
        logits = logits / choices.temperature[:, None]
    if needs.cut:
        logits = cut(logits, choices.top_k[:, None], choices.top_p[:, None])
    return logits


def draw(logits_PW: Tensor, choices: Choices, position_P: Tensor, needs: Needs) -> Tensor:
    """The largest of shaped logits, the first of equals; by chance, of logits plus Gumbel noise,
    which is a draw from their softmax.

    The noise is a function of the row's seed, the position and the word, so a token does not depend
    on what else was drawn before or beside it.
    """
    if needs.chance:
        noise = gumbel(choices.seed, position_P, choices.words)
        logits_PW = logits_PW + choices.chance[:, None] * noise
    return logits_PW.argmax(-1)


def cut(logits_PW: Tensor, top_k_P1: Tensor, top_p_P1: Tensor) -> Tensor:
    """-inf where a token is not among the top_k, or not needed to reach top_p among those.

    Equals stay together: tokens as likely as the last that stays do, too.
    """
    ordered = logits_PW.sort(-1, descending=True).values
    last = (top_k_P1 - 1).clamp(0, logits_PW.shape[1] - 1)
    least = ordered.gather(1, last).masked_fill(top_k_P1 == 0, -torch.inf)
    ordered = ordered.masked_fill(ordered < least, -torch.inf)
    # Whole numbers: a running sum that comes out the same in whatever order a device adds.
    parts = (ordered.softmax(-1).double() * 2**40).long()
    before = parts.cumsum(-1) - parts
    # A token stays if those before it fall short of top_p; the first always does.
    unneeded = (before >= (top_p_P1 * 2**40).long()) & (before > 0)
    needed = ordered.masked_fill(unneeded & (top_p_P1 < 1), torch.inf).amin(-1, keepdim=True)
    return logits_PW.masked_fill(logits_PW < torch.maximum(least, needed), -torch.inf)


def word_keys(words: int, device: torch.device) -> Tensor:
    """A number for every word, int64 [W]: the multiples of 2^64 over the golden ratio, mod 2^64."""
    odd = -7046029254386353131
    return torch.arange(1, words + 1, device=device) * odd


def gumbel(seed_P: Tensor, position_P: Tensor, keys_W: Tensor) -> Tensor:
    """Noise [P, W] with distribution exp(-exp(-x)), fp32: a function of (seed, position, word).

    keys_W: from `word_keys`. Made beforehand: in compiled code the product would be an index, which
    the compiler counts in 32 bits.
    """
    key_P = scramble(scramble(seed_P) + position_P)
    bits = scramble(key_P[:, None] + keys_W)
    # 40 bits, with more digits near 0, where the winners of a draw come from; never 0 or 1.
    uniform = (((bits >> 24) & (2**40 - 1)).float() + 0.5) * 2.0**-40
    return -torch.log(-torch.log1p(-uniform.clamp(max=1 - 2.0**-24)))


def scramble(x: Tensor) -> Tensor:
    """A bijection of 64-bit integers without a visible order (products are mod 2^64)."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor
    return x ^ ((x >> 31) & (2**33 - 1))
