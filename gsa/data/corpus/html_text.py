"""HTML to blocks, by the standard library's parser: what a reader reads, without the frame."""

import re
from html.parser import HTMLParser

from gsa.data.corpus.blocks import GAP, Block, decode, squeeze

# Elements whose text is not the document's prose. Those of the second set leave a gap.
_SKIPPED = {"script", "style", "head", "nav", "footer", "form", "select", "button", "noscript"}
_SKIPPED |= {"template", "iframe", "object", "textarea", "address", "title", "aside", "del"}
_CODE = {"pre", "svg", "math", "xmp", "listing", "figure"}
_VOID = {"br", "hr", "img", "meta", "link", "input", "col", "area", "base", "wbr", "embed", "param"}
# Their end tags are optional in HTML, so they are borders, never containers.
_LOOSE = {"p", "li", "dd", "dt", "tr", "td", "th", "thead", "tbody", "option", "colgroup"}
_BLOCKS = _LOOSE | {"div", "ul", "ol", "dl", "blockquote", "section", "article", "main", "table"}
_BLOCKS |= {"header", "body", "html", "hr", "center", "details", "summary", "caption", "h1", "h2"}
_BLOCKS |= {"h3", "h4", "h5", "h6", "fieldset", "pre", "figure", "figcaption", "nav", "footer"}
_HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6"}

# A class, id or role with one of these words marks navigation, code, signatures or small print.
_FRAME = re.compile(
    r"(?:^|[\s_-])(?:nav\w*|sphinxsidebar\w*|sidebar|related|toc|toctree\w*|contents|menu\w*|"
    r"breadcrumbs?|footer|pagination|headerlink|search\w*|copyright|legalnotice|revhistory|"
    r"skip|banner|contentinfo|langs?|localtoc|indextable|fn-backref|refsynopsisdiv|"
    r"footnote-reference|sig|synopsis|anchor|permalink|versionset|tocset|maincolumn-nav|"
    r"docattribute|out-of-band|src|srclink|since|classifier|portability)(?:$|[\s_-])"
)
# Themes that call the frame of the text itself after its navigation.
_CONTENT = re.compile(r"\bwy-nav-content|\bwy-grid-for-nav|\bmain\b|\barticle\b|\bbody\b")
_SOURCE = re.compile(
    r"(?:^|[\s_-])(?:highlight\w*|programlisting|screen|listing\w*|code-block|literal-block|"
    r"verbatim|example-wrap|memproto|fragment|math|mathjax|displaymath|svertical|scheme\w*|"
    r"specgrammar|grammar\w*|productionlist|rktblk|rktinputleft|docutils-table)(?:$|[\s_-])"
)
_CELL_WORDS = 40  # a cell this long is laid-out prose, not data
_LINKS = 0.6  # a paragraph with a larger share of link text is a menu
_CHARSET = re.compile(rb"""charset\s*=\s*["']?([\w-]+)""", re.IGNORECASE)
_LANGUAGE = re.compile(rb"""<html[^>]*?\slang\s*=\s*["']?([a-zA-Z]+)""", re.IGNORECASE)


class _Reader(HTMLParser):
    """Collects blocks; `_open` holds the containers around the place, and which are left out."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self._open: list[tuple[str, bool]] = []
        self._skipping = 0
        self._tables = 0
        self._text: list[str] = []
        self._link_characters = 0
        self._in_link = False
        self._kind = "text"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _BLOCKS:
            self._flush()
            self._kind = "heading" if tag in _HEADINGS else "item" if tag == "li" else self._kind
            if tag == "dt":
                self._kind = "heading"
            elif tag == "dd" or (tag not in _HEADINGS and self._kind == "heading"):
                self._kind = "text"
        elif tag == "br":
            self._text.append("\n")
        if tag in _VOID:
            return
        if tag == "a":
            self._in_link = any(name == "href" for name, _ in attrs)
        skipped = self._is_skipped(tag, attrs)
        if tag in _LOOSE and not skipped:
            return
        self._open.append((tag, skipped))
        self._skipping += skipped
        self._tables += tag == "table"

    def _is_skipped(self, tag: str, attrs: list[tuple[str, str | None]]) -> bool:
        if tag in _SKIPPED:
            return True
        if tag in _CODE:
            self._gap()
            return True
        if tag in ("body", "html", "main", "article"):
            return False
        for name, value in attrs:
            if value and name in ("class", "id", "role"):
                words = value.lower()
                if _CONTENT.search(words) and tag in ("div", "section"):
                    return False
                if name != "id" and _SOURCE.search(words):
                    self._gap()
                    return tag not in ("code", "span", "tt", "table")
                # An id often names a section after its title ("contents"): trust the usual ones.
                frame = _FRAME.search(words)
                if frame and (name != "id" or tag in ("div", "ul", "table", "span")):
                    return tag not in ("p", "section") or name == "class"
        return False

    def handle_endtag(self, tag: str) -> None:
        if tag in _BLOCKS:
            self._flush()
            if tag in _HEADINGS or tag in ("li", "dd", "dt", "ul", "ol", "dl"):
                self._kind = "text"
        if tag == "a":
            self._in_link = False
        place = len(self._open) - 1
        while place >= 0 and self._open[place][0] != tag:
            place -= 1
        if place < 0:
            return
        for name, skipped in self._open[place:]:
            self._skipping -= skipped
            self._tables -= name == "table"
        del self._open[place:]

    def handle_data(self, data: str) -> None:
        if self._skipping:
            return
        self._text.append(data)
        if self._in_link:
            self._link_characters += len(data.strip())

    def _gap(self) -> None:
        if not self._skipping:
            self._flush()
            self.blocks.append(GAP)

    def _flush(self) -> None:
        text, links = squeeze("".join(self._text)), self._link_characters
        self._text.clear()
        self._link_characters = 0
        if not text or self._skipping:
            return
        if self._tables and len(text.split()) < _CELL_WORDS:
            self.blocks.append(GAP)
        elif self._kind == "heading":
            self.blocks.append(Block("heading", text.strip("¶#§ ")))
        elif links > _LINKS * len(text):
            self.blocks.append(GAP)
        else:
            self.blocks.append(Block("item" if self._kind == "item" else "text", text))

    def close(self) -> None:
        super().close()
        self._flush()


def html_language(data: bytes) -> str:
    """The language that <html lang> states, in lower case; "" if none is stated."""
    found = _LANGUAGE.search(data, 0, 4096)
    return found[1].decode().lower() if found else ""


def html_blocks(data: bytes) -> list[Block]:
    """The headings, paragraphs and list items of a page."""
    declared = _CHARSET.search(data, 0, 4096)
    reader = _Reader()
    reader.feed(decode(data, declared[1].decode() if declared else ""))
    reader.close()
    return reader.blocks
