"""`gsa data corpus`: packages and folders in, cleaned jsonl out, whole or not at all.

    OUT/train/00000.jsonl …      {"text", "source"}
    OUT/held-out/00000.jsonl …   the same, of sources that are not in train
    OUT/corpus.json              what it was made of, and what was left out and why

Written to a hidden folder beside the output and renamed when complete.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gsa.data.corpus import duplicates, prose
from gsa.data.corpus.documents import Cleaned, read_source
from gsa.data.corpus.duplicates import Seen
from gsa.data.corpus.sources import Source, find_sources
from gsa.data.preparation import progress_bar, sync
from gsa.data.shards import file_sha256

INDEX = "corpus.json"
FORMAT = "gated-slots corpus"
VERSION = 1
"""Of the rules: a change that gives other bytes for the same inputs raises it."""
TRAIN, HELD_OUT = "train", "held-out"
SHARD_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """What `build_corpus` is asked to do."""

    inputs: tuple[str, ...]
    """Debian packages (.deb, never installed), folders of packages, folders of documents (each one
    source), and single .html, .rst or .txt files (each one source, as a book)."""
    out: str
    """The folder to write."""
    held_out: tuple[str, ...] = ()
    """Names of sources to keep out of training: package names, folder names, file names without
    their ending."""
    processes: int = 1
    """Sources that are read at the same time; the corpus is the same for any number."""
    quiet: bool = False
    """Show no progress bar; without a terminal none is shown anyway."""

    def __post_init__(self) -> None:
        for name in ("inputs", "held_out"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(value):
                raise ValueError(f"{name}: expected a tuple of non-empty strings, got {value!r}")
        if not self.inputs:
            raise ValueError("inputs: expected one or more paths, got none")
        if self.processes < 1:
            raise ValueError(f"processes: expected 1 or more, got {self.processes}")
        if not self.out:
            raise ValueError("out: expected a non-empty string")


def build_corpus(config: CorpusConfig) -> str:
    """Make English prose for training out of Debian packages, folders of documents and books.

    The same inputs give the same bytes, in whatever order they are named. Held-out sources come
    first, so that a text in both parts is left out of training. Memory: the prose of one source,
    and about 150 bytes per kept shingle. Returns a summary for the reader; so does a second call
    with the same inputs, which only checks the files.

    Raises before anything is written: FileNotFoundError for missing inputs, ValueError for inputs
    that cannot be read, that are called alike, or that leave nothing to train on, ImportError for
    a package compressed with zstd that this Python cannot read, FileExistsError if `out` holds
    anything but this corpus. While writing: ValueError naming a damaged input.
    """
    out = Path(config.out).resolve()
    sources = find_sources(config.inputs)
    unknown = sorted(set(config.held_out) - {source.name for source in sources})
    if unknown:
        raise ValueError(
            f"held_out: expected names of sources, got {', '.join(unknown)}; known are "
            + ", ".join(source.name for source in sources)
        )
    if len(set(config.held_out)) == len(sources):
        raise ValueError("held_out: expected some sources to be left to train on, got all of them")
    for given in config.inputs:
        path = Path(given).resolve()
        if out == path or path in out.parents or out in path.parents:
            raise ValueError(f"out: expected a folder apart from the inputs, got {out} and {path}")
    request = _request(sources, config)
    if out.exists() and any(out.iterdir()):
        return "already complete: " + _summary(out, _check_same(out, request))
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(partial, sources, request, config)
        partial.rename(out)
        sync(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return _summary(out, json.loads((out / INDEX).read_text(encoding="utf-8")))


def _request(sources: list[Source], config: CorpusConfig) -> dict[str, Any]:
    """What decides the bytes of a corpus."""
    return {
        "rules": {
            "version": VERSION,
            "min_block_words": prose.MIN_BLOCK_WORDS,
            "min_document_words": prose.MIN_DOCUMENT_WORDS,
            "min_letters": prose.MIN_LETTERS,
            "min_paragraph_common": prose.MIN_PARAGRAPH_COMMON,
            "min_document_common": prose.MIN_DOCUMENT_COMMON,
            "shingle_words": duplicates.SHINGLE_WORDS,
            "max_seen": duplicates.MAX_SEEN,
        },
        "inputs": {source.name: source.sha256 for source in sources},
        "held_out": sorted(set(config.held_out)),
    }


def _check_same(out: Path, request: dict[str, Any]) -> dict[str, Any]:
    """The index of a finished corpus; FileExistsError if it is another, or not whole."""
    try:
        index = json.loads((out / INDEX).read_text(encoding="utf-8"))
        found, files = index["request"], index["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileExistsError(
            f"out: {out} exists and is no corpus ({error}); choose another, or remove it yourself"
        ) from None
    if found != request:
        parts = [key for key in request if found.get(key) != request[key]]
        raise FileExistsError(
            f"out: {out} holds a corpus with other {' and '.join(parts)}; choose another folder, "
            "or remove it yourself"
        )
    for name, about in files.items():
        path = out / name
        if not path.is_file() or file_sha256(path) != about["sha256"]:
            raise FileExistsError(
                f"out: {path} is missing or was changed; remove {out} yourself and build it again"
            )
    return index


def _write(
    folder: Path, sources: list[Source], request: dict[str, Any], config: CorpusConfig
) -> None:
    for part in (TRAIN, HELD_OUT):
        (folder / part).mkdir(parents=True)
    seen = Seen()
    entries: dict[str, dict[str, Any]] = {}
    files: dict[str, dict[str, Any]] = {}
    held_out_shingles: set[int] = set()
    in_both: set[int] = set()
    ordered = sorted(sources, key=lambda source: source.name not in request["held_out"])
    with _reading(ordered, config) as read:
        for part in (HELD_OUT, TRAIN):
            writer = _Shards(folder, part, files)
            for source in ordered:
                if (source.name in request["held_out"]) != (part == HELD_OUT):
                    continue
                entry, texts = _new_documents(source, next(read), seen)
                entries[source.name] = {"part": part, **entry}
                for text in texts:
                    writer.add(text, source.name)
                    if part == HELD_OUT:
                        held_out_shingles.update(seen.shingles(text))
                    else:
                        in_both.update(held_out_shingles.intersection(seen.shingles(text)))
            writer.finish()
    totals = {
        part: {
            key: sum(e[key] for e in entries.values() if e["part"] == part)
            for key in ("documents", "bytes_after", "bytes_before")
        }
        for part in (TRAIN, HELD_OUT)
    }
    if not totals[TRAIN]["documents"]:
        raise ValueError("inputs: no English prose was found in them; see the docs for what is")
    index = {
        "format": FORMAT,
        "request": request,
        "totals": totals,
        "held_out_shingles_in_train": round(len(in_both) / max(1, len(held_out_shingles)), 5),
        "sources": {name: entries[name] for name in sorted(entries)},
        "files": files,
    }
    with (folder / INDEX).open("w", encoding="utf-8") as file:
        json.dump(index, file, indent=1, ensure_ascii=False)
        file.write("\n")
    sync(folder / INDEX)
    for part in (TRAIN, HELD_OUT):
        sync(folder / part)
    sync(folder)


@contextmanager
def _reading(sources: list[Source], config: CorpusConfig) -> Iterator[Iterator[Cleaned]]:
    """What each source gave, in order, with a progress bar of bytes read."""
    with progress_bar(config.quiet) as progress:
        task = progress.add_task("reading", total=sum(source.size for source in sources))
        if config.processes == 1:

            def read() -> Iterator[Cleaned]:
                for source in sources:
                    progress.update(task, description=source.name)
                    yield read_source(source, lambda n: progress.advance(task, n))

            yield read()
            return

        # Spawned: a copy of this process could not rely on the locks of its threads.
        pool = ProcessPoolExecutor(config.processes, multiprocessing.get_context("spawn"))

        def gather() -> Iterator[Cleaned]:
            for source, cleaned in zip(sources, pool.map(read_source, sources), strict=True):
                progress.update(task, description=source.name)
                progress.advance(task, source.size)
                yield cleaned

        try:
            yield gather()
        finally:
            pool.shutdown(cancel_futures=True)


def _new_documents(
    source: Source, cleaned: Cleaned, seen: Seen
) -> tuple[dict[str, Any], list[str]]:
    """The source's entry in the index, and the texts of the documents that are kept."""
    dropped, texts = Counter(cleaned.dropped), []
    for _, blocks in cleaned.documents:
        new = prose.tidy(seen.new_blocks(blocks))
        text = prose.join(new)
        reason = prose.why_not(text)
        if reason:
            dropped["duplicate" if len(new) < len(blocks) and reason == "short" else reason] += 1
        elif seen.share(text) > duplicates.MAX_SEEN:
            dropped["duplicate"] += 1
        else:
            seen.add(new, text)
            texts.append(text)
    entry = {
        "input": source.path.name,
        "sha256": source.sha256,
        "version": source.version,
        **cleaned.about,
        "documents": len(texts),
        "bytes_after": sum(len(text.encode()) for text in texts),
        "dropped": dict(sorted(dropped.items())),
    }
    return entry, texts


