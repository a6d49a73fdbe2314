"""A corpus of English prose out of Debian packages, folders and books: `gsa data corpus`.

sources → blocks (html_text, plain_text, manual_pages, dictionaries) → prose → duplicates → jsonl
"""

from gsa.data.corpus.builder import CorpusConfig, build_corpus

__all__ = ["CorpusConfig", "build_corpus"]
