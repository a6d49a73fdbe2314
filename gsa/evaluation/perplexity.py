"""`gsa eval perplexity`: how well held-out text is predicted, by how much of it is in sight."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gsa.data.encoding import HuggingFaceEncoder
from gsa.data.readers import check_parquet, find_files
from gsa.data.shards import INDEX, TokenShards
from gsa.evaluation.config import PerplexityConfig
from gsa.evaluation.models import (
    context_length,
    is_ours,
    model_facts,
    open_model,
    open_tokenizer,
    read_config,
)
from gsa.evaluation.report import check_out, markdown, write_report
from gsa.model import GSACache
from gsa.training.environment import environment

LOGITS = 1 << 26
"""Logits held at a time, where the model's memory allows reading in pieces."""


class Window(NamedTuple):
    """Tokens start … end−1 of a document, of which those from `first` on are scored."""

    start: int
    end: int
    first: int


def windows(tokens: int, length: int, stride: int) -> Iterator[Window]:
    """Windows over a document such that no token is scored twice.

    All tokens are scored but those that stand first in their window when they could be: the first
    of the document, and with stride = length the first of each row.

    Args:
        tokens: of the document.
        length: of a window at most.
        stride: from one start to the next, at most length.
    """
    scored = 1
    for start in range(0, tokens, stride):
        end = min(start + length, tokens)
        first = max(scored, start + 1)
        if first < end:
            yield Window(start, end, first)
        scored = end
        if end == tokens:
            return


@dataclass(eq=False)
class Tally:
    """Sums of negative log-likelihoods (nats) and counts by position, which is the number of tokens
    in sight; bucket b holds positions 2^b … 2^(b+1)−1."""

    nats: Tensor
    tokens: Tensor

    @staticmethod
    def empty() -> "Tally":
        return Tally(torch.zeros(64, dtype=torch.float64), torch.zeros(64, dtype=torch.int64))

    def add(self, nats_N: Tensor, positions_N: Tensor) -> None:
        """Adds tokens one by one: losses in nats, and int64 positions of at least 1."""
        buckets = torch.frexp(positions_N.double()).exponent.long() - 1
        self.nats.index_add_(0, buckets, nats_N.double())
        self.tokens.index_add_(0, buckets, torch.ones_like(buckets))

    def rows(self) -> list[dict[str, Any]]:
        """One dict per bucket that has tokens."""
        return [
            {
                "from": 1 << bucket,
                "to": (2 << bucket) - 1,
                "tokens": count,
                "nats_per_token": nats / count,
                "perplexity": math.exp(nats / count),
            }
            for bucket, (nats, count) in enumerate(
                zip(self.nats.tolist(), self.tokens.tolist(), strict=True)
            )
            if count
        ]

    def total(self) -> dict[str, Any]:
        """Of all tokens, each weighing the same; ValueError if there are none."""
        count = int(self.tokens.sum())
        if not count:
            raise ValueError("data: expected a document of at least two tokens, got none")
        nats = float(self.nats.sum()) / count
        return {"tokens": count, "nats_per_token": nats, "perplexity": math.exp(nats)}


