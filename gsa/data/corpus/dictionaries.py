"""Dictionaries of the dictd format to blocks: one paragraph per entry, without its apparatus."""

import re
import unicodedata
from collections.abc import Iterator

from gsa.data.corpus.blocks import Block, decode, squeeze

_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_VALUE = {digit: value for value, digit in enumerate(_DIGITS)}
_ENTRY_WORDS = 12
_DOCUMENT_CHARACTERS = 8000

_ACCENTS = {"`": "\u0300", "'": "\u0301", "^": "\u0302", '"': "\u0308", "~": "\u0303"}
_APPARATUS = (
    (re.compile(r"\\[^\\\n]{1,80}\\"), ""),  # \pro*nun"ci*a`tion\
    (re.compile(r"\[([`'^\"~])([A-Za-z])\]"), lambda m: m[2] + _ACCENTS[m[1]]),
    (re.compile(r"\[=([A-Za-z])\]"), r"\1"),
    (re.compile(r"\[(ae|oe|AE|OE)\]"), r"\1"),
    (re.compile(r"\((?:[^()]*\[[^()]*)\)"), ""),  # ([a^][ng]"k[~e]r*m[a^]n`)
    (re.compile(r"\[[^\[\]]*\]"), ""),  # origins, sources, [Obs.]
    (re.compile(r"\[[^\[\]]*\]"), ""),
    (re.compile(r"<[a-z][^<>\n]{0,60}>"), ""),  # <communications>
    (re.compile(r"\(\d{4}-\d\d-\d\d\)"), ""),
    (re.compile(r"[{}]"), ""),
    (re.compile(r"\s+--\s?(?=[A-Z][\w. ]{2,40}$)", re.MULTILINE), " — "),
)


def dictionary_documents(data: bytes, index: bytes) -> Iterator[list[Block]]:
    """Documents of about 8,000 characters each: consecutive entries of the dictionary.

    data: the .dict file, unpacked; index: the .index file beside it.
    """
    places = set()
    for line in decode(index).splitlines():
        headword, *numbers = line.split("\t")
        if len(numbers) != 2 or not _VALUE.keys() >= set("".join(numbers)):
            continue  # no line of a dictd index
        if not headword.startswith("00"):
            places.add((_number(numbers[0]), _number(numbers[1])))
    document: list[Block] = []
    size = 0
    for offset, length in sorted(places):
        entry = clean_entry(decode(data[offset : offset + length]))
        if len(entry.split()) >= _ENTRY_WORDS:
            document.append(Block("text", entry))
            size += len(entry)
        if size >= _DOCUMENT_CHARACTERS:
            yield document
            document, size = [], 0
    if document:
        yield document


def clean_entry(entry: str) -> str:
    """Headword and meanings on one line, without pronunciation, origin and source marks."""
    # The first words of the next entry may stand after the last source mark.
    entry = re.sub(r"(\[[^\[\]]*(?:Webster|WordNet|PJC)[^\[\]]*\])[^\n]*\s*\Z", r"\1", entry)
    for pattern, replacement in _APPARATUS:
        entry = pattern.sub(replacement, entry)
    entry = unicodedata.normalize("NFC", squeeze(entry))
    entry = re.sub(r"^([^,(]{1,60}?)\s*\([^()]*[`?\"*][^()]*\)\s*(?=,)", r"\1", entry)
    entry = re.sub(r"\s+([,.;:])", r"\1", entry)
    return re.sub(r"([,.;:])\1+", r"\1", entry)


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + _VALUE[digit]
    return value
