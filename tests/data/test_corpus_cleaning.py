"""Each format to prose: what a reader reads is kept word for word, frame and code are not."""

import gzip
from collections import Counter

import pytest

from gsa.data.corpus.blocks import Block
from gsa.data.corpus.dictionaries import clean_entry, dictionary_documents
from gsa.data.corpus.documents import _file_documents
from gsa.data.corpus.duplicates import Seen
from gsa.data.corpus.html_text import html_blocks, html_language
from gsa.data.corpus.manual_pages import manual_blocks
from gsa.data.corpus.plain_text import text_blocks
from gsa.data.corpus.prose import is_prose, join, prose_blocks, tidy, why_not
from gsa.data.corpus.sources import File, kind_of, licences


def prose(blocks) -> str:
    return join(tidy(prose_blocks(blocks)))


HTML = """<!DOCTYPE html>
<html lang="en-GB"><head><title>Old &amp; new</title><style>p {color: red}</style></head>
<body class="with-sidebar">
<div class="related" role="navigation"><ul><li><a href="/">index</a><li><a>next</a></ul></div>
<div class="wy-nav-content"><div role="main">
<h1>Rivers &amp; roads<a class="headerlink" href="#x">&para;</a></h1>
<p>A river <em>carries</em> what a road
cannot, and it does so <code>for free</code>.
<p>It is said that the oldest of the roads follow the rivers:
<pre>def river(): return 1</pre>
<p>For example:</p>
<div class="highlight"><span>x = river()</span></div>
<ul><li>The first of them is in the north of the country
<li><a href="a">Another page about all the rivers of the north</a></ul>
<h2>Only a table</h2>
<table><tr><td>one</td><td>two of the many, it is said.</td></tr></table>
<h2>Last words</h2>
<dl><dt>ford</dt><dd>A place where a river can be crossed on foot.</dd></dl>
<p>&copy; 2001 by the rivers of the north. All rights reserved.</p>
</div></div>
<footer>Made with something that makes the pages of this site.</footer></body></html>"""


def test_html_keeps_the_text_and_drops_the_frame():
    assert prose(html_blocks(HTML.encode())) == "\n\n".join(
        [
            "Rivers & roads",
            "A river carries what a road cannot, and it does so for free.",
            "- The first of them is in the north of the country",
            "Last words",
            "ford",
            "A place where a river can be crossed on foot.",
        ]
    )


def test_html_in_other_encodings_and_languages():
    page = '<html LANG=de><meta charset="iso-8859-1"><p>caf\xe9'.encode("latin-1")
    assert html_blocks(page) == [Block("text", "café")]
    assert html_language(page) == "de"
    assert html_blocks("<p>café".encode()) == [Block("text", "café")]
    assert html_language(b"<html><p lang=de>") == ""


def test_html_that_is_never_closed():
    page = b"<div class=toc><p>menu</div><div><pre>code<div>more</pre><p>The end of it</b></i>"
    assert [block.text for block in html_blocks(page) if block.text] == ["The end of it"]


def test_a_table_that_lays_out_a_page_is_read():
    words = "it is said that the river of the north is the longest of them all " * 4
    page = f"<table><tr><td><p>{words}</p></td><td>menu of it</td></tr></table>"
    assert [b.text for b in html_blocks(page.encode()) if b.text] == [words.strip()]


RST = """\
==========
The Kernel
==========

:Author: Somebody

.. contents:: :local:

Locks
-----

The kernel has *many* locks, of which ``spin_lock`` is
the :ref:`oldest <locks>`; see `the list <http://x.org>`_ for all of
them::

    spin_lock(&lock);

    spin_unlock(&lock);

.. note::

   It is not allowed to sleep while one of them is held.

.. code-block:: c

   int i;

- The first of the rules is to hold a lock for as short
  a time as can be.
- The second of them is not to forget the first.

===== =====
Name  Value
===== =====
"""