@torch.no_grad()
def token_losses(model: Any, input_ids: Tensor) -> Tensor:
    """−log p of tokens 1 … T−1 given those before them, in nats: [B, T] to [B, T−1].

    Our own models read long rows in pieces, their state carried on, so that the logits of only
    some tokens are there at a time. In fp32, or fp64 for such a model.
    """
    read, targets = input_ids[:, :-1], input_ids[:, 1:]
    if not is_ours(model):
        return _losses(model(input_ids=read, use_cache=False).logits, targets)
    cache, found = GSACache(model.config), []
    piece = max(1, LOGITS // (len(input_ids) * model.config.vocab_size))
    for ids, after in zip(read.split(piece, 1), targets.split(piece, 1), strict=True):
        found.append(_losses(model(input_ids=ids, past_key_values=cache).logits, after))
    return torch.cat(found, 1)


def _losses(logits_BTW: Tensor, targets_BT: Tensor) -> Tensor:
    logits = logits_BTW if logits_BTW.dtype == torch.float64 else logits_BTW.float()
    return F.cross_entropy(logits.transpose(1, 2), targets_BT, reduction="none")


def measure(
    model: Any,
    documents: Iterator[np.ndarray],
    *,
    length: int | None,
    stride: int | None,
    rows: int,
    max_tokens: int = 0,
) -> tuple[Tally, int]:
    """(losses by position, documents read) of token ids [T] each.

    Args:
        length: tokens of a window at most; None for whole documents.
        stride: from one window to the next; None for length.
        rows: windows read at once.
        max_tokens: stop after about so many; 0 for all.
    """
    tally, count, waiting = Tally.empty(), 0, []

    def read() -> None:
        # Shorter windows are filled up at the end: what follows a token does not change it.
        ids = torch.zeros(len(waiting), max(len(ids) for ids, _ in waiting), dtype=torch.int64)
        for row, (tokens, _) in enumerate(waiting):
            ids[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
        losses = token_losses(model, ids.to(model.device)).cpu()
        for row, (tokens, first) in enumerate(waiting):
            positions = torch.arange(first, len(tokens))
            tally.add(losses[row, first - 1 : len(tokens) - 1], positions)
        waiting.clear()

    asked = 0
    for tokens in documents:
        count += 1
        longest = length or max(len(tokens), 1)
        for window in windows(len(tokens), longest, stride or longest):
            waiting.append((tokens[window.start : window.end], window.first - window.start))
            asked += window.end - window.first
            if len(waiting) == rows:
                read()
            if max_tokens and asked >= max_tokens:
                break
        if max_tokens and asked >= max_tokens:
            break
    if waiting:
        read()
    return tally, count


def perplexity(config: PerplexityConfig) -> dict[str, Any]:
    """Perplexity of held-out text, overall and by position; prints and writes the tables.

    Documents are read each by itself, their end token included as in training. Raises before the
    model loads: FileNotFoundError and ValueError for data or a folder that cannot be read, shards
    of another tokenizer, an `out` that belongs to something else.
    """
    check_out(config.out)
    if config.whole and read_config(config.model)["model_type"] != "gsa":
        raise ValueError("whole: expected a GSAConfig model, whose state is carried on; use length")
    tokenizer = open_tokenizer(config.model)
    documents = _documents(config, tokenizer)
    model = open_model(config)
    length = None if config.whole else context_length(config, model.config)
    stride = None if length is None else config.stride or length
    if length is not None and stride is not None and stride > length:
        raise ValueError(f"stride: expected at most length = {length}, got {stride}")
    tally, count = measure(
        model,
        documents,
        length=length,
        stride=stride,
        rows=config.rows,
        max_tokens=config.max_tokens,
    )
    document = {
        "evaluation": "perplexity",
        "asked": asdict(config),
        "model": model_facts(model, config.model),
        "environment": environment(model.device),
        "length": length,
        "stride": stride,
        "documents": count,
        "overall": tally.total(),
        "by_position": tally.rows(),
    }
    write_report(config.out, document, perplexity_table(document))
    return document


def perplexity_table(document: dict[str, Any]) -> str:
    """The result as Markdown."""
    length, stride = document["length"], document["stride"]
    if length is None:
        how = "whole documents, their memory carried on"
    elif stride == length:
        how = f"rows of {length} tokens that do not overlap"
    else:
        how = f"windows of {length} tokens, one every {stride}"
    cells = [["tokens in sight", "tokens", "nats per token", "perplexity"]]
    for row in [*document["by_position"], document["overall"] | {"from": "all"}]:
        label = str(row["from"])
        label += f" – {row['to']}" if row.get("to", row["from"]) != row["from"] else ""
        numbers = [f"{row['nats_per_token']:.4f}", f"{row['perplexity']:.3f}"]
        cells.append([label, f"{row['tokens']:,}", *numbers])
    asked = document["asked"]
    return (
        f"{asked['model']} on {asked['data']}: {document['documents']} documents, {how}\n\n"
        f"{markdown(cells)}"
    )


def _documents(config: PerplexityConfig, tokenizer: Any) -> Iterator[np.ndarray]:
    """Token ids [T] of every document; errors that can be seen now are raised now."""
    if (Path(config.data) / INDEX).is_file():
        shards = TokenShards(config.data)
        shards.require_tokenizer(config.model)
        return (shards.document(i) for i in range(shards.num_documents))
    try:
        files = find_files(config.data)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(str(error).replace("inputs: ", "data: ", 1)) from None
    check_parquet(files, config.text_key)
    encoder = HuggingFaceEncoder(tokenizer, config.model)

    def read() -> Iterator[np.ndarray]:
        for file in files:
            for tokens in encoder.encode(file.pieces(config.text_key, lambda _: None)):
                yield tokens.ids

    return read()
