"""`gsa data prepare`: text files in, a shard folder out, whole or not at all.

Everything is written to a hidden folder beside the output, whose index comes last, and renamed
when complete; an error, Ctrl-C or a crash leaves the earlier output as it was.
"""

import hashlib
import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from gsa.data import shards as layout
from gsa.data.encoding import Encoder, load_encoder
from gsa.data.hub import is_dataset, open_dataset, parse_address
from gsa.data.readers import Advance, Source, check_parquet, find_files
from gsa.data.shards import TokenShards, file_sha256, token_dtype


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What `prepare` is asked to do."""

    inputs: tuple[str, ...]
    """Files (.txt, .jsonl, .parquet), folders of those, and Hugging Face datasets, in order:
    hf:OWNER/NAME[/CONFIG][@SPLIT], or hf:FOLDER (packages gated-slots[data])."""
    out: str
    """The shard folder to write."""
    tokenizer: str = "bytes"
    """"bytes"; "mistral", 32,000 tokens, the paper's (packages gated-slots[mistral]); or the local
    folder of a Hugging Face tokenizer."""
    text_key: str = "text"
    """The key (jsonl) or column (parquet, datasets) that holds the text."""
    streaming: bool = False
    """Read datasets as they arrive, without downloading them whole first."""
    overwrite: bool = False
    """Replace `out` if it is a complete shard folder; anything else there is never touched."""
    quiet: bool = False
    """Show no progress bar; without a terminal none is shown anyway."""

    def __post_init__(self) -> None:
        if isinstance(self.inputs, str) or not self.inputs or not all(self.inputs):
            raise ValueError(f"inputs: expected one or more paths, got {self.inputs!r}")
        for name in ("out", "tokenizer", "text_key"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected a non-empty string")
        if self.streaming and not any(map(is_dataset, self.inputs)):
            raise ValueError("streaming: expected an hf: input, since files are never read whole")


def prepare(config: PrepareConfig) -> TokenShards:
    """Tokenize text once into a memory-mapped shard folder, and open it.

    A .txt file is one document, a row of jsonl, parquet or a dataset is one; each ends with the
    tokenizer's eos token. Rows without text are skipped and counted. The same inputs give the same
    bytes, index included (it holds no path outside the inputs and no time). Memory: a few blocks of
    text with the byte tokenizer, one document with others.

    Raises before anything is written: FileNotFoundError for missing inputs or tokenizer, ValueError
    for inputs that are no text, ImportError for packages that an input or the tokenizer needs,
    FileExistsError if `out` is in use. While writing: ValueError naming the file and place of bad
    text, OSError when the disk is full; the output is then as it was before.
    """
    out = Path(config.out).resolve()
    sources = _find_sources(config)
    encoder = load_encoder(config.tokenizer)
    _check_apart(out, config.inputs)
    previous = out.parent / f".{out.name}.previous"
    if previous.is_dir() and not out.exists():
        previous.rename(out)  # a crash came between the two renames of an overwrite
    _check_free(out, config.overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write_folder(partial, sources, encoder, config)
        _check_free(out, config.overwrite)
        _put_in_place(partial, out, previous)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(
            error.errno, f"cannot write {out}: {os.strerror(error.errno)}; it is left as it was"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return TokenShards(out)


def _find_sources(config: PrepareConfig) -> list[Source]:
    """Every source that the inputs mean, in order; ValueError for one that is meant twice."""
    sources: list[Source] = []
    for given in config.inputs:
        if is_dataset(given):
            quiet = config.quiet or not Console(stderr=True).is_terminal
            options = {"text_key": config.text_key, "streaming": config.streaming}
            sources.append(open_dataset(given, quiet=quiet, **options))
        else:
            files = find_files(given)
            check_parquet(files, config.text_key)
            sources += files
    seen: set[str] = set()
    for source in sources:
        if source.identity in seen:
            raise ValueError(f"inputs: {source.place} is meant twice; name each source once")
        seen.add(source.identity)
    return sources


def _check_apart(out: Path, inputs: tuple[str, ...]) -> None:
    # A tokenizer's own .txt files (merges.txt) in `out` would be read as documents the next time.
    for given in inputs:
        if is_dataset(given):
            folder = parse_address(given).folder
            if folder is None:
                continue
            path = folder.resolve()
        else:
            path = Path(given).resolve()
        if out == path or path in out.parents or out in path.parents:
            raise ValueError(f"out: expected a folder apart from the inputs, got {out} and {path}")


def _check_free(out: Path, overwrite: bool) -> None:
    """FileExistsError unless `out` is absent, an empty folder, or shards that may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        known = TokenShards(out).files
    except (ValueError, OSError) as error:
        raise FileExistsError(
            f"out: {out} exists and is not a complete shard folder ({error}); "
            "choose another, or remove it yourself"
        ) from None
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()}
    if found != known:
        raise FileExistsError(
            f"out: {out} also holds {', '.join(sorted(found - known))}, which is not part of the "
            "shards; choose another folder, or remove it yourself"
        )
    if not overwrite:
        raise FileExistsError(f"out: {out} already holds shards; pass overwrite to replace them")


