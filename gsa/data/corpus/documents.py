"""A source to its documents: each file cleaned, in an order that does not depend on the archive."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from gsa.data.corpus.blocks import Block
from gsa.data.corpus.dictionaries import dictionary_documents
from gsa.data.corpus.html_text import html_blocks, html_language
from gsa.data.corpus.manual_pages import manual_blocks
from gsa.data.corpus.plain_text import text_blocks
from gsa.data.corpus.prose import join, prose_blocks, why_not
from gsa.data.corpus.sources import Advance, File, Source

_ORDER = ("html", "dictionary", "text", "manual")
"""Of two versions of one text the first is kept: HTML marks best what is what."""


class Cleaned(NamedTuple):
    """What one source gave."""

    documents: list[tuple[str, list[Block]]]
    """(path of the file, its blocks of prose), in order."""
    about: dict
    """`licences`, `files` and `bytes_before`, the size of what was read."""
    dropped: Counter[str]
    """How many files or documents were left out, by reason."""


def read_source(source: Source, advance: Advance = lambda n: None) -> Cleaned:
    """Every document of a source that holds prose; duplicates are still in it."""
    about = {"licences": [], "files": 0, "bytes_before": 0}
    dropped: Counter[str] = Counter()
    found: list[tuple[int, str, int, list[Block]]] = []
    parts: dict[str, File] = {}
    for file in source.files(advance, about):
        about["files"] += file.kind != "index"
        about["bytes_before"] += len(file.data) if file.kind != "index" else 0
        if file.kind in ("dictionary", "index"):
            name = file.path.split(".dict")[0].removesuffix(".index")
            other = parts.pop(name, None)
            if other is None or other.kind == file.kind:
                parts[name] = file
                continue
            pair = {file.kind: file, other.kind: other}
            documents = list(dictionary_documents(pair["dictionary"].data, pair["index"].data))
        else:
            documents = list(_file_documents(file, dropped))
        kind = _ORDER.index("dictionary" if file.kind == "index" else file.kind)
        for number, blocks in enumerate(documents):
            kept = prose_blocks(blocks)
            reason = why_not(join([block for block in kept if block.kind != "gap"]))
            if reason:
                dropped[reason] += 1
            else:
                found.append((kind, file.path, number, kept))
    pages = {_stem(path) for kind, path, _, _ in found if _ORDER[kind] == "html"}
    sources = [d for d in found if _ORDER[d[0]] == "text" and _stem(d[1]) in pages]
    dropped["also there as HTML"] += len(sources)
    found = [d for d in found if _ORDER[d[0]] != "text" or _stem(d[1]) not in pages]
    dropped["no index beside the dictionary"] += sum(f.kind == "dictionary" for f in parts.values())
    found.sort(key=lambda document: document[:3])
    return Cleaned([(path, blocks) for _, path, _, blocks in found], about, +dropped)


def _stem(path: str) -> str:
    return path.rsplit("/", 1)[-1].split(".")[0].lower()


def _file_documents(file: File, dropped: Counter[str]) -> Iterator[list[Block]]:
    if file.kind == "html":
        language = html_language(file.data)
        if language not in ("", "en", "c"):
            dropped["not English"] += 1
        else:
            try:
                blocks = html_blocks(file.data)
            except AssertionError:  # what the parser raises for a declaration it does not know
                dropped["broken HTML"] += 1
            else:
                yield blocks
    elif file.kind == "manual":
        blocks = manual_blocks(file.data)
        if blocks is None:
            dropped["not written with the man macros"] += 1
        else:
            yield blocks
    elif b"\0" in file.data:
        dropped["not text"] += 1
    else:
        yield text_blocks(file.data)
