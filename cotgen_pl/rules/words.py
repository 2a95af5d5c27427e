"""When two texts say the same: what leaks are told by, and answers to questions judged by."""

from __future__ import annotations

import unicodedata

ARTICLES = frozenset(("a", "an", "the"))


def plain_text(text: str) -> str:
    """A text in lower case, without punctuation, its words one blank apart.

    Compatibility forms are one (NFKC), case is folded, and each character of a Unicode category of
    punctuation (P) is a blank. A text of nothing else keeps it: "?" and "!" stay two.

    >>> plain_text(' A  "Red" cube, left of it.')
    'a red cube left of it'
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    marks = {ord(one): " " for one in set(folded) if unicodedata.category(one).startswith("P")}
    return " ".join(folded.translate(marks).split()) or " ".join(folded.split())


def plain_words(text: str) -> tuple[str, ...]:
    """The words of a `plain_text` but for articles; all of them where there are only articles.

    >>> plain_words("The boy, on the left of a dog.")
    ('boy', 'on', 'left', 'of', 'dog')
    """
    words = tuple(plain_text(text).split())
    return tuple(word for word in words if word not in ARTICLES) or words
