"""Which blocks are prose, and which documents English: a few stated rules, no model."""

import re
from collections import Counter

from gsa.data.corpus.blocks import Block

MIN_BLOCK_WORDS = 6
MIN_DOCUMENT_WORDS = 100
MIN_LETTERS = 0.75
"""Share of a paragraph's characters that are letters or spaces."""
MIN_PARAGRAPH_COMMON = 0.12
MIN_DOCUMENT_COMMON = 0.22
"""Shares of words that are among the commonest English ones."""
MAX_HEADING_WORDS = 16
MAX_WORD_CHARACTERS = 40

_COMMON = """
the of and to in is that it for with as this be are by or from an not which you was on at have can
if will he his they their has but when there been may all its were these one would any such into no
more other than a i we your should must do does use used only also so
"""
COMMON = frozenset(_COMMON.split())
"""A few are words of other languages, too; a text in those has too few of the rest."""

LOST = ("gap", "heading")
"""Kinds of blocks that cannot be what a paragraph ending in a colon announces."""

_WORD = re.compile(r"[A-Za-z]+(?:['’-][A-Za-z]+)*")
_ENDS = tuple(".!?:;\"'”’)]…")
_BOILERPLATE = re.compile(
    r"all rights reserved|permission is (?:hereby )?granted|under the terms of the|"
    r"free documentation license|general public license|creative commons|without warranty|"
    r"copyright (?:©|\(c\)|\d{4})|©\s*\d{4}|redistribution and use|apache license|mit license|"
    r"last (?:updated|modified|changed|update)|generated (?:by|on|from|with)|"
    r"(?:this|the) (?:page|documentation|document|file|manual) (?:was|is|has been) "
    r"(?:automatically |auto-?)?(?:generated|created|licensed|last)|"
    r"go to the first, previous|table of contents|click here|javascript is|report a bug on|"
    r"except where otherwise noted|all trademarks|registered trademarks? of|"
    r"go to (?:the )?(?:end|top)|to download the full example|see also the index|"
    r"isbn[ :-]|lorem ipsum",
    re.IGNORECASE,
)
_CODE = re.compile(
    r"[{}]\s*$|\);\s*$|^[$#%>]\s|^(?:\w+\.)+\w+\(|^\s*(?:def|class|import|static|void|const|struct|enum)\b.*"
    r"[({:;]|[=!<>]=|->|::|\w\(\)\s*[;{]|\$\{|&&|\|\||\\[a-zA-Z]+\{"
)


def prose_blocks(blocks: list[Block]) -> list[Block]:
    """The paragraphs, items and short headings that read as prose, gaps included."""
    kept: list[Block] = []
    for block in blocks:
        if block.kind == "gap":
            if kept and kept[-1].kind != "gap":
                kept.append(block)
        elif block.kind == "heading":
            if _is_heading(block.text):
                kept.append(block)
        elif is_prose(block.text, is_item=block.kind == "item"):
            kept.append(block)
        elif kept and kept[-1].kind != "gap":
            kept.append(Block("gap"))
    return kept


def is_prose(text: str, *, is_item: bool = False) -> bool:
    """Whether a paragraph is made of sentences: words, not symbols; with small words; an end.

    A list item of some length may do without a mark at its end.
    """
    words = text.split()
    if len(words) < MIN_BLOCK_WORDS or max(map(len, words)) > 2 * MAX_WORD_CHARACTERS:
        return False
    letters = sum(map(str.isalpha, text)) + text.count(" ") + text.count("\n")
    if letters < MIN_LETTERS * len(text) or not any(map(str.islower, text[:200])):
        return False
    if not (text.endswith(_ENDS) or (is_item and len(words) >= 8)) or _BOILERPLATE.search(text):
        return False
    marks = len(_CODE.findall(text))
    if marks * 30 > len(words) or (marks and len(words) < 12):
        return False
    return common_share(text) >= MIN_PARAGRAPH_COMMON


def common_share(text: str) -> float:
    """Share of the words that are among the commonest English ones."""
    words = _WORD.findall(text)
    return sum(word.lower() in COMMON for word in words) / max(1, len(words))


def _is_heading(text: str) -> bool:
    words = text.split()
    if not 1 <= len(words) <= MAX_HEADING_WORDS or len(text) > 120:
        return False
    letters = sum(map(str.isalpha, text)) + text.count(" ")
    return letters >= 0.7 * len(text) and not re.search(r"[{}<>=$\\/]|^--?\w|,.*,", text)


def tidy(blocks: list[Block]) -> list[Block]:
    """Drops what has lost its other half.

    That is a heading without text below it, and a short announcement of a code block or table that
    is gone ("For example:").
    """
    kept: list[Block] = []
    below = "gap"  # what the next heading up would stand over
    for block in reversed(blocks):
        announces = block.text.endswith(":") and len(block.text.split()) < 25
        if block.kind == "heading":
            if below != "gap":
                kept.append(block)
        elif block.kind == "gap" or (announces and (not kept or kept[-1].kind in LOST)):
            below = "gap" if below == "heading" else below
            kept.append(Block("gap"))
            continue
        else:
            kept.append(block)
        below = kept[-1].kind if kept and kept[-1] is block else below
    return [block for block in reversed(kept) if block.kind != "gap"]


def join(blocks: list[Block]) -> str:
    """The document's text: blocks apart by an empty line, items marked with a dash."""
    return "\n\n".join("- " + b.text if b.kind == "item" else b.text for b in blocks)


def why_not(text: str) -> str | None:
    """Why a document is left out: "short", "not English", "repetitive"; None if it is not."""
    words = _WORD.findall(text)
    if len(words) < MIN_DOCUMENT_WORDS:
        return "short"
    if common_share(text) < MIN_DOCUMENT_COMMON:
        return "not English"
    starts = Counter(" ".join(line.split()[:3]) for line in text.split("\n\n"))
    (_, most), total = starts.most_common(1)[0], sum(starts.values())
    return "repetitive" if total >= 8 and most > 0.4 * total else None
