"""A shard folder: token ids on disk, mapped into memory, with an index that says what is there.

    index.json      sizes, checksums, vocabulary, sources; written last
    tokens.bin      documents end to end: little-endian uint16 (vocabulary to 65536) or uint32
    documents.bin   num_documents + 1 offsets into tokens.bin, little-endian int64
    tokenizer/      the tokenizer's own files, for AutoTokenizer

Raw files, so that anything can read them; the index holds the sizes that show a truncated one.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from gsa.data.encoding import DEFINITIONS, load_tokenizer

INDEX = "index.json"
TOKENS = "tokens.bin"
DOCUMENTS = "documents.bin"
TOKENIZER = "tokenizer"
FORMAT = "gsa-token-shards"
VERSION = 1
OFFSET_DTYPE = np.dtype("<i8")

_FIELDS: dict[str, type] = {
    "dtype": str,
    "vocab_size": int,
    "eos_id": int,
    "num_tokens": int,
    "num_documents": int,
    "skipped_empty": int,
    "files": dict,
    "sources": list,
}


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id of the vocabulary fits, else uint32; little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TokenShards:
    """A prepared shard folder, checked when it is opened and read through memory maps.

    Opening compares every file's size with the index and costs no pass over the data; `verify()`
    reads everything and compares checksums. FileNotFoundError if the folder or its index is
    missing; ValueError naming the file that is broken.

    Attributes:
        folder: the folder, a Path.
        tokens: [num_tokens] uint16 or uint32, memory-mapped, read-only; documents end to end.
        document_starts: [num_documents] int64, memory-mapped; where each document begins.
        num_tokens, num_documents: counts; a document's end token is counted with it.
        skipped_empty: rows of jsonl and parquet inputs left out because they held no text.
        vocab_size: every id is below it; what a model's vocabulary must reach.
        eos_id: the token that ends each document.
        tokenizer_folder: the tokenizer's files, a Path.
        fingerprint: SHA-256 of index.json, which holds the checksums of all the rest: two
            folders with the same fingerprint hold the same tokens. A checkpoint keeps it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        text = _read_index(self.folder)
        self.fingerprint = hashlib.sha256(text).hexdigest()
        self._index = _parse_index(self.folder / INDEX, text)
        _check_sizes(self.folder, self._index)
        self.vocab_size: int = self._index["vocab_size"]
        self.eos_id: int = self._index["eos_id"]
        self.num_tokens: int = self._index["num_tokens"]
        self.num_documents: int = self._index["num_documents"]
        self.skipped_empty: int = self._index["skipped_empty"]
        self.tokenizer_folder = self.folder / TOKENIZER
        # np.asarray drops the memmap subclass, not the mapping: slices then cost what arrays cost.
        self.tokens = np.asarray(
            np.memmap(self.folder / TOKENS, dtype=token_dtype(self.vocab_size), mode="r")
        )
        self._offsets = np.asarray(np.memmap(self.folder / DOCUMENTS, dtype=OFFSET_DTYPE, mode="r"))
        self.document_starts = self._offsets[:-1]
        if self._offsets[0] != 0 or self._offsets[-1] != self.num_tokens:
            raise ValueError(f"{self.folder / DOCUMENTS}: offsets do not span the tokens")
        self._source_ends = list(accumulate(s["documents"] for s in self._index["sources"]))

    def __repr__(self) -> str:
        return (
            f"TokenShards({str(self.folder)!r}: {self.num_tokens} tokens, "
            f"{self.num_documents} documents, vocabulary {self.vocab_size})"
        )

    @property
    def sources(self) -> list[dict[str, Any]]:
        """The input files in order: {"name", "documents", "tokens"} each."""
        return [dict(source) for source in self._index["sources"]]

    @property
    def files(self) -> set[str]:
        """Every file of the folder, relative, the index included."""
        return {INDEX, *self._index["files"]}

    def document(self, i: int) -> np.ndarray:
        """The token ids of document `i`, its end token included; a view of `tokens`."""
        return self.tokens[self._offsets[i] : self._offsets[i + 1]]

    def document_name(self, i: int) -> str:
        """The name of the file document `i` came from; "name#3" for the third of several."""
        if not 0 <= i < self.num_documents:
            raise IndexError(f"i: expected 0 … {self.num_documents - 1}, got {i}")
        i_source = bisect_right(self._source_ends, i)
        source = self._index["sources"][i_source]
        if source["documents"] == 1:
            return source["name"]
        first = self._source_ends[i_source] - source["documents"]
        return f"{source['name']}#{i - first + 1}"

    def load_tokenizer(self):
        """The tokenizer that made these tokens (a transformers fast tokenizer)."""
        return load_tokenizer(self.tokenizer_folder)

    @property
    def tokenizer_key(self) -> tuple[object, ...]:
        """What is equal for shards made with the same tokenizer, and for no others."""
        definition = self.tokenizer_folder / "tokenizer.json"
        return self.vocab_size, self.eos_id, definition.is_file() and definition.read_bytes()

    def require_vocab_size(self, vocab_size: int) -> None:
        """ValueError if a model of this vocabulary cannot take every token of the shards."""
        if vocab_size < self.vocab_size:
            raise ValueError(
                f"vocab_size: the shards {self.folder} have ids below {self.vocab_size}, the model "
                f"a vocabulary of {vocab_size}; use vocab_size={self.vocab_size} or prepare the "
                "text with the model's tokenizer"
            )

    def require_tokenizer(self, folder: str | Path) -> None:
        """ValueError if a model's folder has a tokenizer to which these tokens are others.

        Tokens that only one of both knows are no contradiction: some are added to one of them.
        """
        if not any((Path(folder) / name).is_file() for name in DEFINITIONS):
            return
        ours, theirs = (x.get_vocab() for x in (self.load_tokenizer(), load_tokenizer(folder)))
        shared = ours.keys() & theirs.keys()
        if not shared or any(ours[token] != theirs[token] for token in shared):
            raise ValueError(
                f"data: the shards {self.folder} were made with another tokenizer than that in "
                f"{folder}; prepare the text with --tokenizer {folder}"
            )

    def verify(self) -> None:
        """Read every file and compare it with the index; ValueError naming the first difference."""
        for name, entry in self._index["files"].items():
            if file_sha256(self.folder / name) != entry["sha256"]:
                raise ValueError(
                    f"{self.folder / name}: contents differ from {INDEX}; prepare again"
                )
        if (np.diff(self._offsets) <= 0).any():
            raise ValueError(f"{self.folder / DOCUMENTS}: expected increasing offsets")
        if int(self.tokens.max()) >= self.vocab_size:
            raise ValueError(f"{self.folder / TOKENS}: a token id reaches past the vocabulary")


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    folders: tuple[str, ...]
    """Folders of token shards."""


