"""Manual pages (the man macros of roff) to blocks: the sections that are prose."""

import re

from gsa.data.corpus.blocks import GAP, Block, decode, squeeze

_LEFT_OUT = {"SYNOPSIS", "SEE ALSO", "COLOPHON", "AUTHOR", "AUTHORS", "COPYRIGHT", "NAME"}
_LEFT_OUT |= {"LICENSE", "AVAILABILITY", "HISTORY", "ATTRIBUTES", "LIBRARY", "REPORTING BUGS"}
_LEFT_OUT |= {"COPYRIGHT AND LICENSE", "AUTHORS AND COPYRIGHT", "VERSION", "ACKNOWLEDGMENTS"}
_DISPLAYS = {"nf": "fi", "EX": "EE", "TS": "TE", "Vb": "Ve", "EQ": "EN", "de": ".", "ig": "."}
_DISPLAYS |= {"ie": "", "el": "", "if": "", "de1": "."}
_FONTS = {"B", "I", "R", "BR", "RB", "IR", "RI", "BI", "IB", "SM", "SB"}
_BREAKS = {"PP", "P", "LP", "HP", "RS", "RE", "sp", "br", "in"}
_ESCAPES = (
    (re.compile(r"\\\".*"), ""),
    (re.compile(r"\\f(?:\(..|\[[^\]]*\]|.)"), ""),
    (re.compile(r"\\s[-+]?\d"), ""),
    (re.compile(r"\\\*\(?[LR]\"|\\\(?[lr]q|\\\[[lr]q\]|\\\*\(C['`]"), '"'),
    (re.compile(r"\\\(aq|\\\[aq\]|\\\(cq|\\\[cq\]|\\\(oq|\\\[oq\]"), "'"),
    (re.compile(r"\\\(em|\\\[em\]|\\\*\(--"), "—"),
    (re.compile(r"\\\(en|\\\[en\]"), "–"),
    (re.compile(r"\\\(bu|\\\[bu\]"), ""),
    (re.compile(r"\\\(ha|\\\[ha\]"), "^"),
    (re.compile(r"\\\(ti|\\\[ti\]"), "~"),
    (re.compile(r"\\\(rs|\\\[rs\]|\\e"), r"\\"),
    (re.compile(r"\\\*\(..|\\\*\[[^\]]*\]|\\\*.|\\\(..|\\\[[^\]]*\]"), ""),
    (re.compile(r"\\[ ~0]"), " "),
    (re.compile(r"\\[&|^:%/,c]"), ""),
    (re.compile(r"\\([-'`])"), r"\1"),
)
_ARGUMENT = re.compile(r'"([^"]*)"|(\S+)')


def manual_blocks(data: bytes) -> list[Block] | None:
    """The blocks of a manual page; None if it does not use the man macros."""
    text = decode(data)
    if not re.search(r"^\.\s*TH\s", text, re.MULTILINE):
        return None
    return _Page().read(text.splitlines())


class _Page:
    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.text: list[str] = []
        self.wanted = True
        self.is_tag = False

    def read(self, lines: list[str]) -> list[Block]:
        until = None
        for line in lines:
            macro, _, rest = line[1:].strip().partition(" ") if line[:1] in ".'" else ("", "", line)
            if until is not None:
                if macro == until or (until == "." and line.startswith("..")):
                    until = None
            elif line.startswith(("." + '\\"', "'" + '\\"', '\\"')):
                continue
            elif macro in _DISPLAYS:
                self.flush()
                self.blocks += [GAP] if self.wanted else []
                until = _DISPLAYS[macro] or None
            elif macro in ("SH", "SS"):
                self.heading(macro, rest)
            elif macro in ("TP", "IP", "TQ"):
                self.flush()
                self.is_tag = macro != "IP"
            elif macro in _BREAKS or not line.strip():
                self.flush()
            elif macro in _FONTS or not macro:
                self.words(macro, rest)
        self.flush()
        return self.blocks

    def heading(self, macro: str, rest: str) -> None:
        self.flush()
        title = squeeze(_plain(rest.replace('"', "")))
        if macro == "SH":
            self.wanted = title.upper() not in _LEFT_OUT
        if self.wanted:
            self.blocks.append(Block("heading", title.capitalize() if title.isupper() else title))

    def words(self, macro: str, rest: str) -> None:
        if len(macro) == 2 and macro not in ("SM", "SB"):
            rest = "".join(quoted or bare for quoted, bare in _ARGUMENT.findall(rest))
        elif macro:
            rest = rest.replace('"', "")
        self.text.append(_plain(rest))
        if self.is_tag:  # the line after .TP names what the paragraph explains
            self.is_tag = False
            self.flush("heading")

    def flush(self, kind: str = "text") -> None:
        text = squeeze(" ".join(self.text))
        self.text.clear()
        if text and self.wanted:
            self.blocks.append(Block("heading" if kind == "heading" else "text", text))


def _plain(text: str) -> str:
    if "\\" in text:
        for pattern, replacement in _ESCAPES:
            text = pattern.sub(replacement, text)
    return text
