"""Several shard folders in fixed proportions, in an order computed by position.

    rows = open_rows("shards/books:0.7,shards/code:0.3", seq_len=1024, seed=0)

How many of the first p rows are of the first source: floor(p · weight + phase), with a phase in
[0, 1) from the seed; the p rows that remain are shared out among the other sources in the same
way, by the weights that remain. So the rows of each source before any position are known without
walking there, they never decrease from one position to the next, and the source of a row is the
one whose number grows. All of it is integer arithmetic on the weights as they were written: before
every position, each of S sources has its share to within S − 1 rows, and no error adds up.
"""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from gsa.data.packing import PackedRows, Span, TextRows, check_at_least
from gsa.data.permutation import permute
from gsa.data.shards import TokenShards

_PHASES = 1 << 32
_PART = re.compile(r"(?P<folder>.*):(?P<weight>[^:/\\]*)")


class MixedShards:
    """The shards of a mixture, as what a run asks of its training text.

    Attributes:
        parts, weights: the shards and their weights, which sum to 1.
        vocab_size, eos_id, tokenizer_folder: of the tokenizer, which all parts share.
        num_tokens: of all parts together.
        fingerprint: covers the parts' fingerprints, their weights and their order.
    """

    def __init__(self, parts: Sequence[TokenShards], weights: Sequence[Fraction]) -> None:
        first = parts[0]
        for i, part in enumerate(parts):
            if part.tokenizer_key != first.tokenizer_key:
                raise ValueError(
                    f"data: {first.folder} and {part.folder} were made with different tokenizers; "
                    "prepare both with the same"
                )
            for other in parts[:i]:
                if part.fingerprint == other.fingerprint:
                    raise ValueError(
                        f"data: {other.folder} and {part.folder} hold the same tokens; name each "
                        "source once, with the weight of both"
                    )
        self.parts, self.weights = tuple(parts), tuple(weights)
        self.folder, self.tokenizer_folder = first.folder, first.tokenizer_folder
        self.vocab_size, self.eos_id = first.vocab_size, first.eos_id
        self.tokenizer_key = first.tokenizer_key
        self.load_tokenizer = first.load_tokenizer
        self.require_vocab_size = first.require_vocab_size
        self.require_tokenizer = first.require_tokenizer
        self.num_tokens = sum(part.num_tokens for part in parts)
        identity = [[part.fingerprint, str(w)] for part, w in zip(parts, weights, strict=True)]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()


class MixedRows(TextRows):
    """Rows of several sources by weight; position tells the source and which row of it.

    Each source keeps the order and the epochs that it has alone (`PackedRows`), at its own pace. A
    row is of one source. Weights are exact: a Fraction, an int, or a float taken at its word.
    ValueError for sources of different tokenizers or the same tokens, or weights not above 0.
    """

    def __init__(
        self, sources: Sequence[PackedRows], weights: Sequence[Fraction | float], *, seed: int
    ) -> None:
        if not sources or len(sources) != len(weights):
            raise ValueError(
                f"weights: expected one for each of {len(sources)} sources, got {len(weights)}"
            )
        if len({source.seq_len for source in sources}) > 1:
            raise ValueError("sources: expected rows of one seq_len")
        for source, weight in zip(sources, weights, strict=True):
            if not 0 < weight < math.inf:
                raise ValueError(
                    f"data: {source.shards.folder}: expected a finite weight above 0, got {weight}"
                )
        exact = [Fraction(weight) for weight in weights]
        self.weights = tuple(weight / sum(exact) for weight in exact)
        self.sources = tuple(sources)
        self.seq_len = sources[0].seq_len
        self.shards = MixedShards([source.shards for source in sources], self.weights)
        # Each source but the last takes a share of the rows that those before it left.
        left = [sum(self.weights[i:]) for i in range(len(sources) - 1)]
        self._shares = [weight / rest for weight, rest in zip(self.weights, left, strict=False)]
        places = np.arange(len(sources), dtype=np.int64)
        self._phases = permute(places, size=_PHASES, seed=seed, epoch=0).tolist()

    def counts(self, position: int) -> list[int]:
        """How many of the rows before `position` are of each source."""
        check_at_least("position", position, 0)
        counts = []
        for share, phase in zip(self._shares, self._phases, strict=False):
            taken = share.numerator * position + (phase * share.denominator >> 32)
            counts.append(taken // share.denominator)
            position -= counts[-1]
        return [*counts, position]

    def epochs(self, position: int) -> list[int]:
        """The number of whole passes over each source before `position`."""
        counts = self.counts(position)
        return [rows.epoch(count) for rows, count in zip(self.sources, counts, strict=True)]

    def source_ids(self, position: int, rows: int) -> np.ndarray:
        """Which source each of the rows at position … position+rows−1 is of."""
        check_at_least("rows", rows, 1)
        counts = np.array([self.counts(place) for place in range(position, position + rows + 1)])
        return np.diff(counts, axis=0).argmax(axis=1)

    def row_ids(self, position: int, rows: int) -> np.ndarray:
        """Which row of its own source each of those rows is."""
        return self._row_ids(position, self.source_ids(position, rows))

    def _row_ids(self, position: int, chosen: np.ndarray) -> np.ndarray:
        ids = np.empty(len(chosen), dtype=np.int64)
        for i, (source, first) in enumerate(zip(self.sources, self.counts(position), strict=True)):
            here = chosen == i
            if here.any():
                ids[here] = source.row_ids(first, int(here.sum()))
        return ids

    def spans(self, position: int, rows: int) -> list[Span]:
        """Where the tokens of the rows at position … position+rows−1 lie."""
        chosen = self.source_ids(position, rows)
        starts = self._row_ids(position, chosen) * self.seq_len
        return [
            Span(self.sources[i].shards, start, start + self.seq_len)
            for i, start in zip(chosen.tolist(), starts.tolist(), strict=True)
        ]


def open_rows(data: str, *, seq_len: int, seed: int) -> PackedRows | MixedRows:
    """The training rows that `data` means: one shard folder, or several as FOLDER:WEIGHT,….

    A folder that exists as given is that folder, whatever its name. Weights are decimal numbers
    above 0, of which only the proportions count. FileNotFoundError for a folder that is missing;
    ValueError naming the part that cannot be read, or the sources that do not go together.
    """

    def alone(folder: str) -> PackedRows:
        return PackedRows(TokenShards(folder), seq_len=seq_len, seed=seed)

    if Path(data).is_dir() or not ("," in data or _PART.fullmatch(data)):
        return alone(data)
    parts = [_parse_part(part) for part in data.split(",")]
    folders, weights = zip(*parts, strict=True)
    return MixedRows([alone(folder) for folder in folders], weights, seed=seed)


def _parse_part(part: str) -> tuple[str, Fraction]:
    found = _PART.fullmatch(part.strip())
    if found is None or not found["folder"]:
        raise ValueError(
            f"data: expected FOLDER:WEIGHT for each of several sources, got {part!r}; "
            "write for example shards/books:0.7,shards/code:0.3"
        )
    try:
        usable = 0 < float(found["weight"]) < math.inf
    except ValueError:
        usable = False
    if not usable:
        raise ValueError(f"data: expected a finite weight above 0 after the colon, got {part!r}")
    return found["folder"], Fraction(found["weight"].strip())