def _put_in_place(partial: Path, out: Path, previous: Path) -> None:
    replaces = out.is_dir() and any(out.iterdir())
    if replaces:
        shutil.rmtree(previous, ignore_errors=True)
        out.rename(previous)
    try:
        partial.rename(out)
    except OSError:
        if replaces:
            previous.rename(out)
        raise
    sync(out.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _write_folder(
    folder: Path, sources: list[Source], encoder: Encoder, config: PrepareConfig
) -> None:
    folder.mkdir()
    encoder.save(folder / layout.TOKENIZER)
    index: dict[str, Any] = {
        "format": layout.FORMAT,
        "version": layout.VERSION,
        "dtype": token_dtype(encoder.vocab_size).name,
        "vocab_size": encoder.vocab_size,
        "eos_id": encoder.eos_id,
    }
    with (
        progress_bar(config.quiet) as progress,
        ShardWriter(folder, encoder.vocab_size) as writer,
    ):
        sizes = [source.size for source in sources]
        total = None if None in sizes else sum(filter(None, sizes))
        task = progress.add_task("tokenizing", total=total)
        for source in sources:
            progress.update(task, description=source.name)
            writer.add_source(source, encoder, config.text_key, lambda n: progress.advance(task, n))
        index.update(writer.finish())
    for path in sorted((folder / layout.TOKENIZER).rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            index["files"][name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            sync(path)
    with (folder / layout.INDEX).open("w", encoding="utf-8") as file:
        json.dump(index, file, indent=1, ensure_ascii=False)
        file.write("\n")
    sync(folder / layout.INDEX)
    sync(folder)


def progress_bar(quiet: bool) -> Progress:
    """On stderr; hidden if asked to be, or without a terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=quiet or not console.is_terminal,
    )


def sync(path: Path) -> None:
    """Forces a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _HashedFile:
    """A file written front to back, with its SHA-256."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")
        self.sha256 = hashlib.sha256()

    def write(self, array: np.ndarray) -> None:
        data = array.tobytes()
        self.file.write(data)
        self.sha256.update(data)

    def finish(self) -> dict[str, Any]:
        self.file.flush()
        os.fsync(self.file.fileno())
        return {"bytes": self.file.tell(), "sha256": self.sha256.hexdigest()}


class ShardWriter:
    """Writes tokens.bin and documents.bin as documents come, and counts them."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._dtype = token_dtype(vocab_size)
        self._tokens = _HashedFile(folder / layout.TOKENS)
        self._documents = _HashedFile(folder / layout.DOCUMENTS)
        self._num_tokens = 0
        self._num_documents = 0
        self._skipped_empty = 0
        self._sources: list[dict[str, Any]] = []

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        for part in (self._tokens, self._documents):
            # After a full disk, closing tries to write the rest again; that error is known.
            with suppress(OSError):
                part.file.close()

    def add_source(self, source: Source, encoder: Encoder, text_key: str, advance: Advance) -> None:
        """Append the documents of one file; ValueError if it holds no text at all."""
        first_token, first_document = self._num_tokens, self._num_documents
        length = 0
        for ids, ends_document in encoder.encode(source.pieces(text_key, advance)):
            length += len(ids)
            if ends_document and length == 1:  # its end token alone
                self._skipped_empty += 1
                length = 0
                continue
            self._tokens.write(ids.astype(self._dtype))
            if ends_document:
                self._documents.write(np.array([self._num_tokens], layout.OFFSET_DTYPE))
                self._num_tokens += length
                self._num_documents += 1
                length = 0
        if self._num_documents == first_document:
            raise ValueError(f"{source.place}: expected text, got none; leave it out")
        self._sources.append(
            {
                "name": source.name,
                "documents": self._num_documents - first_document,
                "tokens": self._num_tokens - first_token,
            }
        )

    def finish(self) -> dict[str, Any]:
        """Close the offsets, force everything to disk, and return the index's entries."""
        self._documents.write(np.array([self._num_tokens], layout.OFFSET_DTYPE))
        return {
            "num_tokens": self._num_tokens,
            "num_documents": self._num_documents,
            "skipped_empty": self._skipped_empty,
            "sources": self._sources,
            "files": {
                layout.TOKENS: self._tokens.finish(),
                layout.DOCUMENTS: self._documents.finish(),
            },
        }
