"""Pieces of text into arrays of token ids, each document closed by the end-of-document token.

Two encoders with one shape: the built-in byte tokenizer, and any Hugging Face tokenizer, Mistral's
or one in a local folder. Text that happens to spell a special token ("<|endoftext|>") stays text:
only the encoder itself writes an end of document.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from gsa.data import byte_tokenizer
from gsa.data.mistral_tokenizer import load_mistral_tokenizer
from gsa.data.readers import Piece

_BATCH_CHARACTERS = 1 << 20


class Tokens(NamedTuple):
    """Token ids of (a part of) one document; `ends_document` on its last part."""

    ids: np.ndarray
    ends_document: bool


class Encoder(Protocol):
    """What `prepare` asks of a tokenizer."""

    vocab_size: int
    eos_id: int

    def encode(self, pieces: Iterable[Piece]) -> Iterator[Tokens]:
        """Token ids of the pieces' documents; documents without any text give eos alone."""
        ...

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into `folder`, for `AutoTokenizer.from_pretrained`."""
        ...


class ByteEncoder:
    """The byte tokenizer: encodes piece by piece, so a document never has to fit in memory."""

    vocab_size = byte_tokenizer.VOCAB_SIZE
    eos_id = byte_tokenizer.EOS_ID

    def encode(self, pieces: Iterable[Piece]) -> Iterator[Tokens]:
        for text, ends_document in pieces:
            ids = np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint16)
            if ends_document:
                ids = np.append(ids, np.uint16(self.eos_id))
            yield Tokens(ids, ends_document)

    def save(self, folder: Path) -> None:
        byte_tokenizer.save_byte_tokenizer(folder)


class HuggingFaceEncoder:
    """A Hugging Face tokenizer: `name` is what the user calls it.

    Documents are encoded whole (a tokenizer may merge across any cut), about a million characters
    of them per call. ValueError for a tokenizer without an end-of-sequence token.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        self._tokenizer = tokenizer
        if self._tokenizer.eos_token_id is None:
            raise ValueError(
                f"tokenizer: {name} has no eos_token, which ends each document; "
                "set one in its tokenizer_config.json"
            )
        self.eos_id = int(self._tokenizer.eos_token_id)
        # Ids may have holes, and added tokens lie above `tokenizer.vocab_size`.
        highest = max(self._tokenizer.get_vocab().values())
        self.vocab_size = max(len(self._tokenizer), highest + 1)

    def encode(self, pieces: Iterable[Piece]) -> Iterator[Tokens]:
        document: list[str] = []
        batch: list[str] = []
        characters = 0
        for text, ends_document in pieces:
            document.append(text)
            characters += len(text)
            if ends_document:
                batch.append("".join(document))
                document.clear()
                if characters >= _BATCH_CHARACTERS:
                    yield from self._encode_batch(batch)
                    batch.clear()
                    characters = 0
        yield from self._encode_batch(batch)

    def _encode_batch(self, batch: list[str]) -> Iterator[Tokens]:
        if not batch:
            return
        encoded = self._tokenizer(
            batch,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )
        for ids in encoded["input_ids"]:
            yield Tokens(np.array([*ids, self.eos_id], dtype=np.uint32), True)

    def save(self, folder: Path) -> None:
        self._tokenizer.save_pretrained(str(folder))


DEFINITIONS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
"""A folder with any of these has a tokenizer."""


def load_tokenizer(folder: str | Path):
    """`AutoTokenizer` from a local folder: nothing is downloaded, no remote code runs."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(
            f"tokenizer: expected 'bytes', 'mistral' or the folder of a Hugging Face tokenizer, "
            f"got {folder}"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"tokenizer: no tokenizer could be loaded from {folder}: {error}"
        ) from error


def load_encoder(tokenizer: str) -> Encoder:
    """The encoder that a `tokenizer` setting means: "bytes", "mistral", or a folder.

    FileNotFoundError for a missing folder, ValueError for one without a usable tokenizer,
    ImportError if the packages that hold Mistral's are missing.
    """
    if tokenizer == "bytes":
        return ByteEncoder()
    if tokenizer == "mistral":
        return HuggingFaceEncoder(load_mistral_tokenizer(), tokenizer)
    return HuggingFaceEncoder(load_tokenizer(tokenizer), tokenizer)
