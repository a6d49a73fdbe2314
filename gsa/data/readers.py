"""Text out of files: which files an input means, and the pieces of text that each one holds.

A document arrives as one or more `Piece`s, so that a huge text file never has to fit in memory.
Every error names the file and the place in it.
"""

import codecs
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

KINDS = (".txt", ".jsonl", ".parquet")
_BLOCK_BYTES = 1 << 20
_PARQUET_ROWS = 64


class Piece(NamedTuple):
    """Some text of a document; `ends_document` on its last piece."""

    text: str
    ends_document: bool


Advance = Callable[[int], object]
"""Called with a number of bytes of the input just read."""


class Source(Protocol):
    """One input, of whatever kind, as `prepare` reads it."""

    @property
    def name(self) -> str:
        """What the shard index keeps."""
        ...

    @property
    def place(self) -> str:
        """What errors call it."""
        ...

    @property
    def identity(self) -> str:
        """Equal for two inputs that mean the same text."""
        ...

    @property
    def size(self) -> int | None:
        """Bytes that `pieces` will report to `advance`; None if nobody knows."""
        ...

    def pieces(self, text_key: str, advance: Advance) -> Iterator[Piece]:
        """The documents, as pieces in order."""
        ...


class FileSource(NamedTuple):
    """One input file: where it is, and the name that the shard index keeps for it."""

    path: Path
    name: str

    @property
    def place(self) -> str:
        """The path as given."""
        return str(self.path)

    @property
    def identity(self) -> str:
        """The file itself, whichever way leads there."""
        return str(self.path.resolve())

    @property
    def size(self) -> int:
        """Of the file, in bytes."""
        return self.path.stat().st_size

    def pieces(self, text_key: str, advance: Advance) -> Iterator[Piece]:
        """The documents of the file, as pieces in order; a .txt file is one document."""
        kind = self.path.suffix.lower()
        if kind == ".txt":
            yield from _read_text(self.path, advance)
        elif kind == ".jsonl":
            yield from _read_jsonl(self.path, text_key, advance)
        else:
            yield from _read_parquet(self.path, text_key, advance)


def find_files(given: str) -> list[FileSource]:
    """Every file that an input means, in reading order.

    A file stands for itself and is named by its file name. A folder stands for the .txt, .jsonl and
    .parquet files below it, sorted by their path inside it, which is also their name; names that
    begin with a dot are left out. FileNotFoundError for a path that does not exist; ValueError for
    a file of another kind or a folder without such files.
    """
    path = Path(given)
    if path.is_dir():
        return _files_below(path)
    if not path.exists():
        raise FileNotFoundError(f"inputs: {path} does not exist")
    if path.suffix.lower() not in KINDS:
        raise ValueError(
            f"inputs: expected {', '.join(KINDS)} or a folder of those, got {path}; "
            "rename a file of plain text to .txt"
        )
    return [FileSource(path, path.name)]


def _files_below(folder: Path) -> list[FileSource]:
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(parent, name)
            if path.suffix.lower() in KINDS and not name.startswith("."):
                found.append(FileSource(path, path.relative_to(folder).as_posix()))
    if not found:
        raise ValueError(f"inputs: no {', '.join(KINDS)} file in the folder {folder}")
    return sorted(found, key=lambda source: source.name)


def _read_text(path: Path, advance: Advance) -> Iterator[Piece]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            if (nul := block.find(b"\0")) >= 0:
                raise ValueError(
                    f"{path}: expected text, got a binary file (NUL byte at byte {offset + nul})"
                )
            held = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block)
            except UnicodeDecodeError as error:
                raise _not_utf8(str(path), offset - held + error.start, error) from None
            # The mark some editors put before UTF-8 says how to read the file; it is not text.
            if offset == 0:
                text = text.removeprefix("\ufeff")
            offset += len(block)
            advance(len(block))
            yield Piece(text, False)
    held = len(decoder.getstate()[0])
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _not_utf8(str(path), offset - held, error) from None
    yield Piece("", True)


def _not_utf8(place: str, offset: int, error: UnicodeDecodeError) -> ValueError:
    return ValueError(
        f"{place}: expected UTF-8 text, got {error.reason} at byte {offset}; "
        "convert it (for Latin-1: iconv -f LATIN1 -t UTF-8)"
    )


def _read_jsonl(path: Path, text_key: str, advance: Advance) -> Iterator[Piece]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}, line {number}"
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield Piece(_text_of_json(line, text_key, place), True)
            advance(len(line))


def _text_of_json(line: bytes, text_key: str, place: str) -> str:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(place, error.start, error) from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{place}: expected a JSON object, got broken JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected a JSON object, got {type(row).__name__}")
    if text_key not in row:
        keys = ", ".join(map(repr, row)) or "none"
        raise ValueError(f"{place}: expected the key {text_key!r}, got keys {keys}; set text_key")
    return checked_text(row[text_key], place, text_key)


def checked_text(value: object, place: str, text_key: str) -> str:
    """The text of one row, "" for null; ValueError naming the place if it is no Unicode text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{place}: expected text in {text_key!r}, got {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place}: {text_key!r} holds half a surrogate pair at character {error.start}, "
            "which is not Unicode text"
        ) from None
    return value


def check_parquet(files: list[FileSource], text_key: str) -> None:
    """Refuse, before any work, parquet files that cannot be read or lack the column.

    ImportError without pyarrow; ValueError naming the file and the columns it has.
    """
    paths = [file.path for file in files if file.path.suffix.lower() == ".parquet"]
    if paths and importlib.util.find_spec("pyarrow") is None:
        raise ImportError(
            f'{paths[0]}: reading parquet needs pyarrow; pip install "gated-slots[parquet]"'
        )
    for path in paths:
        with _open_parquet(path) as file:
            columns = file.schema_arrow.names
        if text_key not in columns:
            names = ", ".join(map(repr, columns)) or "none"
            raise ValueError(
                f"{path}: expected the column {text_key!r}, got columns {names}; set text_key"
            )


def _open_parquet(path: Path):
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: expected a parquet file, got {error}") from None


def _read_parquet(path: Path, text_key: str, advance: Advance) -> Iterator[Piece]:
    import pyarrow

    size, number = path.stat().st_size, 0
    with _open_parquet(path) as file:
        total = file.metadata.num_rows
        batches = file.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_key])
        while True:
            try:
                batch = next(batches, None)
            except (pyarrow.ArrowException, OSError) as error:
                raise ValueError(f"{path}: damaged after row {number} ({error})") from None
            if batch is None:
                return
            for value in batch.column(0).to_pylist():
                number += 1
                place = f"{path}, row {number}"
                yield Piece(checked_text(value, place, text_key), True)
            advance(size * batch.num_rows // total)
