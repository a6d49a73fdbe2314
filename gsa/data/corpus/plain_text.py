"""Plain text and reStructuredText to blocks: paragraphs unwrapped, markup and code left out."""

import itertools
import re

from gsa.data.corpus.blocks import GAP, Block, decode, squeeze

_RULE = re.compile(r"^\s*([=\-~^\"'`#*+.:_<>])\1{2,}\s*$")
_TABLE = re.compile(r"^\s*(?:\+[-=+]{3,}|\|.*\||[=-]{2,}(?:\s+[=-]{2,})+)\s*$")
_DIRECTIVE = re.compile(r"^(\s*)\.\.(?:\s+(?P<name>[\w:+-]+)::)?(?:\s|$)")
_ITEM = re.compile(r"^(\s*)(?:[-*+•]|\(?(?:\d{1,3}|[a-zA-Z])[.)])\s+(?=\S)")
_FIELD = re.compile(r"^\s*:[^:`\n]{1,60}:(?:\s|$)")
_PROSE_DIRECTIVES = {"note", "warning", "tip", "hint", "important", "caution", "attention"}
_PROSE_DIRECTIVES |= {"admonition", "danger", "epigraph", "topic"}

_SILENT_DIRECTIVES = {None, "contents", "toctree", "index", "meta", "highlight", "sectnum", "raw"}
"""Nobody reads these: what stands around them belongs together. None is a comment or target."""

_INLINE = (
    (re.compile(r":[\w:+.-]+:`([^`<]*?)\s*<[^`>]*>`"), r"\1"),  # :ref:`text <target>`
    (re.compile(r":[\w:+.-]+:`[~!]?([^`]*)`"), r"\1"),  # :func:`name`
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`__?"), r"\1"),  # `text <address>`_
    (re.compile(r"``([^`]+)``"), r"\1"),
    (re.compile(r"`([^`]+)`(?:__?)?"), r"\1"),
    (re.compile(r"\*\*([^*\n]+)\*\*"), r"\1"),
    (re.compile(r"(?<![\w*])\*([^*\s][^*\n]*)\*(?![\w*])"), r"\1"),
    (re.compile(r"\[#?\w+\]_|\|(\w[\w -]*)\|_?"), r"\1"),
    (re.compile(r"\b(\w+)__?(?=[\s.,;)]|$)"), r"\1"),
    (re.compile(r"\\(?=\W)"), ""),
)
_WRAPPED = 50  # lines this long on average were broken to fit; shorter ones, as in verse, mean it


def text_blocks(data: bytes) -> list[Block]:
    """The blocks of a text; reStructuredText is recognised by its marks, line by line."""
    lines = decode(data).replace("\f", "\n\n").expandtabs(8).splitlines()
    blocks: list[Block] = []
    margin = _margin(lines)
    place = 0
    while place < len(lines):
        line = lines[place]
        if not line.strip():
            place += 1
            continue
        directive = _DIRECTIVE.match(line)
        if directive and directive["name"] in _PROSE_DIRECTIVES:
            end = _below(lines, place, _indent(line))
            inner = [text for text in lines[place + 1 : end] if not _FIELD.match(text)]
            blocks += text_blocks("\n".join(inner).encode())
            place = end
        elif directive:
            if directive["name"] not in _SILENT_DIRECTIVES:
                blocks.append(GAP)
            place = _below(lines, place, _indent(line))
        else:
            end = place
            while end < len(lines) and lines[end].strip():
                end += 1
            blocks += _paragraph(lines[place:end], margin)
            if lines[end - 1].rstrip().endswith("::"):
                blocks.append(GAP)
                indent = _indent(lines[end - 1])
                end = _below(lines, end - 1, indent)
            place = end
    return blocks


def _margin(lines: list[str]) -> int:
    """The indentation of most of the text: a whole text may stand away from the edge."""
    counts: dict[int, int] = {}
    for line in lines:
        if line.strip():
            counts[_indent(line)] = counts.get(_indent(line), 0) + 1
    return max(counts, key=lambda indent: (counts[indent], -indent)) if counts else 0


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _below(lines: list[str], place: int, indent: int) -> int:
    """The first line after `place` that is neither blank nor indented deeper."""
    place += 1
    while place < len(lines) and (not lines[place].strip() or _indent(lines[place]) > indent):
        place += 1
    return place


def _paragraph(lines: list[str], margin: int) -> list[Block]:
    if any(_TABLE.match(line) for line in lines):
        return [GAP]
    ruled = [bool(_RULE.match(line)) for line in lines]
    if any(ruled):
        kept = [line for line, rule in zip(lines, ruled, strict=True) if not rule]
        if len(kept) == 1:
            return [Block("heading", inline(kept[0]))]
        # A title directly above its text.
        if len(lines) > 2 and ruled[1]:
            return [Block("heading", inline(lines[0])), *_paragraph(lines[2:], margin)]
        lines = kept
    if not lines or all(_FIELD.match(line) for line in lines):
        return []
    starts = [i for i, line in enumerate(lines) if _ITEM.match(line)]
    if starts and starts[0] == 0:
        edges = [*starts, len(lines)]
        return [
            Block("item", inline(_ITEM.sub("", "\n".join(lines[start:end]))))
            for start, end in itertools.pairwise(edges)
        ]
    if min(map(_indent, lines)) >= margin + 8:
        return [GAP]
    return [Block("text", _unwrapped(lines))]


def _unwrapped(lines: list[str]) -> str:
    lengths = [len(line.strip()) for line in lines[:-1]]
    if len(lengths) >= 2 and sum(lengths) / len(lengths) < _WRAPPED:
        return "\n".join(inline(line) for line in lines)
    return inline("\n".join(lines))


def inline(text: str) -> str:
    """The text on one line, without reStructuredText's marks for emphasis, code and links."""
    text = squeeze(text)
    if "`" in text or "*" in text or "_" in text or "\\" in text:
        for pattern, replacement in _INLINE:
            text = pattern.sub(replacement, text)
    return text[:-1] if text.endswith("::") else text