def test_restructured_text():
    assert prose(text_blocks(RST.encode())) == "\n\n".join(
        [
            "The Kernel",
            "Locks",
            "It is not allowed to sleep while one of them is held.",
            "- The first of the rules is to hold a lock for as short a time as can be.",
            "- The second of them is not to forget the first.",
        ]
    )


def test_plain_text_is_unwrapped_and_verse_is_not():
    wrapped = "It was the best of times, it was the worst of times, it was the age of\nwisdom."
    verse = "The woods are lovely, dark and deep,\nBut I have promises to keep,\nAnd miles to go."
    for indent in ("", "    "):
        text = "\n".join(indent + line for line in f"{wrapped}\n\n{verse}".split("\n"))
        found = [block.text for block in text_blocks(text.encode())]
        assert found == [wrapped.replace("\n", " "), verse]


MANUAL = r"""'\" t
.\" a comment
.TH SLEEP 3 2020-01-01
.SH NAME
sleep \- sleep for a time
.SH SYNOPSIS
.nf
unsigned int sleep(unsigned int);
.fi
.SH DESCRIPTION
.BR sleep ()
causes the \fIcalling\fP thread to sleep until the
number of real\-time seconds specified in
.I seconds
has elapsed, or until a signal arrives.
.TP
.B EINTR
The call was interrupted by a signal that was not ignored.
.PP
It is used as in
.EX
sleep(1);
.EE
.SH SEE ALSO
Many of the other pages that are to be read.
"""


def test_manual_pages():
    assert prose(manual_blocks(MANUAL.encode()) or []) == "\n\n".join(
        [
            "Description",
            "sleep() causes the calling thread to sleep until the number of real-time seconds "
            "specified in seconds has elapsed, or until a signal arrives.",
            "EINTR",
            "The call was interrupted by a signal that was not ignored.",
        ]
    )
    assert manual_blocks(b".Dd today\n.Dt LS 1\n.Sh NAME\n") is None


ENTRY = r"""Anchoret \An"cho*ret\, Anchorite \An"cho*rite\, n. [F.
   anachor[`e]te, L. anachoreta; akin to {Anchor}.]
   One who renounces the world and secludes himself, usually for
   religious reasons; a hermit. [Written by some {anachoret}.]
   [1913 Webster]

         Our Savior did not choose a monastic life.  --Boyle.
   [1913 Webster] Anchoretic
"""
CLEAN = (
    "Anchoret, Anchorite, n. One who renounces the world and secludes himself, usually for "
    "religious reasons; a hermit. Our Savior did not choose a monastic life. — Boyle."
)


