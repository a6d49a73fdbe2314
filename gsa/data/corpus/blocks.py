"""What every cleaner gives: the blocks of a document, in order."""

import re
from typing import Literal, NamedTuple


class Block(NamedTuple):
    """A paragraph, a list item or a heading; a gap stands where code, a table or a figure was."""

    kind: Literal["text", "item", "heading", "gap"]
    text: str = ""


GAP = Block("gap")

_SPACE = re.compile(r"\s+")


def squeeze(text: str) -> str:
    """The text on one line, with single spaces."""
    return _SPACE.sub(" ", text).strip()


def decode(data: bytes, declared: str = "") -> str:
    """Text from bytes: UTF-8, else the declared encoding, else Windows-1252 as far as it goes."""
    for encoding in ("utf-8-sig", declared):
        if encoding:
            try:
                return data.decode(encoding)
            except (UnicodeDecodeError, LookupError):
                continue
    return data.decode("cp1252", errors="replace")