def verify(config: VerifyConfig) -> Iterator[str]:
    """Reads token shards whole and compares them with their checksums; a line for each folder.

    ValueError or FileNotFoundError for the first that is damaged or missing.
    """
    for folder in config.folders:
        shards = TokenShards(folder)
        shards.verify()
        yield f"{folder}: {shards.num_tokens:,} tokens as they were written"


def _read_index(folder: Path) -> bytes:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; make it with gsa data prepare")
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: not a shard folder ({INDEX} is missing); make one with gsa data prepare"
        )
    return path.read_bytes()


def _parse_index(path: Path, text: bytes) -> dict[str, Any]:
    try:
        index = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"{path}: not the index of a shard folder (format is not {FORMAT!r})")
    if index.get("version") != VERSION:
        raise ValueError(f"{path}: expected version {VERSION}, got {index.get('version')!r}")
    for name, kind in _FIELDS.items():
        if not isinstance(index.get(name), kind):
            raise ValueError(f"{path}: expected {kind.__name__} {name!r}, got {index.get(name)!r}")
    _check_entries(
        path, "sources", index["sources"], {"name": str, "documents": int, "tokens": int}
    )
    _check_entries(path, "files", index["files"].values(), {"bytes": int, "sha256": str})
    dtype = token_dtype(index["vocab_size"])
    if index["dtype"] != dtype.name:
        raise ValueError(f"{path}: expected dtype {dtype.name}, got {index['dtype']}")
    counted = sum(source["documents"] for source in index["sources"])
    if counted != index["num_documents"]:
        raise ValueError(f"{path}: sources name {counted} of {index['num_documents']} documents")
    return index


def _check_entries(path: Path, name: str, entries: Iterable[Any], kinds: dict[str, type]) -> None:
    for entry in entries:
        fits = isinstance(entry, dict) and all(
            isinstance(entry.get(key), kind) for key, kind in kinds.items()
        )
        if not fits:
            raise ValueError(
                f"{path}: expected {', '.join(kinds)} in each of {name!r}, got {entry}"
            )


def _check_sizes(folder: Path, index: dict[str, Any]) -> None:
    files = index["files"]
    needed = {
        TOKENS: index["num_tokens"] * token_dtype(index["vocab_size"]).itemsize,
        DOCUMENTS: (index["num_documents"] + 1) * OFFSET_DTYPE.itemsize,
    }
    for name, size in needed.items():
        if name not in files or files[name]["bytes"] != size:
            raise ValueError(f"{folder / INDEX}: expected {size} bytes listed for {name}")
    for name, entry in files.items():
        path = folder / PurePosixPath(name)
        if not path.is_file():
            raise ValueError(f"{path}: missing, though {INDEX} lists it; prepare again")
        if (size := path.stat().st_size) != entry["bytes"]:
            raise ValueError(
                f"{path}: expected {entry['bytes']} bytes, got {size}: truncated or changed; "
                "prepare again"
            )