def digits(number: int) -> str:
    """A number as dictd writes it: base 64, most significant digit first."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    head = digits(number // 64) if number >= 64 else ""
    return head + alphabet[number % 64]


def test_dictionaries():
    assert clean_entry(ENTRY) == CLEAN
    short = "Zyme\n   A ferment.\n"
    head = "00-database-info\n   This dictionary was made by many people over a great many years.\n"
    data = (head + ENTRY * 60 + short).encode()
    size = len(ENTRY)
    places = [("00-database-info", 0, len(head))]
    places += [(f"anchoret{i}", len(head) + i * size, size) for i in range(60)]
    places += [("alias", len(head), size), ("zyme", len(head) + 60 * size, len(short))]
    index = "".join(f"{name}\t{digits(at)}\t{digits(long)}\n" for name, at, long in places)
    index += "not dictd's: 1 2\nnor\tthis:\tone\n"
    documents = list(dictionary_documents(data, index.encode()))
    texts = [[block.text for block in document] for document in documents]
    assert [len(document) for document in texts] == [49, 11]  # once each, aliases or not
    assert {text for document in texts for text in document} == {CLEAN}


def test_what_is_prose():
    assert is_prose("The pages of this book were written in the course of a year.")
    assert not is_prose("The pages of this book were written in the course of a year and")
    assert is_prose("The pages of this book were written in a year", is_item=True)
    assert not is_prose("if (page == NULL) { return the_book(); } // of the pages;")
    assert not is_prose("Die Seiten dieses Buches wurden im Laufe eines Jahres geschrieben.")
    assert not is_prose("Permission is granted to copy this document for any of the uses below.")
    assert not is_prose("0x00 0x01 0x02 0x03 0x04 of the 0x05 0x06 0x07.")


def test_a_lost_announcement_and_an_empty_section_go():
    text = "This is how the program is called by most of its users:"
    kept = Block("text", "The program is said to be one of the oldest.")
    blocks = [Block("heading", "Use"), Block("text", text), Block("gap"), kept]
    assert tidy(blocks) == [blocks[0], kept]
    assert tidy(blocks[:3]) == []
    assert tidy([Block("text", text), kept]) == [Block("text", text), kept]
    chapter, section = Block("heading", "One"), Block("heading", "Two")
    assert tidy([chapter, section, kept, section]) == [chapter, section, kept]


def test_why_a_document_is_left_out():
    assert why_not("The book of the year is in the house. " * 20) is None
    assert why_not("A short one.") == "short"
    assert why_not("Seiten dieses Buches wurden im Laufe eines Jahres " * 20) == "not English"
    assert why_not("\n\n".join(["Returns the size of the thing that is in it."] * 20)) == (
        "repetitive"
    )


def test_duplicates_exact_and_near():
    words = [f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(600)]
    blocks = [Block("text", " ".join(words[i : i + 50])) for i in range(0, 600, 50)]
    text = join(blocks)
    seen = Seen()
    assert seen.share(text) == 0
    assert len(seen.shingles(text)) > 30
    seen.add(blocks, text)
    assert seen.share(text) == 1
    assert seen.new_blocks([Block("text", blocks[3].text.upper() + "!")]) == []
    # One word in forty changed: no paragraph is the same, most shingles still are.
    edited = " ".join("other" if i % 40 == 7 else word for i, word in enumerate(words))
    assert seen.new_blocks([Block("text", edited)])
    assert 0.6 < seen.share(edited) < 1
    # A copy inside a larger text.
    assert 0.2 < seen.share(text + " new" * 20 + " ".join(reversed(words))) < 0.6
    short = Block("text", "See below.")
    assert seen.new_blocks([short, short]) == [short, short]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("usr/share/doc/x/index.html", "html"),
        ("usr/share/doc/x/index.html.en", "html"),
        ("usr/share/doc/x/index.html.fr", None),
        ("usr/share/doc/x/fr/index.html", None),
        ("usr/share/doc/x/_sources/index.rst.txt", None),
        ("usr/share/doc/x/genindex-A.html", None),
        ("usr/share/doc/x/guide.rst.gz", "text"),
        ("usr/share/doc/x/copyright", None),
        ("usr/share/man/man3/sleep.3.gz", "manual"),
        ("usr/share/man/de/man3/sleep.3.gz", None),
        ("usr/share/dictd/gcide.dict.dz", "dictionary"),
        ("usr/share/dictd/gcide.index", "index"),
        ("usr/bin/x", None),
    ],
)
def test_which_files_are_read(path, kind):
    assert kind_of(path) == kind


def test_licences_and_binary_text():
    free = b"It is under the GPL, see /usr/share/common-licenses/GPL-2.\nLicense: as above\n"
    assert licences(free) == {"GPL-2"}
    assert licences(b"Format: x\nLicense: CC-BY-SA-3.0\n Text\n") == {"CC-BY-SA-3.0"}
    dropped: Counter[str] = Counter()
    assert list(_file_documents(File("a.txt", "text", gzip.compress(b"a")), dropped)) == []
    broken = File("a.html", "html", b"<p>text<![unknown[ x ]]>")
    assert list(_file_documents(broken, dropped)) == []
    assert dropped == {"not text": 1, "broken HTML": 1}