class _Shards:
    """Writes the jsonl files of one part, each of about SHARD_BYTES."""

    def __init__(self, folder: Path, part: str, files: dict[str, dict[str, Any]]) -> None:
        self._folder, self._part, self._files = folder, part, files
        self._file = None
        self._number = 0
        self._digest = hashlib.sha256()

    def add(self, text: str, source: str) -> None:
        if self._file is None:
            self._file = (self._folder / self._name()).open("wb")
            self._digest = hashlib.sha256()
        row = json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n"
        self._file.write(row.encode())
        self._digest.update(row.encode())
        if self._file.tell() >= SHARD_BYTES:
            self.finish()

    def finish(self) -> None:
        """Closes the file at hand, and enters it in the index."""
        if self._file is None:
            return
        size = self._file.tell()
        self._file.close()
        self._file = None
        sync(self._folder / self._name())
        self._files[self._name()] = {"bytes": size, "sha256": self._digest.hexdigest()}
        self._number += 1

    def _name(self) -> str:
        return f"{self._part}/{self._number:05}.jsonl"


def _summary(out: Path, index: dict[str, Any]) -> str:
    parts = []
    for part in (TRAIN, HELD_OUT):
        total = index["totals"][part]
        sources = sum(entry["part"] == part for entry in index["sources"].values())
        parts.append(
            f"{part} {total['bytes_after'] / 1e6:.1f} MB in {total['documents']:,} documents of "
            f"{sources} sources"
        )
    return f"{out}: " + "; ".join(parts)
